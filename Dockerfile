# swamla for a GPU machine. Untested: where it was written no image could be built.
#
#   docker build -t swamla .
#   mkdir -p runs
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD/runs:/training/runs" swamla \
#       train small --data /training/runs/text.txt
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD/runs:/training/runs" --entrypoint torchrun \
#       swamla --nproc_per_node 8 -m swamla train small --parallel fsdp
#
# --ipc host: NCCL exchanges through shared memory, of which a container has 64 MB otherwise. --user: what is written to
# runs/ belongs to you; without it the container is the user swamla (1000), to whom your runs/ has to be open.
FROM python:3.12-slim

# gcc for triton, which compiles its launchers; PyPI's torch brings CUDA's libraries with it
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/swamla
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt '.[hub,tracking,gpu]'

# Triton, torch and the hub's library keep their caches at home, which is open to every user as --user may name any;
# torch asks for a name, which a user of no entry in /etc/passwd has only from USER.
RUN useradd --uid 1000 --create-home swamla && mkdir -p /training/runs && chmod 1777 /home/swamla /training /training/runs
USER swamla
WORKDIR /training
ENV HOME=/home/swamla USER=swamla SWAMLA_CACHE=/training/runs/cache
ENTRYPOINT ["swamla"]
CMD ["--help"]

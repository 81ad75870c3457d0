# swamla for a GPU machine. Untested: where it was written no image could be built.
#
#   docker build -t swamla .
#   docker run --gpus all --ipc host -v "$PWD/runs:/training/runs" swamla train small --data /training/runs/text.txt
#   docker run --gpus all --ipc host -v "$PWD/runs:/training/runs" --entrypoint torchrun swamla \
#       --nproc_per_node 8 -m swamla train small --parallel fsdp
#
# --ipc host: NCCL exchanges through shared memory, of which a container has 64 MB otherwise.
FROM python:3.12-slim

# gcc for triton, which compiles its launchers; PyPI's torch brings CUDA's libraries with it
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/swamla
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt '.[hub,tracking]'
WORKDIR /training
ENV SWAMLA_CACHE=/training/runs/cache
ENTRYPOINT ["swamla"]
CMD ["--help"]

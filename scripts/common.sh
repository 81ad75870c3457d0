# What the launchers share; sourced by them. The caller has set `here` to this folder.

usage() {
    echo "usage: $1" >&2
    exit 2
}

# split_arguments …: sets the array `arguments` to what stands before --, and `flags` to what stands behind it.
split_arguments() {
    arguments=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        arguments+=("$1")
        shift
    done
    [ $# -eq 0 ] || shift
    flags=("$@")
}

is_number() {
    case $1 in
        '' | *[!0-9]* | 0*) return 1 ;;
    esac
}

# The interpreter: $PYTHON, else the checkout's environment, else what is on the path.
choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
    elif [ -x "$here/../.venv/bin/python" ]; then
        python=$here/../.venv/bin/python
    else
        python=python3
    fi
}

# resume_flags RESUME OUT: sets the array `where`, which says where the run is and whether it goes on.
resume_flags() {
    case $1 in
        false | '') where=(--output_dir "$2") ;;
        true) where=(--resume --output_dir "$2") ;;
        *) where=(--resume "$1") ;;
    esac
}

# choose_launch BATCH: one process for each GPU, under torchrun where there are several. Sets the array `launch`, and
# `rows`, those of a step: BATCH for every process. GPUS says how many, by default all that there are.
choose_launch() {
    local processes=${GPUS:-}
    if [ -z "$processes" ] && command -v nvidia-smi > /dev/null; then
        processes=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || processes=1
    fi
    if is_number "${processes:-1}" && [ "${processes:-1}" -gt 1 ]; then
        launch=("$python" -m torch.distributed.run --standalone --nproc_per_node "$processes")
        rows=$(($1 * processes))
        echo "$processes processes, $1 rows each" >&2
    else
        launch=("$python")
        rows=$1
    fi
}

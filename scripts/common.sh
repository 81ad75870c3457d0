# What the launchers share; sourced by them. The caller has set `here` to this folder.
# shellcheck shell=bash disable=SC2034  # functions set variables that the caller reads

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

# The interpreter: $PYTHON, else that of the environment $VENV, by default the checkout's, else what is on the path. A
# python that has no torch is refused here: it would fail later, as a bug of swamla's.
choose_python() {
    local venv=${VENV:-$here/../.venv}
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
    elif [ -x "$venv/bin/python" ]; then
        python=$venv/bin/python
    elif [ -n "${VENV:-}" ]; then
        echo "VENV=$VENV: no bin/python in it" >&2 && exit 2
    elif python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2> /dev/null; then
        python=python3
    else
        echo "no environment $venv, and no torch for python3: pip install swamla there, or set VENV to another" >&2
        exit 2
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

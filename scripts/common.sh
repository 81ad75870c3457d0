# What the launchers share; sourced by them. The caller has set `here` to this folder.

usage() {
    echo "usage: $1" >&2
    exit 2
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

# One process drives one device today, however many there are.
say_devices() {
    local found=0
    if command -v nvidia-smi > /dev/null; then
        found=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || found=0
    fi
    if [ "$found" -gt 1 ]; then
        echo "$found GPUs found, one is used: training on several is not there yet" >&2
    fi
}

#!/usr/bin/env bash
# Train a preset: sliding windows beneath latent attention.
#
#   scripts/train_swa_mla.sh SIZE BATCH BLOCK [OUT RESUME OPTIMIZER] [-- FLAGS …]
#
# SIZE       a recipe: small, medium, large …
# BATCH      rows of a step for each process, BLOCK tokens each
# OUT        the run's folder (default runs/swa-mla-SIZE)
# RESUME     false (default), true to go on in OUT, or the folder of the run to go on with
# OPTIMIZER  adamw (default), lion, muon, fp8_adamw or fp8_lion
#
# What stands behind -- is handed to train.py as it is. VENV names the environment (default .venv of the checkout), or
# PYTHON the interpreter; GPUS how many processes to start, by default one for each GPU.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"
call='train_swa_mla.sh SIZE BATCH BLOCK [OUT RESUME OPTIMIZER] [-- FLAGS …]'

split_arguments "$@"
{ [ ${#arguments[@]} -ge 3 ] && [ ${#arguments[@]} -le 6 ]; } || usage "$call"

size=${arguments[0]} batch=${arguments[1]} block=${arguments[2]}
out=${arguments[3]:-runs/swa-mla-$size} resume=${arguments[4]:-false} optimizer=${arguments[5]:-adamw}
{ is_number "$batch" && is_number "$block"; } || usage "$call"

choose_python
choose_launch "$batch"
resume_flags "$resume" "$out"
exec "${launch[@]}" "$here/../train.py" --size "$size" --batch_size "$rows" --block_size "$block" "${where[@]}" \
    --optimizer_type "$optimizer" "${flags[@]}"

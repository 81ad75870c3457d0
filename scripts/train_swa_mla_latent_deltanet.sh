#!/usr/bin/env bash
# Train moe-2b with gated DeltaNet for its local layers: experts behind a down-projection, the delta rule's projections
# through latents.
#
#   scripts/train_swa_mla_latent_deltanet.sh BATCH BLOCK [OUT RESUME OPTIMIZER HF_REPO] [-- FLAGS …]
#
# BATCH      rows of a step for each process, BLOCK tokens each
# OUT        the run's folder (default runs/latent-deltanet)
# RESUME     false (default), true to go on in OUT, or the folder of the run to go on with
# OPTIMIZER  adamw (default), lion, muon, fp8_adamw or fp8_lion
# HF_REPO    where on the Hugging Face Hub to push the best checkpoints; needs HF_TOKEN
#
# From the environment, with their defaults:
#   LATENT_RATIO=4           how many times narrower than the model the experts work
#   N_EXPERTS=32             experts, and
#   N_ACTIVATED=3            those a token goes to, both before the ratio multiplies them
#   DELTANET_LATENT_DIM=256  width of the latents, 0 for none
#   DELTANET_SHARE_QK=true   whether queries serve as keys
#   MLA_Q_LORA_RANK=256      latent of the latent attention's queries, 0 for none
#
# What stands behind -- is handed to train.py as it is. VENV names the environment (default .venv of the checkout), or
# PYTHON the interpreter; GPUS how many processes to start, by default one for each GPU.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"
call='train_swa_mla_latent_deltanet.sh BATCH BLOCK [OUT RESUME OPTIMIZER HF_REPO] [-- FLAGS …]'

split_arguments "$@"
{ [ ${#arguments[@]} -ge 2 ] && [ ${#arguments[@]} -le 6 ]; } || usage "$call"

batch=${arguments[0]} block=${arguments[1]}
out=${arguments[2]:-runs/latent-deltanet} resume=${arguments[3]:-false} optimizer=${arguments[4]:-adamw}
repository=${arguments[5]:-}
{ is_number "$batch" && is_number "$block"; } || usage "$call"

model=(
    --use_gated_deltanet
    --deltanet_latent_dim "${DELTANET_LATENT_DIM:-256}"
    --use_moe --use_latent_moe
    --latent_ratio "${LATENT_RATIO:-4}"
    --n_experts "${N_EXPERTS:-32}"
    --n_activated "${N_ACTIVATED:-3}"
    --mla_q_lora_rank "${MLA_Q_LORA_RANK:-256}"
)
case ${DELTANET_SHARE_QK:-true} in
    true) model+=(--deltanet_share_qk) ;;
    false) model+=(--no_deltanet_share_qk) ;;
    *) echo "DELTANET_SHARE_QK=$DELTANET_SHARE_QK: must be true or false" >&2 && exit 2 ;;
esac
if [ -n "$repository" ]; then
    model+=(--hf_repo_id "$repository")
fi

choose_python
choose_launch "$batch"
resume_flags "$resume" "$out"
exec "${launch[@]}" "$here/../train.py" --size moe-2b --batch_size "$rows" --block_size "$block" "${where[@]}" \
    "${model[@]}" --optimizer_type "$optimizer" "${flags[@]}"

#!/usr/bin/env bash
# Latent compression factors: experiments/emoji_compression/run.sh DATA OUT
# DATA is a checkout of EmojiTwo. OUT may be the output folder of emoji_ldm, whose runs are then reused. The last line
# holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../emoji_ldm/begin.sh"

two=(hydra/launcher=joblib hydra.launcher.n_jobs=2) # two points at a time, one core each
export OMP_NUM_THREADS=1
"$mmlab" train -m experiment=emoji/first_stage model/first_stage=kl_f2_tiny,kl_f8_tiny sweep.metric=val/psnr \
    sweep.direction=maximize "${two[@]}"
for f in 2 8; do
    score first_stage-kl_f${f}_tiny
    encode first_stage-kl_f${f}_tiny latents_f$f
done
"$mmlab" train -m experiment=emoji/compression_f1,emoji/compression_f2,emoji/compression_f4,emoji/compression_f8 \
    sweep.metric=val/fid run.sweep=emoji_compression "${two[@]}"

"$python" "$here/figures.py" . $((SECONDS - start))

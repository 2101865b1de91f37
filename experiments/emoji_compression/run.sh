#!/usr/bin/env bash
# How far to compress before diffusion: experiments/emoji_compression/run.sh DATA OUT
# DATA is a checkout of EmojiTwo; OUT may be that of emoji_ldm, whose runs are then not trained again. The last line is
# one JSON object of figures.
set -euo pipefail
source "$(dirname "$0")/../emoji_ldm/begin.sh"

two=(hydra/launcher=joblib hydra.launcher.n_jobs=2) # points at a time, on one core each
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

#!/usr/bin/env bash
# Emoji with VQGAN and a transformer prior, from raw files to samples:
#   experiments/emoji_vqgan/run.sh DATA OUT
# DATA is a checkout of EmojiTwo. OUT may be the output folder of emoji_ldm, whose runs are then reused. The last line
# holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../emoji_ldm/begin.sh"

train vqgan
score vqgan
encode vqgan codes
"$python" "$here/speed.py" data/emoji/train data/emoji/codes/train > speed.json
train prior
score prior samples=540 candidates=4
"$mmlab" sample run=emoji/prior count=54 guidance=2 out=samples/prior # clearer and less varied than the scored samples
"$mmlab" sample run=emoji/prior label=people count=16 guidance=2 out=samples/prior_people # its strip is a figure
"$mmlab" sample run=emoji/prior label=flags size=64 count=8 guidance=2 out=samples/prior_large # sliding window
"$mmlab" export run=emoji/prior to=diffusers out=exported/prior

"$python" "$here/figures.py" . $((SECONDS - start))

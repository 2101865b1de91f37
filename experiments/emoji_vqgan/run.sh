#!/usr/bin/env bash
# Emoji as codes, from raw files to samples: experiments/emoji_vqgan/run.sh DATA OUT
# DATA is a checkout of EmojiTwo; OUT may be that of emoji_ldm, whose runs are then not trained again. The last line is
# one JSON object of figures.
set -euo pipefail
source "$(dirname "$0")/../emoji_ldm/begin.sh"

train vqgan
score vqgan
encode vqgan codes
"$python" "$here/speed.py" data/emoji/train data/emoji/codes/train > speed.json
train prior
score prior samples=540 candidates=4
"$mmlab" sample run=emoji/prior count=54 guidance=2 out=samples/prior # less varied than what is scored, and clearer
"$mmlab" sample run=emoji/prior class=people count=16 guidance=2 out=samples/prior_people # its strip is shown
"$mmlab" sample run=emoji/prior class=flags size=64 count=8 guidance=2 out=samples/prior_large # a window slides
"$mmlab" export run=emoji/prior to=diffusers out=exported/prior

"$python" "$here/figures.py" . $((SECONDS - start))

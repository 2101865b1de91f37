#!/usr/bin/env bash
# Emoji from raw files to samples: experiments/emoji_ldm/run.sh DATA OUT
# DATA is a checkout of EmojiTwo (emoji.json, png/64); everything is written below OUT. The last line is one JSON object
# of figures.
set -euo pipefail
start=$SECONDS
source "$(dirname "$0")/begin.sh"

train class text
for recipe in class text; do
    score $recipe samples=540
done
for name in nature people flags; do
    "$mmlab" sample run=emoji/class class=$name count=16 out=samples/$name
done
"$mmlab" sample run=emoji/text "prompt='red heart, love'" count=16 out=samples/red_heart

"$python" "$emoji/figures.py" eval $((SECONDS - start))

#!/usr/bin/env bash
# Emoji, from raw files to samples: experiments/emoji_ldm/run.sh DATA OUT
# DATA is a checkout of EmojiTwo (emoji.json, png/64); all output goes to OUT. The last line holds the results as one
# JSON object.
set -euo pipefail
source "$(dirname "$0")/begin.sh"

train class text
for recipe in class text; do
    score $recipe samples=540
done
"$mmlab" sample run=emoji/class count=54 out=samples/classes
"$mmlab" sample run=emoji/class label=people count=16 out=samples/people # its denoising strip is a figure
# Names of training images; the sheet in eval/text has held-out ones.
names="'grinning face, happy, smiley, emotion','panda face, wildlife, roar, animal','penguin, wildlife, animal'"
names+=",'honeybee, insects, animal','strawberry, fruit, food','watermelon, fruit, food','pineapple, fruit, food, tropical'"
names+=",'hamburger, america, food','tulip, nature, flower, plant','cactus, nature, plant, trees'"
names+=",'christmas tree, plant, holidays, trees','rocket, transportation, object, space','bus, transportation, office'"
names+=",'umbrella, weather, object, sky','key, object, lock','soccer ball, game, sport, football','blue heart, love, symbol'"
names+=",'flag of turkey, country'"
"$mmlab" sample run=emoji/text "prompt=[$names]" count=36 out=samples/names

"$python" "$emoji/figures.py" eval $((SECONDS - start))

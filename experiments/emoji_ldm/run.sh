#!/usr/bin/env bash
# Emoji from raw files to samples: experiments/emoji_ldm/run.sh DATA OUT
# DATA is a checkout of EmojiTwo (emoji.json, png/64); everything is written below OUT. The last line is one JSON object
# of figures.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 DATA OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$1" && pwd)
mkdir -p "$2" && cd "$2"
bin=$here/../../.venv/bin
mmlab=$([ -x "$bin/mmlab" ] && echo "$bin/mmlab" || command -v mmlab)
python=$([ -x "$bin/python" ] && echo "$bin/python" || command -v python3)
start=$SECONDS

"$python" "$here/prepare.py" "$data" tables
for split in train val; do
    "$mmlab" shards build captions "$data/png/64" data/emoji/$split --captions tables/$split.jsonl --overwrite
    "$mmlab" shards show data/emoji/$split --out $split.png -n 60 --columns 10
done
"$mmlab" shards tokenizer data/emoji/train --out data/emoji/tokenizer

score() { # score RUN …: compare with held-out pictures, and with the training pictures
    "$mmlab" eval run=emoji/$1 data.path=data/emoji/val data.train_from=data/emoji/train features=emoji/features \
        out=eval/$1 "${@:2}"
}
"$mmlab" train experiment=emoji/features
"$mmlab" train experiment=emoji/first_stage
score first_stage
for split in train val; do
    "$mmlab" shards encode emoji/first_stage data/emoji/$split data/emoji/latents/$split --flip --overwrite
done
for recipe in class text; do
    "$mmlab" train experiment=emoji/$recipe
    score $recipe samples=540
done
for name in nature people flags; do
    "$mmlab" sample run=emoji/class class=$name count=16 out=samples/$name
done
"$mmlab" sample run=emoji/text "prompt='red heart, love'" count=16 out=samples/red_heart

"$python" "$here/figures.py" eval $((SECONDS - start))

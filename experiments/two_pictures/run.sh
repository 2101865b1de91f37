#!/usr/bin/env bash
# Two pictures in one question, and pictures of any shape: experiments/two_pictures/run.sh DATA OUT
# The pictures are drawn; DATA is not read. All output goes to OUT. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"

"$python" "$here/prepare.py" data
"$mmlab" shards tokenizer data/pairs/train --out data/pairs/tokenizer
train() { # train RECIPE …
    "$mmlab" train "experiment=two_pictures/$1" --config-dir "$here/conf" "${@:2}"
}
ask() { # ask RUN DATA …: answers in eval/RUN
    "$mmlab" eval "run=$1" "data.path=data/$2/test" "out=eval/$1" batch_size=120 max_new_tokens=8 "${@:3}"
}

train cells
train answers
ask two_pictures-answers pairs
"$python" "$here/hide.py" two_pictures-answers data/pairs/test > hidden.json

train scenes run.name=pad data.aspect=pad
train scenes run.name=anyres data.aspect=anyres 'data.grids=[[1,2],[2,1]]' model=llava_next \
    'stage.trainable=[vision,connector,language,newline]'
ask pad scenes
ask anyres scenes

rm -rf export
for run in two_pictures-answers anyres; do
    data=data/$([ $run = anyres ] && echo scenes || echo pairs)/test
    "$mmlab" export run=$run to=transformers out=export/$run
    "$python" -I "$here/without_mmlab.py" export/$run $data eval/$run/predictions.jsonl > eval/$run/exported.json
done

"$python" "$here/figures.py"

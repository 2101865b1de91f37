#!/usr/bin/env bash
# easy-VQA, from raw files to answers: experiments/easy_vqa/run.sh DATA OUT
# DATA holds easy_vqa/data; all output goes to OUT. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"

"$mmlab" shards build easy_vqa "$data" data/easy_vqa/train --overwrite
"$mmlab" shards build easy_vqa "$data" data/easy_vqa/test --split test --overwrite
"$mmlab" shards tokenizer data/easy_vqa/train --out data/easy_vqa/tokenizer

for recipe in vision language language_places align finetune no_align; do
    "$mmlab" train experiment=easy_vqa/$recipe
done

ask() { # ask RUN …: answer the test questions
    "$mmlab" eval run=easy_vqa/$1 data.path=data/easy_vqa/test out=eval/$1 batch_size=256 max_new_tokens=8 "${@:2}"
}
ask finetune data.train_from=data/easy_vqa/train
ask align template=v1 'types=[color,shape]'
ask no_align

"$python" "$here/figures.py" eval $((SECONDS - start))

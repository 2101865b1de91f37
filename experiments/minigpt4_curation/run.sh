#!/usr/bin/env bash
# MiniGPT-4 at small scale, with its curation: experiments/minigpt4_curation/run.sh DATA OUT
# DATA holds easy-VQA (data/train, data/test); all output goes to OUT. The last line holds the results as one JSON
# object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
shards=data/easy_vqa

"$mmlab" shards build easy_vqa "$data" $shards/train --overwrite
"$mmlab" shards build easy_vqa "$data" $shards/test --split test --overwrite
"$python" "$here/texts.py" $shards/train $shards/web $shards/books
"$mmlab" shards tokenizer $shards/train $shards/web $shards/books --out $shards/tokenizer \
    --text "###Human: <Img></Img> ###Assistant:"

# Pretrain the parts that stay frozen. The language model learns web-style captions, then dialogues, then web-style
# captions again, so that it can produce both, like a model pretrained on web text.
train() { # train RECIPE NAME …
    "$mmlab" train experiment=minigpt4/$1 data=easy_vqa run.name=$2 "${@:3}"
}
web='data.train=[{path: web}]'
"$mmlab" train experiment=easy_vqa/vision
train captions_tiny captions "$web"
train language_tiny dialogues 'data.train=[{path: books}]' stage.prompt.turns=conversations \
    'stage.init_from=[captions]' trainer.max_steps=400
train captions_tiny language "$web" 'stage.init_from=[dialogues]' trainer.max_steps=40 optim.lr=3e-4
train qformer_tiny qformer model/vision=siglip_tiny 'stage.init_from=[easy_vqa/vision]'
# Train the linear layer on web-style captions.
frozen=easy_vqa/vision,language,qformer
train stage1_tiny stage1 model/vision=siglip_tiny "$web" "stage.init_from=[$frozen]" optim.lr=5e-3

describe() { # describe RUN: describe the held-out images with the prompts of stage 2
    "$mmlab" eval run=$1 template=minigpt4 data.path=$shards/test out=eval/$1 batch_size=100 max_new_tokens=96
}
describe stage1

# Describe, continue, repair, filter;
rm -f endpoint.url review.txt
"$python" "$here/endpoint.py" endpoint.url & endpoint=$!
trap 'kill $endpoint ${review:-} 2>/dev/null || true' EXIT
until [ -s endpoint.url ]; do kill -0 $endpoint; sleep 0.2; done
curate() {
    "$mmlab" curate minigpt4 run=stage1 template=minigpt4 data.path=$shards/train out=curated samples=1200 \
        batch_size=100 max_new_tokens=96 llm.model=scripted llm.url="$(cat endpoint.url)" llm.variable=null
}
curate
# then review and write shards.
"$mmlab" curate review out=curated port=0 > review.txt & review=$!
until grep -qs http review.txt; do kill -0 $review; sleep 0.2; done
"$python" "$here/reviewer.py" "$(grep -o 'http[^ ]*' review.txt)" $shards/train
kill $review && wait $review
curate

train stage2_tiny stage2 model/vision=siglip_tiny 'data.train=[{path: ../../curated/shards}]' "stage.init_from=[$frozen,stage1]" \
    trainer.max_steps=200 optim.lr=3e-3
describe stage2

"$python" "$here/figures.py" . $((SECONDS - start))

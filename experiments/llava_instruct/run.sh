#!/usr/bin/env bash
# LLaVA's instruction data at small scale, and a tiny LLaVA trained on it: experiments/llava_instruct/run.sh DATA OUT
# DATA holds coco49-cc and llava-prompts; all output goes to OUT. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
coco=$data/coco49-cc
prompts=$data/llava-prompts

rm -rf endpoint.url requests.jsonl train val told runs # from an earlier run
"$python" "$here/endpoint.py" endpoint.url requests.jsonl & endpoint=$!
trap 'kill $endpoint ${curation:-} 2>/dev/null || true' EXIT
until [ -s endpoint.url ]; do sleep 0.2; done
llm=(llm.model=scripted llm.url="$(cat endpoint.url)" llm.variable=null llm.timeout=4 llm.attempts=2 llm.backoff=0.1)
llm+=(llm.prompt_price=1 llm.completion_price=1 unanswered=drop examples="$prompts/playground/data/prompts")
curate() { "$mmlab" curate llava_instruct "${llm[@]}" "$@"; }

# Real COCO images with their boxes; 151 of the 200 images in the annotations are missing. Types about 58 : 23 : 77.
for split in train val; do
    curate out=$split samples.conversation=15 samples.detail_description=6 samples.complex_reasoning=20 \
        data.images="$coco/${split}2017" data.instances="$coco/annotations/instances_${split}2017.json" \
        data.missing_budget=0.8
done

# 80 images as LLaVA published them: five captions each and boxes, without the images. Killed twice on the way.
told=(out=told data.table="$prompts/caps_boxes_coco2014_val_80.jsonl")
kills=0
for replies in 40 120; do
    "$mmlab" curate llava_instruct "${llm[@]}" "${told[@]}" > /dev/null 2>&1 & curation=$!
    until [ "$(find told/replies -name '[!.]*.json' 2>/dev/null | wc -l)" -ge $replies ]; do
        kill -0 $curation || break
        sleep 0.05
    done
    kill -KILL $curation 2>/dev/null && kills=$((kills + 1))
    wait $curation 2>/dev/null || true
    find told/replies -name '[!.]*.json' > kept-$kills.txt
    wc -l < requests.jsonl > asked-$kills.txt
done
curate "${told[@]}"
curate "${told[@]}" > again.txt # no questions left to send

# Train connector and language model on the output, from scratch, with types sampled uniformly and by size.
"$mmlab" shards tokenizer train/shards val/shards --out tokenizer
for balance in type size; do
    "$mmlab" train experiment=llava/finetune_tiny run.name=$balance data.balance=$balance data.root=. \
        model/vision=siglip_tiny optim.lr=1e-3 optim.weight_decay=0 'optim.betas=[0.9,0.999]' optim.warmup_ratio=0.03 \
        'data.train=[{path: train/shards}]' 'data.val=[{path: val/shards}]' 'stage.init_from=[]' data.max_length=512 \
        data.global_batch=12 data.micro_batch=12 trainer.max_steps=25 trainer.log_every_n_steps=1 trainer.accelerator=cpu
done

"$python" "$here/figures.py" . $((SECONDS - start)) $kills

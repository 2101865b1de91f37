#!/usr/bin/env bash
# LLaVA-1.5 7B finetuning at full size, with random weights on one GPU of 141 GB: experiments/gpu/run.sh OUT
# It trains 30 steps in each of two precisions. MODEL=tiny does the same with a tiny model on a CPU. The last line holds
# the results as one JSON object, as does OUT/results.json.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
set -- . "$1"
source "$(dirname "$0")/../begin.sh"
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} # mmlab need not be installed
[ -n "$mmlab" ] || mmlab="$python -m mmlab"
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # 126 of 140 GiB leave no room for gaps

# One device does what each of the eight of the published run does: 16 samples per step.
run=(experiment=llava/v15_7b_finetune stage.init_from=[] trainer.devices=1 data.global_batch=16 logger=none
    trainer.max_epochs=null trainer.max_steps=30)
case ${MODEL:-7b} in
    7b)
        "$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null ||
            { echo "no GPU here; MODEL=tiny runs on a CPU" >&2; exit 2; }
        run+=(data.max_length=832)
        ;;
    tiny)
        small=hidden_size:64,intermediate_size:128,num_hidden_layers:2,num_attention_heads:4
        run+=("model.language.architecture={$small,num_key_value_heads:4,vocab_size:2000}"
            "model.vision.architecture={$small,image_size:112}" data.max_length=320 data.workers=2
            trainer.accelerator=cpu callbacks.progress.peak_tflops=0.1)
        ;;
    *) echo "MODEL is 7b or tiny" >&2; exit 2 ;;
esac

"$python" "$here/prepare.py" data "${run[@]}"
$mmlab shards build llava_json records.json pictures data/llava_mix_665k/train
$mmlab shards tokenizer data/llava_mix_665k/train --out tokenizer
"$python" "$here/prepare.py" parts "${run[@]}"
for precision in bf16-mixed bf16-true; do
    "$python" "$here/measure.py" plan "$precision.plan.json" "${run[@]}" trainer.precision="$precision"
    "$python" "$here/measure.py" train "$precision.json" "${run[@]}" trainer.precision="$precision"
done
"$python" "$here/figures.py" "${MODEL:-7b}" $((SECONDS - start)) | tee results.json

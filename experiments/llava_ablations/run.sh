#!/usr/bin/env bash
# LLaVA's ablations at small scale: experiments/llava_ablations/run.sh DATA OUT
# The data is generated; DATA is not read. All output goes to OUT. The last line holds the results as one JSON object;
# each ablation's table and plot are in its sweep, OUT/runs/sweeps/<name>.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
export OMP_NUM_THREADS=1
kinds=(--kinds circle square triangle)
shapes=data/shapes

if [ ! -e $shapes/tokenizer ]; then # rerunning the command reuses existing data and runs
    rm -rf data
    "$mmlab" shards build shapes $shapes/train --count 4000 --max-objects 1 "${kinds[@]}"
    "$mmlab" shards build shapes $shapes/val --split val --count 200 --max-objects 1 "${kinds[@]}"
    "$mmlab" shards problems data/problems --own-letters --train 3000 --val 100 --test 400 "${kinds[@]}"
    for split in train val test; do
        "$mmlab" shards build scienceqa data/problems $shapes/problems/$split --split $split
    done
    "$mmlab" shards build scienceqa data/problems $shapes/problems/answer_first --form QCM-ALE
    "$mmlab" shards build scienceqa data/problems $shapes/problems/answer_first_val --split val --form QCM-ALE
    for type in conversation detail_description complex_reasoning; do
        "$mmlab" shards build instructions $shapes/instructions/$type --types $type --count 2000 "${kinds[@]}"
    done
    "$mmlab" shards build instructions $shapes/instructions/val --split val --count 60 "${kinds[@]}"
    "$mmlab" shards build instructions $shapes/instructions/test --split test --count 300 "${kinds[@]}"
    "$mmlab" shards tokenizer $shapes/{train,problems/train,problems/answer_first} \
        $shapes/instructions/{conversation,detail_description,complex_reasoning} --out $shapes/tokenizer
fi

two=(hydra/launcher=joblib hydra.launcher.n_jobs=2) # two points at a time, one core each
sweep() { # sweep NAME METRIC RECIPE,RECIPE …: three seeds per recipe; runs of other sweeps are reused
    "$mmlab" train -m run.sweep="llava_ablations_$1" sweep.metric="$2" sweep.direction=maximize "experiment=$3" \
        seed=0,1,2 "${two[@]}"
}

# The vision encoder and the language model are trained once, in parallel.
"$mmlab" train experiment=llava_ablations/vision > vision.log 2>&1 & eye=$!
"$mmlab" train experiment=llava_ablations/language
wait $eye
"$mmlab" train -m experiment=llava_ablations/align model.vision.feature_layer=-2,-1 seed=0,1,2 \
    run.sweep=llava_ablations_stage1 sweep.metric=val/facts sweep.direction=maximize "${two[@]}"

page=llava_ablations
sweep layer val/accuracy $page/best,$page/last_layer
sweep order val/accuracy $page/best,$page/answer_first
sweep alignment val/accuracy $page/best,$page/no_align
sweep types val/facts \
    $page/all_types,$page/detail_complex,$page/conversation_some,$page/conversation,$page/align

"$python" "$here/figures.py" runs/sweeps $((SECONDS - start))

#!/usr/bin/env bash
# Objectives, averages and alignment at equal compute: experiments/diffusion_ablation/run.sh DATA OUT
# DATA is a checkout of EmojiTwo. OUT may be the output folder of emoji_ldm, whose runs are then reused. The last line
# holds the results as one JSON object; table.csv and plot.png are in OUT.
set -euo pipefail
source "$(dirname "$0")/../emoji_ldm/begin.sh"
export OMP_NUM_THREADS=1
conf=(--config-dir "$here/conf")
page=diffusion_ablation
sweep=runs/sweeps/$page

if [ ! -e data/scenes/tokenizer ]; then # rerunning the command reuses existing data and runs
    rm -rf data/scenes
    "$mmlab" shards build shapes data/scenes/train --count 3000 --max-objects 1
    "$mmlab" shards build shapes data/scenes/val --split val --count 400 --max-objects 1
    "$mmlab" shards tokenizer data/scenes/train --out data/scenes/tokenizer
fi
"$mmlab" train "${conf[@]}" experiment=$page/scenes_features run.name=scenes-features
"$mmlab" train "${conf[@]}" experiment=$page/scenes_first_stage run.name=scenes-first_stage
# The encoders whose features REPA takes know classes, not captions, and are of another kind than those of the scores.
for set in emoji scenes; do
    "$mmlab" train "${conf[@]}" experiment=$page/aligned_encoder data.root=data/$set run.name=$set-encoder
    for split in train val; do
        "$mmlab" shards encode $set/first_stage data/$set/$split data/$set/ablation_latents/$split --keep-images --overwrite
    done
done

"$mmlab" train -m "${conf[@]}" run.sweep=$page sweep.metric=val/fid experiment=$page/emoji,$page/scenes \
    +cell=epsilon,v,v_min_snr,flow,flow_logit_normal,edm,edm_uncertainty,flow_repa,v_no_ema,v_ema_999 seed=0,1,2 \
    hydra/launcher=joblib hydra.launcher.n_jobs=2

# Averages of v whose width is chosen after training; the scores are those of the sweep, with another average.
score_average() { # score_average RUN SET NETWORK SAMPLES WIDTH
    "$mmlab" eval run=$1 data.path=data/$2/val features=$3 samples=$4 ema=$5 out=eval/$page/$1/$5 > /dev/null
}
awk -F, '$2 == "v" {print $1, $4}' $sweep/table.csv | while read -r set run; do
    for width in 0.05 0.1 0.15; do
        case $set in
            *emoji) score_average $run emoji emoji/features 540 $width ;;
            *) score_average $run scenes scenes/features 400 $width ;;
        esac
    done
done

"$python" "$here/figures.py" . $((SECONDS - start))

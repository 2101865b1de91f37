#!/usr/bin/env bash
# Recipes that draw shapes, from raw scenes to judged samples: experiments/drawn_shapes/run.sh DATA OUT
# The scenes are drawn; DATA is not read. All output goes to OUT. The last line holds the results as one JSON object.
# Completed runs are skipped, and then their minutes are those of the skipping: use a new OUT to measure them.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"

timed() { # timed STEP COMMAND …: run it, and add a line with its seconds to minutes.txt
    local began=$SECONDS
    "${@:2}"
    echo "$1 $((SECONDS - began))" >> minutes.txt
}
build() {
    "$mmlab" shards build shapes data/shapes_images/crowded --count 12000 --min-objects 4 --max-objects 4 --types shape --size 32 --overwrite
    "$mmlab" shards build shapes data/shapes_images/train --count 20000 --max-objects 1 --sizes large --types shape --size 32 --overwrite
    "$mmlab" shards build shapes data/shapes_images/val --split val --count 500 --max-objects 1 --sizes large --types shape --size 32 --overwrite
    "$mmlab" shards tokenizer data/shapes_images/train --out data/shapes_images/tokenizer
}
encode() { # encode RUN FOLDER: latents or codes of all scenes
    for split in train val; do
        "$mmlab" shards encode "$1" data/shapes_images/$split data/shapes_images/$2/$split --overwrite
    done
}
train() { # train RECIPE FOLDER …: from latents or codes
    "$mmlab" train experiment=$1 data.latents=true "data.train=[{path: $2/train}]" "data.val=[{path: $2/val}]" "${@:3}"
}
draw() { # draw RUN FOLDER …: 576 samples
    rm -rf "samples/$2"
    "$mmlab" sample "run=$1" "out=samples/$2" count=576 batch_size=96 strip=0 "${@:3}"
}
prompts=$("$python" -c 'from mmlab.data.sources.scenes import COLORS, KINDS
from mmlab.data.sources.shapes import article
print(",".join(article(f"{color} {kind}") for kind in KINDS for color in COLORS))')

rm -f minutes.txt
timed shards build
timed kl "$mmlab" train experiment=ldm/first_stage_kl_tiny
timed latents encode ldm/first_stage_kl_tiny latents
timed class train ldm/class_tiny latents
timed text train ldm/text_tiny latents
timed vqgan "$mmlab" train experiment=taming/vqgan_tiny
timed codes encode taming/vqgan_tiny codes
timed prior train taming/prior_tiny codes
# What a judge should refuse: a denoiser after a tenth of its steps, and one that has not learned.
train ldm/class_tiny latents run.name=blobs trainer.max_steps=200
train ldm/class_tiny latents run.name=noise trainer.max_steps=1

draw ldm/class_tiny class
draw ldm/text_tiny text "prompt=[$prompts]"
draw taming/prior_tiny prior
draw blobs blobs
draw noise noise
"$python" "$here/figures.py" samples minutes.txt

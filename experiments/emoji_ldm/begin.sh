# Sourced with DATA and OUT by the run.sh of emoji_ldm, emoji_compression and emoji_vqgan: changes to OUT, builds the
# emoji shards and trains the shared runs. Completed runs are skipped.
emoji=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$emoji/../begin.sh"

score() { # score RUN …: compare with held-out and with training images
    "$mmlab" eval run=emoji/$1 data.path=data/emoji/val data.train_from=data/emoji/train features=emoji/features \
        out=eval/$1 "${@:2}"
}
train() { # train RECIPE …: in parallel, one core each
    local recipe job jobs=()
    for recipe in "$@"; do
        OMP_NUM_THREADS=1 "$mmlab" train experiment=emoji/$recipe & jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
}
encode() { # encode RUN FOLDER: cache latents of all images and their mirror images
    for split in train val; do
        "$mmlab" shards encode emoji/$1 data/emoji/$split data/emoji/$2/$split --flip --overwrite
    done
}

"$python" "$emoji/prepare.py" "$data" tables
for split in train val; do
    "$mmlab" shards build captions "$data/png/64" data/emoji/$split --captions tables/$split.jsonl --overwrite
    "$mmlab" shards show data/emoji/$split --out $split.png -n 60 --columns 10
done
"$mmlab" shards tokenizer data/emoji/train --out data/emoji/tokenizer
train features first_stage
score first_stage
encode first_stage latents

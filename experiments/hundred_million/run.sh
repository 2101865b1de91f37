#!/usr/bin/env bash
# 130 million samples in 13,000 shards: experiments/hundred_million/run.sh DATA OUT
# The data is generated; DATA is not read. It takes 16 GB below OUT, which are removed at the end, and 11 GB of memory.
# The image goes to OUT. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
export OMP_NUM_THREADS=1
before=ed3ecf9  # the last commit with one index file for all shards
root=$here/../..
trap 'rm -rf sets few tars before' EXIT
rm -rf sets few tars before figures.jsonl
mkdir before
git -C "$root" archive "$before" mmlab | tar -x -C before
new() { PYTHONPATH="$root" "$python" "$here/$1.py" "${@:2}" | tee -a figures.jsonl >&2; }
old() { PYTHONPATH="$PWD/before" "$python" "$here/$1.py" "${@:2}" | tee -a figures.jsonl >&2; }
new generate sets 10000 1000 4000 13000
new generate few 1000 1000
for set in sets/1000 sets/4000 sets/13000 few/1000; do new join $set; done
old join_before sets/1000 sets/4000
for round in 1 2 3 4 5; do
    for set in sets/1000 sets/4000 sets/13000; do
        for what in random training order types batch; do new measure $what $set; done
    done
    [ "$round" -gt 3 ] || for what in random training batch; do old measure $what sets/1000; done
done
for round in 1 2 3; do new measure training few/1000; done
old measure open sets/4000
for method in fork spawn; do
    for set in sets/1000 sets/4000 sets/13000; do new measure $method $set; done
    old measure $method sets/1000
done
new tars tars
for round in 1 2 3 4 5 6 7; do
    new build tars
    old build tars
done
"$python" "$here/figures.py" figures.jsonl $((SECONDS - start))

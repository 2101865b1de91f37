#!/usr/bin/env bash
# A run killed 100 times at random moments: experiments/kill_matrix/run.sh DATA OUT
# The data is generated; DATA is not read. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
exec "$python" "$here/kill_matrix.py" .

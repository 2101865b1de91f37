#!/usr/bin/env bash
# A run killed 200 times at random moments: experiments/kill_matrix/run.sh DATA OUT
# DATA is not read: the scenes are drawn. The last line is one JSON object of figures.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
exec "$python" "$here/kill_matrix.py" .

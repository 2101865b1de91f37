#!/usr/bin/env bash
# A run killed 200 times at random moments: experiments/kill_matrix/run.sh DATA OUT
# DATA is not read: the scenes are drawn. The last line is one JSON object of figures.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 DATA OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python=$here/../../.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
exec "$python" "$here/kill_matrix.py" "$2"

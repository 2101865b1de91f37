#!/usr/bin/env bash
# Eight Gaussians, every sampler: experiments/eight_gaussians/run.sh DATA OUT
# It makes its own data, so DATA is not read; the picture is written below OUT. The last line is one JSON object.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 DATA OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
bin=$here/../../.venv/bin
python=$([ -x "$bin/python" ] && echo "$bin/python" || command -v python3)
exec "$python" "$here/eight_gaussians.py" "$2"

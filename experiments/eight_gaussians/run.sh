#!/usr/bin/env bash
# Eight Gaussians, every sampler: experiments/eight_gaussians/run.sh DATA OUT
# It makes its own data, so DATA is not read; the picture is written below OUT. The last line is one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
exec "$python" "$here/eight_gaussians.py" .

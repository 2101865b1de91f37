#!/usr/bin/env bash
# Eight Gaussians with every sampler: experiments/eight_gaussians/run.sh DATA OUT
# The data is generated; DATA is not read. The image goes to OUT. The last line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"
exec "$python" "$here/eight_gaussians.py" .

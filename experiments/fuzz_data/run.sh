#!/usr/bin/env bash
# Mutated records and members through everything that reads data: experiments/fuzz_data/run.sh DATA OUT [MUTATIONS]
# The data is generated; DATA is not read. The last line holds the results as one JSON object.
set -euo pipefail
mutations=${3:-10000}
set -- "$1" "$2"
source "$(dirname "$0")/../begin.sh"
exec "$python" "$here/fuzz_data.py" . "$mutations"

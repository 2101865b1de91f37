#!/usr/bin/env bash
# Training steps on one GPU beside transformers' and diffusers', in under 8 minutes: benchmarks/gpu.sh OUT
# LLaVA-1.5 7B (both stages, and ten questions a picture), DiT-XL/2 and a UNet f4 with random weights, eager and
# compiled, with each attention: tokens or images per second, model FLOPs utilization, memory. It downloads nothing.
# benchmarks/gpu.sh tiny OUT tries it with tiny models on a CPU. The last line holds the results as one JSON object, as
# does OUT/gpu.json. ONLY=DiT measures the cases whose names contain a word.
set -uo pipefail
size=
[ "${1:-}" != tiny ] || { size=tiny && shift; }
[ $# -eq 1 ] || { echo "usage: $0 [tiny] OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python=$here/../.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
rm -f "$out/gpu.json"
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # mmlab need not be installed
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # rows of other lengths leave gaps
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -n "$size" ] || "$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null ||
    { echo "no GPU here; $0 tiny OUT runs on a CPU" >&2; exit 2; }
# It ends itself after 440 s and the imports; if it cannot, it is ended after 470.
timeout --kill-after=5 470 "$python" "$here/gpu.py" $size "$out" || echo "gpu.py ended with exit code $?"
[ -s "$out/gpu.json" ] || exit 1
cat "$out/gpu.json"

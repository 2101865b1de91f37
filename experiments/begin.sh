# Sourced by each run.sh with its DATA and OUT: changes to OUT, locates mmlab and python, records the start time.
[ $# -eq 2 ] || { echo "usage: $0 DATA OUT" >&2; exit 2; }
start=$SECONDS
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$1" 2>/dev/null && pwd || echo "$1")
mkdir -p "$2" && cd "$2"
bin=$here/../../.venv/bin
mmlab=$([ -x "$bin/mmlab" ] && echo "$bin/mmlab" || command -v mmlab)
python=$([ -x "$bin/python" ] && echo "$bin/python" || command -v python3)

step() { # step NAME COMMAND …: run a command; its time and memory go to steps.jsonl
    "$python" "$here/../measured.py" "$@"
}

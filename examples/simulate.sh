#!/usr/bin/env bash
# Two minutes of a real trace, twice as fast, to two prefill and two decode engines and to four coupled ones.
# With matplotlib (pip install matplotlib) it draws simulate.svg as well.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
plot=()
if "$python" -c "import matplotlib" 2>/dev/null; then plot=(--plot simulate.svg); fi
"$python" -m mooncake_connector.cli simulate --trace examples/conversation_120s.jsonl --speed 2 \
    --preset h200-8b --xpyd 2P2D 4C --routing conductor least_loaded --ttft 2 --tbt 0.02 "${plot[@]}" "$@"

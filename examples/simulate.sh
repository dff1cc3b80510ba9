#!/usr/bin/env bash
# Two minutes of a real trace to three prefill and one decode engines and to four coupled ones, with and without
# the conductor's admission.
# With matplotlib (pip install matplotlib) it draws simulate.svg as well.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
plot=()
if "$python" -c "import matplotlib" 2>/dev/null; then plot=(--plot simulate.svg); fi
"$python" -m mooncake_connector.cli simulate --trace examples/conversation_120s.jsonl --speed 1.2 \
    --preset h200-8b --xpyd 3P1D 4C --admission none per_request --ttft 2 --tbt 0.03 "${plot[@]}" "$@"

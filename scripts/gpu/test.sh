#!/usr/bin/env bash
# Runs tests/gpu on this machine's GPUs; arguments go to pytest. What can't run here is skipped by name.
# The checkout need not be installed: a Python with torch (CUDA) and pytest will do. vLLM's tests want vLLM on
# PYTHONPATH. MOONCAKE_TEST_PYTHON chooses the Python, MOONCAKE_TEST_LOGS a folder for the engines' logs.
#
#   scripts/gpu/test.sh                      all
#   scripts/gpu/test.sh -k 'not vllm' -x     pytest's own options
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

sees_gpus='import sys, pytest, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "GPUs", torch.cuda.device_count())
raise SystemExit(not torch.cuda.is_available())'
for python in "${MOONCAKE_TEST_PYTHON:-}" .venv/bin/python python3 none; do
    [ "$python" = none ] && { echo "no Python here whose torch sees a GPU (MOONCAKE_TEST_PYTHON names one)" >&2; exit 2; }
    [ -n "$python" ] && "$python" -c "$sees_gpus" 2>/dev/null && break
done
lack="$("$python" - <<'PYTHON'
import importlib
for module in ("msgspec", "zmq", "xxhash", "numpy", "cuda.bindings.driver", "pytest_timeout"):
    try:
        importlib.import_module(module)
    except ImportError:
        print(module, end=" ")
PYTHON
)"
[ -z "$lack" ] || { echo "$python lacks: $lack" >&2; exit 2; }

nvidia-smi --query-gpu=index,name,driver_version,memory.used --format=csv,noheader
# Unknown to pytest where its asyncio plugin is missing, which no test here needs.
"$python" -m pytest tests/gpu -v -s --durations=10 -W 'ignore:Unknown config option' "$@"
status=$?
# If a kernel was ended by the GPU, the driver's log says by what.
[ $status -eq 0 ] || dmesg 2>/dev/null | grep -i xid | tail -5
exit $status

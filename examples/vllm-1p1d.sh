#!/usr/bin/env bash
# One prefill engine, one decode engine and the proxy, as plain commands: what `make demo` does, by hand.
#
#   examples/vllm-1p1d.sh [MODEL]       then, in another terminal, examples/ask.sh
#
# Needs `make setup`, or an environment with vLLM and `pip install 'mooncake-connector[proxy]'`. Ctrl-C stops all.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"

MODEL="${1:-$(python -c 'from mooncake_connector.demo import models; print(models.make("tiny-llama"))' 2>/dev/null)}"
echo "model: $MODEL"

# For several engines on the CPUs of one machine (this version refuses engines whose KV is on a GPU).
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_HOST_IP=127.0.0.1
COMMON=(--host 127.0.0.1 --served-model-name m --max-model-len 4096 --block-size 32 --enforce-eager)

kv() { # ROLE
    echo '{"kv_connector": "MooncakePushConnector",
           "kv_connector_module_path": "mooncake_connector.kv_transfer.vllm",
           "kv_role": "'"$1"'", "kv_load_failure_policy": "recompute"}'
}

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
vllm serve "$MODEL" "${COMMON[@]}" --port 8100 --kv-transfer-config "$(kv kv_both)" &
vllm serve "$MODEL" "${COMMON[@]}" --port 8200 --kv-transfer-config "$(kv kv_consumer)" &
# With --first-token prefill streams begin as soon as prefill has a token.
mooncake-connector proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000 &
wait -n

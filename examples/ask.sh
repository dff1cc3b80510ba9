#!/usr/bin/env bash
# A completion, a chat and a streamed chat through the proxy of examples/vllm-1p1d.sh.
set -euo pipefail
URL="${1:-http://127.0.0.1:8000}"

post() { curl -sSN "$URL$1" -H 'Content-Type: application/json' -d "$2"; echo; }

post /v1/completions '{"model": "m", "prompt": "the quick brown fox", "max_tokens": 16, "temperature": 0}'
post /v1/chat/completions '{"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}'
post /v1/chat/completions '{"model": "m", "max_tokens": 8, "stream": true,
    "messages": [{"role": "user", "content": "what is the weather today?"}]}'

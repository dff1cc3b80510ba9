#!/usr/bin/env bash
# Makes .venv-routers: the published proxies that benchmarks/proxy.py compares with, in an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/pip_settings.sh

VENV=.venv-routers
ROUTERS=(vllm-router==0.1.17 sglang-router==0.3.2)

die() {
    echo "routers: $*" >&2
    exit 1
}

[ -x .venv/bin/uv ] || die ".venv is missing: run 'make setup' first"
stamp="$(.venv/bin/python --version) ${ROUTERS[*]}"
if [ "$(cat $VENV/.setup-stamp 2>/dev/null || true)" != "$stamp" ]; then
    echo "routers: making $VENV"
    rm -rf $VENV
    .venv/bin/python -m venv --without-pip $VENV
    pip_settings_to_uv .venv/bin/python
    .venv/bin/uv pip install --quiet --python $VENV/bin/python "${ROUTERS[@]}" ||
        die "they did not install; the lines above say why"
    echo "$stamp" >$VENV/.setup-stamp
fi
echo "routers: $VENV is ready"

#!/usr/bin/env bash
# Makes .venv-peers: the transfer engines that the benchmarks compare with, in an environment of their own.
# It has .venv's Python and numpy and nothing else beside them, so that a peer's vLLM engine can have it on
# PYTHONPATH without its own packages being shadowed.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-peers
PEERS=(nixl==1.5.1 nixl-cu12==1.5.1 mooncake-transfer-engine-non-cuda==0.3.13.post1)

say() { echo "peers: $*"; }
die() {
    echo "peers: $*" >&2
    exit 1
}

[ -x .venv/bin/uv ] || die ".venv is missing: run 'make setup' first"
numpy="numpy==$(.venv/bin/python -c 'import numpy; print(numpy.__version__)')"
stamp="$(.venv/bin/python --version) ${PEERS[*]} $numpy"

if [ "$(cat $VENV/.setup-stamp 2>/dev/null || true)" != "$stamp" ]; then
    say "making $VENV"
    rm -rf $VENV
    .venv/bin/python -m venv --without-pip $VENV
    # --no-deps: their requirements would pull in torch; to move host memory they need numpy alone.
    VIRTUAL_ENV="$PWD/$VENV" .venv/bin/uv pip install --quiet --python $VENV/bin/python --no-deps \
        "${PEERS[@]}" "$numpy" || die "the peers did not install; the lines above say why"
    echo "$stamp" >$VENV/.setup-stamp
fi

can_import() { $VENV/bin/python -c "import $1" 2>/dev/null; }

if ! can_import mooncake.engine && command -v apt-get >/dev/null; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if "${as_root[@]}" true 2>/dev/null; then
        say "installing libibverbs1, which Mooncake's engine links to"
        { "${as_root[@]}" apt-get -qq update && "${as_root[@]}" apt-get -qq install -y libibverbs1; } \
            >/dev/null 2>&1 || say "apt-get could not install libibverbs1"
    fi
fi
can_import nixl._api || die "NIXL does not load: $($VENV/bin/python -c 'import nixl._api' 2>&1 | tail -1)"
if can_import mooncake.engine; then
    say "$VENV is ready"
else
    # NIXL alone is still worth a comparison; the benchmarks say which peer they did not run.
    say "$VENV has NIXL only; Mooncake needs a system package: apt-get install libibverbs1"
fi

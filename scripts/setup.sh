#!/usr/bin/env bash
# Makes .venv with the locked set and this project in it. Quick when there is nothing to do.
#
#   PYTHON=python3.12 scripts/setup.sh    another interpreter than the first of python3.11, 3.12, 3.13, python3
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
VENV=.venv
LOCK=requirements/cpu.txt

say() { echo "setup: $*"; }
die() {
    echo "setup: $*" >&2
    exit 1
}

stamp="$(cat "$LOCK" pyproject.toml scripts/setup.sh scripts/vllm_metadata.py | sha256sum | cut -d' ' -f1)"
if [ "$(cat $VENV/.setup-stamp 2>/dev/null || true)" = "$stamp" ]; then
    exit 0
fi

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ ! -x $VENV/bin/python ]; then
    python=""
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            python="$candidate"
            break
        fi
    done
    [ -n "$python" ] || die "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python make setup"
    say "making $VENV with $("$python" --version)"
    if ! "$python" -m venv $VENV; then
        rm -rf $VENV
        die "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
    fi
fi
new_enough $VENV/bin/python || die "$VENV has a Python older than 3.11; remove it and run again: rm -rf $VENV"

if [ "$($VENV/bin/uv --version 2>/dev/null | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    say "installing uv $UV_VERSION"
    $VENV/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
fi
uv_install() { VIRTUAL_ENV="$PWD/$VENV" $VENV/bin/uv pip install --quiet --python $VENV/bin/python "$@"; }

. scripts/pip_settings.sh
pip_settings_to_uv $VENV/bin/python

# torch's CPU build is in no default index. A local wheel folder wins; else uv knows PyTorch's own CPU index.
torch="$(sed -n 's/^\(torch==[^ ;]*+cpu\).*/\1/p' $LOCK)"
backend=()
if uv_install --dry-run --no-deps "$torch" >/dev/null 2>&1; then
    say "installing the locked set (torch as locally available)"
else
    say "installing the locked set (torch from PyTorch's CPU index, about 200 MB)"
    backend=(--torch-backend cpu)
fi
# Bytecode now, or the first starts of every engine would pay for it.
uv_install --no-deps --compile-bytecode "${backend[@]}" -r $LOCK ||
    die "the locked set did not install; the lines above say why"
uv_install --no-deps --editable .
$VENV/bin/python scripts/vllm_metadata.py

echo "$stamp" >$VENV/.setup-stamp
say "done: $VENV is ready"

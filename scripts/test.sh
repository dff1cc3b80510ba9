#!/usr/bin/env bash
# Runs the test layers one after another, quickest first, and says which did not run and why.
#
#   scripts/test.sh               all layers
#   scripts/test.sh unit proxy    these
set -uo pipefail
cd "$(dirname "$0")/.."

layers=("$@")
[ ${#layers[@]} -gt 0 ] || layers=(unit proxy store faults engine rdma gpu)

absent() { # LAYER: prints what the layer lacks on this machine
    case "$1" in
    gpu) command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU || echo "no NVIDIA GPU" ;;
    esac
}

summary=()
failed=0
for layer in "${layers[@]}"; do
    if ! find "tests/$layer" -name 'test_*.py' 2>/dev/null | grep -q .; then
        continue
    fi
    lack="$(absent "$layer")"
    if [ -n "$lack" ]; then
        files="$(find "tests/$layer" -name 'test_*.py' | sort | xargs)"
        summary+=("$layer: NOT RUN, $lack ($files)")
        continue
    fi
    echo "== tests/$layer"
    started=$SECONDS
    .venv/bin/python -m pytest "tests/$layer" -q
    status=$?
    took="$((SECONDS - started)) s"
    case $status in
    0) summary+=("$layer: passed, $took") ;;
    5) summary+=("$layer: no test collected") ;;
    *)
        summary+=("$layer: FAILED (pytest exit $status), $took")
        failed=1
        ;;
    esac
done

echo "== layers"
printf '  %s\n' "${summary[@]:-nothing to run}"
exit $failed

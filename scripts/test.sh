#!/usr/bin/env bash
# Runs the test layers one after another, quickest first, and says which did not run and why.
#
#   scripts/test.sh               all layers
#   scripts/test.sh unit proxy    these
set -uo pipefail
cd "$(dirname "$0")/.."

layers=("$@")
[ ${#layers[@]} -gt 0 ] || layers=(unit proxy store faults engine rdma gpu)

rdma_here() { # whether this machine itself can run tests/rdma
    grep -qs ACTIVE /sys/class/infiniband/*/ports/*/state && .venv/bin/python -c 'import pyverbs.device' 2>/dev/null
}

absent() { # LAYER: prints what the layer lacks on this machine
    case "$1" in
    rdma) rdma_here || scripts/rdma/prepare.sh ;;
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
    test=(.venv/bin/python -m pytest "tests/$layer" -q)
    where=""
    [ "$layer" = gpu ] && test=(scripts/gpu/test.sh)
    if [ "$layer" = rdma ] && ! rdma_here; then
        # Its kernel has netem, which those of small machines often lack.
        test=(scripts/rdma/guest.sh -t 900 -- "${test[@]}" tests/faults/test_network.py::test_netem)
        where=" (in a guest with two soft-RoCE NICs)"
    fi
    echo "== tests/$layer$where"
    started=$SECONDS
    "${test[@]}"
    status=$?
    took="$((SECONDS - started)) s"
    case $status in
    0) summary+=("$layer: passed, $took") ;;
    5) summary+=("$layer: no test collected") ;;
    *)
        summary+=("$layer: FAILED (exit $status), $took")
        failed=1
        ;;
    esac
done

echo "== layers"
printf '  %s\n' "${summary[@]:-nothing to run}"
exit $failed

#!/usr/bin/env bash
# Measures on this machine's GPUs, one name after another; results and what was printed go to a folder, the
# engines' logs there, too, or to the folder LOGS. With LABEL names of files end by it.
# Each name has a time limit of its own, so that what hangs costs no more than that. Needs what
# scripts/gpu/test.sh needs, aiohttp and uvloop, and vLLM on PYTHONPATH for all but tcp and bytes.
#
#   scripts/gpu/measure.sh FOLDER NAME...
#
#   tcp       GPU memory over tcp with other buffers, connections, kernels; beside it host memory and the limits
#   bytes     cuda_ipc and the bulk copy; peers only with PEERS=1
#   prefill   how much prefill is slowed, by VARIANTS (JSON, see benchmarks/gpu_switch.py) on one engine
#   decode    how much decode is slowed: by requests that join, and by their bytes; EXTRA: connector's settings
#   ttft      added TTFT and where it goes, EXTRA as above; NIXL beside it where it is importable
set -uo pipefail
folder=${1:?FOLDER NAME...}
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
logs=${LOGS:-$folder}
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${MOONCAKE_TEST_PYTHON:-python3}
extra=${EXTRA:-"{}"}
label=${LABEL:+-$LABEL}
variants=${VARIANTS:-'[{},{"cuda_copy":"copy_engine"},{"cuda_sms":4},{"cuda_sms":1},
  {"priority":"low"},{"threads":256,"cuda_sms":48},{"push_bytes":1099511627776}]'}

commit=$(cat COMMIT 2>/dev/null || git rev-parse --short HEAD 2>/dev/null || echo unknown)

limits() { # what the system lets a socket buffer grow to
    for name in core/rmem_max core/wmem_max ipv4/tcp_rmem ipv4/tcp_wmem; do
        echo "$name: $(cat "/proc/sys/net/$name" 2>/dev/null || echo "not to be seen")"
    done
}

run() { # NAME SECONDS SCRIPT ARGUMENTS...: one measurement, its output in FOLDER/NAME.txt
    local name=$1$label limit=$2 began=$SECONDS status
    shift 2
    timeout -k 5 "$limit" "$python" "$@" --json "$folder/$name.json" 2>&1 | tee "$folder/$name.txt"
    status=$?
    echo "== $name: status $status, $((SECONDS - began)) s"
    return $status
}

failed=0
for name in "$@"; do
    case $name in
    tcp)
        limits
        run tcp 105 benchmarks/gpu.py --only tcp tcp-host socket pinned_copy --sweep --limit 98 \
            --commit "$commit" --logs "$folder/tcp.log"
        ;;
    bytes)
        # shellcheck disable=SC2086  # one word or two
        run bytes 190 benchmarks/gpu.py --limit 180 --commit "$commit" --logs "$folder/bytes.log" \
            --only cuda_ipc peer_copy ${PEERS:+nixl mooncake-nvlink}
        ;;
    prefill)
        run prefill 460 benchmarks/ttft.py --gpu --only prefill --variants "$variants" --budget 430 \
            --logs "$logs/logs-prefill"
        ;;
    decode)
        run decode 260 benchmarks/ttft.py --gpu --only decode --extra "$extra" --budget 240 \
            --logs "$logs/logs-decode$label"
        ;;
    ttft)
        run ttft 400 benchmarks/ttft.py --gpu --only ttft breakdown --extra "$extra" --budget 380 \
            --logs "$logs/logs-ttft$label"
        ;;
    *)
        echo "unknown: $name" >&2
        exit 2
        ;;
    esac || failed=1
done
exit $failed

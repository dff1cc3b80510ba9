#!/usr/bin/env bash
# Runs a command in a throw-away virtual machine that has two soft-RoCE NICs, rxe0 and rxe1: real verbs without
# RDMA hardware. The machine's root is this machine's / under a layer in memory, so checkout and environment are
# the same there, and what the command writes is lost. No KVM needed. Ends with the command's exit status; 124: out of
# time; 125: the guest failed, or lacks something (prepare.sh).
#
#   guest.sh [options] -- COMMAND [ARGUMENT...]
#     -C DIR       working directory (the present one)
#     -w DIR       a folder that the command may write to, repeatable
#     -e NAME      an environment variable to hand over, repeatable (PATH, HOME, LANG, PYTHONPATH always are)
#     -m MIB       memory (4096)
#     -c N         CPUs (2)
#     -t SECONDS   limit on the whole run (600)
#     -v           the guest's console, too, on stderr
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

directory="$PWD" memory=4096 cpus=2 limit=600 verbose="" writable=() variables=(PATH HOME LANG)
while getopts C:w:e:m:c:t:v option; do
    case $option in
    C) directory="$OPTARG" ;;
    w) writable+=("$(realpath "$OPTARG")") ;;
    e) variables+=("$OPTARG") ;;
    m) memory="$OPTARG" ;;
    c) cpus="$OPTARG" ;;
    t) limit="$OPTARG" ;;
    v) verbose=1 ;;
    *) exit 125 ;;
    esac
done
shift $((OPTIND - 1))
die() {
    echo "rdma guest: $*" >&2
    exit 125
}
[ $# -gt 0 ] || die "no command; $0 [options] -- COMMAND"
lack="$("$here/prepare.sh")" || die "could not be prepared"
[ -z "$lack" ] || die "$lack"
cache="$("$here/prepare.sh" --cache)"

# Its own folder for what both sides share: the command, its status, and two pipes for what it prints.
run="$(mktemp -d "${TMPDIR:-/tmp}/rdma-guest.XXXXXX")"
qemu="" readers=()
cleanup() {
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true
    [ ${#readers[@]} -eq 0 ] || kill "${readers[@]}" 2>/dev/null || true
    rm -rf "$run"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$run/control"
mkfifo "$run/out" "$run/err"
cat "$run/out" &
readers+=($!)
cat "$run/err" >&2 &
readers+=($!)

folder() { # TAG PATH [MORE]
    local share="local,id=$1,path=${2//,/,,},security_model=none,multidevs=remap${3:-}"
    machine+=(-fsdev "$share" -device "virtio-9p-pci,fsdev=$1,mount_tag=$1")
}
machine=()
folder host / ,readonly=on
folder control "$run/control"
{
    for i in "${!writable[@]}"; do
        folder "writable$i" "${writable[i]}"
        echo "mount -t 9p -o cache=mmap,trans=virtio,version=9p2000.L,msize=1048576 writable$i ${writable[i]@Q}"
    done
    for name in "${variables[@]}"; do
        [ -z "${!name+set}" ] || echo "export $name=${!name@Q}"
    done
    pythonpath="${PYTHONPATH:+$PYTHONPATH:}$cache/pyverbs"
    echo "export PYTHONPATH=${pythonpath@Q}"
    echo "cd ${directory@Q}"
    printf 'exec'
    printf ' %q' "$@"
    echo
} >"$run/control/command"
cp "$here/boot.sh" "$run/control/boot"

timeout -k 5 "$limit" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -M q35 -smp "$cpus" -m "$memory" \
    -nodefaults -no-user-config -display none -monitor none -nic none -no-reboot \
    -kernel "$cache/vmlinuz" -initrd "$cache/initrd" \
    -append "console=ttyS0 panic=-1 $([ -n "$verbose" ] && echo loglevel=6 || echo quiet) mitigations=off tsc=reliable random.trust_cpu=on" \
    -serial "file:$run/console" -device virtio-rng-pci -device virtio-serial-pci \
    -chardev "file,id=out,path=$run/out" -device virtserialport,chardev=out,name=out \
    -chardev "file,id=err,path=$run/err" -device virtserialport,chardev=err,name=err \
    "${machine[@]}" </dev/null &
qemu=$!
status=0
wait "$qemu" || status=$?
qemu=""
wait "${readers[@]}" || true
readers=()

[ -z "$verbose" ] || cat "$run/console" >&2
case $status in 124 | 137)
    echo "rdma guest: stopped after $limit s" >&2
    exit 124
    ;;
esac
if [ -s "$run/control/status" ]; then
    [ -z "$verbose" ] || echo "rdma guest: the command began $(cat "$run/control/up") s after the start" >&2
    exit "$(cat "$run/control/status")"
fi
tail -n 20 "$run/console" >&2
die "ended without an exit status (QEMU's was $status); the console's last lines are above"

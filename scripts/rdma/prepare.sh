#!/usr/bin/env bash
# Makes this machine able to boot the soft-RoCE guest (guest.sh): installs packages when it may (root, apt-get) and
# keeps a kernel, a root image and pyverbs in a cache, about 15 MB. Quick when there is nothing to do.
#
# Prints what is missing and how to mend it, and nothing when the guest can be booted. Progress goes to stderr.
#
#   prepare.sh            prepare
#   prepare.sh --cache    print the cache's folder
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PATH:/usr/sbin:/sbin"
export LC_ALL=C # apt's words are read below

# Without HOME, ~ is the home that the system knows.
CACHE="${XDG_CACHE_HOME:-$(echo ~/.cache)}/mooncake_connector/rdma-guest"
[ "${1:-}" != --cache ] || { echo "$CACHE"; exit; }

# In the guest: the file system, and what a root over it needs; soft RoCE and its checksum; cables, a switch, netem.
MODULES=(virtio_pci 9pnet_virtio 9p overlay virtio_console rdma_rxe rdma_ucm crc32_generic veth bridge sch_netem)
LACKING="the soft-RoCE guest lacks"

missing() { # prints: what prepare cannot do
    echo "$*"
    exit 0
}

apt_get() { # fails with apt's own words in $why
    local log
    log="$(DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=60 \
        -o APT::Sandbox::User=root "$@" 2>&1)" && return
    why="$(grep -m1 '^E: ' <<<"$log" || tail -n1 <<<"$log")"
    return 1
}

fresh() { # the same; where it fails, once more with new lists: images come with none, and old ones name what is gone
    apt_get "$@" || { [ "$(id -u)" = 0 ] && apt_get update && apt_get "$@"; }
}

[ "$(uname -sm)" = "Linux x86_64" ] || missing "the soft-RoCE guest is for Linux on AMD64, this is $(uname -sm)"

install() { # PACKAGE...
    [ $# -gt 0 ] || return 0
    local command="apt-get install --no-install-recommends $*"
    command -v apt-get >/dev/null || missing "$LACKING $* (packages of Debian, which this is not)"
    [ "$(id -u)" = 0 ] || missing "$LACKING packages: sudo $command"
    echo "rdma: $command" >&2
    fresh install --no-install-recommends -y "$@" || missing "$LACKING packages: $command said: $why"
}

libraries="$(ldconfig -p)"
packages=()
wants() { command -v "$1" >/dev/null || packages+=("$2"); }
wants qemu-system-x86_64 qemu-system-x86
wants rdma iproute2
wants modprobe kmod
wants cpio cpio
[[ "$libraries" = *libibverbs.so.1* && -e /etc/libibverbs.d/rxe.driver ]] || packages+=(ibverbs-providers)
[[ "$libraries" = *librdmacm.so.1* ]] || packages+=(librdmacm1)
install "${packages[@]}"

stamp="$(cat scripts/rdma/prepare.sh scripts/rdma/init.sh | sha256sum | cut -d' ' -f1)"
mkdir -p "$CACHE"
exec 9>"$CACHE/lock"
flock 9
if [ "$(cat "$CACHE/stamp" 2>/dev/null || true)" != "$stamp" ]; then
    command -v apt-get >/dev/null || missing "$LACKING a kernel (prepared with apt-get, and this is not Debian)"
    echo "rdma: preparing a guest in $CACHE (downloads 70 MB)" >&2
    work="$(mktemp -d "$CACHE/work.XXXXXX")"
    trap 'rm -rf "$work"' EXIT
    kernel() { apt-cache depends linux-image-amd64 2>/dev/null | awk '/ Depends: linux-image-[0-9]/ {print $2; exit}'; }
    [ -n "$(kernel)" ] || fresh update || true
    [ -n "$(kernel)" ] || missing "$LACKING Debian's kernel: apt-get update, then again (apt knows no linux-image-amd64)"
    # Unpacked only: a kernel is not to be installed, busybox-static cannot be beside busybox.
    pushd "$work" >/dev/null
    fresh download "$(kernel)" busybox-static python3-pyverbs ||
        missing "$LACKING a kernel: apt-get download $(kernel) busybox-static python3-pyverbs said: $why"
    popd >/dev/null
    for deb in "$work"/*.deb; do dpkg -x "$deb" "$work/all"; done

    version="$(basename "$work"/all/boot/vmlinuz-*)"
    version="${version#vmlinuz-}"
    [ -d "$work/all/lib" ] || ln -s usr/lib "$work/all/lib"
    depmod -b "$work/all" "$version"
    mkdir -p "$work"/image/{bin,modules,proc,sys,dev,low,up,new}
    busybox="$(find "$work/all" -path '*bin/busybox')"
    cp "$busybox" "$work/image/bin/busybox"
    cp scripts/rdma/init.sh "$work/image/init"
    for module in "${MODULES[@]}"; do
        modprobe -d "$work/all" -S "$version" --show-depends "$module" | awk '$1 == "insmod" {print $2}'
    done | awk '!seen[$0]++' | while read -r path; do
        name="$(basename "${path%.xz}")"
        case "$path" in
        *.xz) "$busybox" xzcat "$path" >"$work/image/modules/$name" ;;
        *) cp "$path" "$work/image/modules/$name" ;;
        esac
        echo "$name" >>"$work/image/modules/order"
    done
    (cd "$work/image" && find . | cpio -o -H newc --quiet) >"$CACHE/initrd"
    cp "$work"/all/boot/vmlinuz-* "$CACHE/vmlinuz"
    rm -rf "$CACHE/pyverbs"
    mkdir "$CACHE/pyverbs"
    cp -r "$work"/all/usr/lib/python3/dist-packages/pyverbs "$CACHE/pyverbs/"
    echo "$stamp" >"$CACHE/stamp"
fi

# pyverbs was built for the system's Python, and is linked to its library whichever Python of that version loads it.
python="$(basename "$CACHE"/pyverbs/pyverbs/device.*.so | sed -n 's/.*cpython-3\([0-9]*\).*/python3.\1/p')"
[[ "$libraries" = *"lib$python.so.1.0"* ]] || install "lib$python"
if [ -x .venv/bin/python ] && [ ! -e ".venv/bin/$python" ]; then
    missing "pyverbs here is for $python, .venv has another: rm -rf .venv; PYTHON=$python make setup"
fi

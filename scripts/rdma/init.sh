#!/bin/busybox sh
# First program of the guest, in its initial root: modules, then the host's / (read-only) under a layer in memory.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module"; done </modules/order
options=trans=virtio,version=9p2000.L,msize=1048576
$b mount -t 9p -o ro,cache=loose,$options host /low || exec $b poweroff -f
$b mount -t tmpfs -o size=90% up /up
$b mkdir /up/upper /up/work
$b mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work root /new || exec $b poweroff -f
for folder in proc sys dev; do $b mount --move /$folder /new/$folder; done
$b mkdir -p /new/run/rdma-guest
$b mount -t 9p -o cache=none,$options control /new/run/rdma-guest
exec $b switch_root /new /bin/bash /run/rdma-guest/boot

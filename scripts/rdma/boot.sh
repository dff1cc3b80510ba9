#!/bin/bash
# Process 1 of the guest: makes two soft-RoCE NICs, rxe0 and rxe1, runs the command and turns the guest off.
#
#   rxe0 = roce0 (10.99.0.1) ──┐
#                            switch       two cables, so that a NIC that goes down takes only itself down
#   rxe1 = roce1 (10.99.0.2) ──┘
control=/run/rdma-guest
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sfn "fd/${n%:*}" "/dev/${n#*:}"; done
hostname rdma-guest
ulimit -l unlimited
ulimit -n 65536

network() {
    local i
    # Both addresses are this machine's own. So that what goes from one NIC to the other takes the cable and not lo,
    # routes asked for by NIC (soft RoCE does) come before local ones, packets from an own address are accepted, and
    # only the interface that has an address answers for it.
    # Nothing else is set up by hand: a NIC that was down and comes up again works again.
    sysctl -qw net.ipv4.conf.{all,default}.rp_filter=0 net.ipv4.conf.{all,default}.accept_local=1 \
        net.ipv4.conf.{all,default}.arp_ignore=1 net.ipv6.conf.{all,default}.accept_dad=0
    ip link set lo up
    ip link add switch mtu 9000 type bridge mcast_snooping 0
    ip link set switch up
    for i in 0 1; do
        ip link add "roce$i" address "02:00:00:00:00:0$((i + 1))" mtu 9000 numtxqueues 1 \
            type veth peer name "cable$i" mtu 9000
        ip link set "cable$i" master switch up
        ip address add "10.99.0.$((i + 1))/24" dev "roce$i"
        ip link set "roce$i" up
        ip rule add pref "$((i + 1))" oif "roce$i" to "10.99.0.$((2 - i))" lookup main
    done
    ip rule add pref 10 lookup local
    ip rule del pref 0
    for i in 0 1; do rdma link add "rxe$i" type rxe netdev "roce$i" || return; done
}

if network; then
    for port in /sys/class/virtio-ports/*; do
        case "$(cat "$port/name")" in
        out) out="/dev/${port##*/}" ;;
        err) err="/dev/${port##*/}" ;;
        esac
    done
    cut -d' ' -f1 /proc/uptime >$control/up
    # A session of its own, so that no program takes the console for a terminal.
    setsid bash $control/command </dev/null >"$out" 2>"$err"
    echo $? >$control/status
fi
sync
echo o >/proc/sysrq-trigger
while :; do sleep 1; done

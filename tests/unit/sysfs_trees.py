"""Sysfs trees of machine shapes, written by the formats that the kernel documents.

As in a real sysfs the devices are directories below ``devices`` and everything else is links to them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

ZERO_GID = ":".join(["0000"] * 8)
Gids = Sequence[tuple[str, str]]
"""(address, type as sysfs says it), by index."""


def ipv4_gid(address: str) -> str:
    a, b, c, d = map(int, address.split("."))
    return f"0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}"


class Tree:
    """A sysfs root being written."""

    def __init__(self, root: Path, nodes: Sequence[str] = ("0-15",)) -> None:
        self.root = root
        self.write("class/net/.keep", "")
        for number, cpus in enumerate(nodes):
            self.write(f"devices/system/node/node{number}/cpulist", cpus)
        self.interface("lo", "", kind="772", state="unknown")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def link(self, link: str, target: str) -> None:
        path = self.root / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(self.root / target, path.parent))

    def function(self, path: str, klass: str, vendor: str, numa: int, lanes: tuple[str, int] | None) -> str:
        """A PCI function below the bridges that `path` names; returns its directory."""
        at = f"devices/{path}"
        if not (self.root / at / "class").exists():
            self.write(f"{at}/class", klass)
            self.write(f"{at}/vendor", vendor)
            self.write(f"{at}/numa_node", str(numa))
            self.link(f"bus/pci/devices/{Path(path).name}", at)
        if lanes:
            self.write(f"{at}/current_link_speed", f"{lanes[0]} GT/s PCIe")
            self.write(f"{at}/current_link_width", str(lanes[1]))
        return at

    def gpu(self, path: str, numa: int = 0) -> None:
        self.function(path, "0x030200", "0x10de", numa, ("32.0", 16))

    def interface(
        self, name: str, path: str, *, numa: int = -1, state: str = "up", megabits: int = -1, kind: str = "1"
    ) -> str:
        """A network interface: of a PCI function, or virtual if `path` is empty."""
        if path:
            self.function(path, "0x020000", "0x15b3", numa, None)
        at = f"devices/{path}/net/{name}" if path else f"devices/virtual/net/{name}"
        self.write(f"{at}/type", kind)
        self.write(f"{at}/operstate", state)
        self.write(f"{at}/speed", str(megabits))
        self.write(f"{at}/dev_port", "0")
        self.link(f"class/net/{name}", at)
        return at

    def rdma(
        self,
        name: str,
        path: str,
        *,
        rate: str = "400 Gb/sec (4X NDR)",
        link_layer: str = "InfiniBand",
        state: str = "4: ACTIVE",
        numa: int = 0,
        lanes: tuple[str, int] = ("32.0", 16),
        gids: Gids = (("fe80:0000:0000:0000:a088:c203:0012:3456", "IB/RoCE v1"),),
        netdev: str = "",
        ports: int = 1,
    ) -> None:
        """An RDMA device: of a PCI function, or soft if `path` is empty."""
        if path:
            self.function(path, "0x020700", "0x15b3", numa, lanes)
        at = f"devices/{path}/infiniband/{name}" if path else f"devices/virtual/infiniband/{name}"
        self.write(f"{at}/node_guid", "a088:c203:0012:3456")
        if not path:
            self.write(f"{at}/parent", netdev)
        for number in range(1, ports + 1):
            port = f"{at}/ports/{number}"
            self.write(f"{port}/state", state)
            self.write(f"{port}/rate", rate)
            self.write(f"{port}/link_layer", link_layer)
            for index in range(len(gids) + 2):
                gid, kind = gids[index] if index < len(gids) else (ZERO_GID, "")
                self.write(f"{port}/gids/{index}", gid)
                # Reading a type or an interface that is not set fails with EINVAL: here, it is not there.
                if kind:
                    self.write(f"{port}/gid_attrs/types/{index}", kind)
                    if netdev:
                        self.write(f"{port}/gid_attrs/ndevs/{index}", netdev)
        self.link(f"class/infiniband/{name}", at)


def roce(address: str) -> Gids:
    """What a RoCE port with one IPv4 address shows: link-local and IPv4, each in both versions."""
    local = "fe80:0000:0000:0000:ba3f:d2ff:fe00:0001"
    return [(gid, kind) for gid in (local, ipv4_gid(address)) for kind in ("IB/RoCE v1", "RoCE v2")]


DGX_COMPUTE = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")
"""By GPU, each under the GPU's own PCIe switch; the first four belong to node 0."""


def dgx_h100(root: Path) -> None:
    """8 GPUs, each with a 400 Gb/s NIC under its PCIe switch; per socket a storage NIC apart from them."""
    tree = Tree(root, ("0-55,112-167", "56-111,168-223"))
    for gpu, (bus, nic) in enumerate(
        zip((0x15, 0x37, 0x48, 0x59, 0x97, 0xB7, 0xC7, 0xD7), DGX_COMPUTE, strict=True)
    ):
        numa = gpu // 4
        switch = f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        tree.gpu(f"{switch}/0000:{bus + 2:02x}:00.0/0000:{bus + 3:02x}:00.0", numa)
        card = f"{switch}/0000:{bus + 2:02x}:02.0/0000:{bus + 4:02x}:00.0"
        tree.interface(f"ib{gpu}", card, numa=numa, megabits=400000, kind="32")
        tree.rdma(nic, card, numa=numa)
    for numa, (bus, nic) in enumerate(((0x26, "mlx5_1"), (0xA7, "mlx5_7"))):
        card = f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        netdev = f"enp{bus + 1}s0"
        tree.interface(netdev, card, numa=numa, megabits=200000)
        gids = roce(f"10.1.{numa}.1")
        tree.rdma(
            nic,
            card,
            numa=numa,
            rate="200 Gb/sec (4X HDR)",
            link_layer="Ethernet",
            gids=gids,
            netdev=netdev,
            lanes=("16.0", 16),
        )
    tree.interface("eno3", "pci0000:00/0000:00:1c.0/0000:0b:00.0", numa=0, megabits=10000)


def two_sockets(root: Path) -> None:
    """No GPU; four 100 Gb/s RoCE NICs, two per socket; mlx5_3 has lost its link."""
    tree = Tree(root, ("0-31", "32-63"))
    for number, bus in enumerate((0x17, 0x31, 0x98, 0xB1)):
        numa, up = number // 2, number != 3
        card = f"pci0000:{bus:02x}/0000:{bus:02x}:02.0/0000:{bus + 1:02x}:00.0"
        netdev = f"ens{number}np0"
        tree.interface(netdev, card, numa=numa, megabits=100000 if up else -1, state="up" if up else "down")
        tree.rdma(
            f"mlx5_{number}",
            card,
            numa=numa,
            rate="100 Gb/sec (4X EDR)" if up else "40 Gb/sec (4X QDR)",
            link_layer="Ethernet",
            state="4: ACTIVE" if up else "1: DOWN",
            gids=roce(f"10.0.{number}.7"),
            netdev=netdev,
            lanes=("16.0", 16),
        )


def cloud_vm(root: Path) -> None:
    """One GPU and one virtual NIC without a speed on a flat bus; NUMA nodes are not told. And Docker."""
    tree = Tree(root, ("0-7",))
    tree.gpu("pci0000:00/0000:00:1e.0", numa=-1)
    tree.interface("ens5", "pci0000:00/0000:00:05.0")
    tree.interface("docker0", "")


def no_nic(root: Path) -> None:
    """A container that was given the loopback interface only."""
    Tree(root)


def soft_roce(root: Path) -> None:
    """rxe0 over a virtual interface, rxe1 over a real one, as `rdma link add` makes them."""
    tree = Tree(root, ("0-1",))
    tree.interface("roce0", "", megabits=10000)
    tree.interface("eth1", "pci0000:00/0000:00:04.0", numa=0, megabits=10000)
    for name, netdev, address in (("rxe0", "roce0", "10.99.0.1"), ("rxe1", "eth1", "10.99.0.2")):
        gids = [("fe80:0000:0000:0000:0000:00ff:fe00:0001", "RoCE v2"), (ipv4_gid(address), "RoCE v2")]
        tree.rdma(
            name, "", rate="10 Gb/sec (1X FDR10)", link_layer="Ethernet", gids=gids, netdev=netdev, numa=-1
        )


SHAPES = (dgx_h100, two_sockets, cloud_vm, no_nic, soft_roce)

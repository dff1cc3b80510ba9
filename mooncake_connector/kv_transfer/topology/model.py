"""What a host is made of, as far as moving bytes goes: NUMA nodes, GPUs, NICs and how far apart they are."""

import enum
import ipaddress
from collections.abc import Iterable
from typing import Literal

import msgspec

Kind = Literal["rdma", "tcp"]
ACTIVE = "ACTIVE"


class Distance(enum.IntEnum):
    """How two PCIe devices are connected, in the words of ``nvidia-smi topo``; nearest first."""

    PIX = 0
    """One PCIe switch (or one card) holds both."""
    PXB = 1
    """Several PCIe bridges, but not the CPU's host bridge."""
    PHB = 2
    """Through one host bridge."""
    NODE = 3
    """Through two host bridges of one NUMA node."""
    SYS = 4
    """Between NUMA nodes, or not known."""


class Gid(msgspec.Struct, frozen=True, order=True):
    """One address of an RDMA port.

    Attributes:
        index: what a queue pair names it by.
        gid: eight groups of four hex digits.
        type: ``RoCE v2``, ``RoCE v1`` or ``IB``.
        netdev: network interface whose address it is; empty on InfiniBand.
    """

    index: int
    gid: str
    type: str
    netdev: str

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The IP address it stands for."""
        six = ipaddress.IPv6Address(self.gid)
        return six.ipv4_mapped or six


class Node(msgspec.Struct, frozen=True):
    """A NUMA node.

    Attributes:
        id: its number.
        cpus: as the kernel lists them (``0-55,112-167``); empty for memory without CPUs.
    """

    id: int
    cpus: str = ""


class Gpu(msgspec.Struct, frozen=True):
    """An NVIDIA GPU.

    Attributes:
        index: NVML's number; without NVML the place in PCI order, which is the same unless GPUs are hidden.
            CUDA counts otherwise under CUDA_VISIBLE_DEVICES: `address` tells which one it is.
        address: on the PCI bus, ``0000:18:00.0``.
        numa: NUMA node, -1 if unknown.
        pci: host bridge, then every bridge down to the device itself; empty if unknown.
        name: product, from NVML.
    """

    index: int
    address: str
    numa: int = -1
    pci: tuple[str, ...] = ()
    name: str = ""

    @property
    def location(self) -> str:
        """As memory regions name it, ``cuda:1``."""
        return f"cuda:{self.index}"


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """One port of an RDMA device, or a network interface that belongs to none.

    Attributes:
        name: unique on the host: the device's, with ``:PORT`` after it where the device has several ports.
        kind: ``rdma``, or ``tcp`` for a plain network interface.
        device: what verbs (or the kernel) calls the device.
        port: of the RDMA device, from 1; 0 for a plain interface.
        state: ``ACTIVE``, or what else the port says (``DOWN``, ``INIT``, ``ARMED``).
        speed: of the link [bytes/s], 0 if unknown.
        pcie: of its PCIe link as trained [bytes/s], 0 if unknown.
        numa: NUMA node, -1 if unknown.
        link_layer: ``InfiniBand`` or ``Ethernet``.
        netdev: network interface on top of the port, empty if there is none.
        guid: of the RDMA device.
        pci: host bridge, then every bridge down to the device itself; empty for soft and virtual ones.
        gids: of the port, by index; empty for a plain interface.
    """

    name: str
    kind: Kind
    device: str
    port: int = 0
    state: str = "DOWN"
    speed: float = 0.0
    pcie: float = 0.0
    numa: int = -1
    link_layer: str = "Ethernet"
    netdev: str = ""
    guid: str = ""
    pci: tuple[str, ...] = ()
    gids: tuple[Gid, ...] = ()

    @property
    def active(self) -> bool:
        """Whether bytes can go over it now."""
        return self.state == ACTIVE

    @property
    def bandwidth(self) -> float:
        """What it can carry [bytes/s]: the slower of link and PCIe, 0 if neither is known."""
        return min((speed for speed in (self.speed, self.pcie) if speed), default=0.0)


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """One host at one moment.

    Attributes:
        nodes: at least one.
        gpus: by index.
        nics: by name.
        notes: what could not be found out, and the mend.
    """

    nodes: tuple[Node, ...] = (Node(0),)
    gpus: tuple[Gpu, ...] = ()
    nics: tuple[Nic, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def locations(self) -> tuple[str, ...]:
        """Everywhere memory can be: ``cpu:0``, ..., ``cuda:0``, ..."""
        return (*(f"cpu:{node.id}" for node in self.nodes), *(gpu.location for gpu in self.gpus))

    def kind(self) -> Kind:
        """The kind of NIC that bytes go over here: rdma if there is any."""
        return "rdma" if any(nic.kind == "rdma" for nic in self.nics) else "tcp"

    def distance(self, location: str, nic: Nic) -> Distance | None:
        """From memory at `location` to `nic`; None if the host has no such location."""
        if location not in self.locations:
            return None
        name, number = location.split(":")
        if name == "cpu":
            return self._between_nodes(int(number), nic.numa)
        gpu = next(gpu for gpu in self.gpus if gpu.location == location)
        shared = _common(gpu.pci, nic.pci)
        if shared == 0:
            return self._between_nodes(gpu.numa, nic.numa)
        if shared == 1:
            return Distance.PHB
        # Below a shared bridge each side has at most its own port of the switch, and itself.
        return Distance.PIX if max(len(gpu.pci), len(nic.pci)) - shared <= 2 else Distance.PXB

    def _between_nodes(self, one: int, other: int) -> Distance:
        known = one >= 0 and other >= 0
        same = one == other if known else len(self.nodes) == 1
        return Distance.NODE if same else Distance.SYS


class Change(msgspec.Struct, frozen=True):
    """One difference between two moments.

    Attributes:
        kind: ``up`` and ``down``: the port's state; ``changed``: speed, addresses or place.
        nic: as it is now; as it was, if ``removed``.
    """

    kind: Literal["added", "removed", "up", "down", "changed"]
    nic: Nic


def differences(old: Iterable[Nic], new: Iterable[Nic]) -> tuple[Change, ...]:
    """What became of the NICs, by name."""
    before, after = {nic.name: nic for nic in old}, {nic.name: nic for nic in new}
    changes = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            changes.append(Change("added", now) if now else Change("removed", before[name]))
        elif was.active != now.active:
            changes.append(Change("up" if now.active else "down", now))
        elif was != now:
            changes.append(Change("changed", now))
    return tuple(changes)


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many components two paths share from their start."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared

"""What sysfs says about NUMA nodes, GPUs and NICs.

Formats: the kernel's Documentation/ABI, files sysfs-class-infiniband, sysfs-class-net, sysfs-bus-pci and
sysfs-devices-node.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mooncake_connector.kv_transfer.topology.model import ACTIVE, Gid, Gpu, Nic, Node, Topology
from mooncake_connector.kv_transfer.topology.refine import refine
from mooncake_connector.kv_transfer.topology.sysfs import Recorder, Sysfs

SYS = Path("/sys")
_NVIDIA = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
_ETHERNET, _INFINIBAND = "1", "32"
"""ARPHRD_ETHER and ARPHRD_INFINIBAND, of /sys/class/net/*/type."""

_Known = Mapping[tuple[str, int], tuple[Gid, ...]]
"""Addresses by device and port."""

_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
_GID = re.compile(r"([0-9a-f]{4}:){7}[0-9a-f]{4}")
_FUNCTION = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_OLD_RATES = {"2.5": 0.8, "5.0": 0.8, "64.0": 242 / 256}
"""PCIe rates [GT/s] whose share of payload bits is not 128/130."""


def discover(sysfs: Path = SYS) -> Topology:
    """The host's topology, or a recorded one.

    NVML and verbs refine this host's, where they are installed. Never fails: what can't be read is left out.

    Args:
        sysfs: ``/sys``, or a directory that `record` filled.
    """
    found = _read(Sysfs(sysfs))
    return refine(found) if sysfs == SYS else found


def discover_nics(sysfs: Path = SYS, known: Iterable[Nic] = ()) -> tuple[Nic, ...]:
    """The NICs alone: the part of a topology that changes while a host runs.

    Args:
        sysfs: as for `discover`.
        known: NICs whose addresses are taken over. To read them is most of the work: a port has up to 1024.
    """
    return _nics(Sysfs(sysfs), {(nic.device, nic.port): nic.gids for nic in known})


def glance(sysfs: Path = SYS) -> tuple[str, ...]:
    """Equal as long as no NIC comes, goes, or changes state; much cheaper than `discover_nics`."""
    root = Sysfs(sysfs)
    patterns = ("class/infiniband/*/ports/*/state", "class/infiniband_verbs/*/ibdev", "class/net/*/operstate")
    states = [path for pattern in patterns for path in root.root.glob(pattern)]
    return tuple(sorted(f"{path} {root.text(path)}" for path in states))


def record(copy: Path, sysfs: Path = SYS) -> int:
    """Copy what `discover` reads into `copy` (created); returns how many files that were.

    Raises:
        OSError: `copy` can't be written.
    """
    copy.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(sysfs, copy)
    _read(recorder)
    return recorder.files


def _read(sysfs: Sysfs) -> Topology:
    return Topology(nodes=_nodes(sysfs), gpus=_gpus(sysfs), nics=_nics(sysfs))


def _nodes(sysfs: Sysfs) -> tuple[Node, ...]:
    found = []
    for path in sysfs.children(sysfs.root / "devices/system/node"):
        if number := re.fullmatch(r"node(\d+)", path.name):
            found.append(Node(int(number[1]), sysfs.text(path / "cpulist")))
    return tuple(sorted(found, key=lambda node: node.id)) or (Node(0),)


def _gpus(sysfs: Sysfs) -> tuple[Gpu, ...]:
    found: list[Gpu] = []
    for link in sysfs.children(sysfs.root / "bus/pci/devices"):
        if not sysfs.peek(link / "class").startswith(_DISPLAY_CLASSES) or (path := sysfs.real(link)) is None:
            continue
        if sysfs.text(path / "class") and sysfs.text(path / "vendor") == _NVIDIA:
            found.append(Gpu(len(found), path.name, _numa(sysfs, path), _pci_path(path)))
    return tuple(found)


def _nics(sysfs: Sysfs, known: _Known | None = None) -> tuple[Nic, ...]:
    # A device that is being removed loses its verbs first, and stays in sysfs until nobody has it open.
    verbs = sysfs.children(sysfs.root / "class/infiniband_verbs")
    usable = {sysfs.text(path / "ibdev") for path in verbs}
    rdma = [
        nic
        for link in sysfs.children(sysfs.root / "class/infiniband")
        if not verbs or link.name in usable
        for nic in _ports(sysfs, link, known or {})
    ]
    taken = {nic.netdev for nic in rdma}
    plain = [
        nic
        for link in sysfs.children(sysfs.root / "class/net")
        if link.name not in taken and (nic := _interface(sysfs, link))
    ]
    return tuple(sorted([*rdma, *plain], key=lambda nic: _natural(nic.name)))


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts mlx5_10 after mlx5_2."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _ports(sysfs: Sysfs, link: Path, known: _Known) -> list[Nic]:
    """All ports of an RDMA device."""
    if (path := sysfs.real(link)) is None:
        return []
    numbers = sorted(int(port.name) for port in sysfs.children(path / "ports") if port.name.isdecimal())
    guid = sysfs.text(path / "node_guid")
    found = []
    for number in numbers:
        port = path / "ports" / str(number)
        link_layer = sysfs.text(port / "link_layer")
        gids = known.get((path.name, number)) or _gids(sysfs, port, link_layer)
        netdev = next((gid.netdev for gid in gids if gid.netdev), "") or _netdev(sysfs, path, number)
        place = path
        if not _pci_path(path):
            # A soft device (rxe, siw) sits where the interface does that it runs over.
            place = sysfs.real(sysfs.root / "class/net" / netdev) or path
        nic = Nic(
            name=path.name if len(numbers) == 1 else f"{path.name}:{number}",
            kind="rdma",
            device=path.name,
            port=number,
            state=sysfs.text(port / "state").partition(": ")[2] or "DOWN",
            speed=_rate(sysfs.text(port / "rate")),
            pcie=_pcie(sysfs, place),
            numa=_numa(sysfs, place),
            link_layer=link_layer,
            netdev=netdev,
            guid=guid,
            pci=_pci_path(place),
            gids=gids,
        )
        found.append(nic)
    return found


def _gids(sysfs: Sysfs, port: Path, link_layer: str) -> tuple[Gid, ...]:
    found = []
    for path in (path for path in sysfs.children(port / "gids") if path.name.isdecimal()):
        # All but a few are zero.
        if set(sysfs.peek(path)) <= set("0:") or not _GID.fullmatch(gid := sysfs.text(path)):
            continue
        kind = sysfs.text(port / "gid_attrs/types" / path.name)
        if kind == "IB/RoCE v1" or not kind:
            kind = "RoCE v1" if link_layer == "Ethernet" else "IB"
        found.append(Gid(int(path.name), gid, kind, sysfs.text(port / "gid_attrs/ndevs" / path.name)))
    return tuple(sorted(found))


def _netdev(sysfs: Sysfs, path: Path, port: int) -> str:
    """The interface of a port that has no GID yet: a soft device names it, else its PCI function has it."""
    if not _pci_path(path):
        return sysfs.text(path / "parent")
    for interface in sysfs.children(path.parent.parent / "net"):
        if sysfs.text(interface / "dev_port") == str(port - 1):
            return interface.name
    return ""


def _interface(sysfs: Sysfs, link: Path) -> Nic | None:
    """A network interface that is a NIC: hardware, or a bond; neither the parts of a bond nor a bridge."""
    path = sysfs.real(link)
    if path is None or not (_is_bond(sysfs, path) or "virtual" not in path.relative_to(sysfs.root).parts):
        return None
    master = sysfs.real(path / "master")
    kind = sysfs.text(path / "type")
    if kind not in (_ETHERNET, _INFINIBAND) or (master and _is_bond(sysfs, master)):
        return None
    megabits = sysfs.text(path / "speed")
    return Nic(
        name=path.name,
        kind="tcp",
        device=path.name,
        state=ACTIVE if sysfs.text(path / "operstate") == "up" else "DOWN",
        speed=int(megabits) * 1e6 / 8 if megabits.isdecimal() else 0.0,
        pcie=_pcie(sysfs, path),
        numa=_numa(sysfs, path),
        link_layer="InfiniBand" if kind == _INFINIBAND else "Ethernet",
        netdev=path.name,
        pci=_pci_path(path),
    )


def _is_bond(sysfs: Sysfs, path: Path) -> bool:
    return sysfs.text(path / "bonding/mode") != ""


def _pci_path(path: Path) -> tuple[str, ...]:
    """Host bridge and PCI functions on the way to a device."""
    parts = [part for part in path.parts if _HOST_BRIDGE.fullmatch(part) or _FUNCTION.fullmatch(part)]
    return tuple(parts)


def _function(path: Path) -> Path | None:
    """The directory of the PCI function that a device belongs to."""
    return next((at for at in (path, *path.parents) if _FUNCTION.fullmatch(at.name)), None)


def _numa(sysfs: Sysfs, path: Path) -> int:
    function = _function(path)
    text = sysfs.text(function / "numa_node") if function else ""
    return int(text) if text.isdecimal() else -1


def _pcie(sysfs: Sysfs, path: Path) -> float:
    """Bandwidth of a PCI function's link [bytes/s]; 0 if it has none (virtual functions, emulated cards)."""
    if (function := _function(path)) is None:
        return 0.0
    rate = re.match(r"([\d.]+) GT/s", sysfs.text(function / "current_link_speed"))
    width = sysfs.text(function / "current_link_width")
    if rate is None or not width.isdecimal():
        return 0.0
    return float(rate[1]) * 1e9 / 8 * int(width) * _OLD_RATES.get(rate[1], 128 / 130)


def _rate(text: str) -> float:
    """``400 Gb/sec (4X NDR)`` in bytes/s."""
    rate = re.match(r"([\d.]+) Gb/sec", text)
    return float(rate[1]) * 1e9 / 8 if rate else 0.0

"""``mooncake-connector topology``: the host and its matrix, for people and as JSON."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.topology.discovery import SYS, discover, record
from mooncake_connector.kv_transfer.topology.gid import choose_gid
from mooncake_connector.kv_transfer.topology.matrix import Matrix, NicRules
from mooncake_connector.kv_transfer.topology.model import Gpu, Nic, Topology


def run(options: dict[str, Any]) -> str:
    """What the command prints.

    Args:
        options: ``sysfs``, ``override`` and ``record`` (a path or None), ``allow`` and ``deny`` (lists or
            None), ``json``.

    Raises:
        ConfigError: A directory or file does not fit, or a name is not there.
    """
    sysfs = Path(options["sysfs"] or SYS)
    if not sysfs.is_dir():
        raise ConfigError(f"--sysfs {sysfs} is no directory: give one that --record has filled")
    if options["record"]:
        return _record(Path(options["record"]), sysfs)
    rules = NicRules.of(options["allow"] or (), options["deny"] or (), options["override"])
    topology = discover(sysfs)
    rules.check(topology)
    matrix = Matrix.of(topology, rules)
    return as_json(topology, matrix) if options["json"] else "\n".join(as_text(topology, matrix, rules))


def as_json(topology: Topology, matrix: Matrix) -> str:
    """The topology, the distance from every location to every NIC, and the matrix in Mooncake's shape."""
    distances = {
        location: {nic.name: _distance(topology, location, nic) for nic in topology.nics}
        for location in topology.locations
    }
    gids = {nic.name: gid.index for nic in topology.nics if (gid := _gid(nic))}
    plain = {"topology": topology, "distances": distances, "gids": gids, "matrix": matrix.choices}
    return msgspec.json.format(msgspec.json.encode(plain)).decode()


def as_text(topology: Topology, matrix: Matrix, rules: NicRules) -> Iterator[str]:
    """The topology as a tree, line by line, then the matrix."""
    known = {node.id for node in topology.nodes}
    if len(known) == 1:
        known.add(-1)
    for node in topology.nodes:
        yield f"NUMA node {node.id}: CPUs {node.cpus or 'none listed'}"
        yield from _devices(topology, known if -1 in known else {node.id})
    if elsewhere := list(_devices(topology, {device.numa for device in _all(topology)} - known)):
        yield "NUMA node unknown"
        yield from elsewhere
    if not topology.nics:
        yield "no NIC found"
    kind = topology.kind()
    yield f"\nMatrix of {kind} NICs, preferred first (xN: a byte is taken to need N times as long)"
    width = max(map(len, matrix.choices))
    for location in matrix.choices:
        yield f"  {location:<{width}}  {_row(matrix, location)}"
    unused = [nic for nic in topology.nics if nic.kind == kind and not (nic.active and rules.admits(nic))]
    for nic in unused:
        yield f"  not used: {nic.name} ({nic.state if rules.admits(nic) else 'allow or deny list'})"
    for note in topology.notes:
        yield f"note: {note}"


def _record(copy: Path, sysfs: Path) -> str:
    if copy.exists() and any(copy.iterdir()):
        raise ConfigError(f"--record {copy} is not empty: name a new directory")
    try:
        files = record(copy, sysfs)
    except OSError as error:
        raise ConfigError(f"--record {copy} can't be written: {error.strerror}") from error
    return f"{files} files of {sysfs} are now in {copy}; GUIDs and GIDs among them tell this host's addresses"


def _all(topology: Topology) -> tuple[Gpu | Nic, ...]:
    return (*topology.gpus, *topology.nics)


def _devices(topology: Topology, nodes: set[int]) -> Iterator[str]:
    lines = [_line(topology, device) for device in _all(topology) if device.numa in nodes]
    for n, line in enumerate(lines, 1):
        yield f"{'└─' if n == len(lines) else '├─'} {line}"


def _line(topology: Topology, device: Gpu | Nic) -> str:
    if isinstance(device, Nic):
        pcie = f"PCIe {_speed(device.pcie)}" if device.pcie else ""
        over = f"over {device.netdev}" if device.netdev not in ("", device.name) else ""
        gid = f"GID {found.index} {found.type} {found.ip}" if (found := _gid(device)) else ""
        if device.kind == "rdma" and not gid:
            gid = "no GID that would do"
        parts = [device.kind, device.state, device.link_layer, _speed(device.speed), pcie, over, gid]
        return ", ".join([f"{device.name}: {parts[0]}", *filter(None, parts[1:])])
    near = {
        nic.name: topology.distance(device.location, nic)
        for nic in topology.nics
        if nic.kind == topology.kind()
    }
    least = min((d for d in near.values() if d is not None), default=None)
    nearest = [name for name, distance in near.items() if distance == least]
    at = f", {least.name} to {' '.join(nearest)}" if least is not None else ""
    return f"{device.location}: {device.name or 'NVIDIA GPU'}, {device.address}{at}"


def _row(matrix: Matrix, location: str) -> str:
    choice = matrix.choice(location)
    tiers = itertools.groupby(choice.secondary, lambda name: matrix.penalty(location, name))
    secondary = [f"x{penalty:g}: {' '.join(names)}" for penalty, names in tiers]
    return " | ".join([" ".join(choice.preferred) or "none", *secondary])


def _gid(nic: Nic) -> Any:
    try:
        return choose_gid(nic) if nic.kind == "rdma" else None
    except ConfigError:
        return None


def _distance(topology: Topology, location: str, nic: Nic) -> str | None:
    distance = topology.distance(location, nic)
    return None if distance is None else distance.name


def _speed(speed: float) -> str:
    return f"{speed * 8 / 1e9:.4g} Gb/s" if speed else "speed unknown"

"""Which NICs are open as the host changes, and what follows for links: on faked NICs."""

from typing import Any

import pytest
from msgspec.structs import replace

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer import fabric
from mooncake_connector.kv_transfer.fabric import Fabric, open_fabric
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.topology import Change, Gpu, Node, Topology
from mooncake_connector.kv_transfer.topology.gid import choose_gid
from mooncake_connector.kv_transfer.topology.model import Gid, Nic
from mooncake_connector.kv_transfer.transport.rdma import RdmaDevices, devices, verbs

GIDS = (
    Gid(0, "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2", "eth0"),
    Gid(1, "0000:0000:0000:0000:0000:ffff:0a00:0002", "RoCE v2", "eth0"),
)


def port(name: str, state: str = "ACTIVE", gids: tuple[Gid, ...] = GIDS, **more: Any) -> Nic:
    return Nic(name=name, kind="rdma", device=name, port=1, state=state, gids=gids, **more)


class FakeNic:
    made: list["FakeNic"] = []  # noqa: RUF012 - emptied for each test
    refuses: set[str] = set()  # noqa: RUF012 - emptied for each test

    def __init__(self, nic: Nic, poller: object, gid_index: int | None) -> None:
        if nic.name in self.refuses:
            raise TransportError(f"{nic.name} refuses")
        self.address = choose_gid(nic, gid_index)
        self.label, self.gid, self.closed = nic.name, self.address.gid, False
        self.regions: list[Region] = []
        FakeNic.made.append(self)

    def still(self, nic: Nic) -> bool:
        return self.address in nic.gids

    def register(self, region: Region) -> None:
        if f"memory of {self.label}" in self.refuses:
            raise TransportError("no memory")
        self.regions.append(region)

    def deregister(self, region: Region) -> None:
        self.regions.remove(region)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNic.made.clear()
    FakeNic.refuses.clear()
    monkeypatch.setattr(devices, "RdmaNic", FakeNic)
    monkeypatch.setattr(verbs, "unavailable", lambda: None)
    monkeypatch.setattr(fabric, "unavailable", lambda: None)


def labels(found: RdmaDevices) -> list[str]:
    return [nic.label for nic in found.nics]


def test_nics_are_opened_when_they_come_up_and_closed_when_they_are_gone() -> None:
    a, b = port("a"), port("b")
    eth = Nic(name="eth0", kind="tcp", device="eth0", state="ACTIVE")
    found = RdmaDevices([a, port("b", "DOWN"), eth])
    assert labels(found) == ["a"]
    first = found.nics[0]
    found.refresh([a, b, eth])
    assert labels(found) == ["a", "b"]
    found.refresh([port("a", "DOWN"), b, eth])
    assert labels(found) == ["a", "b"], "a port that goes down stays open"
    assert found.nics[0] is first
    found.refresh([b, eth])
    assert labels(found) == ["b"]
    assert FakeNic.made[0].closed
    found.refresh([a, b, eth])
    assert labels(found) == ["a", "b"]
    assert found.nics[0] is not first
    found.close()
    assert all(nic.closed for nic in FakeNic.made)


def test_a_nic_whose_address_is_gone_is_opened_anew() -> None:
    found = RdmaDevices([port("a")])
    found.refresh([port("a", speed=1.0)])
    assert len(FakeNic.made) == 1
    found.refresh([port("a", gids=GIDS[1:])])
    assert [nic.closed for nic in FakeNic.made] == [True, False]
    assert found.nics[0].gid == GIDS[1].gid
    found.refresh([port("a", gids=())])
    assert not found.nics, "there is no address to open it with"
    found.refresh([port("a")])
    assert labels(found) == ["a"]
    found.close()


def test_a_nic_gets_all_memory_that_is_registered() -> None:
    part, whole = Region(5000, 100), Region(4096, 4096)
    found = RdmaDevices([port("a")])
    found.register(whole)
    found.register(part)
    found.register(whole)
    found.refresh([port("a"), port("b")])
    assert FakeNic.made[1].regions == [whole, whole, part]
    for region in (whole, whole, part):
        found.deregister(region)
    assert not FakeNic.made[1].regions
    assert not found.regions
    found.close()


def test_a_nic_that_cannot_be_opened_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    found = RdmaDevices([port("a")])
    found.register(Region(4096, 4096))
    for refusal in ("b", "memory of b"):
        FakeNic.refuses = {refusal}
        found.refresh([port("a"), port("b")])
        assert labels(found) == ["a"]
        assert "rdma: b is not used" in caplog.text
    assert FakeNic.made[-1].closed
    FakeNic.refuses = set()
    found.refresh([port("a"), port("b")])
    assert labels(found) == ["a", "b"]
    found.close()


def test_what_the_settings_demand_has_to_be_there_at_the_start() -> None:
    with pytest.raises(ConfigError, match="rdma_gid_index=7: on a that index does not exist"):
        RdmaDevices([port("a")], gid_index=7)
    FakeNic.refuses = {"a", "b"}
    with pytest.raises(TransportError, match="a refuses; b refuses"):
        RdmaDevices([port("a"), port("b")])
    FakeNic.refuses = {"a"}
    found = RdmaDevices([port("a"), port("b")])
    assert labels(found) == ["b"]
    found.close()


# ---------------------------------------------------------------------- the fabric

NEAR_GPU = ("pci0000:00", "0000:00:01.0")
HOST = Topology(
    nodes=(Node(0), Node(1)),
    gpus=(Gpu(0, "0000:02:00.0", 1, (*NEAR_GPU, "0000:02:00.0")),),
    nics=(port("a", numa=0), port("b", numa=1, pci=(*NEAR_GPU, "0000:03:00.0"))),
)


class FakeWatcher:
    def __init__(self, topology: Topology, listener: Any) -> None:
        self.tell = listener

    def close(self) -> None:
        pass


class Told:
    """A link, or the target, that counts how often it was told of changes."""

    def __init__(self) -> None:
        self.times = 0

    def refresh(self) -> None:
        self.times += 1


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> list[Topology]:
    host = [HOST]
    monkeypatch.setattr(fabric, "discover", lambda: host[0])
    monkeypatch.setattr(fabric, "Watcher", FakeWatcher)
    return host


def made(**settings: Any) -> tuple[Fabric, Told]:
    fabric = Fabric(TransferConfig(**settings), lambda topic, handler: None)
    link: Any = Told()
    fabric._rails.add(link)
    return fabric, link


def test_links_hear_of_rdma_nics_and_of_nothing_else(host: list[Topology]) -> None:
    fabric, link = made(rdma_devices="a,b*")
    watcher: Any = fabric._watcher
    eth = Nic(name="eth0", kind="tcp", device="eth0")
    watcher.tell((Change("added", eth),), replace(HOST, nics=(*HOST.nics, eth)))
    assert link.times == 0
    b2, c = port("b2"), port("c")
    now = replace(HOST, nics=(*HOST.nics[:1], b2, c))
    watcher.tell((Change("added", b2), Change("added", c), Change("removed", HOST.nics[1])), now)
    assert link.times == 1
    assert [nic.label for nic in fabric._nics()] == ["a", "b2"], "c is none that the settings want"
    assert fabric.penalty("b") == float("inf")
    fabric.close()


def test_nics_near_most_of_the_memory_are_near(host: list[Topology]) -> None:
    fabric, link = made()
    assert (fabric.penalty("a"), fabric.penalty("b")) == (1.0, 2.0)
    fabric.register(Region(4096, 4096, "cpu:0"))
    assert link.times == 0
    fabric.register(Region(1 << 30, 8192, "cuda:0"))
    assert link.times == 1
    assert fabric.penalty("b") == 1.0
    assert fabric.penalty("a") > 1.0
    fabric.deregister(Region(1 << 30, 8192, "cuda:0"))
    assert link.times == 2
    assert fabric.penalty("a") == 1.0
    fabric.close()


def test_ports_that_are_all_down_are_waited_for_if_there_is_another_way(host: list[Topology]) -> None:
    down = tuple(replace(nic, state="DOWN") for nic in HOST.nics)
    host[0] = replace(HOST, nics=down)
    with pytest.raises(ConfigError, match=r"path=rdma: rdma: no port is active of a, b \(mend: "):
        open_fabric(TransferConfig(path="rdma"), lambda topic, handler: None)
    fabric, link = made()
    assert not fabric._nics()
    watcher: Any = fabric._watcher
    watcher.tell((Change("up", HOST.nics[1]),), replace(HOST, nics=(down[0], HOST.nics[1])))
    assert link.times == 1
    assert [nic.label for nic in fabric._nics()] == ["b"]
    fabric.close()


def test_settings_that_name_no_nic_are_refused(host: list[Topology]) -> None:
    with pytest.raises(
        ConfigError, match=r"rdma_devices='mlx9'.*names 'mlx9', which this host does not have"
    ):
        open_fabric(TransferConfig(rdma_devices="mlx9"), lambda topic, handler: None)

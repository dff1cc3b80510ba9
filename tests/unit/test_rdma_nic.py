"""A NIC's registrations, events and end, on faked verbs."""

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.topology.model import Gid, Nic
from mooncake_connector.kv_transfer.transport.rdma import nic as nic_module
from mooncake_connector.kv_transfer.transport.rdma import verbs
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic
from mooncake_connector.kv_transfer.transport.rdma.registration import Registered, Way

ACTIVE, PORT_ERR, DEVICE_FATAL, QP_FATAL, OTHER = 4, 10, 8, 1, 17

TOPOLOGY_NIC = Nic(
    name="mlx5_0",
    kind="rdma",
    device="mlx5_0",
    port=1,
    state="ACTIVE",
    speed=50e9,
    gids=(
        Gid(0, "fe80:0000:0000:0000:0000:0000:0000:0001", "RoCE v2", "eth0"),
        Gid(3, "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2", "eth0"),
    ),
)


class Fakes:
    """A device whose state, events and refusals the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = ACTIVE
        self.event: int | None = None
        self.refuses = False
        self.closed: list[str] = []
        self.ready: Any = None
        self._keys = iter(range(1, 100))
        fake: Any = self
        monkeypatch.setattr(verbs, "event_fd", lambda make: (fake, 7))
        monkeypatch.setattr(
            verbs, "PD", lambda _: SimpleNamespace(close=lambda: fake.closed.append("pd")), raising=False
        )
        monkeypatch.setattr(nic_module.registration, "makers", lambda pd, region: {})
        monkeypatch.setattr(nic_module.registration, "register", self._register)
        codes = SimpleNamespace(
            IBV_PORT_ACTIVE=ACTIVE,
            IBV_EVENT_PORT_ERR=PORT_ERR,
            IBV_EVENT_DEVICE_FATAL=DEVICE_FATAL,
            IBV_EVENT_QP_FATAL=QP_FATAL,
            IBV_EVENT_QP_REQ_ERR=2,
            IBV_EVENT_QP_ACCESS_ERR=3,
        )
        monkeypatch.setattr(verbs, "e", codes)
        self.nic = RdmaNic(TOPOLOGY_NIC, fake)

    # the poller

    def add(self, fd: int, on_ready: Any) -> None:
        assert fd == 7
        self.ready = on_ready

    def remove(self, fd: int, on_ready: Any) -> None:
        self.closed.append("events")

    # the context

    def query_device(self) -> Any:
        return SimpleNamespace(max_sge=30, max_qp_wr=1 << 15)

    def query_port(self, port: int) -> Any:
        if self.refuses:
            raise verbs.PyverbsError("no such device")
        return SimpleNamespace(state=self.state, active_mtu=5, lid=0, max_msg_sz=1 << 30)

    def get_async_event(self) -> Any:
        if self.event is None:
            raise verbs.PyverbsError("would block")
        kind, self.event = self.event, None
        return SimpleNamespace(event_type=kind, ack=lambda: None)

    def close(self) -> None:
        self.closed.append("context")

    # registration

    def _register(self, region: Region, label: str, makers: object) -> Registered:
        if self.refuses:
            raise TransportError("refused")
        key = next(self._keys)
        mr = SimpleNamespace(lkey=key, rkey=100 + key, close=lambda: self.closed.append(f"mr {key}"))
        return Registered(mr, region.address, Way.HOST)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def test_a_region_is_registered_once_and_counted(fakes: Fakes) -> None:
    nic, whole, part = fakes.nic, Region(4096, 4096), Region(5000, 100)
    nic.register(whole)
    nic.register(whole)
    nic.register(part)
    assert nic.rows() == [(4096, 4096, 4096, 101)]
    assert nic.local.key.tolist() == [0, 1]
    for region in (whole, part):
        nic.deregister(region)
    assert not fakes.closed
    nic.deregister(whole)
    assert fakes.closed == ["mr 1"]
    assert nic.rows() == []
    assert nic.local.key.tolist() == [0]


def test_regions_that_overlap_are_refused(fakes: Fakes) -> None:
    fakes.nic.register(Region(4096, 4096))
    fakes.nic.register(Region(8192, 4096))
    for region in (Region(4000, 200), Region(8000, 400), Region(0, 20000)):
        with pytest.raises(TransportError, match="register their union"):
            fakes.nic.register(region)
    assert len(fakes.nic.rows()) == 2


def test_what_a_nic_refuses_leaves_no_trace(fakes: Fakes) -> None:
    fakes.refuses = True
    with pytest.raises(TransportError, match="refused"):
        fakes.nic.register(Region(4096, 4096))
    fakes.refuses = False
    fakes.nic.register(Region(4096, 4096))
    assert len(fakes.nic.rows()) == 1


def test_the_gid_is_chosen_or_as_the_setting_says(fakes: Fakes) -> None:
    assert fakes.nic.gid_index == 3, "IPv4 before link-local"
    poller: Any = fakes
    assert RdmaNic(TOPOLOGY_NIC, poller, 0).gid_index == 0
    with pytest.raises(ConfigError, match="rdma_gid_index=1"):
        RdmaNic(TOPOLOGY_NIC, poller, 1)


def test_events_reach_those_who_listen(fakes: Fakes) -> None:
    heard: list[str] = []
    fakes.nic.listeners.append(heard.append)
    for event in (None, OTHER, PORT_ERR, QP_FATAL):
        fakes.event = event
        fakes.ready()
    assert heard == ["the port of mlx5_0 went down", ""]
    assert fakes.nic.problem() is None
    fakes.state = 1
    assert fakes.nic.problem() == "the port of mlx5_0 is down"
    fakes.refuses = True
    assert fakes.nic.problem() == "mlx5_0 does not answer: no such device"
    fakes.event = DEVICE_FATAL
    fakes.ready()
    assert "failed: it is used again once its driver has brought it back" in heard[-1]
    assert fakes.nic.problem() == heard[-1]
    assert not fakes.nic.still(TOPOLOGY_NIC)


def test_a_port_goes_on_while_it_has_its_address(fakes: Fakes) -> None:
    fewer = replace(TOPOLOGY_NIC, gids=TOPOLOGY_NIC.gids[:1])
    assert fakes.nic.still(replace(TOPOLOGY_NIC, speed=1.0))
    assert not fakes.nic.still(fewer)
    assert fakes.nic.still(replace(fewer, state="DOWN")), "addresses go with the port, and come back with it"


def test_it_closes_in_order(fakes: Fakes) -> None:
    fakes.nic.register(Region(4096, 4096))
    fakes.nic.close()
    assert fakes.closed == ["events", "mr 1", "pd", "context"]
    fakes.nic.close()
    assert fakes.closed.count("context") == 1


def test_whoever_holds_it_last_gives_it_back(fakes: Fakes) -> None:
    for _ in range(2):
        fakes.nic.hold()
    fakes.nic.close()
    fakes.nic.release()
    assert not fakes.closed
    with pytest.raises(TransportError, match="mlx5_0 is gone"):
        fakes.nic.hold()
    with pytest.raises(TransportError, match="mlx5_0 is gone"):
        fakes.nic.register(Region(4096, 4096))
    assert fakes.nic.problem() == "mlx5_0 is gone"
    fakes.event = PORT_ERR
    fakes.ready()
    assert fakes.event == PORT_ERR, "a device that is closed is not asked"
    fakes.nic.release()
    assert fakes.closed == ["events", "pd", "context"]

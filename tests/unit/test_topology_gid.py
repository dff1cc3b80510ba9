"""Which address of a port is used."""

from pathlib import Path

import pytest

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.topology import Gid, Nic, choose_gid, discover
from tests.unit.sysfs_trees import dgx_h100, ipv4_gid, soft_roce, two_sockets

LOCAL = "fe80:0000:0000:0000:ba3f:d2ff:fe00:0001"
GLOBAL = "2001:0db8:0000:0000:0000:0000:0000:0007"


def port(*gids: tuple[int, str, str, str], link_layer: str = "Ethernet") -> Nic:
    return Nic(
        name="mlx5_0",
        kind="rdma",
        device="mlx5_0",
        port=1,
        link_layer=link_layer,
        netdev="eth2",
        gids=tuple(Gid(*gid) for gid in gids),
    )


@pytest.mark.parametrize(
    ("gids", "chosen"),
    [
        ([(0, LOCAL, "RoCE v1"), (1, LOCAL, "RoCE v2"), (2, ipv4_gid("10.0.0.1"), "RoCE v1")], 1),
        ([(1, LOCAL, "RoCE v2"), (3, GLOBAL, "RoCE v2"), (5, ipv4_gid("10.0.0.1"), "RoCE v2")], 5),
        ([(1, LOCAL, "RoCE v2"), (3, GLOBAL, "RoCE v2")], 3),
        ([(3, ipv4_gid("10.0.0.1"), "RoCE v2"), (7, ipv4_gid("10.0.1.1"), "RoCE v2")], 3),
    ],
)
def test_roce_v2_over_ipv4_is_preferred(gids: list[tuple[int, str, str]], chosen: int) -> None:
    assert choose_gid(port(*((*gid, "eth2") for gid in gids))).index == chosen


def test_the_port_itself_before_its_vlans() -> None:
    vlan, own = (3, ipv4_gid("10.0.5.1"), "RoCE v2", "eth2.5"), (7, ipv4_gid("10.0.0.1"), "RoCE v2", "eth2")
    assert choose_gid(port(vlan, own)).index == 7


def test_wanted_index_wins() -> None:
    nic = port((1, LOCAL, "RoCE v2", "eth2"), (3, ipv4_gid("10.0.0.1"), "RoCE v2", "eth2"))
    assert choose_gid(nic, 1).index == 1


def test_infiniband_takes_its_first() -> None:
    nic = port((0, LOCAL, "IB", ""), (1, GLOBAL, "IB", ""), link_layer="InfiniBand")
    assert choose_gid(nic).index == 0
    assert choose_gid(nic, 1).index == 1


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (2, "rdma_gid_index=2: on mlx5_0 that index does not exist; usable there: 3 .RoCE v2 10.0.0.1."),
        (0, "rdma_gid_index=0: on mlx5_0 that index is RoCE v1"),
    ],
)
def test_a_wanted_index_that_will_not_do(wanted: int, says: str) -> None:
    nic = port((0, LOCAL, "RoCE v1", "eth2"), (3, ipv4_gid("10.0.0.1"), "RoCE v2", "eth2"))
    with pytest.raises(ConfigError, match=says):
        choose_gid(nic, wanted)


def test_a_port_without_roce_v2() -> None:
    with pytest.raises(ConfigError, match=r"no RoCE v2 address \(it has: 0 .*interface eth2 an IP address"):
        choose_gid(port((0, LOCAL, "RoCE v1", "eth2")))
    with pytest.raises(ConfigError, match="it has: none"):
        choose_gid(port(link_layer="InfiniBand"))


def test_on_recorded_machines(tmp_path: Path) -> None:
    for shape, name, index in ((dgx_h100, "mlx5_7", 3), (two_sockets, "mlx5_0", 3), (soft_roce, "rxe0", 1)):
        shape(tmp_path / name)
        nic = next(nic for nic in discover(tmp_path / name).nics if nic.name == name)
        assert choose_gid(nic).index == index
        assert choose_gid(nic).ip.version == 4

"""NICs that are taken away and come back while engines run, and settings that name none."""

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.engine import TransferEngine
from tests.rdma.nics import Cables, Nic, guest_only
from tests.rdma.test_failover import SIZE, Two, until


@pytest.fixture
def links(nics: list[Nic]) -> Iterator["Links"]:
    links = Links()
    yield links
    for nic in nics:
        links.add(nic)


class Links:
    """Takes RDMA devices off their interfaces, and puts them back."""

    def delete(self, nic: Nic) -> "subprocess.Popen[bytes]":
        """It ends when the device is gone: when nobody has it open any more."""
        return subprocess.Popen(["rdma", "link", "delete", nic.device])

    def add(self, nic: Nic) -> None:
        if f"{nic.device}/" not in subprocess.run(["rdma", "link"], capture_output=True, text=True).stdout:
            command = ["rdma", "link", "add", nic.device, "type", "rxe", "netdev", nic.netdev]
            subprocess.run(command, check=True)
        until(nic.active, 10)


def rails(two: Two, nic: Nic) -> list[str]:
    return [rail for rail in two.peer.outbound.rails if f"-{nic.device}-" in rail]


def whole(two: Two) -> None:
    """Write everything, all of it to land over rdma."""
    before = two.over("rdma")
    two.memory[:] = 0
    two.finish(two.initiator.write(two.peer, two.source, deadline=120))
    assert two.over("rdma") - before >= SIZE


@guest_only
def test_a_nic_is_taken_away_and_put_back(nics: list[Nic], links: Links) -> None:
    kept, other = nics
    two = Two("rdma", nics)
    try:
        names = rails(two, other)
        first = two.begin(1 << 20)
        for _ in range(3):
            transfer = two.initiator.write(two.peer, two.source, deadline=120)
        deletion = links.delete(other)
        waited = until(lambda: not rails(two, other), 15)
        print(f"{other.device} is no longer used {waited:.1f} s after it was to go")
        assert not transfer.done, "too late to show anything"
        assert deletion.wait(20) == 0, "it is still open"
        first.wait(120)
        two.finish(transfer)
        assert not rails(two, other)
        assert rails(two, kept)
        for _ in range(2):  # what came back goes and comes back like what was there first
            links.add(other)
            waited = until(lambda: set(rails(two, other)) >= set(names), 15)
            print(f"{other.device} is used again {waited:.1f} s after it was there")
            before = two.over(other.device)
            whole(two)
            assert two.over(other.device) - before > SIZE // 10
            assert links.delete(other).wait(20) == 0
        whole(two)
    finally:
        two.initiator.close()
        two.target.close()


@guest_only
def test_a_nic_that_was_not_there_at_the_start_is_used(nics: list[Nic], links: Links) -> None:
    kept, other = nics
    assert links.delete(other).wait(20) == 0
    two = Two("rdma", [kept])
    try:
        links.add(other)
        until(lambda: f"rdma-{other.device}-{other.device}-0" in rails(two, other), 15)
        before = two.over(other.device)
        whole(two)
        assert two.over(other.device) > before
    finally:
        two.initiator.close()
        two.target.close()


@guest_only
def test_ports_that_were_down_at_the_start_are_used(nics: list[Nic], cables: Cables) -> None:
    for nic in nics:
        cables.pull(nic)
    with pytest.raises(ConfigError, match="path=rdma: rdma: no port is active of rxe0, rxe1"):
        TransferEngine(TransferConfig(path="rdma"))
    cables.plug(nics[0])
    two = Two("rdma,tcp", nics[:1])
    try:
        cables.plug(nics[1])
        until(lambda: two.up(nics[1]), 15)
        whole(two)
    finally:
        two.initiator.close()
        two.target.close()


@guest_only
def test_a_nic_that_changes_its_address_is_opened_anew(nics: list[Nic]) -> None:
    def address(*change: str) -> None:
        subprocess.run(["ip", "address", *change, "dev", nics[1].netdev], check=True)

    two = Two("rdma", nics)
    before = set(rails(two, nics[1]))
    try:
        transfer = two.begin()
        address("add", "10.98.0.2/24")
        address("del", "10.99.0.2/24")
        two.finish(transfer)
        until(lambda: set(rails(two, nics[1])) >= before, 15)
        whole(two)
        assert np.array_equal(two.memory, two.source)
    finally:
        subprocess.run(["ip", "address", "flush", "dev", nics[1].netdev, "scope", "global"], check=True)
        address("add", "10.99.0.2/24")
        two.initiator.close()
        two.target.close()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"rdma_devices": "nonesuch"},
            r"rdma_devices='nonesuch'.* names 'nonesuch', which this host does not have: take one of",
        ),
        ({"rdma_devices": "none*"}, r"rdma_devices='none\*'.* matches none of this host's NICs"),
        ({"rdma_gid_index": 99}, r"rdma_gid_index=99: on \S+ that index does not exist; usable there: "),
    ],
)
@pytest.mark.parametrize("path", ["rdma", "auto"])
def test_settings_that_name_nothing_are_refused(path: str, settings: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        TransferEngine(TransferConfig(path=path, **settings))  # type: ignore[arg-type]

"""What the other tests stand on: NICs, verbs on them, and cables that can be pulled one by one."""

import json
import subprocess
import sys

from tests.rdma.nics import Cables, Nic, guest_only


@guest_only
def test_the_guest_has_two_nics(nics: list[Nic]) -> None:
    assert nics == [Nic("rxe0", "roce0"), Nic("rxe1", "roce1")]


def test_verbs_open_every_nic(nics: list[Nic]) -> None:
    from pyverbs.device import Context

    for nic in nics:
        with Context(name=nic.device) as context:
            assert context.query_port(1).state == 4, f"{nic} is active for sysfs, not for verbs"


def test_the_topology_command_shows_them(nics: list[Nic]) -> None:
    command = [sys.executable, "-m", "mooncake_connector", "topology", "--json"]
    shown = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    rdma = [nic for nic in shown["topology"]["nics"] if nic["kind"] == "rdma" and nic["state"] == "ACTIVE"]
    assert {(nic["device"], nic["netdev"]) for nic in rdma} == {(nic.device, nic.netdev) for nic in nics}
    assert {nic["name"] for nic in rdma} == {name for tier in shown["matrix"]["*"] for name in tier}


@guest_only
def test_a_nic_goes_down_alone_and_comes_back(nics: list[Nic], cables: Cables) -> None:
    one, other = nics
    cables.pull(one)
    assert not one.active()
    assert other.active(), "both NICs hang on one cable"
    cables.plug(one)
    assert one.active()

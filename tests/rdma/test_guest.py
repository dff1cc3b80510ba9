"""What the other tests stand on: NICs, verbs on them, and cables that can be pulled one by one."""

from tests.rdma.nics import Cables, Nic, guest_only


@guest_only
def test_the_guest_has_two_nics(nics: list[Nic]) -> None:
    assert nics == [Nic("rxe0", "roce0"), Nic("rxe1", "roce1")]


def test_verbs_open_every_nic(nics: list[Nic]) -> None:
    from pyverbs.device import Context

    for nic in nics:
        with Context(name=nic.device) as context:
            assert context.query_port(1).state == 4, f"{nic} is active for sysfs, not for verbs"


@guest_only
def test_a_nic_goes_down_alone_and_comes_back(nics: list[Nic], cables: Cables) -> None:
    one, other = nics
    cables.pull(one)
    assert not one.active()
    assert other.active(), "both NICs hang on one cable"
    cables.plug(one)
    assert one.active()

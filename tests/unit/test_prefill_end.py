"""Prefill's end where the adversary does not look: what one transfer's trouble does to others."""

from tests.unit.protocol_world import (
    BLOCK,
    CONFIG,
    DecodeRequest,
    FlyingWrite,
    PrefillRequest,
    World,
    blocks_of,
)


def start(world: World, n: int) -> PrefillRequest:
    """A request on both sides, its prefill computed and its writes in flight."""
    tokens = 2 * BLOCK + 1
    r = PrefillRequest(f"p{n}", f"t{n}", n, tokens)
    world.prefill.expect(r)
    blocks = [world.decode.free.pop(0) for _ in range(blocks_of(tokens - 1))]
    world.decode.reserve(DecodeRequest(f"d{n}", r.transfer, n, tokens, 0, blocks), world.address)
    world.calm()
    world.prefill.begin_step(r, tokens, 0)
    while world.prefill.chunk is not None:
        world.prefill.write_layer()
    world.prefill.pump()
    return r


def writes_of(world: World, n: int) -> list[FlyingWrite]:
    parts = [part for rank in world.decode.ranks for part in rank.end._parts.values()]
    keys = [part.key for part in parts if part.load.want.request_id == f"d{n}"]
    return [w for w in world.flying if w.key in keys]


def test_an_abort_leaves_the_link_to_others() -> None:
    """Writes of an aborted request may take their time: the link is closed only once they seem stuck."""
    world = World()
    aborted, other = start(world, 1), start(world, 2)
    world.prefill.finish(aborted, aborted=True)
    world.pass_time(1.0)
    assert all(c.linked for c in world.connections.values() if c.name)
    for write in writes_of(world, 2):
        world.land(write, 1_000)
    world.prefill.finish(other, aborted=False)
    world.calm()
    assert world.decode.requests["d2"].reported == "loaded"
    assert world.decode.requests["d1"].reported is None, "a write of the aborted request is still in flight"
    world.pass_time(CONFIG.peer_timeout_s)
    assert not any(c.linked for c in world.connections.values())


def test_a_lease_that_decode_renews_does_not_end() -> None:
    world = World()
    held = start(world, 1)
    world.prefill.finish(held, aborted=False)
    for _ in range(20):
        world.pass_time(CONFIG.heartbeat_s / 2)
        world.calm()
    assert world.prefill.requests, "the blocks were freed while decode waited for them"
    for write in writes_of(world, 1):
        world.land(write, 1_000)
    world.calm()
    assert not world.prefill.requests
    assert world.decode.requests["d1"].reported == "loaded"

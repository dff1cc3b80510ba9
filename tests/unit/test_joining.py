"""An engine that comes fresh and empty gets its share by prediction: a burst does not fall on it alone."""

from collections import Counter

import pytest

from mooncake_connector.scheduler.policy.base import Instance, Placement, Side
from tests.unit.test_conductor import World

KV = 10_000_000


def join(world: World, name: str, side: Side) -> None:
    world.conductor.join(Instance(name=name, side=side, kv_tokens=KV), 0.0)
    world.index.join(name)


def placed(world: World, id: str) -> Placement:
    verdict = world.arrive(id)
    assert isinstance(verdict, Placement)
    return verdict


def test_a_fresh_prefill_engine_gets_what_levels_the_queues() -> None:
    world = World(admission="none", kv_tokens=KV)
    for at in range(10):
        placed(world, f"before {at}")
    join(world, "p1", "prefill")
    got = Counter(placed(world, f"burst {at}").prefill for at in range(24))
    # 1 s a prompt: 10 + 7 s beside 17 s.
    assert got == {"p0": 7, "p1": 17}
    queues = [account.queue for account in world.conductor.accounts(0.0) if account.side == "prefill"]
    assert queues == [pytest.approx(17.0, rel=0.05)] * 2


def test_a_fresh_decode_engine_shares_a_burst() -> None:
    world = World(prefills=2, admission="none", kv_tokens=KV)
    for at in range(16):
        world.decoding(f"before {at}")
    join(world, "d1", "decode")
    got = Counter(placed(world, f"burst {at}").decode for at in range(40))
    assert 0.4 < got["d1"] / 40 < 0.75

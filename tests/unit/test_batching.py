"""Small writes are gathered while something is in flight, in order, and never wait for nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.batching import Aggregator, BatchPolicy, Flush, Load
from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from tests.unit.dispatcher_world import pairs_of

KIB, US = 1 << 10, 1e-6


def write(at: int, nbytes: int = KIB) -> CopyPlan:
    """Target bytes ``[at, at + nbytes)``, from a source that differs from write to write."""
    address = np.array([at], np.uint64)
    return CopyPlan(address * np.uint64(3) + np.uint64(1 << 40), address, np.array([nbytes], np.uint64))


class Gathering:
    """An aggregator as a link uses it: one event at a time, busy from each flush until told otherwise."""

    def __init__(self, policy: BatchPolicy | None = None) -> None:
        self.aggregator = Aggregator(Load(policy))
        self.busy = False

    def add(self, item: int, plan: CopyPlan, urgent: bool, now: float) -> list[Flush]:
        flushes = self.aggregator.add(item, plan, urgent, now)
        return flushes + self.tick(now, self.busy or bool(flushes))

    def tick(self, now: float, busy: bool = True) -> list[Flush]:
        flushes = self.aggregator.tick(now, busy)
        self.busy = busy or bool(flushes)
        return flushes

    def idle(self, now: float) -> list[Flush]:
        self.aggregator.load.idle(now)
        return self.tick(now, busy=False)

    def next_tick(self) -> float | None:
        return self.aggregator.next_tick()


def busy() -> Gathering:
    """With one write in flight since 0 and writes expected every microsecond."""
    aggregator = Gathering()
    assert [f.items for f in aggregator.add(0, write(0), False, 0.0)] == [(0,)]
    return aggregator


def items(flushes: list[Flush]) -> list[tuple[int, ...]]:
    return [f.items for f in flushes]


def test_with_nothing_in_flight_a_write_leaves_at_once() -> None:
    aggregator = Gathering()
    for i in range(3):
        assert items(aggregator.add(i, write(i * KIB), False, i * US)) == [(i,)]
        assert aggregator.idle(i * US + 0.5 * US) == []


def test_what_comes_meanwhile_leaves_together_when_the_first_has_landed() -> None:
    aggregator = busy()
    for i in range(1, 10):
        assert aggregator.add(i, write(i * 2 * KIB), False, i * US) == []
    (flush,) = aggregator.idle(10 * US)
    assert flush.items == tuple(range(1, 10))
    assert pairs_of(flush.plan) == [pair for i in range(1, 10) for pair in pairs_of(write(i * 2 * KIB))]
    # That flush is in flight now.
    assert aggregator.add(10, write(100 * KIB), False, 11 * US) == []


def test_neighbours_become_one_range() -> None:
    aggregator = busy()
    for i in range(1, 9):
        at = np.array([i * KIB], np.uint64)
        aggregator.add(i, CopyPlan(at, at, np.array([KIB], np.uint64)), False, i * US)
    (flush,) = aggregator.idle(10 * US)
    assert flush.plan.length.tolist() == [8 * KIB]


def test_tiles_travel_alone_and_after_the_bytes_they_overwrite() -> None:
    aggregator = busy()
    aggregator.add(1, write(KIB), False, US)
    at = np.array([0], np.uint64)
    tile = Tile.of(8, [(2, KIB, KIB), (2, 64, 32)])
    apart, across = CopyPlan.tiled(at, at + np.uint64(1 << 20), tile), CopyPlan.tiled(at, at, tile)
    (alone,) = aggregator.add(2, apart, False, 2 * US)
    assert (alone.items, alone.plan) == ((2,), apart)
    assert items(aggregator.add(3, across, False, 3 * US)) == [(1,), (3,)]


def test_gathered_plans_wait_for_all_their_events() -> None:
    class Done:
        handle = 1

        def query(self) -> bool:
            return True

        def synchronize(self) -> None: ...

    events = [Done(), Done()]
    aggregator = busy()
    for i, event in ((1, events[0]), (2, events[1]), (3, events[0])):
        plan = write(i * 2 * KIB)
        aggregator.add(i, CopyPlan(plan.src, plan.dst, plan.length, after=(event,)), False, i * US)
    (flush,) = aggregator.idle(10 * US)
    assert flush.plan.after == tuple(events)


def test_count_and_size_and_time() -> None:
    policy = BatchPolicy()
    aggregator = busy()
    flushes = [aggregator.add(i, write(i * KIB), False, i * 0.1 * US) for i in range(1, policy.max_count + 1)]
    assert [len(f) for f in flushes] == [0] * (policy.max_count - 1) + [1]

    aggregator = busy()
    flushes = [aggregator.add(i, write(i * 64 * KIB, 64 * KIB), False, i * US) for i in range(1, 33)]
    assert [len(f) for f in flushes] == [0] * 31 + [1]
    assert flushes[-1][0].plan.nbytes == policy.max_bytes

    aggregator = busy()
    aggregator.add(1, write(KIB), False, 1 * US)
    at = aggregator.next_tick()
    assert at == pytest.approx(1 * US + policy.max_delay_s)
    assert aggregator.tick(at - US) == []
    assert items(aggregator.tick(at)) == [(1,)]
    assert aggregator.next_tick() is None


def test_urgent_and_large_writes_do_not_wait() -> None:
    aggregator = busy()
    aggregator.add(1, write(KIB), False, 1 * US)
    assert items(aggregator.add(2, write(10 * KIB), True, 2 * US)) == [(2,)]
    assert items(aggregator.add(3, write(100 * KIB, 65 * KIB), False, 3 * US)) == [(3,)]
    assert items(aggregator.idle(4 * US)) == [(1,)]


def test_an_urgent_write_does_not_overtake_one_to_the_same_bytes() -> None:
    aggregator = busy()
    aggregator.add(1, write(8 * KIB), False, 1 * US)
    aggregator.add(2, write(16 * KIB), False, 2 * US)
    assert items(aggregator.add(3, write(12 * KIB), True, 2 * US)) == [(3,)]  # between them
    assert items(aggregator.add(4, write(9 * KIB - 1), True, 3 * US)) == [(1, 2), (4,)]


def test_writes_to_the_same_bytes_share_no_flush() -> None:
    aggregator = busy()
    for i, at in enumerate((8 * KIB, 20 * KIB, 9 * KIB - 1), start=1):
        aggregator.add(i, write(at), False, i * US)
    assert items(aggregator.idle(9 * US)) == [(1,), (2,), (3,)]


def test_rare_writes_are_not_held_up_although_something_is_in_flight() -> None:
    aggregator = Gathering()
    now, waited = 0.0, 0
    for i in range(100):
        waited += not aggregator.add(i, write(i * KIB), False, now)
        now += 5e-3  # five times the longest delay; what is in flight takes longer
    assert waited <= 1  # before the rate was known


def test_a_burst_after_a_pause_is_soon_seen() -> None:
    aggregator = Gathering()
    aggregator.add(0, write(0), False, 0.0)
    now = 3600.0
    alone = sum(bool(aggregator.add(i, write(i * KIB), False, now + i * US)) for i in range(1, 60))
    assert alone < 30


def test_the_delay_is_what_a_flush_takes_to_land() -> None:
    aggregator = Gathering()
    now = 0.0
    for i in range(0, 200, 2):
        aggregator.add(i, write(i * KIB), False, now)
        aggregator.add(i + 1, write(i * KIB + KIB), False, now + 2 * US)
        now += 20 * US
        aggregator.idle(now)
        now += 5 * US
        aggregator.idle(now)
    aggregator.add(1000, write(0), False, now)
    aggregator.add(1001, write(KIB), False, now + US)
    at = aggregator.next_tick()
    assert at is not None
    assert 5 * US < at - now < 30 * US


def run(aggregator: Gathering | None, gap: float, count: int, fixed: float, each: float) -> tuple[int, float]:
    """Writes every `gap` to a target that handles one message after the other, in `fixed` + `each` a write.

    Returns messages and the mean time from a write's arrival to its landing [s].
    """
    arrivals = [i * gap for i in range(count)]
    queue: list[tuple[int, ...]] = []
    server, now, at, messages, total = 0.0, 0.0, 0, 0, 0.0
    in_service: tuple[int, ...] | None = None
    while at < count or queue or in_service is not None:
        tick = aggregator.next_tick() if aggregator else None
        steps = [arrivals[at]] if at < count else []
        steps += [server] if in_service is not None else []
        steps += [max(tick, now)] if tick is not None else []
        now = min(steps)
        if in_service is not None and server <= now:
            total += sum(now - arrivals[i] for i in in_service)
            in_service = None
            if aggregator and not queue:
                queue += items(aggregator.idle(now))
        elif at < count and arrivals[at] <= now:
            queue += items(aggregator.add(at, write(at * KIB), False, now)) if aggregator else [(at,)]
            at += 1
        elif aggregator:
            queue += items(aggregator.tick(now))
        if in_service is None and queue:
            in_service = queue.pop(0)
            messages += 1
            server = now + fixed + each * len(in_service)
    return messages, total / count


def test_under_load_many_writes_share_a_message_and_land_sooner() -> None:
    """A message costs 20 us, a write in it 1 us: alone 10 us apart they can't be kept up with."""
    alone, alone_s = run(None, 10 * US, 5000, 20 * US, 1 * US)
    gathered, gathered_s = run(Gathering(), 10 * US, 5000, 20 * US, 1 * US)
    assert alone == 5000
    assert gathered < alone / 2
    assert gathered_s < alone_s / 50
    burst, _ = run(Gathering(), 1 * US, 5000, 20 * US, 0.5 * US)
    assert burst < 5000 / 20


def test_without_load_nothing_is_lost() -> None:
    alone = run(None, 100 * US, 1000, 20 * US, 1 * US)
    gathered = run(Gathering(), 100 * US, 1000, 20 * US, 1 * US)
    assert gathered[0] == alone[0] == 1000
    assert gathered[1] == pytest.approx(alone[1])


events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40), st.integers(1, 12), st.booleans()),
        st.just(("idle",)),
        st.tuples(st.just("wait"), st.sampled_from([0, 1, 50, 500])),
    ),
    max_size=60,
)


@given(events, st.integers(2, 6), st.integers(8, 40))
def test_every_write_leaves_once_and_those_to_the_same_bytes_in_order(
    script: list[tuple[object, ...]], max_count: int, max_bytes: int
) -> None:
    policy = BatchPolicy(small_bytes=8, max_bytes=max_bytes, max_count=max_count)
    aggregator = Gathering(policy)
    now, left, plans, added = 0.0, [], {}, {}  # type: ignore[var-annotated]
    for event in script:
        if event[0] == "add":
            _, at, nbytes, urgent = event
            item = len(plans)
            plans[item] = write(at, nbytes)  # type: ignore[arg-type]
            added[item] = now
            leaves = aggregator.add(item, plans[item], bool(urgent), now)
            if urgent or nbytes > policy.small_bytes:  # type: ignore[operator]
                assert leaves[-1].items == (item,)
        elif event[0] == "idle":
            leaves = aggregator.idle(now)
            assert aggregator.next_tick() is None
        else:
            end = now + event[1] * US  # type: ignore[operator]
            tick = aggregator.next_tick()
            now = end if tick is None else min(end, max(tick, now))
            leaves = aggregator.tick(now)
            now = end
        left += [(flush, now) for flush in leaves]
    left += [(flush, now) for flush in aggregator.idle(now)]

    order = [item for flush, _ in left for item in flush.items]
    assert sorted(order) == sorted(plans)
    content: dict[int, int] = {}
    for flush, _ in left:
        pairs = pairs_of(flush.plan)
        assert pairs == [pair for item in flush.items for pair in pairs_of(plans[item])]
        assert len({d for _, d in pairs}) == len(pairs), "two writes to one byte in one flush"
        assert len(flush.items) <= max_count
        content |= {d: s for s, d in pairs}
    expected: dict[int, int] = {}
    for plan in plans.values():
        expected |= {d: s for s, d in pairs_of(plan)}
    assert content == expected

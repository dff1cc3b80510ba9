"""The dispatcher on simulated rails of given speed: balance, failover, return, and latency under load."""

import numpy as np
import pytest

from mooncake_connector.kv_transfer.dispatcher import Finished, Post, Priority
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.rails import Health
from mooncake_connector.kv_transfer.transport.base import Failure
from tests.unit.dispatcher_simulation import GB, GIB, KIB, MIB, Simulation


@pytest.mark.parametrize("told", [0.0, 10 * GB], ids=["unknown speed", "wrong speed"])
@pytest.mark.parametrize("rates", [(10 * GB, 5 * GB), (3 * GB, 1 * GB), (0.05 * GB, 0.03 * GB)])
def test_two_rails_share_by_their_speeds(rates: tuple[float, float], told: float) -> None:
    sim = Simulation()
    for name, rate in zip("ab", rates, strict=True):
        sim.rail(name, rate, speed=told)
    nbytes = int(sum(rates) / 2)
    transfer = sim.submit(nbytes)
    sim.run()
    assert sim.ok(transfer)
    assert sum(sim.carried.values()) == nbytes
    assert sim.carried["a"] / sim.carried["b"] == pytest.approx(rates[0] / rates[1], rel=0.1)
    assert sim.took[transfer] == pytest.approx(nbytes / sum(rates), rel=0.1)


def test_shares_follow_a_speed_that_changes() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    sim.rail("b", 10 * GB)
    sim.submit(GIB)
    sim.run()
    sim.rails["a"].rate = 1 * GB
    sim.carried.clear()
    transfer = sim.submit(2 * GIB)
    sim.run()
    assert sim.carried["b"] / sim.carried["a"] == pytest.approx(10, rel=0.15)
    assert sim.took[transfer] == pytest.approx(2 * GIB / (11 * GB), rel=0.1)


def test_a_rail_with_a_penalty_is_used_in_proportion() -> None:
    sim = Simulation()
    sim.rail("near", 10 * GB)
    sim.rail("far", 10 * GB, penalty=2.0)
    transfer = sim.submit(2 * GIB)
    sim.run()
    assert sim.ok(transfer)
    assert sim.carried["near"] / sim.carried["far"] == pytest.approx(2, rel=0.1)


def test_a_small_write_takes_the_near_rail_and_is_not_cut() -> None:
    sim = Simulation()
    sim.rail("far", 10 * GB, penalty=2.0)
    sim.rail("near", 10 * GB)
    sim.submit(MIB)
    assert sim.posts == 1
    sim.run()
    assert sim.carried == {"near": MIB}


def test_a_large_write_is_shared_at_once() -> None:
    sim = Simulation()
    for name in "abcd":
        sim.rail(name, 10 * GB)
    sim.submit(GIB)
    sim.run()
    sim.carried.clear()
    transfer = sim.submit(8 * MIB)
    sim.run()
    assert all(n == pytest.approx(2 * MIB, rel=0.2) for n in sim.carried.values())
    assert sim.took[transfer] < 0.33 * 8 * MIB / (10 * GB)


@pytest.mark.parametrize("rails", [1, 4, 8])
def test_rails_that_share_a_processor_do_not_slow_each_other_down_for_ever(rails: int) -> None:
    """Rails that look slow because slices cost time must not get ever smaller ones, which cost more."""
    sim = Simulation(cost=0.35e-3)
    for number in range(rails):
        sim.rail(f"tcp-{number}", 8 * GB / rails, rank=1)
    for _ in range(4):
        transfer = sim.submit(GIB, ranges=GIB // (32 * KIB))
        sim.run()
    assert sim.took[transfer] < 1.25 * GIB / (8 * GB)


def test_a_slow_rail_does_not_hold_up_the_end() -> None:
    """Its smallest slice takes longer than the other rail needs for everything."""
    sim = Simulation()
    sim.rail("fast", 10 * GB, speed=10 * GB)
    sim.rail("slow", 1e6, speed=1e6)
    transfer = sim.submit(200 * MIB)
    sim.run()
    assert sim.took[transfer] < 1.1 * 200 * MIB / (10 * GB)
    long = sim.submit(4 * GIB)
    sim.run()
    assert sim.carried["slow"] > 0
    assert sim.took[long] < 1.02 * 4 * GIB / (10 * GB)


def test_a_huge_plan_is_cut_only_as_it_goes() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    transfer = sim.submit(GIB, ranges=65536)
    assert sim.posts <= 64
    sim.run()
    assert sim.ok(transfer)
    assert sim.carried["a"] == GIB


def test_a_rail_that_dies_leaves_its_slices_to_the_other() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    sim.rail("b", 10 * GB)
    transfer = sim.submit(GIB)
    sim.at(0.02, lambda: sim.kill("a"))
    sim.run(until=1.0)
    assert sim.ok(transfer)
    assert sim.ended[transfer].nbytes == sum(sim.carried.values()) == GIB
    assert 0 < sim.carried["a"] < sim.carried["b"]


def test_both_die_and_return_and_tcp_bridges_the_gap() -> None:
    sim = Simulation()
    sim.rail("rdma-0", 10 * GB)
    sim.rail("rdma-1", 10 * GB)
    sim.rail("tcp-0", 1 * GB, rank=1)
    transfer = sim.submit(4 * GIB)
    sim.run(until=0.05)
    assert not sim.carried["tcp-0"]
    sim.kill("rdma-0")
    sim.run(until=0.06)
    assert not sim.carried["tcp-0"]
    sim.kill("rdma-1")
    sim.run(until=0.3)
    assert sim.carried["tcp-0"] == pytest.approx(0.24 * GB, rel=0.1)

    for name in ("rdma-0", "rdma-1"):
        sim.rails[name].alive = True
    before = sim.carried["rdma-0"]
    sim.run(until=0.05 + 0.5 + 0.02)  # the first cooldown, and a little
    assert sim.carried["rdma-0"] > before
    over_tcp = sim.carried["tcp-0"]
    sim.run()
    assert sim.carried["tcp-0"] - over_tcp < 20 * MIB  # what was in flight
    assert sim.ok(transfer)
    assert sum(sim.carried.values()) == 4 * GIB


def test_a_better_transport_that_comes_later_takes_over() -> None:
    sim = Simulation()
    sim.rail("tcp-0", 1 * GB, rank=1)
    sim.submit(GIB)
    sim.run(until=0.1)
    sim.rail("rdma-0", 10 * GB)
    sim.run()
    assert sim.carried["tcp-0"] < 0.12 * GB
    assert sim.carried["rdma-0"] == GIB - sim.carried["tcp-0"]


def foreground_latencies(background: Priority | None) -> list[float]:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    sim.rail("b", 10 * GB)
    sim.submit(GIB)
    sim.run()
    if background is not None:
        sim.submit(4 * GIB, background)
        sim.submit(4 * GIB, Priority.MIGRATION)
    writes: list[int] = []
    start = sim.now
    for i in range(40):
        sim.at(start + 0.002 + i * 0.0037, lambda: writes.append(sim.submit(4 * KIB)))
    sim.run(until=start + 0.16)
    assert background is None or not set(sim.ended) - set(writes) - {0}, "the background ended too early"
    return [sim.took[w] for w in writes]


def test_foreground_waits_for_one_background_slice_at_most() -> None:
    slice_s = 8 * MIB / (10 * GB)
    alone, behind = foreground_latencies(None), foreground_latencies(Priority.PREFETCH)
    assert max(alone) < 0.1 * slice_s
    assert max(behind) < 1.1 * slice_s
    # Bulk of the same priority has a whole window in flight: this is what priorities spare it.
    assert max(foreground_latencies(Priority.FOREGROUND)) > 2 * slice_s


def test_prefetch_comes_before_migration_and_both_use_idle_rails() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    migration = sim.submit(256 * MIB, Priority.MIGRATION)
    prefetch = sim.submit(256 * MIB, Priority.PREFETCH)
    sim.run()
    assert sim.took[prefetch] < 0.6 * sim.took[migration]
    assert sim.took[migration] < 1.2 * 512 * MIB / (10 * GB)


def test_a_huge_transfer_does_not_starve_a_small_one() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    huge = sim.submit(4 * GIB)
    sim.run(until=0.05)
    small = sim.submit(4 * MIB)
    sim.run()
    assert sim.took[small] < 0.05 * sim.took[huge]


def test_a_rail_that_hangs_is_abandoned() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    sim.rail("b", 10 * GB)
    transfer = sim.submit(GIB)

    def hang() -> None:
        sim.rails["a"].stuck = True
        sim.rails["a"].life += 1

    sim.at(0.02, hang)
    sim.run(until=2.9)
    assert transfer not in sim.ended
    sim.run(until=3.2)
    assert sim.abandoned == ["a"]
    assert sim.ok(transfer)


@pytest.mark.parametrize("known", [False, True])
def test_a_rail_that_is_slower_than_anything_expected_is_given_time(known: bool) -> None:
    """100 kB/s: the first slice takes 10 s and more. Abandoned once, the rail gets slices that fit it."""
    sim = Simulation()
    sim.rail("a", 10 * GB)
    if known:
        sim.submit(GIB)
        sim.run()
    sim.rails["a"].rate = 1e5
    start = sim.now
    transfer = sim.submit(2 * MIB)

    def revive() -> None:
        sim.rails["a"].alive = True

    sim.at(start + 3.1, revive)
    sim.run(until=start + 60)
    assert sim.abandoned == ["a"]
    assert sim.ok(transfer)


def test_what_waits_for_a_full_rail_does_not_block_the_others() -> None:
    """A write that `a` lost waits for `b`, which hangs; `a` is back and carries what it can."""
    sim = Simulation()
    posted: list[Post] = []
    sim.post = posted.append  # type: ignore[assignment,method-assign]
    sim.rail("a", 10 * GB)
    sim.submit(MIB)
    sim.rail("b", 9 * GB)
    sim.submit(MIB)
    sim.submit(MIB)
    sim.rails["a"].alive = True
    assert [p.rail for p in posted] == ["a", "b", "a"]
    sim.submit(MIB)
    assert [p.rail for p in posted] == ["a", "b", "a", "b"]
    sim.kill("a", alive=True)
    sim.run(until=0.6)
    # Two slices that `a` lost wait for `b`, which is full. A new one takes the probation.
    assert len(posted) == 4
    sim.submit(4 * KIB)
    assert posted[4].rail == "a"


def test_a_failed_write_whose_rail_goes_on_costs_the_rail() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    posted: list[Post] = []
    sim.post = posted.append  # type: ignore[assignment,method-assign]
    sim.submit(4 * KIB)
    sim.do(sim.dispatcher.slice_ended(posted[0].slice, Failure("checksum", retry=True), sim.now))
    sim.run(until=0.49)
    assert not sim.abandoned
    sim.run(until=0.51)
    assert sim.abandoned == ["a"]


def test_transfers_wait_for_the_first_rail_and_not_for_ever() -> None:
    sim = Simulation()
    first = sim.submit(MIB)
    sim.run(until=5)
    sim.rail("a", 10 * GB)
    sim.run(until=6)
    assert sim.ok(first)

    sim.kill("a")
    second = sim.submit(MIB)
    sim.run(until=15.9)
    assert second not in sim.ended
    sim.run(until=16.1)
    error = sim.ended[second].error
    assert error is not None
    assert "no rail for 10 s" in error
    assert "a is cooling (cable still pulled)" in error


def test_a_fence_that_takes_long_is_no_failure() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    transfer = sim.submit(4 * KIB)
    d = sim.dispatcher
    sim.rail("b", 10 * GB)
    sim.do(d.rail_down("a", "cable pulled", sim.now))
    sim.run(until=0.1)
    assert sim.carried["b"] == 4 * KIB
    sim.do(d.rail_down("b", "cable pulled", sim.now))
    sim.run(until=30)
    sim.do(d.tick(sim.now))
    assert transfer not in sim.ended
    sim.do(d.rail_fenced("b", sim.now))
    assert transfer not in sim.ended
    sim.do(d.rail_fenced("a", sim.now))
    assert sim.ok(transfer)


def test_a_fence_of_a_rail_that_is_up_means_nothing() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    sim.do(sim.dispatcher.rail_fenced("a", sim.now))
    sim.do(sim.dispatcher.rail_fenced("unknown", sim.now))
    assert [rail.health for rail in sim.dispatcher.rails] == [Health.UP]
    transfer = sim.submit(MIB)
    sim.run()
    assert sim.ok(transfer)


def test_what_was_cancelled_does_not_count_as_backlog() -> None:
    sim = Simulation()
    sim.rail("fast", 10 * GB)
    sim.rail("slow", 1e6, speed=1e6)
    huge = sim.submit(100 * GIB)
    sim.run(until=0.2)
    sim.do(sim.dispatcher.cancel(huge, "not needed", sim.now))
    sim.run()
    sim.carried.clear()
    sim.submit(20 * MIB)
    sim.run()
    assert sim.carried == {"fast": 20 * MIB}


def test_deadlines() -> None:
    sim = Simulation()
    sim.rail("a", 1 * GB)
    late = sim.submit(GIB, deadline=0.5)
    in_time = sim.submit(MIB, deadline=0.5)
    over = sim.submit(MIB, deadline=0.0)
    sim.run()
    assert "deadline" in (sim.ended[late].error or "")
    assert 0 < sim.ended[late].nbytes < GIB
    assert sim.took[late] == pytest.approx(0.5, abs=0.02)  # what is in flight still lands
    assert sim.ok(in_time)
    assert "deadline" in (sim.ended[over].error or "")


def test_a_link_that_is_down_ends_everything_at_once() -> None:
    sim = Simulation()
    sim.rail("a", 1 * GB)
    running, waiting = sim.submit(GIB), sim.submit(GIB, Priority.MIGRATION)
    sim.do(sim.dispatcher.link_down("the peer died", 0.0))
    assert {sim.ended[running].error, sim.ended[waiting].error} == {"the peer died"}
    assert sim.ended[sim.submit(4 * KIB)].error == "the peer died"
    sim.run()


def test_nothing_to_copy_ends_at_once_and_numbers_are_unique() -> None:
    sim = Simulation()
    nothing = np.zeros(0, np.uint64)
    done = sim.dispatcher.submit(1, 1, CopyPlan(nothing, nothing, nothing), Priority.FOREGROUND, None, 0.0)
    assert done == [Finished(1, None, 0)]
    one = np.ones(1, np.uint64)
    sim.dispatcher.submit(2, 1, CopyPlan(one, one, one), Priority.FOREGROUND, None, 0.0)
    with pytest.raises(ValueError, match="uniquely"):
        sim.dispatcher.submit(2, 1, CopyPlan(one, one, one), Priority.FOREGROUND, None, 0.0)
    assert sim.dispatcher.cancel(3, "unknown", 0.0) == []


def test_memory_of_past_transfers_is_bounded() -> None:
    sim = Simulation()
    sim.rail("a", 10 * GB)
    for _ in range(1000):
        sim.submit(4 * KIB, deadline=1e6)
        sim.run(until=sim.now + 1e-4)
    assert len(sim.ended) == 1000
    assert len(sim.dispatcher._deadlines) < 100

"""No write after free: what was fenced never changes again, whatever happens to either process meanwhile."""

import random
import signal
import time

import pytest

from tests.gpu.half import GUARD, Half
from tests.gpu.processes import Process, Processes
from tests.gpu.ranges import Copies, scattered
from tests.gpu.test_cuda_ipc import MIB, PLACES, Where

GIB = 1 << 30
HELD = 20 * GIB
"""What a target that is killed has offered: so much that nobody else's memory can be mistaken for it."""

CYCLES = 400_000_000  # of a slow kernel, about 0.2 s


def size_of(where: Where) -> int:
    return 32 * MIB if where.path == "tcp" else GIB


def copies_of(where: Where, kind: str) -> Copies:
    """Milliseconds of writing: pages, for the kernel, or long ranges, for copy engines."""
    nbytes = size_of(where)
    size = 16384 if kind == "pages" else nbytes // 64
    return scattered(random.Random(1), [size] * (nbytes * 3 // 4 // size), 16, nbytes, nbytes)


def begin(initiator: Process, target: Process, copies: Copies) -> None:
    """The initiator writes without pause; some of it has landed, more is under way."""
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    initiator.call("storm", peer="t", copies=copies)
    initiator.call("await_landed", count=2)


def assert_untouched(target: Process, seconds: float) -> None:
    looks, wrong = target.call("changed", seconds=seconds, wait=seconds + 30)
    print(f"looked {looks} times in {seconds} s: {wrong} bytes changed")
    assert not wrong, f"{wrong} bytes were written after the fence"


def assert_writes(initiator: Process, target: Process, peer: str, nbytes: int) -> None:
    """A fresh link between the two works."""
    copies = scattered(random.Random(peer), [4096] * 500, 16, nbytes, nbytes)
    initiator.call("connect", name=peer, address=target.call("offer", peer=peer))
    initiator.call("fill", seed=3)
    target.call("fill", seed=GUARD)
    initiator.call("write", peer=peer, copies=copies)
    assert not target.call("wrong", seed=3, copies=[copies])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", ["pages", "long ranges"])
def test_fenced_in_the_middle_of_writes(processes: Processes, where: Where, kind: str) -> None:
    """Ten times, at a random moment: the memory is used for something else the moment the fence returns."""
    initiator, target = where.start(processes, size_of(where))
    copies, rng = copies_of(where, kind), random.Random(8)
    fences, landed = [], []
    for _ in range(10):
        begin(initiator, target, copies)
        time.sleep(0.02 * rng.random())
        fences.append(target.call("fence_and_poison", peer="i"))
        _, wrong = target.call("changed", seconds=0.1)
        assert not wrong, f"{wrong} bytes were written after the fence"
        ended = initiator.call("await_end", seconds=30)
        assert ended != "it was told to stop"
        landed.append(initiator.call("storm_state")[0])
        initiator.call("hang_up", name="t")
    assert_untouched(target, 1.0)
    assert min(landed) >= 2
    print(f"10 fences while {landed} writes landed: {1e3 * max(fences):.1f} ms at most; then: {ended}")
    assert_writes(initiator, target, "again", size_of(where))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", ["pages", "long ranges"])
def test_fenced_while_the_initiator_is_stopped(processes: Processes, where: Where, kind: str) -> None:
    """SIGSTOP: what it has enqueued goes on, what it would enqueue comes when it is continued."""
    initiator, target = where.start(processes, size_of(where))
    begin(initiator, target, copies_of(where, kind))
    initiator.signal(signal.SIGSTOP)
    try:
        target.begin("fence_and_poison", {"peer": "i"})
        if target.ended(10):
            print(f"the fence took {1e3 * target.end():.1f} ms while the initiator was stopped")
            assert_untouched(target, 1.0)
        else:
            # Stopped between looking at the gate and handing its copies to the copy engines.
            assert kind == "long ranges", (
                "a fence against a stopped initiator's kernel did not return in 10 s"
            )
    finally:
        initiator.signal(signal.SIGCONT)
    if target.running:
        print(f"the fence waited for the stopped initiator: {target.end(10):.1f} s")
    assert_untouched(target, 1.0)
    print("the initiator, continued:", initiator.call("await_end", seconds=30))
    assert_writes(initiator, target, "again", size_of(where))


@pytest.mark.parametrize("where", PLACES[1:])
@pytest.mark.parametrize("kind", ["pages", "long ranges"])
def test_fenced_before_its_data_is_there(processes: Processes, where: Where, kind: str) -> None:
    """A copy waits on the GPU for an event; it is fenced, then the event happens."""
    initiator, target = where.start(processes, size_of(where))
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    copies = copies_of(where, kind)
    initiator.call("write", peer="t", copies=copies)
    initiator.call("submit_behind_sleep", peer="t", copies=copies, cycles=5 * CYCLES)
    took = target.call("fence_and_poison", peer="i")
    print(f"the fence took {1e3 * took:.1f} ms, the event about a second")
    assert_untouched(target, 1.5)
    print("the copy:", initiator.call("await_end", seconds=30))
    assert_writes(initiator, target, "again", size_of(where))


@pytest.mark.parametrize("where", PLACES)
def test_the_initiator_is_killed(processes: Processes, where: Where) -> None:
    initiator, target = where.start(processes, size_of(where))
    begin(initiator, target, copies_of(where, "pages"))
    took = initiator.kill()
    fence = target.call("fence_and_poison", peer="i")
    print(f"the initiator was gone after {took:.2f} s; the fence took {1e3 * fence:.1f} ms")
    assert_untouched(target, 1.0)
    if where.path == "cuda_ipc":
        assert target.call("computes")
    nbytes = size_of(where)
    another = processes.take()
    another.new(Half, device=where.initiator, path=where.path, nbytes=nbytes)
    assert_writes(another, target, "another", nbytes)


@pytest.mark.parametrize("where", PLACES)
def test_the_target_is_killed(processes: Processes, where: Where) -> None:
    """The initiator's CUDA context survives; it lets go of the dead target's memory; a new target works."""
    nbytes = size_of(where)
    on_gpu = where.path == "cuda_ipc"
    initiator, target = processes.take(), processes.take()
    initiator.new(Half, device=where.initiator, path=where.path, nbytes=nbytes)
    target.new(Half, device=where.target, path=where.path, nbytes=HELD if on_gpu else nbytes)
    restarted = processes.take()
    restarted.new(Half, device=where.target, path=where.path, nbytes=nbytes)
    before = restarted.call("free_bytes") if on_gpu else 0
    begin(initiator, target, copies_of(where, "pages"))
    target.kill()
    killed = time.monotonic()
    ended = initiator.call("await_end", seconds=30)
    print(f"the initiator knew {time.monotonic() - killed:.2f} s after the target was gone: {ended}")
    assert ended != "it was told to stop"
    if on_gpu:
        assert initiator.call("computes"), "the initiator's CUDA context did not survive"
        while (freed := restarted.call("free_bytes") - before) < HELD * 3 // 4:
            assert time.monotonic() - killed < 15, f"of {HELD} bytes {freed} were given back within 15 s"
            time.sleep(0.05)
        print(
            f"{freed >> 20} MiB were given back {time.monotonic() - killed:.2f} s after the target was gone"
        )
    assert_writes(initiator, restarted, "restarted", nbytes)

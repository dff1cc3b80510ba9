"""Bytes that go from one process's memory into another's by cuda_ipc: all of them, and only there.

The same checks run over tcp between host memories first: what they find there would be their own fault.
"""

import random
from dataclasses import dataclass

import pytest

from tests.gpu.conftest import EXPANDABLE, only
from tests.gpu.half import GUARD, Half
from tests.gpu.processes import Environment, Process, Processes
from tests.gpu.ranges import Copies, Shape, scattered, tiles

MIB = 1 << 20


@dataclass(frozen=True)
class Where:
    """Devices of initiator and target, as each of them counts, and their environments."""

    initiator: str
    target: str
    path: str = "cuda_ipc"
    environments: tuple[Environment, Environment] = ((), ())
    vmm: bool = False

    def start(self, processes: Processes, nbytes: int) -> tuple[Process, Process]:
        """Initiator and target."""
        a, b = (processes.take(environment) for environment in self.environments)
        a.new(Half, device=self.initiator, path=self.path, nbytes=nbytes)
        b.new(Half, device=self.target, path=self.path, nbytes=nbytes, vmm=self.vmm)
        return a, b


HOST = Where("cpu", "cpu", "tcp")
ONE = Where("cuda:0", "cuda:0")
TWO = Where("cuda:0", "cuda:1")
BACK = Where("cuda:1", "cuda:0")
APART = Where("cuda:0", "cuda:0", environments=(only(0), only(1)))

PLACES = [
    pytest.param(HOST, id="host memory by tcp", marks=pytest.mark.gpus(0)),
    pytest.param(ONE, id="one GPU", marks=pytest.mark.gpus(1)),
    pytest.param(TWO, id="two GPUs", marks=pytest.mark.gpus(2)),
]
KINDS = [
    pytest.param(BACK, id="the other way", marks=pytest.mark.gpus(2)),
    pytest.param(APART, id="each sees one GPU", marks=pytest.mark.gpus(2)),
    pytest.param(
        Where("cuda:0", "cuda:0", environments=((), EXPANDABLE)),
        id="into expandable segments",
        marks=pytest.mark.gpus(1),
    ),
    pytest.param(
        Where("cuda:0", "cuda:1", environments=(EXPANDABLE, EXPANDABLE)),
        id="between expandable segments",
        marks=pytest.mark.gpus(2),
    ),
    pytest.param(
        Where("cuda:0", "cuda:0", vmm=True), id="into cuMemCreate's, one GPU", marks=pytest.mark.gpus(1)
    ),
    pytest.param(
        Where("cuda:0", "cuda:1", vmm=True), id="into cuMemCreate's, two GPUs", marks=pytest.mark.gpus(2)
    ),
]


def ranges_of(rng: random.Random, nbytes: int) -> dict[str, Copies]:
    """Plans of every kind of range that fit a memory of so many bytes."""

    def some(sizes: list[int], align: int) -> Copies:
        return scattered(rng, sizes, align, nbytes, nbytes)

    big = nbytes // 8
    made = {
        f"{n} byte aligned": some([rng.randint(1, 5000) for _ in range(1500)], n) for n in (1, 2, 4, 8, 16)
    }
    made |= {
        f"pages of {size}": some([size] * min(3000, nbytes // 2 // size), 16)
        for size in (16, 256, 4096, 16384, 32768, 262_144)
    }
    made["odd pages"] = some([100_003] * (nbytes // 400_000), 1)
    made["one byte each"] = some([1] * 4000, 1)
    made["long ranges"] = some([big, big + 1, big // 2 + 16], 16)
    made["long ranges, odd"] = some([big, big - 7], 1)
    made["all sizes"] = some([rng.randint(1, 1 << rng.randint(0, 21)) for _ in range(60)], 1)
    made["one"] = some([nbytes // 2], 16)
    return made


def tiles_of(rng: random.Random, nbytes: int) -> dict[str, Copies]:
    """Plans of tiles: what re-slicing of heads, token order and block size make, and shapes made to hurt."""
    heads, tokens, run = 8, 16, 256
    shapes = {
        "NHD to HND": (Shape(heads, tokens, run, run, heads * run, tokens * run, run), 16),
        "HND to NHD": (Shape(tokens, heads, run, run, tokens * run, heads * run, run), 16),
        "half of the heads, HND": (Shape(heads // 2, 1, tokens * run, tokens * run, 0, tokens * run, 0), 16),
        "half of the heads, NHD": (Shape(1, tokens, 4 * run, 0, heads * run, 0, 8 * run), 16),
        "two runs": (Shape(1, 2, 4096, 0, 8192, 0, 4096 + 16), 16),
        "runs of 8": (Shape(3, 5, 8, 200, 24, 320, 40), 8),
        "runs of 3, odd strides": (Shape(3, 7, 3, 101, 11, 67, 5), 1),
        "single bytes": (Shape(4, 9, 1, 64, 3, 40, 4), 1),
        "long odd runs": (Shape(2, 2, 70_001, 150_003, 70_005, 140_007, 70_003), 1),
    }
    return {
        name: tiles(rng, shape, max(1, min(400, nbytes // 3 // (shape.dst_span + 16))), nbytes, nbytes, align)
        for name, (shape, align) in shapes.items()
    }


def check(initiator: Process, target: Process, plans: dict[str, Copies]) -> None:
    """Run each plan into guarded memory, and look at every byte of it."""
    initiator.call("fill", seed=1)
    wrong = {}
    total, ranges, seconds, carriers = 0, 0, 0.0, set()
    for name, copies in plans.items():
        target.call("fill", seed=GUARD)
        took, rails = initiator.call("write", peer="t", copies=copies)
        assert rails, "nothing says what carried it"
        total, ranges, seconds = total + copies.nbytes, ranges + copies.length.size, seconds + took
        carriers |= set(rails)
        if said := target.call("wrong", seed=1, copies=[copies]):
            wrong[name] = said
    what = f"{len(plans)} plans, {ranges} ranges or tiles, {total} bytes"
    print(f"{what} in {1e3 * seconds:.1f} ms by {', '.join(sorted(carriers))}; {len(wrong)} plans wrong")
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())


def size_of(where: Where) -> int:
    return 8 * MIB if where.path == "tcp" else 96 * MIB


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", ["ranges", "tiles"])
def test_every_byte(processes: Processes, where: Where, kind: str) -> None:
    nbytes = size_of(where)
    initiator, target = where.start(processes, nbytes)
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    made = ranges_of if kind == "ranges" else tiles_of
    check(initiator, target, made(random.Random(kind), nbytes))


@pytest.mark.parametrize("where", KINDS)
def test_every_kind_of_memory(processes: Processes, where: Where) -> None:
    """Whatever made the memory, wherever it is: the plan that hurts most, pages, a long range, tiles."""
    nbytes = 32 * MIB
    initiator, target = where.start(processes, nbytes)
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    rng = random.Random(3)
    plans = ranges_of(rng, nbytes) | tiles_of(rng, nbytes)
    few = ["1 byte aligned", "pages of 16384", "long ranges", "all sizes", "NHD to HND"]
    check(initiator, target, {name: plans[name] for name in few})


@pytest.mark.parametrize("where", PLACES)
def test_memory_that_begins_inside_an_allocation(processes: Processes, where: Where) -> None:
    """Regions registered one by one inside one allocation, beginning anywhere."""
    nbytes = 8 * MIB
    initiator, target = where.start(processes, nbytes)
    initiator.call("fill", seed=1)
    target.call("fill", seed=GUARD)
    begin = 3 * MIB + 48
    address = target.call("offer", peer="i", parts=[(begin, 2 * MIB), (100, 512)])
    initiator.call("connect", name="t", address=address)
    inside = scattered(random.Random(4), [999] * 500, 1, nbytes, 2 * MIB)
    initiator.call("write", peer="t", copies=inside)
    there = Copies(inside.src, inside.dst + begin, inside.length)
    assert not target.call("wrong", seed=1, copies=[there])
    # Memory that nobody offered: refused, and nothing of it lands.
    past = Copies(inside.src[:1], inside.dst[:1] + (1 << 40), inside.length[:1])
    refusal = initiator.call("fails", peer="t", copies=past)
    print(f"memory that nobody offered: {refusal}")
    assert refusal
    assert not target.call("wrong", seed=1, copies=[there])


@pytest.mark.parametrize("where", PLACES)
def test_four_initiators_at_once(processes: Processes, where: Where) -> None:
    """Each writes its part of one target's memory, all at the same time, page by page."""
    nbytes, gap = size_of(where), 4096
    part = nbytes // 4 - gap
    _, target = where.start(processes, nbytes)
    initiators = []
    for n in range(4):
        one = processes.take()
        device = where.initiator if n % 2 else where.target
        one.new(Half, device=device, path=where.path, nbytes=part)
        address = target.call("offer", peer=f"i{n}", parts=[(n * (part + gap), part)])
        one.call("connect", name="t", address=address)
        one.call("fill", seed=10 + n)
        initiators.append(one)
    target.call("fill", seed=GUARD)
    rng = random.Random(5)
    plans = [scattered(rng, [4096] * (part // 2 // 4096), 16, part, part) for _ in initiators]
    for n, one in enumerate(initiators):
        one.begin("storm", {"peer": "t", "copies": plans[n]})
    for one in initiators:
        one.end()
    counts = [one.call("await_landed", count=20) for one in initiators]
    for one in initiators:
        one.call("still")
        assert one.call("await_end", seconds=30) == "it was told to stop"
    print(f"4 initiators, {sum(counts)} and more writes of {plans[0].nbytes} bytes")
    at = [n * (part + gap) for n in range(4)]
    for n in range(4):
        there = Copies(plans[n].src, plans[n].dst + at[n], plans[n].length)
        assert not target.call("wrong", seed=10 + n, copies=[there], at=at[n], nbytes=part)
        assert not target.call("wrong", seed=0, copies=[], at=at[n] + part, nbytes=gap)


@pytest.mark.parametrize("where", PLACES)
def test_read(processes: Processes, where: Where) -> None:
    """The other way round: the target is asked to push."""
    nbytes = 8 * MIB
    initiator, target = where.start(processes, nbytes)
    initiator.call("fill", seed=GUARD)
    target.call("fill", seed=6)
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    initiator.call("read", peer="t", offset=1003, nbytes=3 * MIB + 5)
    whole = scattered(random.Random(0), [1], 1, nbytes, nbytes)
    copied = Copies(whole.src * 0 + 1003, whole.dst * 0, whole.length * 0 + 3 * MIB + 5)
    assert not initiator.call("wrong", seed=6, copies=[copied])


@pytest.mark.parametrize("where", PLACES[1:])
def test_data_that_a_stream_has_yet_to_write(processes: Processes, where: Where) -> None:
    """`CopyPlan.after`: the copy sees what the stream wrote before its event, and no thread waits for it."""
    nbytes = 64 * MIB
    initiator, target = where.start(processes, nbytes)
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    rng = random.Random(7)
    plans = {
        "pages": scattered(rng, [16384] * 1000, 16, nbytes, nbytes),
        "long ranges": scattered(rng, [12 * MIB] * 3, 16, nbytes, nbytes),
        "odd ranges": scattered(rng, [777] * 1000, 1, nbytes, nbytes),
    }
    initiator.call("fill", seed=1)
    initiator.call("write", peer="t", copies=plans["pages"])  # the link is up, the kernel is loaded
    for seed, (name, copies) in enumerate(plans.items(), 20):
        initiator.call("fill", seed=1)
        target.call("fill", seed=GUARD)
        early, took, still = initiator.call(
            "write_late_data", peer="t", copies=copies, seed=seed, cycles=400_000_000
        )
        print(f"{name}: submit took {1e3 * took:.2f} ms; the data came later: {early}, {still}")
        assert early, "the data was there before the copy was submitted: this shows nothing"
        assert still, f"submit took {took:.3f} s: it waited for the GPU"
        assert not target.call("wrong", seed=seed, copies=[copies])

"""What of cuda_ipc needs no GPU: the gate and those inside it, the target's fences, addresses, the policy."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region, U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from mooncake_connector.kv_transfer.transport.cuda import cards, gate, rail, share
from mooncake_connector.kv_transfer.transport.cuda.gate import GRANTS, Gate, Visitor
from mooncake_connector.kv_transfer.transport.cuda.kernel import fill_table, width_of
from mooncake_connector.kv_transfer.transport.cuda.rail import USUAL_RANGES, CopyPolicy
from mooncake_connector.kv_transfer.transport.cuda.share import Allocation, Exports, Imports
from mooncake_connector.kv_transfer.transport.cuda.target import CudaTarget
from mooncake_connector.kv_transfer.transport.process_vm import identity

KEY = 0x3FFF_FFFF_FFFF_FFFE


class NoRegistration:
    """In place of making host memory reachable for a device: kernels are played by `Kernel`."""

    def __init__(self, address: int, nbytes: int, context: object) -> None:
        self.device_address = address

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "HostRegistration", NoRegistration)


def visit(opened: Gate) -> Visitor:
    return Visitor(os.getpid(), opened.fd, None)  # type: ignore[arg-type]


def word(address: int) -> U64Array:
    return np.ctypeslib.as_array((ctypes.c_uint64 * 1).from_address(address)).view(np.uint64)


class Kernel:
    """A block of scatter.cu, step by step, on host memory."""

    def __init__(self, visitor: Visitor, key: int = KEY, block: int = 0) -> None:
        shown = visitor.kernel(key, 0)
        assert shown is not None
        self._visitor = visitor  # whose mapping it uses
        self._pass, self._slot = shown, word(shown.entered + 8 * block)

    def enter(self) -> bool:
        self._slot[0] = self._pass.ticket
        if word(self._pass.closed)[0] or word(self._pass.grant)[0] != self._pass.key:
            self.leave()
            return False
        return True

    def leave(self) -> None:
        self._slot[0] = 0


# ---------------------------------------------------------------------- gate


def test_only_what_is_granted_gets_in() -> None:
    opened = Gate()
    visitor = visit(opened)
    assert visitor.kernel(KEY, 0) is None
    opened.open(KEY)
    assert Kernel(visitor).enter()
    assert visitor.kernel(KEY + 1, 0) is None
    assert visitor.kernel(0, 0) is None


def test_a_kernel_that_was_launched_before_the_gate_was_shut_finds_it_shut() -> None:
    opened = Gate()
    visitor = visit(opened)
    opened.open(KEY)
    late = Kernel(visitor)
    opened.shut(KEY)
    assert opened.inside().left()
    assert not late.enter()


def test_who_is_inside_is_waited_for_and_who_comes_later_is_not() -> None:
    opened = Gate()
    visitor = visit(opened)
    for key in (KEY, 5):
        opened.open(key)
    first, later = Kernel(visitor), Kernel(visitor, 5)
    assert first.enter()
    opened.shut(KEY)
    inside = opened.inside()
    assert not inside.left()
    first.leave()
    assert later.enter()  # of another grant, in the very same slot
    assert inside.left()


def test_a_grant_moves_in_where_another_one_was() -> None:
    opened = Gate()
    visitor = visit(opened)
    opened.open(KEY)
    stale = Kernel(visitor)
    opened.shut(KEY)
    opened.open(7)
    assert not stale.enter()
    assert Kernel(visitor, 7).enter()


def test_shut_for_all() -> None:
    opened = Gate()
    visitor = visit(opened)
    opened.open(KEY)
    late = Kernel(visitor)
    opened.shut_all()
    assert not late.enter()
    assert not visitor.begin_copy(KEY)


def test_copies_are_inside_until_the_stream_says_that_they_are_done() -> None:
    opened = Gate()
    visitor = visit(opened)
    assert not visitor.begin_copy(KEY)
    assert opened.inside().left()
    opened.open(KEY)
    assert visitor.begin_copy(KEY)
    opened.shut(KEY)
    inside = opened.inside()
    assert not inside.left()
    word(visitor.copy_done)[0] = visitor.copy_number
    assert inside.left()


def test_copies_that_were_refused_while_somebody_looked_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = Gate()
    visitor = visit(opened)
    opened.open(KEY)
    looks: list[gate.Inside] = []

    def shut_in_between() -> None:
        monkeypatch.setattr(gate, "full_barrier", lambda: None)
        opened.shut(KEY)
        looks.append(opened.inside())

    monkeypatch.setattr(gate, "full_barrier", shut_in_between)
    assert not visitor.begin_copy(KEY)
    assert looks[0].left()


def test_an_initiator_that_goes_leaves() -> None:
    opened = Gate()
    visitor = visit(opened)
    opened.open(KEY)
    assert visitor.begin_copy(KEY)  # its device is lost: nothing will say that it is done
    inside = opened.inside()
    visitor.close()
    assert inside.left()


def test_grants_run_out() -> None:
    opened = Gate()
    for key in range(1, GRANTS + 1):
        opened.open(key)
    with pytest.raises(TransportError, match=str(GRANTS)):
        opened.open(GRANTS + 1)
    opened.shut(1)
    opened.open(GRANTS + 1)


@given(st.lists(st.tuples(st.sampled_from(["open", "shut"]), st.integers(1, 6)), max_size=60))
def test_the_gate_lets_in_exactly_what_is_open(steps: list[tuple[str, int]]) -> None:
    opened, expected = Gate(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "HostRegistration", NoRegistration)
        visitor = visit(opened)
        for what, key in steps:
            getattr(opened, what)(key)
            (expected.add if what == "open" else expected.discard)(key)
        assert {key for key in range(1, 7) if visitor.kernel(key, 0) is not None} == expected
    opened.close()


# ---------------------------------------------------------------------- target


class Asker:
    """A target and one peer that puts its questions."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[str, bytes], bytes]] = {}
        exports = Exports()
        exports._allocations[4096] = Allocation(4096, 100, b"x" * 64)
        self.target = CudaTarget(exports, self._serve)
        self.fenced = threading.Event()

    def _serve(self, topic: str, handler: Callable[[str, bytes], bytes]) -> None:
        self.handlers[topic] = handler

    def open(self, token: bytes = b"t", pid: int | None = None, host: str | None = None) -> cards.Opened:
        asked = cards.Open(token, pid or os.getpid(), identity().host_id if host is None else host)
        return cards.decode_opened(self.handlers[cards.OPEN]("p", cards.encode(asked)))

    def visitor(self, **asked: Any) -> Visitor:
        opened = self.open(**asked)
        return Visitor(opened.pid, opened.gate, None)  # type: ignore[arg-type]


@pytest.fixture
def asker() -> Asker:
    made = Asker()
    made.target.admit("p", b"t")
    return made


def test_a_link_that_is_not_admitted_gets_nothing(asker: Asker) -> None:
    with pytest.raises(TransportError, match="not admitted"):
        asker.open(b"another")
    with pytest.raises(TransportError, match="another host"):
        asker.open(host="elsewhere")
    with pytest.raises(TransportError, match="process"):
        asker.open(pid=1 << 22)
    assert asker.open().allocations == (Allocation(4096, 100, b"x" * 64),)


def test_a_fence_waits_for_the_kernel_that_runs(asker: Asker) -> None:
    asker.target.grant(KEY, "p")
    kernel = Kernel(asker.visitor())
    assert kernel.enter()
    assert asker.target.fence(KEY, "p", asker.fenced.set)
    assert not asker.fenced.wait(0.1)
    kernel.leave()
    assert asker.fenced.wait(2)


def test_a_fence_does_not_wait_where_nobody_came(asker: Asker) -> None:
    asker.target.grant(KEY, "p")
    assert asker.target.fence(KEY, "p", asker.fenced.set)
    assert asker.fenced.wait(2)
    assert not asker.target.fence(KEY, "somebody", asker.fenced.set)


def test_a_fenced_peer_can_open_nothing_more(asker: Asker) -> None:
    visitor = asker.visitor()
    asker.target.grant(KEY, "p")
    kernel = Kernel(visitor)
    asker.target.fence_peer("p", asker.fenced.set)
    assert asker.fenced.wait(2)
    assert not kernel.enter()
    with pytest.raises(TransportError, match="not admitted"):
        asker.open()


def test_a_process_that_died_inside_has_left(asker: Asker) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        asker.target.grant(KEY, "p")
        kernel = Kernel(asker.visitor(pid=other.pid))
        assert kernel.enter()
        assert asker.target.fence(KEY, "p", asker.fenced.set)
        assert not asker.fenced.wait(0.1)
    finally:
        other.kill()
        other.wait()
    assert asker.fenced.wait(2)


def test_close_does_not_wait_for_ever(asker: Asker) -> None:
    asker.target.grant(KEY, "p")
    assert Kernel(asker.visitor()).enter()
    began = time.monotonic()
    asker.target.close()
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------------- addresses


class Mapped:
    """Allocations as if opened elsewhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *allocations: tuple[int, int, int]) -> None:
        here = {base: there for base, _, there in allocations}
        monkeypatch.setattr(share, "_open", lambda pid, a, context: share._Opened(here[a.base], 0, b""))
        context: Any = threading.Lock()
        self.imports = Imports(1, [Allocation(base, n) for base, n, _ in allocations], context)


def u64(*values: int) -> U64Array:
    return np.array(values, np.uint64)


def test_addresses_are_found_where_they_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = Mapped(monkeypatch, (1000, 100, 50), (2000, 10, 9000)).imports
    placed = imports.place(CopyPlan(u64(1, 2, 3), u64(2000, 1000, 1090), u64(10, 5, 10)))
    assert placed.dst.tolist() == [9000, 50, 140]
    assert placed.src.tolist() == [1, 2, 3]


def test_ranges_over_two_allocations_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = Mapped(monkeypatch, (1000, 100, 5000), (1100, 50, 70), (1150, 50, 800)).imports
    placed = imports.place(CopyPlan(u64(0, 500), u64(1090, 1000), u64(100, 10)))
    rows = sorted(zip(placed.src.tolist(), placed.dst.tolist(), placed.length.tolist(), strict=True))
    assert rows == [(0, 5090, 10), (10, 70, 50), (60, 800, 40), (500, 5000, 10)]


@pytest.mark.parametrize(("dst", "length"), [(999, 5), (1095, 6), (2011, 1), (5000, 1), (1500, 10)])
def test_outside_is_refused(monkeypatch: pytest.MonkeyPatch, dst: int, length: int) -> None:
    two = Mapped(monkeypatch, (1000, 100, 50), (2000, 10, 9000)).imports
    one = Mapped(monkeypatch, (1000, 100, 50)).imports
    plan = CopyPlan(u64(0), u64(dst), u64(length))
    for imports in (one, two):
        with pytest.raises(TransportError, match="leaves the memory"):
            imports.place(plan)


def test_tiles_must_fit_with_their_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = Mapped(monkeypatch, (1000, 100, 50)).imports
    tile = Tile(2, 2, 4, 8, 4, 40, 8)
    assert imports.place(CopyPlan.tiled(u64(0), u64(1000), tile)).dst.tolist() == [50]
    with pytest.raises(TransportError):
        imports.place(CopyPlan.tiled(u64(0), u64(1060), tile))


def test_tiles_across_two_allocations_become_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = Mapped(monkeypatch, (1000, 100, 5000), (1100, 100, 70)).imports
    tile = Tile(1, 2, 40, 0, 64, 0, 64)
    plan = CopyPlan.tiled(u64(0, 200), u64(1000, 1080), tile)
    placed = imports.place(plan)
    rows = sorted(zip(placed.src.tolist(), placed.dst.tolist(), placed.length.tolist(), strict=True))
    assert rows == [
        (0, 5000, 40),
        (64, 5064, 36),
        (100, 70, 4),
        (200, 5080, 20),
        (220, 70, 20),
        (264, 114, 40),
    ]


def test_gpu_memory_without_cuda_is_not_shared() -> None:
    with pytest.raises(TransportError):
        Exports().add(Region(1 << 40, 4096, "cuda:0"))


# ---------------------------------------------------------------------- launches


def test_table() -> None:
    words = np.full(7, 9, np.uint64)
    assert fill_table(words, u64(1, 2), u64(3, 4), u64(10, 20)) == 30
    assert words.tolist() == [1, 2, 3, 4, 10, 30, 0]


@pytest.mark.parametrize("n", [1, USUAL_RANGES - 1, USUAL_RANGES, USUAL_RANGES + 1, 2 * USUAL_RANGES, 65536])
def test_the_table_grows_with_its_writes(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    sizes = []

    class Buffer:
        address = 0

        def __init__(self, nbytes: int, context: object) -> None:
            sizes.append(nbytes)
            self.array = np.zeros(nbytes, np.uint8)

    for name, fake in (("Pinned", Buffer), ("DeviceBuffer", Buffer), ("Event", lambda context: None)):
        monkeypatch.setattr(rail, name, fake)
    launch: Any = rail._Launch(None, 0, u64(0))  # type: ignore[arg-type]
    ones = np.ones(n, np.uint64)
    assert fill_table(launch.table(n), ones, ones, ones) == n
    assert min(sizes[-2:]) >= 8 * (3 * n + 1)
    assert launch.table(1).size == 4


@pytest.mark.parametrize(("bits", "width"), [(16, 16), (48, 16), (8, 4), (4, 4), (2, 1), (1, 1)])
def test_width(bits: int, width: int) -> None:
    even = u64(160, 320)
    for plan in ((even + np.uint64(bits), even, even), (even, even + np.uint64(bits), even)):
        assert width_of(*plan, None) == width
    assert width_of(even, even, even, Tile(2, 1, 16, bits, 0, 32, 0)) == width


def test_long_ranges_are_left_to_copy_engines() -> None:
    def takes(policy: CopyPolicy, n: int, nbytes: int, tile: Tile | None = None) -> bool:
        plan = CopyPlan(u64(*[0] * n), u64(*[0] * n), u64(*[nbytes] * n), tile)
        return policy.takes_kernel(plan, n * nbytes)

    assert takes(CopyPolicy(), 100, 32768)
    assert not takes(CopyPolicy(), 3, 4 << 20)
    assert takes(CopyPolicy("kernel"), 3, 4 << 20)
    assert not takes(CopyPolicy("copy_engine"), 100, 32768)
    assert takes(CopyPolicy("copy_engine"), 100, 32768, Tile(2, 2, 4, 8, 4, 40, 8))

"""GPU memory over tcp, with a GPU that is made of host memory: the real one is in tests/gpu."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.engine import TransferEngine
from mooncake_connector.kv_transfer.memory import Ranges, Region, U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from mooncake_connector.kv_transfer.transport import Failure, Landed, Receiver, staging, stream, wire
from mooncake_connector.kv_transfer.transport.outgoing import Frame, Write
from mooncake_connector.kv_transfer.transport.staging import Loader, Staging
from mooncake_connector.kv_transfer.transport.stream_rail import StreamRail
from tests.unit.fake_gpu import FakeGpu
from tests.unit.transport_peer import Done, Raw, Watched, copy, random_bytes, span, until

KEY = 7
NBYTES = 1 << 20
CHUNK = 16 << 10


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small memory takes many of them."""
    monkeypatch.setattr(staging, "UNLOAD_BYTES", CHUNK)
    monkeypatch.setattr(staging, "LOAD_BYTES", 4 * CHUNK)
    monkeypatch.setattr(stream, "LOAD_BYTES", 4 * CHUNK)


class End:
    """Memory on a GPU or on the host, and the `Staging` that knows it."""

    def __init__(self, on_gpu: bool) -> None:
        self.gpu = FakeGpu(NBYTES)
        self.memory = self.gpu.memory if on_gpu else np.zeros(NBYTES, np.uint8)
        region = self.gpu.region if on_gpu else Region(self.memory.ctypes.data, NBYTES)
        self.address = region.address
        self.staging = Staging(self.gpu)
        self.staging.add(region)


class World:
    """A link from memory to memory, by default of GPUs."""

    def __init__(self, source: bool = True, target: bool = True, checksum: bool = False) -> None:
        self.source, self.target = End(source), End(target)
        self.source.memory[:] = random_bytes(NBYTES, 4)
        self.receiver = Receiver(staging=self.target.staging)
        self.receiver.grant(KEY, "p", span(self.target.address, NBYTES))
        self.link = Watched(
            "tcp", self.receiver.admit("p"), checksum=checksum, staging=self.source.staging
        ).up()

    def plan(self, src: Any, dst: Any, length: Any, **options: Any) -> CopyPlan:
        at = np.atleast_1d(np.asarray(src, np.uint64)) + np.uint64(self.source.address)
        to = np.atleast_1d(np.asarray(dst, np.uint64)) + np.uint64(self.target.address)
        return CopyPlan.of(at, to, np.atleast_1d(np.asarray(length, np.uint64)), **options)

    def begin(self, plan: CopyPlan, rail: int = 0) -> Done:
        done = Done()
        self.link.rails[f"tcp-{rail}"].write(KEY, plan, done)
        return done

    def close(self) -> None:
        for end in (self.source, self.target):
            end.gpu.open.set()
        self.link.close()
        self.receiver.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def pages(size: int) -> tuple[U64Array, U64Array, U64Array]:
    """Places of pages in the source, other places in the target, and their lengths; not all is used."""
    count = NBYTES // size
    draw = np.random.default_rng(size)
    src, dst = draw.permutation(count) * size, draw.permutation(count) * size
    used = max(1, count * 2 // 3)
    return src[:used], dst[:used], np.full(used, size)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize(("source", "target"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("size", [16, 37, 1000, 1024, CHUNK, CHUNK + 1, 5 * CHUNK, NBYTES])
def test_every_byte_lands_in_its_place(source: bool, target: bool, size: int, checksum: bool) -> None:
    world = World(source, target, checksum)
    src, dst, length = pages(size)
    expected = np.zeros(NBYTES, np.uint8)
    for a, b in zip(src, dst, strict=True):
        expected[b : b + size] = world.source.memory[a : a + size]
    assert world.begin(world.plan(src, dst, length)).wait() is None
    assert np.array_equal(world.target.memory, expected)
    assert world.receiver.revoke(KEY) == Landed(int(length.sum()), 1)
    assert world.receiver.mismatches == 0
    world.close()


def test_many_writes_from_both_kinds_of_memory_over_both_connections(world: World) -> None:
    host = random_bytes(NBYTES, 9)
    size, dones = 3000, []
    count = NBYTES // size
    expected = np.zeros(NBYTES, np.uint8)
    for n in range(count):
        here = slice(n * size, (n + 1) * size)
        plan = world.plan(n * size, n * size, size)
        if n % 3 == 0:
            plan = CopyPlan(np.array([host.ctypes.data + n * size], np.uint64), plan.dst, plan.length)
        expected[here] = (host if n % 3 == 0 else world.source.memory)[here]
        dones.append(world.begin(plan, n % 2))
    assert [done.wait() for done in dones] == [None] * count
    assert np.array_equal(world.target.memory, expected)
    assert world.receiver.revoke(KEY) == Landed(count * size, count)


@pytest.mark.parametrize("compiles", [True, False])
def test_many_ranges_go_by_the_kernel_if_there_is_one(world: World, compiles: bool) -> None:
    source, target = world.source.gpu, world.target.gpu
    source.compiles = target.compiles = compiles
    src, dst = np.arange(0, 64 * 512, 1024), np.arange(64 * 512, 0, -1024)
    assert world.begin(world.plan(src, dst, np.full(32, 512))).wait() is None
    assert (source.launches, source.batches) == (([32], []) if compiles else ([], [32]))
    assert (target.launches, target.batches) == (([32], []) if compiles else ([], [32]))
    expected = np.zeros(NBYTES, np.uint8)
    for a, b in zip(src, dst, strict=True):
        expected[b : b + 512] = world.source.memory[a : a + 512]
    assert np.array_equal(world.target.memory, expected)


def test_the_kernel_touches_no_memory_that_is_not_known_to_be_its_devices(world: World) -> None:
    for end in (world.source, world.target):
        end.staging.remove(end.gpu.region)
        end.staging.add(Region(end.gpu.region.address, NBYTES, "cuda:1"))
    src = np.arange(0, 64 * 512, 1024)
    assert world.begin(world.plan(src, src, np.full(32, 512))).wait() is None
    assert not world.source.gpu.launches
    assert not world.target.gpu.launches
    assert np.array_equal(world.target.memory[1024:1536], world.source.memory[1024:1536])


def test_one_write_from_and_to_both_kinds_of_memory(world: World) -> None:
    """As when small writes travel together."""
    host, far = random_bytes(NBYTES, 8), np.zeros(NBYTES, np.uint8)
    world.receiver.grant(
        KEY + 1,
        "p",
        Ranges.of(np.array([far.ctypes.data, world.target.address]), np.array([NBYTES, NBYTES])),
    )
    size, count = 1024, 40
    at = np.arange(count, dtype=np.uint64) * np.uint64(size)
    kind = np.random.default_rng(3).integers(0, 2, (2, count)).astype(bool)
    src = np.where(kind[0], np.uint64(host.ctypes.data), np.uint64(world.source.address)) + at
    dst = np.where(kind[1], np.uint64(far.ctypes.data), np.uint64(world.target.address)) + at
    done = Done()
    world.link.rails["tcp-0"].write(KEY + 1, CopyPlan.of(src, dst, np.full(count, size)), done)
    assert done.wait() is None
    for n in range(count):
        here = slice(n * size, (n + 1) * size)
        came, other = (far, world.target.memory) if kind[1, n] else (world.target.memory, far)
        assert np.array_equal(came[here], (host if kind[0, n] else world.source.memory)[here])
        assert not other[here].any()


def test_adjacent_ranges_are_one_copy(world: World) -> None:
    at = np.arange(16) * 512
    assert world.begin(world.plan(at, at[::-1], np.full(16, 512))).wait() is None
    assert world.source.gpu.batches == [1]
    assert world.target.gpu.batches == [16]


def test_tiles_are_taken_apart(world: World) -> None:
    tile = Tile.of(64, [(8, 256, 64)])
    start = np.array([world.source.address], np.uint64)
    plan = CopyPlan.tiled(start, np.array([world.target.address], np.uint64), tile)
    assert world.begin(plan).wait() is None
    wanted = world.source.memory[: 8 * 256].reshape(8, 256)[:, :64].reshape(-1)
    assert np.array_equal(world.target.memory[:512], wanted)
    assert not world.target.memory[512:].any()


def test_a_small_write_can_be_waited_for(world: World) -> None:
    rail = world.link.rails["tcp-0"]
    assert isinstance(rail, StreamRail)
    for at in range(0, 10_000, 1000):
        assert rail.write_sync(KEY, world.plan(at, at, 1000)) is None
    assert np.array_equal(world.target.memory[:10_000], world.source.memory[:10_000])


def test_a_write_has_not_landed_before_the_gpu_has_it(world: World) -> None:
    world.target.gpu.open.clear()
    done = world.begin(world.plan(0, 0, 100))
    time.sleep(0.1)
    assert not done.results
    assert not world.target.memory.any()
    world.target.gpu.open.set()
    assert done.wait() is None
    assert np.array_equal(world.target.memory[:100], world.source.memory[:100])


def test_the_source_is_read_after_what_it_waits_for(world: World) -> None:
    gpu = world.source.gpu
    written = gpu.Event(None)
    done = world.begin(world.plan([0, 9000], [0, 9000], [4096, 4096], after=(written,)))
    time.sleep(0.1)
    assert not done.results
    gpu.memory[:] = 77
    written.happened.set()
    assert done.wait() is None
    assert (world.target.memory[:4096] == 77).all()
    assert (world.target.memory[9000 : 9000 + 4096] == 77).all()


def test_a_fence_waits_for_the_copy_under_way(world: World) -> None:
    gpu = world.target.gpu
    gpu.open.clear()
    done = world.begin(world.plan(0, 0, 20 * CHUNK))
    until(lambda: bool(gpu.batches), 2, "a copy is under way")
    landed: list[Landed] = []

    def revoke() -> None:
        landed.append(world.receiver.revoke(KEY))
        gpu.memory[:] = 1  # it has another owner from now on

    thread = threading.Thread(target=revoke)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    gpu.open.set()
    thread.join(5)
    time.sleep(0.1)
    assert (gpu.memory == 1).all()
    assert landed[0].nbytes < 20 * CHUNK
    assert landed[0].writes == 0
    assert "was revoked" in done.wait().reason


def test_a_fence_does_not_wait_for_the_initiator() -> None:
    end = End(True)
    receiver = Receiver(staging=end.staging)
    receiver.grant(KEY, "p", span(end.address, NBYTES))
    raw = Raw(receiver.admit("p"))
    payload = random_bytes(4 * CHUNK, 1).tobytes()
    raw.send(KEY, 1, copy(0, end.address, 4 * CHUNK), payload[: CHUNK + 100])
    until(lambda: bool(end.memory[CHUNK - 1]), 2, "the first part has landed")
    begun = time.monotonic()
    assert receiver.revoke(KEY) == Landed(CHUNK, 0)
    assert time.monotonic() - begun < 1
    end.memory[:] = 1
    raw.sock.sendall(payload[CHUNK + 100 :])
    assert raw.reply() == (1, wire.REFUSED, f"key {KEY} was revoked".encode())
    assert (end.memory == 1).all()
    receiver.grant(KEY, "p", span(end.address, NBYTES))
    raw.send(KEY, 2, copy(0, end.address, 100), payload[:100])
    assert raw.reply() == (2, wire.LANDED, b"")
    receiver.close()


def test_more_is_received_while_what_came_before_is_copied() -> None:
    """Also when the socket was empty in between."""
    end = End(True)
    receiver = Receiver(staging=end.staging)
    receiver.grant(KEY, "p", span(end.address, NBYTES))
    raw = Raw(receiver.admit("p"))
    payload = random_bytes(3 * CHUNK, 1)
    end.gpu.open.clear()
    raw.send(KEY, 1, copy(0, end.address, 3 * CHUNK), payload[:CHUNK].tobytes())
    until(lambda: len(end.gpu.batches) == 1, 2, "the first part is being copied")
    time.sleep(0.05)
    raw.sock.sendall(payload[CHUNK : 2 * CHUNK].tobytes())
    until(lambda: len(end.gpu.batches) == 2, 2, "the second part is being copied, too")
    end.gpu.open.set()
    raw.sock.sendall(payload[2 * CHUNK :].tobytes())
    assert raw.reply() == (1, wire.LANDED, b"")
    assert np.array_equal(end.memory[: 3 * CHUNK], payload)
    receiver.close()


def test_a_fence_does_not_wait_for_an_initiator_that_sends_byte_by_byte() -> None:
    end = End(True)
    receiver = Receiver(staging=end.staging)
    receiver.grant(KEY, "p", span(end.address, NBYTES))
    raw = Raw(receiver.admit("p"))
    end.gpu.open.clear()
    raw.send(KEY, 1, copy(0, end.address, 4 * CHUNK), bytes(CHUNK))
    until(lambda: bool(end.gpu.batches), 2, "a copy is under way")
    fenced = threading.Event()

    def revoke() -> None:
        assert receiver.revoke(KEY) == Landed(CHUNK, 0)
        fenced.set()

    threading.Thread(target=revoke).start()
    for sent in range(500):
        if sent == 20:
            end.gpu.open.set()
        raw.sock.sendall(b"x")
        if fenced.wait(0.0005):
            break
    assert 20 <= sent < 400
    receiver.close()


def test_a_broken_connection_is_fenced_only_after_its_copies(world: World) -> None:
    gpu = world.target.gpu
    gpu.open.clear()
    done = world.begin(world.plan(0, 0, 20 * CHUNK))
    until(lambda: bool(gpu.batches), 2, "a copy is under way")
    world.link.link.abandon("tcp-0", "stuck")
    assert done.wait() == Failure("stuck", True)
    time.sleep(0.1)
    assert ("fenced", "tcp-0") not in world.link.kinds()
    gpu.open.set()
    until(lambda: ("fenced", "tcp-0") in world.link.kinds(), 2, "fenced")
    gpu.memory[:] = 1
    time.sleep(0.1)
    assert (gpu.memory == 1).all()
    world.link.link.restore("tcp-0")
    world.link.up()
    assert world.begin(world.plan(0, 0, 100)).wait() is None


@pytest.mark.parametrize("sent", [10, CHUNK + 100, 3 * CHUNK])
def test_of_half_a_frame_nothing_lands_after_its_connection_ended(sent: int) -> None:
    end, downs = End(True), []
    receiver = Receiver(staging=end.staging, on_link_down=lambda peer, reason: downs.append(reason))
    receiver.grant(KEY, "p", span(end.address, NBYTES))
    raw = Raw(receiver.admit("p"))
    payload = random_bytes(4 * CHUNK, 1)
    raw.send(KEY, 1, copy(0, end.address, 4 * CHUNK), payload[:sent].tobytes())
    raw.sock.close()
    until(lambda: bool(downs), 2, "the connection ended")
    whole = sent - sent % CHUNK
    assert np.array_equal(end.memory[:whole], payload[:whole])
    assert not end.memory[whole:].any()
    assert receiver.revoke(KEY) == Landed(whole, 0)
    until(lambda: not end.gpu.alive, 2, "all buffers were given back")
    receiver.close()


def test_bytes_that_changed_on_the_way_are_told() -> None:
    end = End(True)
    receiver = Receiver(staging=end.staging)
    receiver.grant(KEY, "p", span(end.address, NBYTES))
    raw = Raw(receiver.admit("p"))
    raw.send(KEY, 1, copy(0, end.address, 3 * CHUNK), bytes(3 * CHUNK), wire.LAST | wire.CHECKED, 1234)
    _, status, said = raw.reply()
    assert status == wire.FAILED
    assert b"checksum mismatch" in said
    assert receiver.mismatches == 1
    assert receiver.revoke(KEY).writes == 0
    receiver.close()


def test_a_source_that_can_not_be_read_breaks_its_connection_alone(world: World) -> None:
    world.source.gpu.fails = True
    failure = world.begin(world.plan(0, 0, 100)).wait()
    assert failure == Failure("cuMemcpyBatchAsync: planted", True)
    until(lambda: ("fenced", "tcp-0") in world.link.kinds(), 2, "fenced")
    world.source.gpu.fails = False
    assert world.begin(world.plan(0, 0, 100), rail=1).wait() is None
    world.link.link.restore("tcp-0")
    world.link.up()
    assert world.begin(world.plan(0, 0, 100)).wait() is None


def test_a_target_that_can_not_be_written_says_so_and_goes_on(world: World) -> None:
    world.target.gpu.fails = True
    failure = world.begin(world.plan(0, 0, 3 * CHUNK)).wait()
    assert failure == Failure("the target's GPU memory can't be written: cuMemcpyBatchAsync: planted", True)
    world.target.gpu.fails = False
    assert world.begin(world.plan(0, 0, 3 * CHUNK)).wait() is None
    assert world.receiver.revoke(KEY) == Landed(3 * CHUNK, 1)


def test_no_gpu_is_an_error_with_a_reason() -> None:
    world = World()
    elsewhere = FakeGpu(4096)
    world.source.staging.device = elsewhere
    failure = world.begin(world.plan(0, 0, 100)).wait()
    assert "can't stage GPU memory at" in failure.reason
    assert "no memory of this GPU" in failure.reason
    assert not elsewhere.alive
    world.close()


def test_closing_gives_all_buffers_back(world: World) -> None:
    for rail in (0, 1):
        assert world.begin(world.plan(0, 0, NBYTES), rail).wait() is None
    assert world.source.gpu.alive
    assert world.target.gpu.alive
    world.close()
    until(lambda: not world.source.gpu.alive, 2, "the initiator's")
    until(lambda: not world.target.gpu.alive, 2, "the target's")


def test_one_buffer_is_gathered_while_another_is_sent() -> None:
    end = End(True)
    end.memory[:] = random_bytes(NBYTES, 1)
    loader = Loader(end.staging)
    write = Write("tcp", lambda failure: None, 3)
    frames = [
        Frame(write, KEY, 1, copy(end.address + at, 0, 100), 0, False, staged=True) for at in (0, 100, 200)
    ]
    loader.load(frames)
    assert [frame.slot is not None for frame in frames] == [True, True, False]
    assert end.gpu.batches == [1, 1]
    for at, frame in enumerate(frames):
        loader.load(frames[at:])
        frame.begin()
        assert frame.slot is not None
        assert np.array_equal(frame.slot.array[:100], end.memory[100 * at : 100 * at + 100])
        loader.sent(frame)
    loader.close()
    assert not end.gpu.alive


def test_which_addresses_are_gpu_memory() -> None:
    known = Staging()
    for region in (Region(1000, 100, "cuda:0"), Region(5000, 100, "cuda:1"), Region(2000, 100, "cpu:0")):
        known.add(region)

    def covers(*address: int) -> bool:
        return known.covers(np.array(address, np.uint64))

    assert [covers(at) for at in (0, 999, 1000, 1099, 1100, 2050, 5000, 5100)] == [
        *(False, False, True, True, False, False, True, False)
    ]
    assert covers(0, 5050)
    assert not covers()
    one, two = np.array([1000, 1050], np.uint64), np.array([1000, 5000], np.uint64)
    assert known.reach(0, one, np.array([50, 50], np.uint64))
    assert not known.reach(0, one, np.array([50, 51], np.uint64))
    assert not known.reach(0, two, np.array([50, 50], np.uint64))
    assert not known.reach(2, one, np.array([50, 50], np.uint64))
    known.remove(Region(5000, 100, "cuda:1"))
    assert not covers(5050)
    known.remove(Region(1000, 100, "cuda:0"))
    assert not known.active


def test_gpu_memory_that_no_nic_can_register_goes_another_way(caplog: pytest.LogCaptureFixture) -> None:
    registered: list[Region] = []

    def refuse(region: Region) -> None:
        if region.on_gpu:
            raise TransportError("mlx5_0 can't register it")
        registered.append(region)

    def engine(path: str) -> TransferEngine:
        made = TransferEngine(TransferConfig(path=path))
        nics: Any = SimpleNamespace(register=refuse, deregister=registered.remove, close=lambda: None)
        made._fabric = nics
        return made

    host, gpu = Region(1 << 20, 4096), Region(1 << 30, 4096, "cuda:0")
    both = engine("tcp")
    both.config = TransferConfig(path="rdma,tcp")
    both.register(host)
    assert both.paths == ("rdma", "tcp")
    both.register(gpu)
    assert both.paths == ("tcp",)
    assert "no rdma for memory of cuda:0: mlx5_0 can't register it" in caplog.text
    both.deregister(gpu)
    assert both.paths == ("rdma", "tcp")
    both.deregister(host)
    assert not registered
    both.close()
    alone = engine("tcp")
    alone.config = TransferConfig(path="rdma")
    with pytest.raises(TransportError, match="mlx5_0 can't register it"):
        alone.register(gpu)
    alone.close()


@pytest.mark.parametrize("checksum", [False, True])
def test_through_the_engine(monkeypatch: pytest.MonkeyPatch, checksum: bool) -> None:
    gpu = FakeGpu(2 * NBYTES)
    monkeypatch.setattr(staging, "Cuda", lambda: gpu)
    config = TransferConfig(path="tcp", checksum=checksum)
    target, initiator = TransferEngine(config), TransferEngine(config)
    whole = gpu.region
    near, far = Region(whole.address, NBYTES, "cuda:0"), Region(whole.address + NBYTES, NBYTES, "cuda:0")
    gpu.memory[:NBYTES] = random_bytes(NBYTES, 2)
    peer = initiator.connect(target.offer([target.register(far)]))
    initiator.register(near)
    initiator.write(peer, near).wait(10)
    assert np.array_equal(gpu.memory[NBYTES:], gpu.memory[:NBYTES])
    initiator.close()
    target.close()
    until(lambda: not gpu.alive, 2, "all buffers were given back")

"""The transfer engine's public face, over real sockets between two engines of this process."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import ConfigError, TransferError
from mooncake_connector.kv_transfer.engine import Peer, Priority, TransferEngine
from mooncake_connector.kv_transfer.memory import Ranges, Region, U64Array
from mooncake_connector.kv_transfer.peer import Address
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transfer import Status

SIZE = 4 << 20
PAGE = 4096


class Two:
    """A target with memory on offer, and an initiator with a source."""

    def __init__(self, path: str) -> None:
        self.downs: list[tuple[str, str]] = []
        self.target = TransferEngine(on_link_down=lambda peer, why: self.downs.append((peer, why)))
        self.initiator = TransferEngine(TransferConfig(path=path))
        self.memory = np.zeros(SIZE, np.uint8)
        self.source = np.random.default_rng(1).integers(1, 255, SIZE, np.uint8)
        self.initiator.register(self.source)
        self.peer: Peer = self.initiator.connect(
            self.target.offer([self.target.register(self.memory)], peer="writer")
        )

    def plan(self, src: U64Array, dst: U64Array, length: int = PAGE) -> CopyPlan:
        """Pages by offset."""
        here, there = (np.uint64(a.ctypes.data) for a in (self.source, self.memory))
        return CopyPlan.of(here + src, there + dst, np.full(src.size, length))


@pytest.fixture(params=["process_vm", "tcp"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    pair = Two(request.param)
    yield pair
    pair.initiator.close()
    pair.target.close()


def pages(count: int, seed: int) -> U64Array:
    return np.random.default_rng(seed).permutation(SIZE // PAGE)[:count].astype(np.uint64) * np.uint64(PAGE)


def test_scattered_pages_land_and_nothing_else(two: Two) -> None:
    src, dst = pages(400, 2), pages(400, 3)
    transfer = two.initiator.submit(two.plan(src, dst), to=two.peer)
    transfer.wait(10)
    assert transfer.status is Status.LANDED
    assert transfer.bytes_done == transfer.nbytes == 400 * PAGE
    expected = np.zeros(SIZE, np.uint8).reshape(-1, PAGE)
    expected[dst // PAGE] = two.source.reshape(-1, PAGE)[src // PAGE]
    assert np.array_equal(two.memory, expected.reshape(-1))


def test_a_whole_array_goes_and_comes_back(two: Two) -> None:
    two.initiator.write(two.peer, two.source).wait(10)
    assert np.array_equal(two.memory, two.source)
    back = np.zeros(SIZE // 2, np.uint8)
    two.initiator.read(two.peer, back, offset=1000).wait(10)
    assert np.array_equal(back, two.source[1000 : 1000 + SIZE // 2])
    again = np.zeros(10, np.uint8)
    two.initiator.read(two.peer, again).wait(10)
    assert np.array_equal(again, two.source[:10])


def test_regions_and_tensors_are_met_in_the_order_offered() -> None:
    target, initiator = TransferEngine(), TransferEngine()
    first, second = np.zeros(1000, np.uint8), torch.zeros(500, dtype=torch.float16)
    peer = initiator.connect(target.offer([target.register(first), target.register(second)]))
    initiator.write(peer, torch.ones(600, dtype=torch.float16), offset=800).wait(10)
    assert not first[:800].any()
    assert first[800:].view(np.float16).tolist() == [1.0] * 100
    assert second.tolist() == [1.0] * 500
    with pytest.raises(ConfigError, match="do not fit the 2000 bytes"):
        initiator.write(peer, np.zeros(1001, np.uint8), offset=1000)
    initiator.close()
    target.close()


def test_asyncio(two: Two) -> None:
    async def many() -> None:
        await asyncio.gather(
            *(two.initiator.submit(two.plan(pages(8, n), pages(8, n)), to=two.peer) for n in range(50))
        )
        transfer = two.initiator.submit(two.plan(pages(1, 1), pages(1, 1)), to=two.peer, key=12345)
        with pytest.raises(TransferError, match="12345"):
            await transfer

    asyncio.run(many())
    for n in range(50):
        for page in pages(8, n).tolist():
            assert np.array_equal(two.memory[page : page + PAGE], two.source[page : page + PAGE])


def test_small_writes_of_many_threads_all_land(two: Two) -> None:
    def writer(k: int) -> None:
        mine = np.arange(k, SIZE // 512, 8, dtype=np.uint64) * np.uint64(512)
        for wave in np.array_split(mine, 8):
            transfers = [
                two.initiator.submit(two.plan(wave[i : i + 1], wave[i : i + 1], 512), to=two.peer)
                for i in range(wave.size)
            ]
            for transfer in transfers:
                transfer.wait(20)

    threads = [threading.Thread(target=writer, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(two.memory, two.source)


@pytest.mark.parametrize("priority", Priority)
def test_each_priority_lands(two: Two, priority: Priority) -> None:
    two.initiator.write(two.peer, two.source[:SIZE], priority=priority, deadline=10).wait(10)
    assert np.array_equal(two.memory, two.source)


def test_outside_the_grant_is_refused(two: Two) -> None:
    beyond = np.array([SIZE], np.uint64)
    transfer = two.initiator.submit(two.plan(np.zeros(1, np.uint64), beyond), to=two.peer)
    with pytest.raises(TransferError, match="outside"):
        transfer.wait(10)


def test_reading_what_was_not_offered_is_refused(two: Two) -> None:
    into = np.zeros(100, np.uint8)
    elsewhere = Peer("t", two.peer.key, (Region(two.source.ctypes.data, SIZE),), two.peer.outbound)
    with pytest.raises(TransferError, match="outside what was offered"):
        two.initiator.read(elsewhere, into).wait(10)
    assert not into.any()


def test_after_a_fence_nothing_lands(two: Two) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            transfers = [two.initiator.write(two.peer, two.source) for _ in range(4)]
            for transfer in transfers:
                try:
                    transfer.wait(10)
                except TransferError:
                    return

    writer = threading.Thread(target=write)
    writer.start()
    while not two.memory.any():
        time.sleep(0.001)
    two.target.fence("writer")
    two.memory[:] = 0
    time.sleep(0.2)
    assert not two.memory.any()
    writer.join(10)
    assert not writer.is_alive(), "the writer was never told"
    stop.set()


def test_an_ended_link_fails_what_runs_and_what_comes(two: Two) -> None:
    two.initiator.write(two.peer, two.source).wait(10)
    two.target.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            two.initiator.write(two.peer, two.source).wait(5)
        except TransferError:
            break
        assert time.monotonic() < deadline
    begun = time.monotonic()
    with pytest.raises(TransferError):
        two.initiator.write(two.peer, two.source).wait(5)
    assert time.monotonic() - begun < 1


def test_a_target_that_does_not_answer_meets_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        target, initiator = TransferEngine(), TransferEngine(TransferConfig(path="tcp"))
        memory = np.zeros(PAGE, np.uint8)
        address = target.offer([target.register(memory)])
        parsed = Address.parse(address)
        there = msgspec.structs.replace(
            parsed, endpoint=msgspec.structs.replace(parsed.endpoint, port=mute.getsockname()[1])
        )
        transfer = initiator.write(initiator.connect(str(there)), memory, deadline=0.3)
        begun = time.monotonic()
        with pytest.raises(TransferError, match="deadline"):
            transfer.wait(5)
        assert 0.2 < time.monotonic() - begun < 2
        initiator.close()
        target.close()


def test_a_closed_link_is_forgotten(two: Two) -> None:
    two.initiator.write(two.peer, two.source).wait(10)
    assert two.initiator.outbounds == (two.peer.outbound,)
    two.peer.close()
    assert two.initiator.outbounds == ()


def test_bad_input_names_itself() -> None:
    engine = TransferEngine(TransferConfig(path="tcp"))
    with pytest.raises(ConfigError, match="no address"):
        engine.connect("http://example")
    with pytest.raises(ConfigError, match="not registered"):
        engine.offer([Region(1, 2)])
    with pytest.raises(ConfigError, match="not contiguous"):
        engine.register(torch.zeros(4, 4).t())
    other = TransferEngine(TransferConfig(path="process_vm"))
    with pytest.raises(ConfigError, match="no way in common"):
        other.connect(engine.offer([engine.register(np.zeros(1, np.uint8))]))
    with pytest.raises(ConfigError, match="choose auto"):
        TransferConfig(path="pigeon")
    engine.close()
    other.close()


def test_grants_end_with_their_key(two: Two) -> None:
    """A peer's second grant is its own: revoking one leaves the other."""
    inbound, memory = two.target.inbound, two.memory
    whole = Ranges.of(np.array([memory.ctypes.data], np.uint64), np.array([SIZE], np.uint64))
    inbound.grant(77, "writer", whole)
    two.initiator.write(two.peer, two.source[:PAGE], key=77).wait(10)
    inbound.revoke(77)
    with pytest.raises(TransferError, match="77"):
        two.initiator.write(two.peer, two.source[:PAGE], key=77).wait(10)
    two.initiator.write(two.peer, two.source).wait(10)
    assert np.array_equal(memory, two.source)


def test_the_example_runs() -> None:
    example = Path(__file__).parents[2] / "examples/transfer.py"
    ran = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "arrived: 1048576 262144.0\n"


def test_write_now_lands_small_and_large_and_says_what_failed(two: Two) -> None:
    """Whatever way it takes: first on a link that is not up yet, then on an idle one, then beside others."""
    page = two.plan(pages(1, 5), pages(1, 6))
    two.initiator.write_now(page, to=two.peer)
    for seed in range(20):
        two.initiator.write_now(two.plan(pages(1, seed), pages(1, seed)), to=two.peer)
    two.initiator.write_now(two.plan(pages(300, 7), pages(300, 7)), to=two.peer)
    others = [two.initiator.write(two.peer, two.source) for _ in range(4)]
    two.initiator.write_now(two.plan(pages(1, 9), pages(1, 9)), to=two.peer)
    for other in others:
        other.wait(10)
    assert np.array_equal(two.memory, two.source)
    with pytest.raises(TransferError, match="12345"):
        two.initiator.write_now(page, to=two.peer, key=12345)
    two.initiator.write_now(page, to=two.peer)
    two.target.close()
    with pytest.raises(TransferError):
        two.initiator.write_now(page, to=two.peer, timeout=5)

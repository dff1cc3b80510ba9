"""Following a publisher that speaks vLLM's protocol: gaps, restarts, what does not come again."""

import asyncio
import socket
import time
from collections.abc import Callable

import msgspec
import pytest
import zmq
import zmq.asyncio

from mooncake_connector.scheduler.engines.base import KvEventSource
from mooncake_connector.scheduler.engines.kv_events import KvEventSubscriber, Position
from mooncake_connector.scheduler.policy.engine_blocks import EngineBlocks
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex

END = (-1).to_bytes(8, "big", signed=True)
PROMPT = list(range(40))


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def bind(socket: zmq.asyncio.Socket, port: int) -> None:
    """As soon as the one before has let go of it."""
    for _ in range(100):
        try:
            socket.bind(f"tcp://127.0.0.1:{port}")
            return
        except zmq.ZMQError:
            time.sleep(0.02)
    raise AssertionError(f"port {port} is taken")


class Publisher:
    """vLLM's `ZmqEventPublisher`, batch by batch, and what it can be made to lose.

    Args:
        keeps: batches that can be asked for again.
        topics: whether answers carry the topic, as those of vLLM 0.32 do.
    """

    def __init__(
        self, ports: tuple[int, int], *, started: float = 0.0, keeps: int = 1000, topics: bool = True
    ) -> None:
        context = zmq.asyncio.Context.instance()
        self.pub, self.router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        bind(self.pub, ports[0])
        bind(self.router, ports[1])
        self.number, self.ts, self.keeps, self.topics = 0, started, keeps, topics
        self.kept: list[tuple[int, bytes]] = []
        self.drop_answers: set[int] = set()
        self.asked = 0
        self.silent = False
        self.task = asyncio.create_task(self.answer())

    async def answer(self):
        while True:
            client, _, start = await self.router.recv_multipart()
            self.asked += 1
            if self.silent:
                continue
            topic = [b"kv"] if self.topics else []
            for number, payload in list(self.kept):
                if number >= int.from_bytes(start, "big") and number not in self.drop_answers:
                    head = number.to_bytes(8, "big")
                    await self.router.send_multipart([client, b"", *topic, head, payload])
            self.drop_answers.clear()
            await self.router.send_multipart([client, b"", *([b""] if self.topics else []), END, b""])

    async def send(self, *events, lost: bool = False, payload: bytes | None = None):
        self.ts += 1
        payload = payload or msgspec.msgpack.encode([self.ts, events, 0])
        if not lost:
            await self.pub.send_multipart([b"kv", self.number.to_bytes(8, "big"), payload])
        self.kept = [*self.kept, (self.number, payload)][-self.keeps :]
        self.number += 1

    def close(self):
        self.task.cancel()
        self.pub.close(linger=0)
        self.router.close(linger=0)


def block(at: int, tokens=PROMPT):
    """The event of one block of four tokens; its hash is its place."""
    fields = {"block_hashes": [at], "parent_block_hash": at - 1 if at else None, "block_size": 4}
    return {"type": "BlockStored", "token_ids": tokens[at * 4 : at * 4 + 4], "medium": "GPU", **fields}


def gone(at: int):
    return {"type": "BlockRemoved", "block_hashes": [at], "medium": "GPU"}


class World:
    """A publisher, a subscriber, and the index between them."""

    def __init__(self, **publisher) -> None:
        self.ports = free_ports()
        self.publisher = Publisher(self.ports, **publisher)
        self.index = PrefixIndex(4)
        self.subscriber: KvEventSubscriber

    def subscribe(self, *, replay: bool = True, check_seconds: float = 0.1) -> KvEventSubscriber:
        again = f"tcp://127.0.0.1:{self.ports[1]}" if replay else ""
        source = KvEventSource(f"tcp://127.0.0.1:{self.ports[0]}", again, "kv")
        blocks = EngineBlocks(self.index, "e")
        self.subscriber = KvEventSubscriber(blocks, source, check_seconds=check_seconds, replay_seconds=0.3)
        return self.subscriber

    async def restart(self, **publisher) -> None:
        self.publisher.close()
        await asyncio.sleep(0.05)
        self.publisher = Publisher(self.ports, started=1000.0, **publisher)

    def matched(self, tokens=PROMPT) -> int:
        return self.index.match(self.index.keys(tokens)).get("e", 0)

    async def until(self, check: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while not check():
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.005)

    async def connected(self) -> None:
        """Batches arrive: those sent before are learned with the first that does."""

        async def arrive():
            before = self.subscriber.batches
            while self.subscriber.batches == before:
                await self.publisher.send()
                await asyncio.sleep(0.02)

        await asyncio.wait_for(arrive(), 10)


@pytest.fixture
async def world():
    made = []

    def make(**publisher):
        made.append(World(**publisher))
        return made[-1]

    yield make
    for each in made:
        each.publisher.close()


def test_the_order_of_batches():
    position = Position()
    assert position.order(57, 1.0) == "next", "who comes late begins anywhere"
    position.move(57, 1.0)
    assert position.order(58, 2.0) == "next"
    assert position.order(59, 2.0) == "gap"
    assert position.order(57, 1.0) == position.order(3, 0.5) == "old"
    assert position.order(57, 9.0) == position.order(0, 9.0) == "restart"
    assert position.is_at(57, 1.0)
    assert not position.is_at(57, 2.0)


@pytest.mark.parametrize("topics", [True, False])
async def test_who_joins_late_learns_what_was(world, topics):
    w = world(topics=topics)
    for at in range(5):
        await w.publisher.send(block(at))
    async with w.subscribe():
        await w.until(lambda: w.matched() == 5)
        await w.connected()
        await w.publisher.send(block(5), block(6))
        await w.publisher.send(gone(6))
        await w.until(lambda: w.matched() == 6)
        assert (w.subscriber.gaps, w.subscriber.lost) == (0, 0)


async def test_a_gap_is_filled(world):
    w = world()
    async with w.subscribe(check_seconds=60):
        await w.connected()
        await w.publisher.send(block(0), block(1), block(2))
        await w.publisher.send(gone(2), lost=True)
        await w.publisher.send(block(2), lost=True)
        await w.publisher.send(block(3))
        await w.until(lambda: w.matched() == 4)
        assert (w.subscriber.gaps, w.subscriber.lost) == (1, 0)


async def test_what_is_missed_at_the_end_is_asked_for_in_silence(world):
    w = world()
    async with w.subscribe():
        await w.connected()
        await w.publisher.send(block(0), lost=True)
        await w.until(lambda: w.matched() == 1)
        assert w.subscriber.lost == 0


async def test_holes_in_an_answer_are_filled(world):
    w = world()
    for at in range(6):
        await w.publisher.send(block(at))
    w.publisher.drop_answers = {3}
    async with w.subscribe():
        await w.until(lambda: w.matched() == 6)
        assert w.subscriber.lost == 0


@pytest.mark.parametrize("how", ["no endpoint", "silent", "no longer kept"])
async def test_a_gap_that_stays_forgets_all(world, how):
    w = world(keeps=1 if how == "no longer kept" else 1000)
    async with w.subscribe(replay=how != "no endpoint", check_seconds=60):
        await w.connected()
        await w.publisher.send(block(0), block(1))
        await w.until(lambda: w.matched() == 2)
        w.publisher.silent = how == "silent"
        await w.publisher.send(gone(1), lost=True)
        await w.publisher.send(block(2), block(0, [9] * 4))
        await w.until(lambda: w.matched([9] * 4) == 1)
        assert w.index.held("e") == 1, "a block after one that is not known was kept"
        assert (w.subscriber.gaps, w.subscriber.lost, w.matched()) == (1, 1, 0)
        # And it goes on from there.
        await w.publisher.send(gone(0), block(0))
        await w.until(lambda: w.matched() == 1)


@pytest.mark.parametrize("replay", [True, False])
async def test_a_restart_forgets_all(world, replay):
    w = world()
    async with w.subscribe(replay=replay):
        await w.connected()
        await w.publisher.send(block(0), block(1))
        await w.until(lambda: w.matched() == 2)
        await w.restart()
        await w.until(lambda: w.index.held("e") == 0)
        await w.connected()
        await w.publisher.send(block(0, [9] * 4))
        await w.until(lambda: w.matched([9] * 4) == 1)
        assert (w.matched(), w.index.held("e")) == (0, 1)


async def test_a_restart_is_seen_even_if_its_numbers_fit(world):
    """The new start has published just as many batches before we are there again."""
    w = world()
    await w.publisher.send(block(0))
    async with w.subscribe():
        await w.until(lambda: w.matched() == 1)
        await w.restart()
        await w.publisher.send(block(0, [9] * 4))
        await w.until(lambda: w.matched([9] * 4) == 1)
        assert (w.matched(), w.index.held("e")) == (0, 1)


async def test_a_lost_connection_loses_nothing(world):
    w = world()
    async with w.subscribe():
        await w.connected()
        await w.publisher.send(block(0))
        await w.until(lambda: w.matched() == 1)
        old = w.publisher
        old.close()
        await asyncio.sleep(0.05)
        w.publisher = Publisher(w.ports)
        w.publisher.kept, w.publisher.number, w.publisher.ts = old.kept, old.number, old.ts
        await w.publisher.send(block(1))
        await w.until(lambda: w.matched() == 2)
        assert w.subscriber.lost == 0


async def test_a_batch_that_is_not_understood_forgets_all(world):
    w = world()
    async with w.subscribe():
        await w.connected()
        await w.publisher.send(block(0))
        await w.publisher.send(payload=b"\xc1")
        await w.publisher.send(block(0, [-1] * 4))
        await w.publisher.send(block(0, [9] * 4))
        await w.until(lambda: w.matched([9] * 4) == 1)
        assert (w.matched(), w.subscriber.lost) == (0, 2)
        asked = w.publisher.asked
        await w.until(lambda: w.publisher.asked > asked + 1)
        assert w.subscriber.lost == 2, "asked again in silence, the same batch counted again"

"""Follows what an engine publishes of its KV cache: vLLM's ZMQ publisher and its replay endpoint.

Batches are numbered from 0 at every start of an engine. What was missed is asked for again; if the engine no
longer has it, what is known of its cache is forgotten, and learned anew from then on.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal, Self

import msgspec
import zmq
import zmq.asyncio

from mooncake_connector.scheduler.engines.base import KvEventSource
from mooncake_connector.scheduler.policy.engine_blocks import EngineBlocks, Event, decode

log = logging.getLogger(__name__)

_END = (-1).to_bytes(8, "big", signed=True)
_QUEUE = 100_000  # batches; as many as vLLM keeps for a slow subscriber by default
_AT_ONCE = 64  # batches taken in before other tasks have their turn
_TRIES = 8  # answers with holes in them that are asked to be completed
_HEARTBEAT_MS = 5000

Order = Literal["next", "old", "gap", "restart"]
Batch = tuple[float, Sequence[Event] | None]
"""The engine's clock at its making, and the events; None: they were not understood."""


class Position:
    """Where we are in one engine's batches; pure.

    A batch's time tells two starts of an engine apart, as the numbers are the same.

    Attributes:
        last: number of the batch taken in last; None: any may follow.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self._ts = 0.0

    def order(self, number: int, ts: float) -> Order:
        """What a batch is to those before it."""
        if self.last is None or number == self.last + 1:
            return "next"
        if number > self.last:
            return "gap"
        return "restart" if ts > self._ts else "old"

    def is_at(self, number: int, ts: float) -> bool:
        """Whether it is the very batch that was taken in last."""
        return number == self.last and ts == self._ts

    def move(self, number: int, ts: float) -> None:
        """The batch was taken in."""
        self.last, self._ts = number, ts


class KvEventSubscriber:
    """Keeps one engine's blocks as it says they are, for as long as the context is open.

    It connects when the engine is there, and again when it was gone. What it finds then may be another start
    of it: the batch it had last is asked for again, and if that isn't the same one, all is forgotten.

    Args:
        blocks: what the events are applied to.
        source: where the engine publishes.
        check_seconds: silence after which it asks whether something was missed that nothing followed.
        replay_seconds: how long it waits for the next part of an answer.

    Attributes:
        batches: taken in.
        gaps: how often batches were missed.
        lost: how often all was forgotten: what was missed did not come again, or the engine was restarted.
    """

    def __init__(
        self,
        blocks: EngineBlocks,
        source: KvEventSource,
        *,
        check_seconds: float = 5.0,
        replay_seconds: float = 5.0,
    ) -> None:
        self.batches = 0
        self.gaps = 0
        self.lost = 0
        self._blocks = blocks
        self._source = source
        self._check_seconds = check_seconds
        self._replay_seconds = replay_seconds
        self._position = Position()
        self._connected = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except Exception:
                log.exception("KV events of %s: starting over", self._blocks.name)
                self._forget()
                self._connected = False
                await asyncio.sleep(self._check_seconds)

    async def _follow(self) -> None:
        socket = _socket(zmq.SUB, self._source.endpoint)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        try:
            socket.setsockopt(zmq.SUBSCRIBE, self._source.topic.encode())
            socket.connect(self._source.endpoint)
            while True:
                ready = dict(await poller.poll(round(self._check_seconds * 1000)))
                if monitor in ready:
                    await monitor.recv_multipart()
                    await self._on_connect()
                elif socket in ready and self._connected:
                    await self._receive(socket)
                elif not ready and self._connected:
                    await self._recover()
                # What came before the monitor said so waits; and other tasks have their turn.
                await asyncio.sleep(0)
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    async def _on_connect(self) -> None:
        again, self._connected = self._connected, True
        if not await self._recover() and again:
            self._forget()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                frames = await socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            number, batch = _read(frames)
            order = self._position.order(number, batch[0])
            if order in ("gap", "restart"):
                self.gaps += order == "gap"
                if not await self._recover() or self._position.order(number, batch[0]) == "gap":
                    self._forget()
                order = self._position.order(number, batch[0])
            if order == "next":
                self._take(number, batch)

    def _take(self, number: int, batch: Batch) -> None:
        ts, events = batch
        try:
            if events is None:
                raise OverflowError
            self._blocks.apply(events)
        except OverflowError:
            # It may have told of blocks that are gone.
            log.warning("KV events of %s: batch %d is not understood", self._blocks.name, number)
            self._forget()
        self._position.move(number, ts)
        self.batches += 1

    def _forget(self) -> None:
        if self._position.last is not None:
            self.lost += 1
        self._position = Position()
        self._blocks.clear()

    async def _recover(self) -> bool:
        """Take in what was missed, if anything; forget all if the engine is not the one it was.

        Returns:
            Whether the engine answered for everything up to now.
        """
        if not self._source.replay_endpoint:
            return False
        for _ in range(_TRIES):
            before = self._position.last
            found = await self._replay()
            if found != "hole" or self._position.last == before:
                return found == "whole"
        return False

    async def _replay(self) -> Literal["whole", "hole", "silent"]:
        """Ask for the batches from the last one on."""
        while True:
            known = self._position.last is not None
            async with aclosing(self._answer(self._position.last or 0)) as parts:
                count = 0
                try:
                    async for number, batch in parts:
                        count += 1
                        if known and count == 1:
                            if not self._position.is_at(number, batch[0]):
                                break
                        elif self._position.order(number, batch[0]) != "next":
                            return "hole"
                        else:
                            self._take(number, batch)
                        if count % _AT_ONCE == 0:
                            await asyncio.sleep(0)
                    else:
                        if count or not known:
                            return "whole"
                except TimeoutError:
                    return "silent"
            # It no longer has the batch we had last, or never had it.
            self._forget()

    async def _answer(self, start: int) -> AsyncGenerator[tuple[int, Batch], None]:
        socket = _socket(zmq.DEALER, self._source.replay_endpoint)
        try:
            socket.connect(self._source.replay_endpoint)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(self._replay_seconds):
                    frames = await socket.recv_multipart()
                if frames[-2] == _END:
                    return
                yield _read(frames)
        finally:
            socket.close(linger=0)


def _socket(kind: int, endpoint: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.RCVHWM, _QUEUE)
    # Without it a host that went away without a word is never missed.
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    return socket


def _read(frames: Sequence[bytes]) -> tuple[int, Batch]:
    """Number and batch of a message: topic (in some answers none), number, batch."""
    number = int.from_bytes(frames[-2], "big")
    try:
        return number, decode(frames[-1])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return number, (0.0, None)

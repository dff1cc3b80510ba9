"""Decode's answer on its way to the client, and the ways in which there is none."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.engines.base import told
from mooncake_connector.scheduler.engines.pool import Lease
from mooncake_connector.scheduler.engines.response import Broken, Response, Sink
from mooncake_connector.scheduler.policy.base import Rejected
from mooncake_connector.scheduler.proxy.deadlines import Stall
from mooncake_connector.scheduler.proxy.first_token import Early, Mismatch, Splice
from mooncake_connector.scheduler.proxy.journey import Journey
from mooncake_connector.scheduler.proxy.progress import StreamCount, read_whole
from mooncake_connector.scheduler.proxy.rejection import explain
from mooncake_connector.scheduler.proxy.timeline import Timeline

BROKEN = (Broken, TimeoutError)


class Reply(msgspec.Struct, frozen=True):
    """A whole answer of an engine."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NoDecode(MooncakeError):
    """No decode engine is usable."""


class Overloaded(MooncakeError):
    """The conductor rejected it."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(explain(rejected))
        self.rejected = rejected


class DecodeFailed(MooncakeError):
    """Decode failed before its answer's first byte; `reply` is the 5xx it gave, if it gave one."""

    def __init__(self, message: str, reply: Reply | None = None) -> None:
        super().__init__(message)
        self.reply = reply


class StreamBroken(MooncakeError):
    """Decode's stream ended before its end."""


class PrefillFailed(MooncakeError):
    """Prefill failed; `refused`: with a 4xx, which another prefill engine would repeat."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class Answer:
    """Decode's answer, open. `first` is all of it unless `streamed`. Close it, always.

    Args:
        silence: seconds after which a stream that says nothing is cut.

    Attributes:
        transfer_id: names it to both engines' connectors; empty if decode serves alone.
        early: what `first` is, if it is prefill's first token.
        taken: called when decode has what it needs of prefill, or the answer is closed; again is no harm.
        tokens: of the whole answer, once it is closed and if they are known.
        again: called if decode's stream does not go on from that: another stream from its beginning, which
            does; raises `DecodeFailed`.
    """

    def __init__(
        self,
        journey: Journey,
        reply: Response,
        first: bytes,
        streamed: bool,
        lease: Lease,
        silence: float,
        timeline: Timeline,
        reading: asyncio.Task[bytes] | None = None,
        early: Early | None = None,
    ) -> None:
        self.journey = journey
        self.choice = journey.placement
        self.transfer_id = ""
        self.status = reply.status
        self.headers = reply.headers
        self.first = first
        self.streamed = streamed
        self.prefill: asyncio.Task[bytes] | None = None
        self.early = early
        self.taken: Callable[[], None] = lambda: None
        self.again: Callable[[str], Awaitable[Answer]] | None = None
        self.tokens: int | None = None
        self._reply = reply
        self._lease = lease
        self._stall = Stall(silence, reply.close)
        self._timeline = timeline
        self._reading = reading
        self._begun = False
        self._second: Answer | None = None
        self._count = StreamCount()

    async def pour(self, sink: Sink) -> bool:
        """Have `sink` take `first` and what follows it, as it comes: every token passes here.

        Only where decode's stream is the client's as it is, without prefill's token: else `chunks`.

        Returns:
            Whether that was all of it; if not, `sink` takes no more for now.

        Raises:
            StreamBroken: the engine went away.
        """
        stall, feed, progressed = self._stall, self._count.feed, self.journey.progressed
        count = self._count

        def take(chunk: bytes) -> bool:
            stall.turns += 1
            feed(chunk)
            more = sink(chunk)
            progressed(count.tokens)
            return more

        if not self._begun:
            self._begin()
            more = take(self.first)
            self.journey.first_token()  # after it, for the client waits
            if not more:
                return False
        stall.waiting = True
        try:
            ended = await self._reply.pour(take)
        except Broken as error:
            raise self._broken(error) from None
        finally:
            stall.waiting = False
        if ended:
            self._timeline.mark("decode_end")
        return ended

    def chunks(self) -> AsyncIterator[bytes]:
        """`first` and what follows it, as it comes.

        Raises:
            StreamBroken: the engine went away.
        """
        if self.early is None:
            self._count.feed(self.first)
            return self._read(self.first)
        return self._after(self.early)

    async def _after(self, early: Early) -> AsyncIterator[bytes]:
        """Prefill's first token, and what decode's stream has after it."""
        yield self.first
        self.journey.first_token()
        splice = Splice(early)
        try:
            async for chunk in _spliced(self._read(), splice):
                yield chunk
            return
        except (StreamBroken, Mismatch) as error:
            if splice.begun or self.again is None:
                raise StreamBroken(str(error)) from None
            failure = error
        self.journey.over(None)
        self._reply.close()  # whatever it goes on with, nobody wants it
        try:
            self._second = await self.again(str(failure))
            async for chunk in _spliced(self._second.chunks(), Splice(early)):
                yield chunk
        except (DecodeFailed, Mismatch) as error:
            raise StreamBroken(f"{failure}; and again: {error}") from None

    async def _read(self, known: bytes = b"") -> AsyncIterator[bytes]:
        """What is `known` already, if anything, and what comes."""
        stall = self._stall
        self._begin()
        try:
            if known:
                yield known
                self.journey.first_token()  # after it, for the client waits
            stall.waiting = True
            if self._reading:
                first = await self._reading
                self.taken()
                self._timeline.mark("decode_first")
                self._counted(first)
                stall.waiting = False
                yield first
                stall.waiting = True
            while chunk := await self._reply.readany():
                self._counted(chunk)
                stall.waiting = False
                stall.turns += 1
                yield chunk
                stall.waiting = True
            self._timeline.mark("decode_end")
        except Broken as error:
            raise self._broken(error) from None

    def _begin(self) -> None:
        self._begun = True
        self._stall.start()
        self._lease.give_up = self._stall.give_up

    def _broken(self, error: Broken) -> StreamBroken:
        said = "it said nothing for too long" if self._stall.over else told(error)
        self._lease.failed(said)
        return StreamBroken(f"decode {self.choice.decode} broke off: {said}")

    def _counted(self, chunk: bytes) -> None:
        self._count.feed(chunk)
        self.journey.progressed(self._count.tokens)

    def close(self, *, whole: bool = False) -> None:
        """Let go of the engine; an answer that isn't at its end (`whole`) is aborted there."""
        self._stall.stop()
        self._lease.release()
        self.taken()
        self._tell(whole and self.status == 200)
        if self._second:
            self._second.close(whole=whole)
        if self._reading:
            self._reading.cancel()
        self._reply.close()

    def _tell(self, whole: bool) -> None:
        if self.streamed:
            self.tokens = self._count.tokens
        if not whole or self._second:
            self.journey.over(None)
        elif self.streamed:
            self.journey.over(self.tokens)
        else:
            said = read_whole(self.first)
            self.tokens = said.tokens
            self.journey.over(said.tokens, said.decoding)


async def _spliced(chunks: AsyncIterator[bytes], splice: Splice) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield splice.feed(chunk)
    yield splice.end()

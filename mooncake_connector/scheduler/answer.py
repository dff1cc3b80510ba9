"""Decode's answer on its way to the client, and the ways in which there is none."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
import msgspec

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.engines.base import told
from mooncake_connector.scheduler.first_token import Mismatch, Splice
from mooncake_connector.scheduler.policy import Choice
from mooncake_connector.scheduler.timeline import Timeline

BROKEN = (aiohttp.ClientError, OSError, TimeoutError)


class Reply(msgspec.Struct, frozen=True):
    """A whole answer of an engine."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NoDecode(MooncakeError):
    """No decode engine is usable."""


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

    Attributes:
        transfer_id: names it to both engines' connectors; empty if decode serves alone.
        early: whether `first` is prefill's first token.
    """

    def __init__(
        self,
        choice: Choice,
        reply: aiohttp.ClientResponse,
        first: bytes,
        streamed: bool,
        release: Callable[[], None],
        timeline: Timeline,
        reading: asyncio.Task[bytes] | None = None,
        splice: Splice | None = None,
    ) -> None:
        self.choice = choice
        self.transfer_id = ""
        self.status = reply.status
        self.headers = reply.headers
        self.first = first
        self.streamed = streamed
        self.prefill: asyncio.Task[bytes] | None = None
        self.early = splice is not None
        self._reply = reply
        self._release = release
        self._timeline = timeline
        self._reading, self._splice = reading, splice

    async def chunks(self) -> AsyncIterator[bytes]:
        """`first` and what follows it, as it comes.

        Raises:
            StreamBroken: the engine went away.
        """
        splice = self._splice
        yield self.first
        try:
            if self._reading and splice:
                chunk = await self._reading
                self._timeline.mark("decode_first")
                yield splice.feed(chunk)
            async for chunk in self._reply.content.iter_any():
                yield splice.feed(chunk) if splice else chunk
            self._timeline.mark("decode_end")
            if splice:
                yield splice.end()
        except BROKEN as error:
            raise StreamBroken(f"decode {self.choice.decode} broke off: {told(error)}") from None
        except Mismatch as error:
            raise StreamBroken(f"decode {self.choice.decode} goes on differently: {error}") from None

    def close(self) -> None:
        """Let go of the engine; an answer that isn't at its end is aborted there."""
        self._release()
        if self._reading:
            self._reading.cancel()
        if self.streamed and not self._reply.content.at_eof():
            self._reply.close()

"""One attempt at a request: the calls to the prefill and the decode engine that it was given."""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

import msgspec
from aiohttp import hdrs

from mooncake_connector.scheduler.engines.base import Engine, told
from mooncake_connector.scheduler.engines.client import EngineClient, Exchange
from mooncake_connector.scheduler.engines.pool import Instance, Lease, Pool
from mooncake_connector.scheduler.engines.response import Broken, Response, Unreachable
from mooncake_connector.scheduler.proxy.answer import (
    BROKEN,
    Answer,
    DecodeFailed,
    Overloaded,
    PrefillFailed,
    Reply,
)
from mooncake_connector.scheduler.proxy.arrivals import Asked
from mooncake_connector.scheduler.proxy.aside import Aside
from mooncake_connector.scheduler.proxy.copies import Copies
from mooncake_connector.scheduler.proxy.deadlines import Deadlines, Within
from mooncake_connector.scheduler.proxy.ended_by import EndedBy
from mooncake_connector.scheduler.proxy.first_token import Early, EarlyReader, eligible
from mooncake_connector.scheduler.proxy.journey import Journey
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.openai import answered
from mooncake_connector.scheduler.proxy.progress import PrefillTimes
from mooncake_connector.scheduler.proxy.sse import EVENTS, Events
from mooncake_connector.scheduler.proxy.timeline import Timeline

RETRY_PAUSE = 0.1


class Upstream(msgspec.Struct, frozen=True):
    """What attempts share.

    Attributes:
        serial: prefill goes first, and its answer's parameters to decode.
        early: prefill sends a stream's first token where it can.
        keep: lets something go on that nobody waits for.
    """

    pool: Pool
    engine: Engine
    client: EngineClient
    metrics: ProxyMetrics
    aside: Aside
    copies: Copies
    deadlines: Deadlines
    serial: bool
    early: bool
    keep: Callable[[Coroutine[Any, Any, None]], None]


class Attempt:
    """Asks a placement's engines; what it leaves behind is an open answer, or nothing.

    Attributes:
        doubted: leases of engines that answered with a 5xx: they may be to blame, or the request is.
    """

    def __init__(self, up: Upstream, asked: Asked, journey: Journey, timeline: Timeline) -> None:
        self._up = up
        self._asked = asked
        self._journey = journey
        self._timeline = timeline
        self._decode = up.pool[journey.placement.decode]
        self._lease = self._decode.lease(asked.arrival.tokens)
        self._transfer_id = os.urandom(16).hex()
        self._early: asyncio.Future[Early | None] | None = None
        self._copying: asyncio.Task[None] | None = None
        self.doubted: list[Lease] = []

    async def open(self) -> Answer:
        """Decode's answer, with its first bytes.

        Raises:
            PrefillFailed: prefill did, before decode answered.
            DecodeFailed: decode did.
            Overloaded: the conductor rejects it now that its prompt is computed.
        """
        choice, request, engine = self._journey.placement, self._asked.request, self._up.engine
        source = self._up.pool[choice.prefill] if choice.prefill else None
        prefill: asyncio.Task[bytes] | None = None
        answer: Answer | None = None
        taken: Callable[[], None] = _nothing
        try:
            if choice.decode in self._journey.avoided:
                await asyncio.sleep(RETRY_PAUSE)
            params: dict[str, Any] | None = None
            if source and source.info:
                wished = self._up.early and _both(source, self._decode) and eligible(request)
                if wished:
                    self._early = asyncio.get_running_loop().create_future()
                params = engine.decode_params(source.info, self._transfer_id, first_token=wished)
                body = engine.prefill_body(request, self._transfer_id, first_token=wished)
                computing, taken = source.lease(self._asked.arrival.tokens), source.transfer()
                begun = self._begin_prefill(source, body)
                prefill = asyncio.create_task(self._prefill(source, computing, body, begun))
                # A task that is cancelled before its first step runs no finally of its own.
                prefill.add_done_callback(_ignoring_task(computing.release))
                if begun:
                    prefill.add_done_callback(_ignoring_task(begun.give_up))
                if self._up.serial:
                    # A stream says nothing of its transfer, but then we know all that there is to say.
                    params = engine.prefill_params(await prefill) or (params if wished else None)
            body = engine.decode_body(request, params) if params else request.raw
            self._timeline.mark("decode_sent")
            async with EndedBy(prefill):
                answer = await self._open(body)
            answer.prefill, answer.taken = prefill, taken
            if not answer.early:
                taken()
            answer.transfer_id = self._transfer_id if params else ""
            if self._early:
                self._up.metrics.first_tokens.labels("prefill" if answer.early else "decode").inc()
            return answer
        finally:
            if answer is None:
                # Nothing is waited for in here: who is cancelled may be cancelled again.
                self._lease.release()
                taken()
                self._journey.over(None)
                if source and prefill:
                    prefill.cancel()
                    self._up.keep(self._abandon(source, prefill))

    async def alone(self, body: bytes) -> Answer:
        """Decode's answer to `body`, whoever the placement has for prefill.

        Raises:
            DecodeFailed: decode did.
        """
        try:
            return await self._open(body)
        except BaseException:
            self._lease.release()
            self._journey.over(None)
            raise

    async def _abandon(self, source: Instance, prefill: asyncio.Task[bytes]) -> None:
        await cancelled(prefill)
        # One that failed holds nothing.
        if prefill.cancelled() or not isinstance(prefill.exception(), PrefillFailed):
            asked = self._asked
            await self._up.aside.release(source.url, asked.request, asked.headers, self._transfer_id)

    def _begin_prefill(self, source: Instance, body: bytes) -> Exchange | None:
        """Prefill asked at once, if no copy comes first: its task would have to wait for its turn."""
        copies = self._up.copies
        if (copy := self._journey.placement.copy) and copy.source in self._up.pool:
            self._copying = copies.begin(self._up.pool[copy.source], source, self._asked, copy)
        if copies.running:
            return None
        self._timeline.mark("prefill_sent")
        return self._up.client.begin(source.url, self._asked.request.path, body, self._asked.headers)

    async def _ask_prefill(self, source: Instance, body: bytes) -> Response:
        self._timeline.mark("prefill_sent")
        return await self._up.client.post(source.url, self._asked.request.path, body, self._asked.headers)

    async def _prefix(self, source: Instance) -> None:
        """Wait for what is to be copied to `source` before it computes the rest."""
        patience = self._journey.patience
        if self._copying:
            await asyncio.wait({self._copying}, timeout=patience)
        else:
            await self._up.copies.join(source, self._asked, patience)

    async def _prefill(self, source: Instance, lease: Lease, body: bytes, begun: Exchange | None) -> bytes:
        up, journey, early = self._up, self._journey, self._early
        try:
            if begun is None:
                await self._prefix(source)
            started = time.perf_counter()
            async with Within(up.deadlines.of_prefill(journey.placement), lease):
                with closing(await (begun.answer() if begun else self._ask_prefill(source, body))) as reply:
                    _check(reply)
                    if early and reply.content_type == EVENTS:
                        await self._read_early(source, lease, reply, early)
                    answer = await reply.read()
        except BROKEN as error:
            lease.failed(told(error), gone=isinstance(error, Unreachable))
            raise PrefillFailed(f"prefill {source.url} failed: {told(error)}") from None
        finally:
            if early and not early.done():
                early.set_result(None)
        if reply.status >= 500:
            self._doubt(lease, reply.status)
        else:
            lease.served()
        if reply.status >= 400:
            refused = reply.status < 500
            said = answered(reply.status, answer)
            raise PrefillFailed(f"prefill {source.url} {said}", refused=refused)
        self._timeline.mark("prefill_answer")
        up.metrics.prefill_seconds.observe(time.perf_counter() - started)
        if rejected := journey.prefilled(PrefillTimes.of(up.engine.prefill_params(answer))):
            raise Overloaded(rejected)
        return answer

    async def _read_early(
        self,
        source: Instance,
        lease: Lease,
        reply: Response,
        early: asyncio.Future[Early | None],
    ) -> None:
        events, reader = Events(), EarlyReader()
        while chunk := await reply.readany():
            for event in events.feed(chunk):
                if failed := self._up.engine.stream_failure(event):
                    if failed[0] >= 500:
                        self._doubt(lease, failed[0])
                    said = answered(*failed)
                    raise PrefillFailed(f"prefill {source.url} {said}", refused=failed[0] < 500)
                if (found := reader.feed(event)) and not early.done():
                    self._timeline.mark("early")
                    early.set_result(found)

    async def _open(self, body: bytes) -> Answer:
        decode, lease, early, timeline = self._decode, self._lease, self._early, self._timeline
        reply: Response | None = None
        reading: asyncio.Task[bytes] | None = None
        opened = False
        try:
            async with Within(self._patience(), lease):
                path, headers = self._asked.request.path, self._asked.headers
                reply = await self._up.client.post(decode.url, path, body, headers)
                _check(reply)
                timeline.mark("decode_headers")
                streamed = reply.status == 200 and reply.content_type == EVENTS
                if streamed and early:
                    reading = asyncio.create_task(reply.readany())
                    both: set[asyncio.Future[Any]] = {reading, early}
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                    if not reading.done() and (known := early.result()):
                        opened = True
                        return self._answer(reply, known.events, True, reading, known)
                first = await (reading or (self._begun(reply) if streamed else reply.read()))
            timeline.mark("decode_first")
            said = Reply(reply.status, reply.headers, first)
            if streamed and (failed := self._up.engine.stream_failure(first)):
                said = Reply(failed[0], {hdrs.CONTENT_TYPE: "application/json"}, failed[1])
            if said.status >= 500:
                self._doubt(lease, said.status)
                raise DecodeFailed(f"decode {decode.url} {answered(said.status, said.body)}", said)
            if streamed and not first:
                lease.failed("ended its stream before the first byte")
                raise DecodeFailed(f"decode {decode.url} ended its stream before the first byte")
            opened = True
            lease.served()
            return self._answer(reply, first, streamed)
        except BROKEN as error:
            lease.failed(told(error), gone=isinstance(error, Unreachable))
            raise DecodeFailed(f"decode {decode.url} failed: {told(error)}") from None
        finally:
            if reply and not opened:
                reply.close()
            if reading and not opened:
                reading.cancel()

    async def _begun(self, reply: Response) -> bytes:
        """A stream's bytes up to the first that tell of the answer itself; none if it ends before."""
        first = await reply.readany()
        while self._up.engine.preamble(first):
            more = await reply.readany()
            first = first + more if more else b""
        return first

    def _answer(
        self,
        reply: Response,
        first: bytes,
        streamed: bool,
        reading: asyncio.Task[bytes] | None = None,
        early: Early | None = None,
    ) -> Answer:
        chunk = self._up.deadlines.chunk
        return Answer(
            self._journey, reply, first, streamed, self._lease, chunk, self._timeline, reading, early
        )

    def _doubt(self, lease: Lease, status: int) -> None:
        lease.doubt(f"answered {status}")
        self.doubted.append(lease)

    def _patience(self) -> float:
        """Seconds until decode's first bytes; those of an answer in one piece come with its last."""
        arrival, info = self._asked.arrival, self._decode.info
        tokens = 0
        if not self._asked.request.stream:
            tokens = arrival.max_tokens or max(0, (info.max_model_len if info else 0) - arrival.tokens)
        return self._up.deadlines.of_first_byte(self._journey.placement, tokens)


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel and wait until it is over; its result or error is of no interest any more."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _check(reply: Response) -> None:
    """A redirect, an upgrade or the like: no engine does that. Its body is not waited for.

    Raises:
        Broken: so it is.
    """
    if reply.status != 200 and not 400 <= reply.status < 600:
        raise Broken(f"answered {reply.status}, which is no answer")


def _both(prefill: Instance, decode: Instance) -> bool:
    """Whether the connectors of both know how to hand over a first token."""
    return all(instance.info is not None and instance.info.first_token for instance in (prefill, decode))


def _nothing() -> None:
    pass


def _ignoring_task(done: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: done()

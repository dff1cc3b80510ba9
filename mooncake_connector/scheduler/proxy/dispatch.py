"""One request's life: the calls to prefill and decode, what is retried, and what is cancelled."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import aiohttp
from aiohttp import hdrs

from mooncake_connector.scheduler.engines.base import Engine, told
from mooncake_connector.scheduler.engines.pool import Instance, Lease, Pool
from mooncake_connector.scheduler.policy.base import Placement
from mooncake_connector.scheduler.proxy.answer import (
    BROKEN,
    Answer,
    DecodeFailed,
    NoDecode,
    Overloaded,
    PrefillFailed,
    Reply,
)
from mooncake_connector.scheduler.proxy.arrivals import Asked
from mooncake_connector.scheduler.proxy.aside import LINGER, Aside
from mooncake_connector.scheduler.proxy.copies import Copies
from mooncake_connector.scheduler.proxy.first_token import Early, EarlyReader, eligible
from mooncake_connector.scheduler.proxy.journey import Journey
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.progress import PrefillTimes
from mooncake_connector.scheduler.proxy.sse import Events
from mooncake_connector.scheduler.proxy.steering import Steering
from mooncake_connector.scheduler.proxy.timeline import Timeline

log = logging.getLogger(__name__)

UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
EVENTS = "text/event-stream"
REFUSAL_GRACE = 1.0
# The client's stream hangs on this one, and the engine that is asked may be in a long step.
TOKEN_WAIT = 30.0
RETRY_PAUSE = 0.1


class Dispatcher:
    """Serves requests from the pool.

    Args:
        steering: who says which engines serve a request.
        order: ``concurrent`` or ``serial``.
        first_token: ``decode`` or ``prefill``: who sends a stream's first token.
        max_retries: further attempts after decode failed, and after prefill failed, each.
    """

    def __init__(
        self,
        pool: Pool,
        steering: Steering,
        engine: Engine,
        session: aiohttp.ClientSession,
        metrics: ProxyMetrics,
        *,
        order: str,
        first_token: str,
        max_retries: int,
    ) -> None:
        self._pool = pool
        self._steering = steering
        self._engine = engine
        self._session = session
        self._metrics = metrics
        self._serial = order == "serial"
        self._early = first_token == "prefill"
        self._max_retries = max_retries
        self._aside = Aside(engine, session)
        self._copies = Copies(engine, session, self._aside, metrics, steering.copied)
        self._lingering: set[asyncio.Task[None]] = set()
        self._without_prefill = False

    async def open(self, asked: Asked, timeline: Timeline) -> Answer:
        """An answer whose first bytes are there; retries until then.

        Raises:
            NoDecode: nobody can serve it.
            Overloaded: the conductor rejects it.
            DecodeFailed: everybody tried failed.
        """
        alone = self._engine.alone(asked.request)
        avoid: set[str] = set(asked.avoid)
        answered: set[str] = set()
        spent: set[str] = set()
        decode_failures = prefill_failures = 0
        failure: DecodeFailed | None = None
        while True:
            try:
                again = decode_failures + prefill_failures > 0
                shunned = avoid | self._pool.shunned()
                journey = await self._place(asked, alone, shunned, again=again)
            except NoDecode as error:
                raise failure or error from None
            choice = journey.placement
            if choice.decode in spent and failure:
                journey.over(None)
                raise failure
            if choice.decode in answered and choice.prefill and not alone:
                journey.over(None)
                alone = "decode_failed"
                continue
            try:
                answer = await self._attempt(asked, journey, timeline)
            except PrefillFailed as error:
                log.warning("%s; trying without it", error)
                self._metrics.retries.labels("prefill").inc()
                avoid.add(choice.prefill or "")
                prefill_failures += 1
                if error.refused or prefill_failures > self._max_retries:
                    alone = "prefill_failed"
            except DecodeFailed as error:
                log.warning("%s", error)
                failure = error
                decode_failures += 1
                if decode_failures > self._max_retries:
                    raise
                self._metrics.retries.labels("decode").inc()
                avoid.add(choice.decode)
                if error.reply:
                    # The transfer may be to blame: once more without it. Else it would say the same again.
                    (answered if choice.prefill else spent).add(choice.decode)
            else:
                if choice.prefill is None:
                    self._metrics.prefill_skipped.labels(choice.reason).inc()
                if not avoid:
                    self._note(choice)
                return answer

    async def finish(self, answer: Answer, *, whole: bool) -> None:
        """Close `answer`; unless it reached its end (`whole`), its prefill is cancelled too."""
        answer.close(whole=whole)
        prefill = answer.prefill
        if prefill is None:
            return
        if whole and answer.status == 200 and not prefill.done():
            # Its answer is due any moment; waiting for it keeps the connection, but not the client.
            self._keep(asyncio.create_task(self._outlive(prefill)))
            return
        await _cancelled(prefill)

    async def close(self) -> None:
        """Cancel what still lingers."""
        await asyncio.gather(self._copies.close(), *(_cancelled(task) for task in self._lingering))

    async def timeline(self, answer: Answer, asked: Asked) -> dict[str, Any]:
        """What both engines' connectors say of when the request came by."""
        if not (answer.transfer_id and answer.choice.prefill):
            return {}
        found: dict[str, Any] = {"transfer_id": answer.transfer_id}
        for side, url in (("prefill", answer.choice.prefill), ("decode", answer.choice.decode)):
            said = await self._aside.told(url, asked.request, asked.headers, answer.transfer_id)
            found[side] = said.get("timeline", {})
        return found

    async def _place(self, asked: Asked, alone: str, avoid: Collection[str], *, again: bool) -> Journey:
        """See `Steering.place`; engines that were removed while the request waited are not taken."""
        while True:
            journey = await self._steering.place(asked.arrival, alone, avoid, again=again)
            choice = journey.placement
            if choice.decode in self._pool and (choice.prefill is None or choice.prefill in self._pool):
                return journey
            journey.over(None)

    async def _attempt(self, asked: Asked, journey: Journey, timeline: Timeline) -> Answer:
        choice, request = journey.placement, asked.request
        decode = self._pool[choice.decode]
        source = self._pool[choice.prefill] if choice.prefill else None
        transfer_id = uuid.uuid4().hex
        lease = decode.lease(asked.arrival.tokens)
        prefill: asyncio.Task[bytes] | None = None
        opening: asyncio.Task[Answer] | None = None
        answer: Answer | None = None
        early: asyncio.Future[Early | None] | None = None
        taken: Callable[[], None] = _nothing
        try:
            if decode.url in journey.avoided:
                await asyncio.sleep(RETRY_PAUSE)
            params: dict[str, Any] | None = None
            if source and source.info:
                if self._early and _both(source, decode) and eligible(request):
                    early = asyncio.get_running_loop().create_future()
                wished = early is not None
                params = self._engine.decode_params(source.info, transfer_id, first_token=wished)
                body = self._engine.prefill_body(request, transfer_id, first_token=wished)
                computing, taken = source.lease(asked.arrival.tokens), source.transfer()
                prefill = asyncio.create_task(
                    self._prefill(source, computing, asked, journey, body, timeline, early)
                )
                # A task that is cancelled before its first step runs no finally of its own.
                prefill.add_done_callback(_ignoring_task(computing.release))
                if self._serial:
                    # A stream says nothing of its transfer, but then we know all that there is to say.
                    params = self._engine.prefill_params(await prefill) or (params if wished else None)
            body = self._engine.decode_body(request, params) if params else request.raw
            timeline.mark("decode_sent")
            opening = asyncio.create_task(self._open(asked, journey, body, lease, timeline, early))
            answer = await _first(prefill, opening)
            answer.prefill, answer.taken = prefill, taken
            if not answer.early:
                taken()
            answer.transfer_id = transfer_id if params else ""
            answer.again = partial(self._again, asked, answer, timeline)
            if early:
                self._metrics.first_tokens.labels("prefill" if answer.early else "decode").inc()
            return answer
        finally:
            if answer is None:
                taken()
                # Nothing is waited for before this: whoever is cancelled may be cancelled again.
                lease.release()
                journey.over(None)
                if opening:
                    opening.add_done_callback(_unwanted)
                    opening.cancel()
                if prefill:
                    await _cancelled(prefill)
                if source and prefill and not _failed(prefill):
                    release_it = self._aside.release(source.url, request, asked.headers, transfer_id)
                    self._keep(asyncio.create_task(release_it))

    async def _again(self, asked: Asked, answer: Answer, timeline: Timeline, why: str) -> Answer:
        """The client has prefill's token, but decode did not get it: decode alone, told to begin with it."""
        log.warning("%s; decode computes the prompt itself", why)
        self._metrics.retries.labels("decode").inc()
        source = answer.choice.prefill or ""
        id = answer.transfer_id
        said = await self._aside.told(source, asked.request, asked.headers, id, TOKEN_WAIT)
        token = said.get("first_token", -1)
        if token < 0:
            raise DecodeFailed(f"prefill {source} can't tell which token that was")
        try:
            avoid = {answer.choice.decode}
            journey = await self._place(asked, "decode_failed", avoid, again=True)
        except (NoDecode, Overloaded) as error:
            raise DecodeFailed(str(error)) from None
        lease = self._pool[journey.placement.decode].lease(asked.arrival.tokens)
        body = self._engine.decode_body(asked.request, {"first_token": token})
        try:
            return await self._open(asked, journey, body, lease, timeline, None)
        except BaseException:
            lease.release()
            journey.over(None)
            raise

    async def _prefill(
        self,
        source: Instance,
        lease: Lease,
        asked: Asked,
        journey: Journey,
        body: bytes,
        timeline: Timeline,
        early: asyncio.Future[Early | None] | None,
    ) -> bytes:
        url = source.url + asked.request.path
        try:
            if (copy := journey.placement.copy) and copy.source in self._pool:
                await self._copies.bring(self._pool[copy.source], source, asked, copy, journey.patience)
            else:
                await self._copies.join(source, asked, journey.patience)
            started = time.perf_counter()
            timeline.mark("prefill_sent")
            async with self._session.post(url, data=body, headers=asked.headers) as reply:
                if early and reply.content_type == EVENTS:
                    await self._read_early(source, lease, reply, timeline, early)
                answer = await reply.read()
        except BROKEN as error:
            lease.failed(told(error), gone=isinstance(error, UNREACHABLE))
            raise PrefillFailed(f"prefill {source.url} failed: {told(error)}") from None
        finally:
            if early and not early.done():
                early.set_result(None)
        if reply.status >= 500:
            lease.failed(f"answered {reply.status}")
        else:
            lease.served()
        if reply.status >= 400:
            said = answer[:200].decode(errors="replace")
            refused = reply.status < 500
            raise PrefillFailed(f"prefill {source.url} answered {reply.status}: {said}", refused=refused)
        timeline.mark("prefill_answer")
        self._metrics.prefill_seconds.observe(time.perf_counter() - started)
        if rejected := journey.prefilled(PrefillTimes.of(self._engine.prefill_params(answer))):
            raise Overloaded(rejected)
        return answer

    async def _read_early(
        self,
        source: Instance,
        lease: Lease,
        reply: aiohttp.ClientResponse,
        timeline: Timeline,
        early: asyncio.Future[Early | None],
    ) -> None:
        events, reader = Events(), EarlyReader()
        async for chunk in reply.content.iter_any():
            for event in events.feed(chunk):
                if failed := self._engine.stream_failure(event):
                    if failed[0] >= 500:
                        lease.failed(f"answered {failed[0]}")
                    said = failed[1][:200].decode(errors="replace")
                    raise PrefillFailed(f"prefill {source.url} failed: {said}", refused=failed[0] < 500)
                if (found := reader.feed(event)) and not early.done():
                    timeline.mark("early")
                    early.set_result(found)

    async def _open(
        self,
        asked: Asked,
        journey: Journey,
        body: bytes,
        lease: Lease,
        timeline: Timeline,
        early: asyncio.Future[Early | None] | None,
    ) -> Answer:
        decode = self._pool[journey.placement.decode]
        reply: aiohttp.ClientResponse | None = None
        reading: asyncio.Task[bytes] | None = None
        opened = False
        try:
            url = decode.url + asked.request.path
            reply = await self._session.post(url, data=body, headers=asked.headers)
            timeline.mark("decode_headers")
            streamed = reply.status == 200 and reply.content_type == EVENTS
            if streamed and early:
                reading = asyncio.create_task(reply.content.readany())
                both: set[asyncio.Future[Any]] = {reading, early}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done() and (known := early.result()):
                    opened = True
                    journey.first_token()
                    return Answer(journey, reply, known.events, True, lease, timeline, reading, known)
            first = await (reading or (self._begun(reply) if streamed else reply.read()))
            timeline.mark("decode_first")
            said = Reply(reply.status, reply.headers, first)
            if streamed and (failed := self._engine.stream_failure(first)):
                said = Reply(failed[0], {hdrs.CONTENT_TYPE: "application/json"}, failed[1])
            if said.status >= 500:
                lease.failed(f"answered {said.status}")
                shown = said.body[:200].decode(errors="replace")
                raise DecodeFailed(f"decode {decode.url} answered {said.status}: {shown}", said)
            if streamed and not first:
                lease.failed("ended its stream before the first byte")
                raise DecodeFailed(f"decode {decode.url} ended its stream before the first byte")
            opened = True
            lease.served()
            if streamed:
                journey.first_token()
            return Answer(journey, reply, first, streamed, lease, timeline)
        except BROKEN as error:
            lease.failed(told(error), gone=isinstance(error, UNREACHABLE))
            raise DecodeFailed(f"decode {decode.url} failed: {told(error)}") from None
        finally:
            if reply and not opened:
                reply.close()
                if reading:
                    await _cancelled(reading)

    async def _begun(self, reply: aiohttp.ClientResponse) -> bytes:
        """A stream's bytes up to the first that tell of the answer itself; none if it ends before."""
        first = await reply.content.readany()
        while self._engine.preamble(first):
            more = await reply.content.readany()
            first = first + more if more else b""
        return first

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    async def _outlive(self, prefill: asyncio.Task[bytes]) -> None:
        await asyncio.wait({prefill}, timeout=LINGER)
        await _cancelled(prefill)

    def _note(self, choice: Placement) -> None:
        without = choice.reason == "no_prefill"
        if without and not self._without_prefill:
            states = "; ".join(
                f"{p.url}: {p.reason or 'no decode engine to match'}" for p in self._pool.prefill
            )
            log.warning("no prefill engine is usable (%s): decode computes prompts itself", states)
        self._without_prefill = without


async def _first(prefill: asyncio.Task[bytes] | None, opening: asyncio.Task[Answer]) -> Answer:
    """Decode's answer, or prefill's failure if it comes first: decode would wait for KV that never comes."""
    if prefill is None:
        return await opening
    await asyncio.wait({prefill, opening}, return_when=asyncio.FIRST_COMPLETED)
    error = prefill.exception() if prefill.done() else None
    if isinstance(error, PrefillFailed) and error.refused:
        # What prefill refuses, decode most likely refuses too, in words that suit the client's own body.
        await asyncio.wait({opening}, timeout=REFUSAL_GRACE)
    if error and not opening.done():
        raise error
    return await opening


def _both(prefill: Instance, decode: Instance) -> bool:
    """Whether the connectors of both know how to hand over a first token."""
    return all(instance.info is not None and instance.info.first_token for instance in (prefill, decode))


def _failed(prefill: asyncio.Task[bytes]) -> bool:
    """Whether prefill ended with a failure: it holds nothing then."""
    return not prefill.cancelled() and isinstance(prefill.exception(), PrefillFailed)


def _unwanted(opening: asyncio.Task[Answer]) -> None:
    """An answer that came just when it was given up is closed."""
    if not opening.cancelled() and not opening.exception():
        opening.result().close()


def _nothing() -> None:
    pass


def _ignoring_task(done: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: done()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel and wait until it is over; its result or error is of no interest any more."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

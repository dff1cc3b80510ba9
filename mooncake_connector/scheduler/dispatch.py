"""One request's life: the calls to prefill and decode, what is retried, and what is cancelled."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import aiohttp
from aiohttp import hdrs

from mooncake_connector.scheduler.answer import (
    BROKEN,
    Answer,
    DecodeFailed,
    NoDecode,
    PrefillFailed,
    Reply,
)
from mooncake_connector.scheduler.engines.base import Engine, told
from mooncake_connector.scheduler.first_token import Early, EarlyReader, eligible
from mooncake_connector.scheduler.metrics import ProxyMetrics
from mooncake_connector.scheduler.openai import COMPLETIONS, ClientRequest
from mooncake_connector.scheduler.policy import Choice, Demand, Policy
from mooncake_connector.scheduler.pool import Instance, Pool
from mooncake_connector.scheduler.sse import Events
from mooncake_connector.scheduler.timeline import Timeline

log = logging.getLogger(__name__)

UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
EVENTS = "text/event-stream"
REFUSAL_GRACE = 1.0
LINGER = 5.0
# The client's stream hangs on this one, and the engine that is asked may be in a long step.
TOKEN_WAIT = 30.0
RETRY_PAUSE = 0.1


class Dispatcher:
    """Serves requests from the pool.

    Args:
        order: ``concurrent`` or ``serial``.
        first_token: ``decode`` or ``prefill``: who sends a stream's first token.
        max_retries: further attempts after decode failed, and after prefill failed, each.
    """

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        engine: Engine,
        session: aiohttp.ClientSession,
        metrics: ProxyMetrics,
        *,
        order: str,
        first_token: str,
        max_retries: int,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._engine = engine
        self._session = session
        self._metrics = metrics
        self._serial = order == "serial"
        self._early = first_token == "prefill"
        self._max_retries = max_retries
        self._lingering: set[asyncio.Task[None]] = set()
        self._without_prefill = False

    async def open(self, request: ClientRequest, headers: Mapping[str, str], timeline: Timeline) -> Answer:
        """An answer whose first bytes are there; retries until then.

        Raises:
            NoDecode: nobody can serve it.
            DecodeFailed: everybody tried failed.
        """
        alone = self._engine.alone(request)
        avoid: set[str] = set()
        answered: set[str] = set()
        spent: set[str] = set()
        decode_failures = prefill_failures = 0
        failure: DecodeFailed | None = None
        while True:
            demand = Demand(request.prompt_tokens, alone, frozenset(avoid))
            choice = self._policy.choose(self._pool.snapshot(), demand)
            if choice is None or choice.decode in spent:
                raise failure or NoDecode(self._nobody())
            if choice.decode in answered and choice.prefill and not alone:
                alone = "decode_failed"
                continue
            if choice.decode in avoid:
                await asyncio.sleep(RETRY_PAUSE)
            try:
                answer = await self._attempt(request, headers, choice, timeline)
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
        answer.close()
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
        await asyncio.gather(*(_cancelled(task) for task in self._lingering))

    async def timeline(
        self, answer: Answer, request: ClientRequest, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """What both engines' connectors say of when the request came by."""
        if not (answer.transfer_id and answer.choice.prefill):
            return {}
        body = self._engine.timeline_body(request, answer.transfer_id)
        found: dict[str, Any] = {"transfer_id": answer.transfer_id}
        for side, url in (("prefill", answer.choice.prefill), ("decode", answer.choice.decode)):
            told = self._engine.prefill_params(await self._aside(url, body, headers))
            found[side] = (told or {}).get("timeline", {})
        return found

    async def _attempt(
        self, request: ClientRequest, headers: Mapping[str, str], choice: Choice, timeline: Timeline
    ) -> Answer:
        decode = self._pool[choice.decode]
        source = self._pool[choice.prefill] if choice.prefill else None
        transfer_id = uuid.uuid4().hex
        # Counted before the first await, so that requests of one moment see each other.
        release = decode.lease(request.prompt_tokens)
        prefill: asyncio.Task[bytes] | None = None
        opening: asyncio.Task[Answer] | None = None
        answer: Answer | None = None
        early: asyncio.Future[Early | None] | None = None
        try:
            params: dict[str, Any] | None = None
            if source and source.info:
                if self._early and _both(source, decode) and eligible(request):
                    early = asyncio.get_running_loop().create_future()
                asked = early is not None
                params = self._engine.decode_params(source.info, transfer_id, first_token=asked)
                body = self._engine.prefill_body(request, transfer_id, first_token=asked)
                prefill = asyncio.create_task(self._prefill(source, request, headers, body, timeline, early))
                # A task that is cancelled before its first step runs no finally of its own.
                prefill.add_done_callback(_ignoring_task(source.lease(request.prompt_tokens)))
                if self._serial:
                    # A stream says nothing of its transfer, but then we know all that there is to say.
                    params = self._engine.prefill_params(await prefill) or (params if asked else None)
            body = self._engine.decode_body(request, params) if params else request.raw
            timeline.mark("decode_sent")
            opening = asyncio.create_task(
                self._open(decode, choice, request, headers, body, release, timeline, early)
            )
            answer = await _first(prefill, opening)
            answer.prefill = prefill
            answer.transfer_id = transfer_id if params else ""
            answer.again = partial(self._again, request, headers, answer, timeline)
            if early:
                self._metrics.first_tokens.labels("prefill" if answer.early else "decode").inc()
            return answer
        finally:
            if answer is None:
                if prefill:
                    await _cancelled(prefill)
                if opening:
                    await _cancelled(opening)
                    if not opening.cancelled() and not opening.exception():
                        opening.result().close()
                release()
                if source and prefill and (prefill.cancelled() or not prefill.exception()):
                    self._keep(asyncio.create_task(self._release(source, request, headers, transfer_id)))

    async def _again(
        self,
        request: ClientRequest,
        headers: Mapping[str, str],
        answer: Answer,
        timeline: Timeline,
        why: str,
    ) -> Answer:
        """The client has prefill's token, but decode did not get it: decode alone, told to begin with it."""
        log.warning("%s; decode computes the prompt itself", why)
        self._metrics.retries.labels("decode").inc()
        asked = self._engine.timeline_body(request, answer.transfer_id)
        source = answer.choice.prefill or ""
        known = self._engine.prefill_params(await self._aside(source, asked, headers, TOKEN_WAIT))
        token = (known or {}).get("first_token", -1)
        demand = Demand(request.prompt_tokens, "decode_failed", frozenset({answer.choice.decode}))
        choice = self._policy.choose(self._pool.snapshot(), demand)
        if token < 0:
            raise DecodeFailed(f"prefill {source} can't tell which token that was")
        if choice is None:
            raise DecodeFailed("no decode engine is usable")
        release = self._pool[choice.decode].lease(request.prompt_tokens)
        body = self._engine.decode_body(request, {"first_token": token})
        try:
            decode = self._pool[choice.decode]
            return await self._open(decode, choice, request, headers, body, release, timeline, None)
        except BaseException:
            release()
            raise

    async def _prefill(
        self,
        source: Instance,
        request: ClientRequest,
        headers: Mapping[str, str],
        body: bytes,
        timeline: Timeline,
        early: asyncio.Future[Early | None] | None,
    ) -> bytes:
        started = time.perf_counter()
        timeline.mark("prefill_sent")
        try:
            async with self._session.post(source.url + request.path, data=body, headers=headers) as reply:
                if early and reply.content_type == EVENTS:
                    await self._read_early(source, reply, timeline, early)
                answer = await reply.read()
        except BROKEN as error:
            source.suspect(told(error), gone=isinstance(error, UNREACHABLE))
            raise PrefillFailed(f"prefill {source.url} failed: {told(error)}") from None
        finally:
            if early and not early.done():
                early.set_result(None)
        if reply.status >= 500:
            source.suspect(f"answered {reply.status}")
        if reply.status >= 400:
            said = answer[:200].decode(errors="replace")
            refused = reply.status < 500
            raise PrefillFailed(f"prefill {source.url} answered {reply.status}: {said}", refused=refused)
        timeline.mark("prefill_answer")
        self._metrics.prefill_seconds.observe(time.perf_counter() - started)
        return answer

    async def _read_early(
        self,
        source: Instance,
        reply: aiohttp.ClientResponse,
        timeline: Timeline,
        early: asyncio.Future[Early | None],
    ) -> None:
        events, reader = Events(), EarlyReader()
        async for chunk in reply.content.iter_any():
            for event in events.feed(chunk):
                if failed := self._engine.stream_failure(event):
                    said = failed[1][:200].decode(errors="replace")
                    raise PrefillFailed(f"prefill {source.url} failed: {said}", refused=failed[0] < 500)
                if (found := reader.feed(event)) and not early.done():
                    timeline.mark("early")
                    early.set_result(found)

    async def _open(
        self,
        decode: Instance,
        choice: Choice,
        request: ClientRequest,
        headers: Mapping[str, str],
        body: bytes,
        release: Callable[[], None],
        timeline: Timeline,
        early: asyncio.Future[Early | None] | None,
    ) -> Answer:
        reply: aiohttp.ClientResponse | None = None
        reading: asyncio.Task[bytes] | None = None
        opened = False
        try:
            reply = await self._session.post(decode.url + request.path, data=body, headers=headers)
            timeline.mark("decode_headers")
            streamed = reply.status == 200 and reply.content_type == EVENTS
            if streamed and early:
                reading = asyncio.create_task(reply.content.readany())
                both: set[asyncio.Future[Any]] = {reading, early}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done() and (known := early.result()):
                    opened = True
                    return Answer(choice, reply, known.events, True, release, timeline, reading, known)
            first = await (reading or (reply.content.readany() if streamed else reply.read()))
            timeline.mark("decode_first")
            said = Reply(reply.status, reply.headers, first)
            if streamed and (failed := self._engine.stream_failure(first)):
                said = Reply(failed[0], {hdrs.CONTENT_TYPE: "application/json"}, failed[1])
            if said.status >= 500:
                decode.suspect(f"answered {said.status}")
                shown = said.body[:200].decode(errors="replace")
                raise DecodeFailed(f"decode {decode.url} answered {said.status}: {shown}", said)
            if streamed and not first:
                raise DecodeFailed(f"decode {decode.url} ended its stream before the first byte")
            opened = True
            return Answer(choice, reply, first, streamed, release, timeline)
        except BROKEN as error:
            decode.suspect(told(error), gone=isinstance(error, UNREACHABLE))
            raise DecodeFailed(f"decode {decode.url} failed: {told(error)}") from None
        finally:
            if reply and not opened:
                reply.close()
                if reading:
                    await _cancelled(reading)

    async def _release(
        self, source: Instance, request: ClientRequest, headers: Mapping[str, str], transfer_id: str
    ) -> None:
        """Tell prefill that nobody comes: decode may never have seen the request, and the lease is long."""
        await self._aside(source.url, self._engine.release_body(request, transfer_id), headers)

    async def _aside(
        self, url: str, body: bytes, headers: Mapping[str, str], within: float = LINGER
    ) -> bytes:
        """A request that only the connector there answers; empty if it does not."""
        own = {k: v for k, v in headers.items() if k.lower() != "x-request-id"}
        with contextlib.suppress(*BROKEN):
            async with asyncio.timeout(within):
                async with self._session.post(url + COMPLETIONS, data=body, headers=own) as reply:
                    return await reply.read()
        return b""

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    async def _outlive(self, prefill: asyncio.Task[bytes]) -> None:
        await asyncio.wait({prefill}, timeout=LINGER)
        await _cancelled(prefill)

    def _note(self, choice: Choice) -> None:
        without = choice.reason == "no_prefill"
        if without and not self._without_prefill:
            states = "; ".join(
                f"{p.url}: {p.reason or 'no decode engine to match'}" for p in self._pool.prefill
            )
            log.warning("no prefill engine is usable (%s): decode computes prompts itself", states)
        self._without_prefill = without

    def _nobody(self) -> str:
        states = "; ".join(f"{d.url}: {d.reason}" for d in self._pool.decode)
        return f"no decode engine is usable ({states})"


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


def _ignoring_task(done: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: done()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel and wait until it is over; its result or error is of no interest any more."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

"""One request's life: the calls to prefill and decode, what is retried, and what is cancelled."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import hdrs

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.engines.base import Engine, told
from mooncake_connector.scheduler.metrics import ProxyMetrics
from mooncake_connector.scheduler.openai import COMPLETIONS, ClientRequest
from mooncake_connector.scheduler.policy import Choice, Demand, Policy
from mooncake_connector.scheduler.pool import Instance, Pool

log = logging.getLogger(__name__)

UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
REFUSAL_GRACE = 1.0
LINGER = 5.0
RETRY_PAUSE = 0.1


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
    """Decode's answer, open. `first` is all of it unless `streamed`. Close it, always."""

    def __init__(
        self,
        choice: Choice,
        reply: aiohttp.ClientResponse,
        first: bytes,
        streamed: bool,
        release: Callable[[], None],
    ) -> None:
        self.choice = choice
        self.status = reply.status
        self.headers = reply.headers
        self.first = first
        self.streamed = streamed
        self.prefill: asyncio.Task[bytes] | None = None
        self._reply = reply
        self._release = release

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows `first`, as it comes.

        Raises:
            StreamBroken: the engine went away.
        """
        try:
            async for chunk in self._reply.content.iter_any():
                yield chunk
        except BROKEN as error:
            raise StreamBroken(f"decode {self.choice.decode} broke off: {told(error)}") from None

    def close(self) -> None:
        """Let go of the engine; an answer that isn't at its end is aborted there."""
        self._release()
        if self.streamed and not self._reply.content.at_eof():
            self._reply.close()


class Dispatcher:
    """Serves requests from the pool.

    Args:
        order: ``concurrent`` or ``serial``.
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
        max_retries: int,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._engine = engine
        self._session = session
        self._metrics = metrics
        self._serial = order == "serial"
        self._max_retries = max_retries
        self._lingering: set[asyncio.Task[None]] = set()
        self._without_prefill = False

    async def open(self, request: ClientRequest, headers: Mapping[str, str]) -> Answer:
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
                answer = await self._attempt(request, headers, choice)
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

    async def _attempt(self, request: ClientRequest, headers: Mapping[str, str], choice: Choice) -> Answer:
        decode = self._pool[choice.decode]
        source = self._pool[choice.prefill] if choice.prefill else None
        transfer_id = uuid.uuid4().hex
        # Counted before the first await, so that requests of one moment see each other.
        release = decode.lease(request.prompt_tokens)
        prefill: asyncio.Task[bytes] | None = None
        opening: asyncio.Task[Answer] | None = None
        answer: Answer | None = None
        try:
            params: dict[str, Any] | None = None
            if source and source.info:
                params = self._engine.decode_params(source.info, transfer_id)
                prefill = asyncio.create_task(self._prefill(source, request, headers, transfer_id))
                # A task that is cancelled before its first step runs no finally of its own.
                prefill.add_done_callback(_ignoring_task(source.lease(request.prompt_tokens)))
                if self._serial:
                    params = self._engine.prefill_params(await prefill)
            body = self._engine.decode_body(request, params) if params else request.raw
            opening = asyncio.create_task(self._open(decode, choice, request, headers, body, release))
            answer = await _first(prefill, opening)
            answer.prefill = prefill
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

    async def _prefill(
        self,
        source: Instance,
        request: ClientRequest,
        headers: Mapping[str, str],
        transfer_id: str,
    ) -> bytes:
        started = time.perf_counter()
        try:
            body = self._engine.prefill_body(request, transfer_id)
            async with self._session.post(source.url + request.path, data=body, headers=headers) as reply:
                answer = await reply.read()
        except BROKEN as error:
            source.suspect(told(error), gone=isinstance(error, UNREACHABLE))
            raise PrefillFailed(f"prefill {source.url} failed: {told(error)}") from None
        if reply.status >= 500:
            source.suspect(f"answered {reply.status}")
        if reply.status >= 400:
            said = answer[:200].decode(errors="replace")
            refused = reply.status < 500
            raise PrefillFailed(f"prefill {source.url} answered {reply.status}: {said}", refused=refused)
        self._metrics.prefill_seconds.observe(time.perf_counter() - started)
        return answer

    async def _open(
        self,
        decode: Instance,
        choice: Choice,
        request: ClientRequest,
        headers: Mapping[str, str],
        body: bytes,
        release: Callable[[], None],
    ) -> Answer:
        reply: aiohttp.ClientResponse | None = None
        opened = False
        try:
            reply = await self._session.post(decode.url + request.path, data=body, headers=headers)
            streamed = reply.status == 200 and reply.content_type == "text/event-stream"
            first = await (reply.content.readany() if streamed else reply.read())
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
            return Answer(choice, reply, first, streamed, release)
        except BROKEN as error:
            decode.suspect(told(error), gone=isinstance(error, UNREACHABLE))
            raise DecodeFailed(f"decode {decode.url} failed: {told(error)}") from None
        finally:
            if reply and not opened:
                reply.close()

    async def _release(
        self, source: Instance, request: ClientRequest, headers: Mapping[str, str], transfer_id: str
    ) -> None:
        """Tell prefill that nobody comes: decode may never have seen the request, and the lease is long."""
        body = self._engine.release_body(request, transfer_id)
        own = {k: v for k, v in headers.items() if k.lower() != "x-request-id"}
        with contextlib.suppress(*BROKEN):
            async with asyncio.timeout(LINGER):
                async with self._session.post(source.url + COMPLETIONS, data=body, headers=own) as reply:
                    await reply.read()

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


def _ignoring_task(done: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: done()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel and wait until it is over; its result or error is of no interest any more."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

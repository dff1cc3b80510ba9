"""Endpoints that one engine serves by itself, without the conductor: whichever is least busy."""

import time
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus

import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.engines.base import told
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.pool import Instance, Lease, Pool, Side
from mooncake_connector.scheduler.engines.response import Broken, Response, Unreachable
from mooncake_connector.scheduler.proxy.access import ACCESS
from mooncake_connector.scheduler.proxy.answer import BROKEN, StreamBroken
from mooncake_connector.scheduler.proxy.body import read_body
from mooncake_connector.scheduler.proxy.deadlines import Deadlines, Within
from mooncake_connector.scheduler.proxy.errors import error_answer
from mooncake_connector.scheduler.proxy.headers import forwarded, returned
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.relay import SLOW, pouring, relay
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget
from mooncake_connector.scheduler.proxy.sse import EVENTS
from mooncake_connector.scheduler.proxy.stored import Stored

PREFLIGHT = hdrs.ACCESS_CONTROL_REQUEST_METHOD


class _Call(msgspec.Struct, frozen=True):
    """What is asked of an engine."""

    method: str
    path: str
    headers: CIMultiDict[str]
    body: bytes


class _Failed(MooncakeError):
    """An engine failed before anything of its answer was sent; `response` is the 5xx that it gave."""

    def __init__(self, message: str, response: web.Response | None = None) -> None:
        super().__init__(message)
        self.response = response


class Anywhere:
    """Relays requests to one engine, and to another one if that fails before its answer's first byte.

    Args:
        max_retries: further attempts.
        budget: of further attempts of all requests.
    """

    def __init__(
        self,
        pool: Pool,
        stored: Stored,
        client: EngineClient,
        metrics: ProxyMetrics,
        *,
        max_retries: int,
        budget: RetryBudget,
        deadlines: Deadlines,
    ) -> None:
        self._pool = pool
        self._stored = stored
        self._client = client
        self._metrics = metrics
        self._attempts = 1 + max_retries
        self._budget = budget
        self._deadlines = deadlines

    async def any(self, http: web.Request) -> web.StreamResponse:
        """Served by an engine of either pool."""
        return await self._serve(http, ("prefill", "decode"))

    async def decode(self, http: web.Request) -> web.StreamResponse:
        """Served by a decode engine."""
        return await self._serve(http, ("decode",))

    async def stored(self, http: web.Request) -> web.StreamResponse:
        """Served by the decode engine that has the response which the path names."""
        holder = await self._stored.holder(http.match_info["response_id"], forwarded(http))
        return await self._serve(http, ("decode",), holder)

    async def options(self, http: web.Request) -> web.StreamResponse:
        """What may be asked here; browsers that ask for another page are answered as the engines do."""
        if PREFLIGHT in http.headers:
            return await self.any(http)
        resource = http.match_info.route.resource
        methods = sorted({route.method for route in resource}) if resource else []
        return web.Response(status=204, headers={hdrs.ALLOW: ", ".join(methods)})

    async def _serve(
        self, http: web.Request, sides: Sequence[Side], first: Instance | None = None
    ) -> web.StreamResponse:
        began = time.perf_counter()
        resource = http.match_info.route.resource
        path = resource.canonical if resource else http.path
        outcome = "cancelled"
        try:
            method = "GET" if http.method == "HEAD" else http.method
            call = _Call(method, http.rel_url.raw_path_qs, forwarded(http), await read_body(http))
            response, outcome = await self._attempt(http, call, sides, first)
            return response
        except web.HTTPClientError:
            outcome = "client_error"
            raise
        finally:
            if http.get(SLOW):
                outcome = "slow_client"
            self._metrics.requests.labels(path, outcome).inc()
            http[ACCESS].outcome = outcome
            self._metrics.duration.observe(time.perf_counter() - began)

    async def _attempt(
        self, http: web.Request, call: _Call, sides: Sequence[Side], first: Instance | None
    ) -> tuple[web.StreamResponse, str]:
        tried: set[str] = set()
        failure: _Failed | None = None
        doubted: list[Lease] = []
        self._budget.earn()
        while len(tried) < self._attempts:
            instance = first or self._least_busy(sides, tried)
            if instance is None:
                break
            first = None
            if failure:
                if not self._budget.spend():
                    self._metrics.retries_refused.inc()
                    break
                self._metrics.retries.labels(instance.side).inc()
            tried.add(instance.url)
            try:
                http[ACCESS].served_by(instance.side, instance.url)
                with instance.lease(0) as lease:
                    found = await self._ask(http, call, instance, lease)
            except _Failed as error:
                failure = error
                if error.response:
                    doubted.append(lease)
            else:
                for lease in doubted:
                    lease.blame()
                return found
        # What two engines answer with a 5xx is more likely the request's fault than theirs.
        if len(doubted) == 1:
            doubted[0].blame()
        if failure is None:
            states = "; ".join(f"{i.url}: {i.reason}" for i in self._pool if i.side in sides)
            message = f"no {' or '.join(sides)} engine is usable ({states})"
            return error_answer(503, message, "ServiceUnavailableError"), "no_engine"
        return failure.response or error_answer(502, str(failure), "BadGatewayError"), "engine_error"

    def _least_busy(self, sides: Sequence[Side], tried: set[str]) -> Instance | None:
        shunned = self._pool.shunned() | tried
        live = [instance for side in sides for instance in self._pool.live(side)]
        fresh = [instance for instance in live if instance.url not in shunned]
        return min(fresh, key=lambda instance: (instance.requests, instance.tokens), default=None)

    async def _ask(
        self, http: web.Request, call: _Call, instance: Instance, lease: Lease
    ) -> tuple[web.StreamResponse, str]:
        reply, first = await self._open(call, instance, lease)
        headers = returned(reply.headers)
        if not _streamed(reply):
            answer = web.Response(status=reply.status, body=first, headers=headers)
            return answer, "ok" if reply.status < 400 else "client_error"
        response = web.StreamResponse(headers=headers)
        try:
            chunks = self._chunks(instance, lease, first, reply)
            return response, await relay(http, response, pouring(chunks))
        finally:
            # Aborts the request there, if this is not the answer's end.
            reply.close()

    async def _open(self, call: _Call, instance: Instance, lease: Lease) -> tuple[Response, bytes]:
        """The answer, and its first bytes: all of them unless it is a stream."""
        reply: Response | None = None
        opened = False
        try:
            async with Within(self._deadlines.first_byte, lease):
                reply = await self._client.request(
                    call.method, instance.url, call.path, call.body, call.headers
                )
                if reply.status < 200 or 300 <= reply.status < 400:
                    # An upgrade, or a redirect to where only engines are reached: nothing for clients.
                    raise Broken(f"answered {reply.status}, which is no answer")
                first = await (reply.readany() if _streamed(reply) else reply.read())
            # 501 is vLLM's way to say that the model can't do it: no other engine could.
            if reply.status >= 500 and reply.status != HTTPStatus.NOT_IMPLEMENTED:
                lease.doubt(f"answered {reply.status}")
                answer = web.Response(status=reply.status, body=first, headers=returned(reply.headers))
                raise _Failed(f"{instance.url} answered {reply.status}", answer)
            lease.served()
            opened = True
            return reply, first
        except BROKEN as error:
            lease.failed(told(error), gone=isinstance(error, Unreachable))
            raise _Failed(f"{instance.url} failed: {told(error)}") from None
        finally:
            if reply and not opened:
                reply.close()

    async def _chunks(
        self, instance: Instance, lease: Lease, first: bytes, reply: Response
    ) -> AsyncIterator[bytes]:
        yield first
        try:
            while True:
                async with Within(self._deadlines.chunk, lease):
                    chunk = await reply.readany()
                if not chunk:
                    return
                yield chunk
        except BROKEN as error:
            lease.failed(told(error))
            raise StreamBroken(f"{instance.url} broke off: {told(error)}") from None


def _streamed(reply: Response) -> bool:
    return reply.status == 200 and reply.content_type == EVENTS

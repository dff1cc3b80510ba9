"""Answers that are generated: completions, chats, responses, messages."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from mooncake_connector.scheduler.engines.pool import Pool
from mooncake_connector.scheduler.proxy.access import ACCESS
from mooncake_connector.scheduler.proxy.answer import Answer, DecodeFailed, NoDecode, Overloaded
from mooncake_connector.scheduler.proxy.arrivals import Arrivals, Asked
from mooncake_connector.scheduler.proxy.body import read_body
from mooncake_connector.scheduler.proxy.dispatch import Dispatcher
from mooncake_connector.scheduler.proxy.errors import error_answer, rejection_answer
from mooncake_connector.scheduler.proxy.headers import forwarded_json, returned
from mooncake_connector.scheduler.proxy.keys import CALLER
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.openai import RESPONSES, BadRequest, ClientRequest
from mooncake_connector.scheduler.proxy.relay import SLOW, Pour, pouring, relay
from mooncake_connector.scheduler.proxy.stored import Stored
from mooncake_connector.scheduler.proxy.timeline import HEADER, Timeline, into_answer, with_timeline

Tell = Callable[[], Awaitable[dict[str, Any]]]


class Generation:
    """Handles every request that the conductor finds engines for."""

    def __init__(
        self, pool: Pool, arrivals: Arrivals, stored: Stored, dispatcher: Dispatcher, metrics: ProxyMetrics
    ) -> None:
        self._pool = pool
        self._arrivals = arrivals
        self._stored = stored
        self._dispatcher = dispatcher
        self._metrics = metrics

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answer one request."""
        started = time.perf_counter()
        timeline = Timeline(http.headers.get(HEADER) == "1")
        outcome = "cancelled"
        answer: Answer | None = None
        try:
            answer, tell = await self._opened(http, timeline)
            headers_back = returned(answer.headers)
            headers_back["x-mooncake-decode"] = answer.choice.decode
            headers_back["x-mooncake-prefill"] = answer.choice.prefill or f"none ({answer.choice.reason})"
            if answer.early:
                headers_back["x-mooncake-first-token"] = "prefill"
            if answer.streamed:
                self._metrics.first_byte.observe(time.perf_counter() - started)
            response, outcome = await _answered(http, answer, headers_back, timeline, tell)
            return response
        except web.HTTPClientError:
            outcome = "client_error"
            raise
        except BadRequest as error:
            outcome = "client_error"
            return error_answer(400, str(error), "BadRequestError", error.param)
        except Overloaded as error:
            outcome = "rejected"
            return rejection_answer(error)
        except NoDecode as error:
            outcome = "no_decode"
            return error_answer(503, str(error), "ServiceUnavailableError")
        except DecodeFailed as error:
            outcome = "decode_error"
            if reply := error.reply:
                return web.Response(status=reply.status, body=reply.body, headers=returned(reply.headers))
            return error_answer(502, str(error), "BadGatewayError")
        except Exception:
            outcome = "proxy_error"
            raise
        finally:
            if http.get(SLOW):
                outcome = "slow_client"
            if answer:
                await self._dispatcher.finish(answer, whole=outcome in ("ok", "client_error"))
            self._metrics.requests.labels(http.path, outcome).inc()
            self._metrics.duration.observe(time.perf_counter() - started)
            timeline.observe(self._metrics)
            access = http[ACCESS]
            access.outcome = outcome
            if answer:
                access.prefill, access.decode = answer.choice.prefill or "", answer.choice.decode
                access.ttft, access.tokens = timeline.seconds("received", "first_byte"), answer.tokens

    async def _opened(self, http: web.Request, timeline: Timeline) -> tuple[Answer, Tell | None]:
        """Decode's answer, and what tells its timeline, if the client wants to know.

        Only the latter keeps the request: a stream may last for minutes, and prompts are long.
        """
        request = ClientRequest.parse(http.path, await read_body(http))
        timeline.mark("parsed")
        headers = forwarded_json(http, request.get("request_id"))
        asked = await self._arrivals.describe(request, headers, http[CALLER])
        if request.path == RESPONSES:
            asked = await self._at_holder(asked)
        timeline.mark("described")
        answer = await self._dispatcher.open(asked, timeline)
        if not timeline.asked:
            return answer, None

        async def tell() -> dict[str, Any]:
            timeline.mark("decode_end")
            told = await self._dispatcher.timeline(answer, asked)
            return told | {"proxy": timeline.moments}

        return answer, tell

    async def _at_holder(self, asked: Asked) -> Asked:
        """A response that goes on from another one, made to go where that one is."""
        previous = asked.request.get("previous_response_id")
        if not isinstance(previous, str):
            return asked
        holder = await self._stored.holder(previous, asked.headers)
        if holder is None:
            return asked
        others = frozenset(decode.url for decode in self._pool.decode if decode is not holder)
        return msgspec.structs.replace(asked, avoid=others)


async def _answered(
    http: web.Request,
    answer: Answer,
    headers: CIMultiDict[str],
    timeline: Timeline,
    tell: Tell | None,
) -> tuple[web.StreamResponse, str]:
    """Decode's bytes to the client, and how it ended."""
    if not answer.streamed:
        timeline.mark("first_byte")
        body = into_answer(answer.first, await tell()) if tell and answer.status == 200 else answer.first
        whole = web.Response(status=answer.status, body=body, headers=headers)
        return whole, "ok" if answer.status < 400 else "client_error"
    response = web.StreamResponse(status=answer.status, headers=headers)
    pour: Pour = answer.pour
    if tell:
        pour = pouring(with_timeline(answer.chunks(), tell))
    elif answer.early:
        pour = pouring(answer.chunks())
    return response, await relay(http, response, pour, timeline)

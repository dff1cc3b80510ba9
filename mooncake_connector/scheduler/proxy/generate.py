"""Completions and chats: what goes through prefill and decode."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from mooncake_connector.scheduler.proxy.answer import Answer, DecodeFailed, NoDecode, Overloaded, StreamBroken
from mooncake_connector.scheduler.proxy.arrivals import Arrivals
from mooncake_connector.scheduler.proxy.dispatch import Dispatcher
from mooncake_connector.scheduler.proxy.errors import error_answer, rejection_answer
from mooncake_connector.scheduler.proxy.headers import REQUEST_ID, identified, returned
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.openai import BadRequest, ClientRequest, error_body
from mooncake_connector.scheduler.proxy.timeline import HEADER, Timeline, into_answer, with_timeline

log = logging.getLogger(__name__)


class Generation:
    """Handles ``POST /v1/completions`` and ``POST /v1/chat/completions``."""

    def __init__(self, arrivals: Arrivals, dispatcher: Dispatcher, metrics: ProxyMetrics) -> None:
        self._arrivals = arrivals
        self._dispatcher = dispatcher
        self._metrics = metrics

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answer one request."""
        started = time.perf_counter()
        timeline = Timeline(http.headers.get(HEADER) == "1")
        outcome = "cancelled"
        answer: Answer | None = None
        try:
            request = ClientRequest.parse(http.path, await http.read())
            timeline.mark("parsed")
            headers, request_id = identified(http, request)
            asked = await self._arrivals.describe(request, headers)
            timeline.mark("described")
            answer = await self._dispatcher.open(asked, timeline)
            headers_back = returned(answer.headers)
            headers_back["x-mooncake-decode"] = answer.choice.decode
            headers_back["x-mooncake-prefill"] = answer.choice.prefill or f"none ({answer.choice.reason})"
            headers_back[REQUEST_ID] = request_id
            if answer.early:
                headers_back["x-mooncake-first-token"] = "prefill"
            if answer.streamed:
                self._metrics.first_byte.observe(time.perf_counter() - started)

            async def tell() -> dict[str, Any]:
                timeline.mark("decode_end")
                told = await self._dispatcher.timeline(answer, asked)
                return told | {"proxy": timeline.moments}

            response, outcome = await _relay(http, answer, headers_back, timeline, tell)
            return response
        except web.HTTPRequestEntityTooLarge:
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
            if answer:
                await self._dispatcher.finish(answer, whole=outcome in ("ok", "client_error"))
            self._metrics.requests.labels(http.path, outcome).inc()
            self._metrics.duration.observe(time.perf_counter() - started)
            timeline.observe(self._metrics)


async def _relay(
    http: web.Request,
    answer: Answer,
    headers: dict[str, str],
    timeline: Timeline,
    tell: Callable[[], Awaitable[dict[str, Any]]],
) -> tuple[web.StreamResponse, str]:
    """Decode's bytes to the client, and how it ended."""
    if not answer.streamed:
        timeline.mark("first_byte")
        asked = timeline.asked and answer.status == 200
        body = into_answer(answer.first, await tell()) if asked else answer.first
        whole = web.Response(status=answer.status, body=body, headers=headers)
        return whole, "ok" if answer.status < 400 else "client_error"
    response = web.StreamResponse(status=answer.status, headers=headers)
    outcome = "ok"
    try:
        await response.prepare(http)
        chunks = answer.chunks()
        try:
            async for chunk in with_timeline(chunks, tell) if timeline.asked else chunks:
                if not chunk:
                    continue
                await response.write(chunk)
                if "first_byte" not in timeline.moments:
                    timeline.mark("first_byte")
        except StreamBroken as error:
            log.warning("%s", error)
            outcome = "stream_broken"
            # The blank line ends an event that was cut in two; no [DONE] follows, for it is not done.
            said = error_body(str(error), "BadGatewayError", 502)
            await response.write(b"\n\ndata: " + said + b"\n\n")
        await response.write_eof()
    except ConnectionResetError:
        return response, "cancelled"
    return response, outcome

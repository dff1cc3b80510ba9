"""The proxy's HTTP face: OpenAI's API in front, prefill and decode engines behind."""

import asyncio
import logging
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import prometheus_client
from aiohttp import hdrs, web

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.engines.base import Engine
from mooncake_connector.scheduler.engines.holdings import Holdings
from mooncake_connector.scheduler.engines.pool import Instance, Pool
from mooncake_connector.scheduler.engines.probe import Prober
from mooncake_connector.scheduler.engines.vllm import VllmEngine
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.policy.estimators import Estimators
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.prompts.tokens import Tokens
from mooncake_connector.scheduler.proxy import rejection
from mooncake_connector.scheduler.proxy.answer import Answer, DecodeFailed, NoDecode, Overloaded, StreamBroken
from mooncake_connector.scheduler.proxy.arrivals import Arrivals
from mooncake_connector.scheduler.proxy.conductor_metrics import ConductorMetrics
from mooncake_connector.scheduler.proxy.dispatch import Dispatcher
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, BadRequest, ClientRequest, error_body
from mooncake_connector.scheduler.proxy.settings import ProxySettings
from mooncake_connector.scheduler.proxy.steering import Steering
from mooncake_connector.scheduler.proxy.timeline import HEADER, Timeline, into_answer, with_timeline

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = "X-Request-Id"
# uvicorn closes an idle connection after 5 s: leave before it does, or a request meets a closing socket.
KEEPALIVE_SECONDS = 4.0
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
OWN = frozenset({"content-length", "x-request-id"})
NOT_FORWARDED = HOP_BY_HOP | OWN | {"host", "content-type", "content-encoding", "accept-encoding", "expect"}
NOT_RETURNED = HOP_BY_HOP | OWN | {"date", "server"}


class Proxy:
    """The application: build it, then `open` it.

    Args:
        settings: what to run with.
        engine: how engines are driven; vLLM unless given.
    """

    def __init__(self, settings: ProxySettings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.pool = Pool(settings.prefill, settings.decode)
        self.metrics = ProxyMetrics(self.pool)
        self.index = PrefixIndex()
        self.estimators = Estimators()
        self.conductor = Conductor(settings.scheduling, self.index, self.estimators)
        self._engine = engine or VllmEngine(
            api_key=settings.engine_api_key, probe_timeout=settings.probe_timeout
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """Probe and serve while the context is open; yields the port. Leaving it drains.

        Raises:
            ConfigError: the address can't be listened on.
        """
        settings = self.settings
        app = web.Application(client_max_size=settings.max_body_mib << 20, middlewares=[_openai_errors])
        app.router.add_post(COMPLETIONS, self._generate)
        app.router.add_post(CHAT, self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=settings.drain_seconds, access_log=None
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT_ENCODING),
        ) as self._session:
            steering = self.steering = self._steer()
            self._dispatcher = Dispatcher(
                self.pool,
                steering,
                self._engine,
                self._session,
                self.metrics,
                # Who is rejected once the prompt is computed must not be with decode by then.
                order="serial" if settings.scheduling.admission == "baseline" else settings.order,
                first_token=settings.first_token,
                max_retries=settings.max_retries,
            )
            prober = Prober(
                self.pool,
                self._engine,
                self._session,
                check_seconds=settings.check_seconds,
                probe_seconds=settings.probe_seconds,
            )
            async with AsyncExitStack() as stack:
                stack.callback(self._tokens.close)
                stack.push_async_callback(self._holdings.close)
                stack.callback(steering.close)
                stack.push_async_callback(self._dispatcher.close)
                await stack.enter_async_context(prober)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                try:
                    await web.TCPSite(runner, settings.host, settings.port).start()
                except OSError as error:
                    raise ConfigError(
                        f"can't listen on {settings.host}:{settings.port} ({error.strerror or error}): "
                        "choose another --port (MOONCAKE_PROXY_PORT) or --host (MOONCAKE_PROXY_HOST)"
                    ) from None
                yield runner.addresses[0][1]

    def _steer(self) -> Steering:
        """Put together what decides about requests."""
        settings = self.settings
        self._holdings = Holdings(self.index)
        steering = Steering(
            self.pool,
            self.conductor,
            self.estimators,
            self._holdings,
            self.metrics,
            settings.scheduling,
            settings.fixed_slo,
        )
        self._tokens = Tokens(settings.tokenizer)
        self._arrivals = Arrivals(
            self.index,
            self._tokens,
            settings.classes,
            settings.tenant_header,
            steering.promise,
            self._adapters,
        )

        def follow(instance: Instance) -> None:
            steering.follow(instance)
            if instance.info:
                self._tokens.offer(instance.info.model)

        for instance in self.pool:
            instance.changed = follow
        clock = asyncio.get_running_loop().time
        self.metrics.registry.register(
            ConductorMetrics(
                lambda: self.conductor.accounts(clock()),
                self.conductor.waiting,
                lambda: len(self.index),
                self.estimators.calibration,
            )
        )
        return steering

    def _adapters(self) -> set[str]:
        return {name for instance in self.pool if instance.info for name in instance.info.adapters}

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        timeline = Timeline(http.headers.get(HEADER) == "1")
        outcome = "cancelled"
        answer: Answer | None = None
        try:
            request = ClientRequest.parse(http.path, await http.read())
            timeline.mark("parsed")
            headers, request_id = _forwarded(http, request)
            asked = await self._arrivals.describe(request, headers)
            timeline.mark("described")
            answer = await self._dispatcher.open(asked, timeline)
            returned = _returned(answer.headers)
            returned["x-mooncake-decode"] = answer.choice.decode
            returned["x-mooncake-prefill"] = answer.choice.prefill or f"none ({answer.choice.reason})"
            returned[REQUEST_ID] = request_id
            if answer.early:
                returned["x-mooncake-first-token"] = "prefill"
            if answer.streamed:
                self.metrics.first_byte.observe(time.perf_counter() - started)

            async def tell() -> dict[str, Any]:
                timeline.mark("decode_end")
                told = await self._dispatcher.timeline(answer, asked)
                return told | {"proxy": timeline.moments}

            response, outcome = await _relay(http, answer, returned, timeline, tell)
            return response
        except web.HTTPRequestEntityTooLarge:
            outcome = "client_error"
            raise
        except BadRequest as error:
            outcome = "client_error"
            return _error(400, str(error), "BadRequestError", error.param)
        except Overloaded as error:
            outcome = "rejected"
            return _rejection(error)
        except NoDecode as error:
            outcome = "no_decode"
            return _error(503, str(error), "ServiceUnavailableError")
        except DecodeFailed as error:
            outcome = "decode_error"
            if reply := error.reply:
                return web.Response(status=reply.status, body=reply.body, headers=_returned(reply.headers))
            return _error(502, str(error), "BadGatewayError")
        except Exception:
            outcome = "proxy_error"
            raise
        finally:
            if answer:
                await self._dispatcher.finish(answer, whole=outcome in ("ok", "client_error"))
            self.metrics.requests.labels(http.path, outcome).inc()
            self.metrics.duration.observe(time.perf_counter() - started)
            timeline.observe(self.metrics)

    async def _models(self, http: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in http.headers.items() if name.lower() not in NOT_FORWARDED}
        tried = "none is up"
        for decode in self.pool.live("decode"):
            try:
                async with self._session.get(f"{decode.url}/v1/models", headers=headers) as reply:
                    body = await reply.read()
                    return web.Response(status=reply.status, body=body, headers=_returned(reply.headers))
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                tried = f"{decode.url}: {error}"
                decode.suspect(tried)
        return _error(503, f"no decode engine can list its models ({tried})", "ServiceUnavailableError")

    async def _health(self, _: web.Request) -> web.StreamResponse:
        healthy = self.pool.paired()
        report = {
            "status": "ok" if healthy else "degraded" if self.pool.live("decode") else "down",
            "prefill": [instance.report() for instance in self.pool.prefill],
            "decode": [instance.report() for instance in self.pool.decode],
            "mismatches": self.pool.mismatches(),
            "scheduling": {
                "routing": self.settings.scheduling.routing,
                "admission": self.settings.scheduling.admission,
                "waiting": self.conductor.waiting(),
            },
        }
        body = msgspec.json.encode(report)
        return web.Response(status=200 if healthy else 503, body=body, content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=self.metrics.text(), headers=headers)


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


def _forwarded(http: web.Request, request: ClientRequest) -> tuple[dict[str, str], str]:
    """Headers for the engines, and the request's id: the client's if it named one."""
    headers = {name: value for name, value in http.headers.items() if name.lower() not in NOT_FORWARDED}
    named = http.headers.get(REQUEST_ID) or request.get("request_id")
    usable = isinstance(named, str) and named.isprintable() and named.isascii()
    request_id = str(named) if usable else uuid.uuid4().hex
    return headers | {REQUEST_ID: request_id, hdrs.CONTENT_TYPE: "application/json"}, request_id


def _returned(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in NOT_RETURNED}


def _error(status: int, message: str, kind: str, param: str | None = None) -> web.Response:
    body = error_body(message, kind, status, param)
    return web.Response(status=status, body=body, content_type="application/json")


def _rejection(error: Overloaded) -> web.Response:
    headers = {hdrs.RETRY_AFTER: str(rejection.retry_seconds(error.rejected))}
    body = rejection.body(error.rejected)
    return web.Response(status=rejection.STATUS, body=body, headers=headers, content_type="application/json")


@web.middleware
async def _openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _error(404, f"the proxy has no {request.method} {request.path}", "NotFoundError")
    except web.HTTPException as error:
        return _error(error.status, error.text or error.reason, error.reason.replace(" ", "") + "Error")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _error(500, "the proxy failed; its log has the cause", "InternalServerError")


async def serve(settings: ProxySettings) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal drops what still runs."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and task:
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        async with Proxy(settings).open() as port:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"mooncake-connector proxy listens on http://{host}:{port}", flush=True)
            await stop.wait()
            log.info("draining: no new requests, running ones have %g s", settings.drain_seconds)
    except asyncio.CancelledError:
        log.warning("stopped before all answers ended")

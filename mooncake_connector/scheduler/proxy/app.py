"""The proxy's HTTP face: OpenAI's API in front, prefill and decode engines behind."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

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
from mooncake_connector.scheduler.proxy.anywhere import Anywhere
from mooncake_connector.scheduler.proxy.arrivals import Arrivals
from mooncake_connector.scheduler.proxy.conductor_metrics import ConductorMetrics
from mooncake_connector.scheduler.proxy.deadlines import Deadlines
from mooncake_connector.scheduler.proxy.dispatch import Dispatcher
from mooncake_connector.scheduler.proxy.endpoints import ANY, DECODE, DECODE_ALONE, DISAGGREGATED, STORED
from mooncake_connector.scheduler.proxy.errors import Handler, openai_errors
from mooncake_connector.scheduler.proxy.generate import Generation
from mooncake_connector.scheduler.proxy.headers import stamp
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.relay import PATIENCE
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget
from mooncake_connector.scheduler.proxy.settings import ProxySettings
from mooncake_connector.scheduler.proxy.steering import Steering
from mooncake_connector.scheduler.proxy.stored import Stored

# uvicorn closes an idle connection after 5 s: leave before it does, or a request meets a closing socket.
KEEPALIVE_SECONDS = 4.0


class Proxy:
    """The application: build it, then `open` it.

    Args:
        settings: what to run with.
        engine: how engines are driven; vLLM unless given.

    Attributes:
        draining: ``/health`` says 503, though all is served.
    """

    def __init__(self, settings: ProxySettings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.draining = False
        self.pool = Pool(settings.prefill, settings.decode)
        self.budget = RetryBudget(settings.retry_share)
        self.deadlines = Deadlines(
            settings.prefill_timeout, settings.first_byte_timeout, settings.chunk_timeout
        )
        self.metrics = ProxyMetrics(self.pool, self.budget)
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
                budget=self.budget,
                deadlines=self.deadlines,
            )
            prober = Prober(
                self.pool,
                self._engine,
                self._session,
                check_seconds=settings.check_seconds,
                probe_seconds=settings.probe_seconds,
                down_seconds=settings.down_timeout,
            )
            runner = web.AppRunner(
                self._application(),
                handler_cancellation=True,
                shutdown_timeout=settings.drain_seconds,
                access_log=None,
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

    def _application(self) -> web.Application:
        limit = self.settings.max_body_mib << 20
        app = web.Application(client_max_size=limit, middlewares=[openai_errors])
        stored = Stored(self.pool, self._session)
        generation = Generation(self.pool, self._arrivals, stored, self._dispatcher, self.metrics)
        anywhere = Anywhere(
            self.pool,
            stored,
            self._session,
            self.metrics,
            max_retries=self.settings.max_retries,
            budget=self.budget,
            deadlines=self.deadlines,
        )
        served: list[tuple[Handler, Iterable[tuple[str, str]]]] = [
            (generation.handle, [("POST", path) for path in (*DISAGGREGATED, *DECODE_ALONE)]),
            (anywhere.decode, DECODE),
            (anywhere.stored, STORED),
            (anywhere.any, ANY),
            (self._health, [("GET", "/health")]),
            (self._ping, [("GET", "/ping"), ("POST", "/ping")]),
            (self._load, [("GET", "/load")]),
            (self._metrics, [("GET", "/metrics")]),
        ]
        for handler, endpoints in served:
            for method, path in endpoints:
                add = app.router.add_get if method == "GET" else app.router.add_post
                add(path, handler)
        for resource in app.router.resources():
            if isinstance(resource, web.Resource):
                resource.add_route(hdrs.METH_OPTIONS, anywhere.options)
        app[PATIENCE] = self.settings.client_timeout
        app.on_response_prepare.append(stamp)
        return app

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

        self.pool.subscribe(follow)
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

    async def _health(self, _: web.Request) -> web.StreamResponse:
        healthy = self.pool.paired() and not self.draining
        state = "ok" if self.pool.paired() else "degraded" if self.pool.live("decode") else "down"
        report = {
            "status": "draining" if self.draining else state,
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

    async def _ping(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self.pool.paired() else 503)

    async def _load(self, _: web.Request) -> web.StreamResponse:
        load = sum(instance.requests for instance in self.pool.decode)
        return web.json_response({"server_load": load})

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=self.metrics.text(), headers=headers)

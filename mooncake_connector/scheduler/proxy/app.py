"""The proxy's HTTP face: OpenAI's API in front, prefill and decode engines behind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import prometheus_client
from aiohttp import hdrs, web

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.engines.base import Engine
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.holdings import Holdings
from mooncake_connector.scheduler.engines.pool import Instance, Pool
from mooncake_connector.scheduler.engines.probe import Prober
from mooncake_connector.scheduler.engines.vllm import VllmEngine
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.policy.estimators import Estimators
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.prompts.tokens import Tokens
from mooncake_connector.scheduler.proxy.access import AccessLog
from mooncake_connector.scheduler.proxy.admin import Admin
from mooncake_connector.scheduler.proxy.anywhere import Anywhere
from mooncake_connector.scheduler.proxy.arrivals import Arrivals
from mooncake_connector.scheduler.proxy.body import IN_FORCE, not_yet
from mooncake_connector.scheduler.proxy.callers import Callers
from mooncake_connector.scheduler.proxy.conductor_metrics import ConductorMetrics
from mooncake_connector.scheduler.proxy.connections import Site
from mooncake_connector.scheduler.proxy.deadlines import Deadlines
from mooncake_connector.scheduler.proxy.dispatch import Dispatcher
from mooncake_connector.scheduler.proxy.endpoints import ANY, DECODE, DECODE_ALONE, DISAGGREGATED, STORED
from mooncake_connector.scheduler.proxy.errors import Handler, openai_errors
from mooncake_connector.scheduler.proxy.generate import Generation
from mooncake_connector.scheduler.proxy.headers import stamp
from mooncake_connector.scheduler.proxy.membership import Membership
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.relay import PATIENCE
from mooncake_connector.scheduler.proxy.reload import Reloader
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget
from mooncake_connector.scheduler.proxy.settings import InForce, ProxySettings, spelled
from mooncake_connector.scheduler.proxy.steering import Steering
from mooncake_connector.scheduler.proxy.stored import Stored
from mooncake_connector.scheduler.proxy.tls import Certificate

# Connections that the kernel takes before the proxy does: many clients may come at once.
BACKLOG = 1024


class Proxy:
    """The application: build it, then `open` it.

    Args:
        settings: what to run with.
        engine: how engines are driven; vLLM unless given.
        load: reads the settings anew, for `reload`.

    Attributes:
        admin_port: where the admin API listens, once the proxy is open; 0 if nowhere.
        followers: called with the new settings after each reload.
        draining: ``/health`` says 503, though all is served.
    """

    def __init__(
        self,
        settings: ProxySettings,
        engine: Engine | None = None,
        load: Callable[[], ProxySettings] | None = None,
    ) -> None:
        self._in_force = InForce(settings)
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
        self._client = EngineClient(settings.connect_timeout)
        self._callers = Callers(settings)
        self._membership = Membership(self.pool)
        self._certificate = Certificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        self.followers: list[Callable[[ProxySettings], None]] = [self._callers.configure, self._reschedule]
        self._reloader = Reloader(
            load or (lambda: settings),
            self._in_force,
            self._membership,
            self._certificate,
            self.followers,
        )
        self.admin_port = 0

    @property
    def settings(self) -> ProxySettings:
        """Those in force."""
        return self._in_force.settings

    def reload(self) -> list[str]:
        """Read the settings again; returns the names of those that changed.

        Raises:
            ConfigError: they are wrong, or can't change at run time; nothing changed.
        """
        return self._reloader.reload()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """Probe and serve while the context is open; yields the port. Leaving it drains.

        Raises:
            ConfigError: the address can't be listened on.
        """
        settings = self.settings
        steering = self.steering = self._steer()
        self._dispatcher = Dispatcher(
            self.pool,
            steering,
            self._engine,
            self._client,
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
            self._client,
            check_seconds=settings.check_seconds,
            probe_seconds=settings.probe_seconds,
            down_seconds=settings.down_timeout,
        )
        async with AsyncExitStack() as stack:
            stack.callback(self._client.close)
            stack.callback(self._tokens.close)
            stack.push_async_callback(self._holdings.close)
            stack.callback(steering.close)
            stack.push_async_callback(self._dispatcher.close)
            await stack.enter_async_context(prober)
            stack.push_async_callback(self._membership.close)
            if settings.admin_keys:
                admin = Admin(self._in_force, self.pool, self._membership, self._reloader)
                self.followers.append(admin.configure)
                self.admin_port = await self._listen(stack, admin.application(), "admin_")
            yield await self._listen(stack, self._application())

    async def _listen(self, stack: AsyncExitStack, app: web.Application, which: str = "") -> int:
        """Serve until the stack is closed; returns the port. `which` names its settings."""
        host: str = getattr(self.settings, f"{which}host")
        port: int = getattr(self.settings, f"{which}port")
        runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=self.settings.drain_seconds, access_log=None
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        tls = self._certificate.context if self._certificate else None
        try:
            await Site(runner, self._in_force, host, port, ssl_context=tls, backlog=BACKLOG).start()
        except OSError as error:
            raise ConfigError(
                f"can't listen on {host}:{port} ({error.strerror or error}): "
                f"choose another {spelled(f'{which}port')} or {spelled(f'{which}host')}"
            ) from None
        return int(runner.addresses[0][1])

    def _application(self) -> web.Application:
        middlewares = [openai_errors, AccessLog(self._in_force).written, self._callers.known]
        app = web.Application(middlewares=middlewares)
        app[IN_FORCE] = self._in_force
        stored = Stored(self.pool, self._client)
        generation = Generation(self.pool, self._arrivals, stored, self._dispatcher, self.metrics)
        anywhere = Anywhere(
            self.pool,
            stored,
            self._client,
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
                if method == "GET":
                    app.router.add_get(path, handler, expect_handler=not_yet)
                else:
                    app.router.add_post(path, handler, expect_handler=not_yet)
        for resource in app.router.resources():
            if isinstance(resource, web.Resource):
                resource.add_route(hdrs.METH_OPTIONS, anywhere.options)
        app[PATIENCE] = self.settings.client_timeout
        app.on_response_prepare.append(stamp)
        app.on_response_prepare.append(self._last)
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
                lambda: self.conductor.margins(clock()),
                lambda: len(self.index),
                self.estimators.calibration,
            )
        )
        return steering

    def _reschedule(self, settings: ProxySettings) -> None:
        self.steering.configure(settings.scheduling, settings.fixed_slo)

    def _adapters(self) -> set[str]:
        return {name for instance in self.pool if instance.info for name in instance.info.adapters}

    async def _last(self, _: web.Request, response: web.StreamResponse) -> None:
        """Who keeps connections is told to give up this one, before it is closed under a request."""
        if self.draining:
            response.headers[hdrs.CONNECTION] = "close"
            response.force_close()

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
        return web.Response(status=200 if self.pool.paired() and not self.draining else 503)

    async def _load(self, _: web.Request) -> web.StreamResponse:
        load = sum(instance.requests for instance in self.pool.decode)
        return web.json_response({"server_load": load})

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=self.metrics.text(), headers=headers)

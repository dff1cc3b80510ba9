"""A proxy in this process, fake engines beside it, a client; everything over loopback sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop

from mooncake_connector.scheduler.proxy.app import Proxy
from mooncake_connector.scheduler.proxy.settings import ProxySettings
from tests.proxy.fakes import WITHIN, FakeEngine

# What is about connections runs on the loop that the command runs on: its transports are others.
ON_UVLOOP = (
    "test_limits.py",
    "test_tls.py",
    "test_hostile_clients.py",
    "test_hostile_bodies.py",
    "test_hostile_engines.py",
    "test_hostile_fuzz.py",
    "test_admin.py",
    "test_reload.py",
)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Which loop a test runs on."""
    return (
        {"uvloop": uvloop.new_event_loop}
        if item.path.name in ON_UVLOOP
        else {"asyncio": asyncio.new_event_loop}
    )


@dataclass
class Setting:
    """A proxy with its engines. `http` has the proxy as base URL; `settings` are what a reload would read."""

    proxy: Proxy
    url: str
    http: aiohttp.ClientSession
    prefill: list[FakeEngine]
    decode: list[FakeEngine]
    settings: ProxySettings

    def reload(self, **changed: Any) -> list[str]:
        """Have the proxy read settings that differ by these."""
        self.settings = msgspec.structs.replace(self.settings, **changed)
        return self.proxy.reload()

    async def settled(self, check: Callable[[Proxy], bool], within: float = WITHIN) -> None:
        """Wait until the proxy's pools are as `check` wants."""
        async with asyncio.timeout(within):
            while not check(self.proxy):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def count(self, metric: str, **labels: str) -> float:
        """Value of one of the proxy's counters, 0 if it never moved."""
        return self.proxy.metrics.registry.get_sample_value(f"mooncake_proxy_{metric}", labels) or 0.0


Start = Callable[..., Awaitable[Setting]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start engines and a proxy: start(1, 2, order="serial") has one prefill and two decode engines."""
    async with AsyncExitStack() as stack:

        async def build(
            prefill: int | list[FakeEngine] = 1,
            decode: int | list[FakeEngine] = 1,
            *,
            ready: bool = True,
            **settings: Any,
        ) -> Setting:
            ps = prefill if isinstance(prefill, list) else [FakeEngine("kv_producer") for _ in range(prefill)]
            ds = decode if isinstance(decode, list) else [FakeEngine("kv_consumer") for _ in range(decode)]
            for engine in [*ps, *ds]:
                if not engine.port:
                    await engine.start()
                stack.push_async_callback(engine.stop)
            options = {"port": 0, "check_seconds": 0.1, "drain_seconds": 1, **settings}
            options["prefill"] = tuple(engine.url for engine in ps)
            options["decode"] = tuple(engine.url for engine in ds)
            settings_read = ProxySettings(**options)
            proxy = Proxy(settings_read, load=lambda: setting.settings)
            port = await stack.enter_async_context(proxy.open())
            url = f"http://127.0.0.1:{port}"
            http = await stack.enter_async_context(aiohttp.ClientSession(url))
            setting = Setting(proxy, url, http, ps, ds, settings_read)
            if ready:
                await setting.settled(lambda proxy: all(instance.up for instance in proxy.pool))
            return setting

        yield build


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

"""The proxy as a process: from its start to the signal that ends it."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.proxy import logs
from mooncake_connector.scheduler.proxy.app import Proxy
from mooncake_connector.scheduler.proxy.connections import raise_file_limit
from mooncake_connector.scheduler.proxy.settings import ProxySettings

log = logging.getLogger(__name__)

# So many objects more than there were have the garbage collector look for cycles.
YOUNG = 10_000


async def serve(load: Callable[[], ProxySettings]) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal drops what still runs.

    After SIGTERM load balancers get `leave_seconds` to see ``/health`` and go. SIGHUP has the settings read
    again; if they are wrong, the old ones stay.

    Args:
        load: reads the settings.

    Raises:
        ConfigError: they are wrong at the start.
    """
    settings = load()
    logs.configure(settings)
    raise_file_limit()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.current_task()

    leave_seconds = settings.leave_seconds

    def on_signal(number: signal.Signals) -> None:
        nonlocal leave_seconds
        if stop.is_set() and task:
            task.cancel()
        if number == signal.SIGINT:
            leave_seconds = 0.0
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        proxy = Proxy(settings, load=load)
        proxy.followers.append(logs.configure)
        async with proxy.open() as port:
            # What is there now stays: the collector need not look through it again and again.
            gc.collect()
            gc.freeze()
            # Requests make no cycles, so there is little to find.
            gc.set_threshold(YOUNG)
            loop.add_signal_handler(signal.SIGHUP, _reload, proxy)
            if proxy.admin_port:
                log.info("the admin API listens on %s", _url(settings, settings.admin_host, proxy.admin_port))
            print(f"mooncake-connector proxy listens on {_url(settings, settings.host, port)}", flush=True)
            await stop.wait()
            proxy.draining = True
            await asyncio.sleep(leave_seconds)
            log.info("draining: no new requests, running ones have %g s", settings.drain_seconds)
    except asyncio.CancelledError:
        log.warning("stopped before all answers ended")


def _reload(proxy: Proxy) -> None:
    try:
        proxy.reload()
    except ConfigError as error:
        log.error("the settings stay as they were: %s", error)


def _url(settings: ProxySettings, host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"

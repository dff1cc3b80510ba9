"""The proxy as a process: from its start to the signal that ends it."""

import asyncio
import logging
import signal

from mooncake_connector.scheduler.proxy.app import Proxy
from mooncake_connector.scheduler.proxy.settings import ProxySettings

log = logging.getLogger(__name__)


async def serve(settings: ProxySettings) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal drops what still runs.

    After SIGTERM load balancers get `leave_seconds` to see ``/health`` and go.
    """
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
        proxy = Proxy(settings)
        async with proxy.open() as port:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"mooncake-connector proxy listens on http://{host}:{port}", flush=True)
            await stop.wait()
            proxy.draining = True
            await asyncio.sleep(leave_seconds)
            log.info("draining: no new requests, running ones have %g s", settings.drain_seconds)
    except asyncio.CancelledError:
        log.warning("stopped before all answers ended")

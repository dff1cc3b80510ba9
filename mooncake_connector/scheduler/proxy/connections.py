"""Clients' connections: how many there may be, and how long a request's headers may take."""

import asyncio
import logging
import resource
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from mooncake_connector.scheduler.proxy.openai import error_body
from mooncake_connector.scheduler.proxy.settings import InForce

log = logging.getLogger(__name__)

# A streamed request has a socket to its client, one to prefill and one to decode.
FILES_EACH = 3
FILES_ELSE = 64


class Connections:
    """Makes a `Connection` for each client that connects.

    Attributes:
        open: how many there are.
    """

    def __init__(self, server: web.Server, in_force: InForce) -> None:
        self._server = server
        self.in_force = in_force
        self.open = 0
        self._files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    def __call__(self) -> "Connection":
        settings = self.in_force.settings
        size = settings.max_header_kib << 10
        return Connection(
            self,
            self._server,
            keepalive_timeout=settings.keepalive_seconds,
            max_line_size=size,
            max_field_size=size,
            access_log=None,
        )

    @property
    def most(self) -> int:
        """So many at a time: `max_connections`, or fewer if this process may not open the files for them."""
        wanted = self.in_force.settings.max_connections
        if self._files == resource.RLIM_INFINITY:
            return wanted
        return min(wanted, max(1, (self._files - FILES_ELSE) // FILES_EACH))


class Connection(web.RequestHandler):
    """One client's connection. Its requests tell it when they `began` and `ended`: between these, it is busy.

    aiohttp limits how large headers are and how long nothing comes, but not how slowly they come.
    """

    def __init__(self, connections: Connections, server: web.Server, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._connections = connections
        self._busy = self._refused = False
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connections.open += 1
        if self._connections.open > self._connections.most:
            self._refused = True
            message = f"the proxy has {self._connections.most} connections, no more: try again later"
            _close_with(transport, 503, "Service Unavailable", message)
            return
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        # aiohttp calls it with nothing when it reads on.
        if data and not self._busy and self._late is None:
            self._expect_headers()
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.open -= 1
        self._stop_clock()
        super().connection_lost(exc)

    def began(self) -> None:
        """A request's headers are there."""
        self._busy = True
        self._stop_clock()

    def ended(self) -> None:
        """Its answer was handed over, and all of its body has come."""
        self._busy = False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP. Its text may hold a key, so it is not logged."""
        if not isinstance(exc, BadHttpMessage):
            return super().handle_error(request, status, exc, message)
        log.info("%s sent what is no HTTP request: %s", request.remote, type(exc).__name__)
        status = 431 if isinstance(exc, LineTooLong) else status
        body = error_body(message or "no HTTP request", "BadRequestError", status)
        response = web.Response(status=status, body=body, content_type="application/json")
        response.force_close()
        return response

    def _expect_headers(self) -> None:
        seconds = self._connections.in_force.settings.header_seconds
        self._late = asyncio.get_running_loop().call_later(seconds, self._headers_late, seconds)

    def _headers_late(self, seconds: float) -> None:
        transport = self.transport
        if transport:
            message = f"the request's headers did not come within {seconds:g} s"
            _close_with(transport, 408, "Request Timeout", message)
            self.force_close()

    def _stop_clock(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None


class Site(web.TCPSite):
    """A listening socket whose connections are `Connection`s.

    Args:
        options: those of `web.TCPSite`.
    """

    def __init__(self, runner: web.BaseRunner, in_force: InForce, *options: Any, **more: Any) -> None:
        super().__init__(runner, *options, **more)
        self._in_force = in_force

    async def start(self) -> None:
        """Listen."""
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        handshake = self._in_force.settings.header_seconds
        self._server = await asyncio.get_running_loop().create_server(
            Connections(server, self._in_force),
            self._host,
            self._port,
            ssl=self._ssl_context,
            ssl_handshake_timeout=handshake if self._ssl_context else None,
            backlog=self._backlog,
            reuse_address=self._reuse_address,
            reuse_port=self._reuse_port,
        )


def raise_file_limit() -> None:
    """Let this process open as many files as its hard limit allows; the soft one is 1,024 on many systems."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _close_with(transport: asyncio.BaseTransport, status: int, reason: str, message: str) -> None:
    body = error_body(message, reason.replace(" ", "") + "Error", status)
    head = (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    # uvloop's transports are no subclass of it.
    writing = cast(asyncio.WriteTransport, transport)
    writing.write(head.encode() + body)
    writing.close()

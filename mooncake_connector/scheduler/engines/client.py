"""The engines' HTTP client on the way of every token: HTTP/1.1 on httptools, with nothing in between.

A general client wakes a task for each chunk, and each of these waits for all that is due in the event loop.
What a proxy of aiohttp's takes is in docs/proxy.md.
"""

import asyncio
import os
import select
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

import httptools
import msgspec
from multidict import CIMultiDict

from mooncake_connector.scheduler.engines.response import Broken, Response, Unreachable

# uvicorn closes an idle connection after 5 s: leave before it does, or a request meets a closing socket.
KEEPALIVE_SECONDS = 4.0
# More bytes without a piece of a body, be it headers or trailers, no engine sends.
MOST_HEAD = 32 << 10
TOO_LARGE = f"its headers are larger than {MOST_HEAD >> 10} KiB"


class Origin(msgspec.Struct, frozen=True):
    """Where an engine listens.

    Attributes:
        netloc: as the Host header says it.
        path: which all paths there begin with.
    """

    host: str
    port: int
    netloc: str
    path: str
    tls: bool


@lru_cache(4096)
def origin(url: str) -> Origin:
    """From an engine's base URL."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    host = parts.hostname or ""
    return Origin(host, parts.port or (443 if tls else 80), parts.netloc, parts.path.rstrip("/"), tls)


class EngineClient:
    """Connections to engines, as many as there are requests; they are kept for the next one.

    Args:
        connect_timeout: seconds.
    """

    def __init__(self, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._idle: dict[Origin, list[Connection]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    async def post(self, url: str, path: str, body: bytes, headers: Mapping[str, str]) -> Response:
        """See `request`."""
        return await self.request("POST", url, path, body, headers)

    async def request(
        self, method: str, url: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Response:
        """The answer to a request, once its headers are there. Nobody is followed to where they redirect.

        Args:
            method: not HEAD.
            url: the engine's base URL, `path` what follows it, as it is sent.
            headers: none of them hop-by-hop, without the body's length.

        Raises:
            Unreachable: there is no connection.
            Broken: the engine hung up, or what it sent is no HTTP.
            ValueError: a header's value has a line break.
        """
        there = origin(url)
        head = _head(method, there, path, body, headers)
        connection = self._kept(there)
        if connection is None:
            connection = await self._connect(there)
        return await connection.begin(head, body).answer()

    def begin(self, url: str, path: str, body: bytes, headers: Mapping[str, str]) -> "Exchange | None":
        """A POST that is sent now; None if no connection is kept, as nothing is waited for. See `request`."""
        there = origin(url)
        head = _head("POST", there, path, body, headers)
        connection = self._kept(there)
        return connection.begin(head, body) if connection else None

    def close(self) -> None:
        """Hang up idle connections; the others are their requests'."""
        if self._sweeper:
            self._sweeper.cancel()
            self._sweeper = None
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
        self._idle.clear()

    def keep(self, connection: "Connection") -> None:
        """A connection is free for another request."""
        connection.since = asyncio.get_running_loop().time()
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._sweeper is None:
            self._sweep_after(KEEPALIVE_SECONDS)

    def lost(self, connection: "Connection") -> None:
        """A connection is gone."""
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)

    def _kept(self, there: Origin) -> "Connection | None":
        # The one that was used last: the others come of age.
        idle = self._idle.get(there)
        while idle:
            connection = idle.pop()
            if connection.usable():
                return connection
            connection.abort()
        return None

    async def _connect(self, there: Origin) -> "Connection":
        if there.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, made = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self, there),
                    there.host,
                    there.port,
                    ssl=self._tls if there.tls else None,
                )
        except TimeoutError:
            raise Unreachable(f"can't connect within {self._connect_timeout:g} s") from None
        except OSError as error:
            raise Unreachable(f"can't connect: {_why(error)}") from None
        return made

    def _sweep_after(self, seconds: float) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long."""
        self._sweeper = None
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_SECONDS
        for there, idle in tuple(self._idle.items()):
            for connection in [each for each in idle if each.since <= oldest]:
                connection.abort()
            self._idle[there] = [each for each in idle if each.since > oldest]
            if not self._idle[there]:
                del self._idle[there]
        if self._idle:
            first = min(idle[0].since for idle in self._idle.values())
            self._sweep_after(max(0.1, first - oldest))


class Exchange:
    """A request that was sent: its answer is awaited, once, or it is given up."""

    __slots__ = ("_connection", "_waiter")

    def __init__(self, connection: "Connection", waiter: asyncio.Future[Response]) -> None:
        self._connection = connection
        self._waiter: asyncio.Future[Response] | None = waiter

    async def answer(self) -> Response:
        """See `EngineClient.request`."""
        waiter = self._waiter
        assert waiter is not None, "an answer is awaited once"
        try:
            found = await waiter
        except asyncio.CancelledError:
            self.give_up()
            raise
        finally:
            self._waiter = None
        return found

    def give_up(self) -> None:
        """Nobody wants the answer, unless somebody has it."""
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        # As soon as there is an answer, the connection may be another request's.
        if waiter.cancelled() or waiter.cancel():
            self._connection.abort()
        elif not waiter.exception():
            waiter.result().close()


class Connection(asyncio.Protocol):
    """One connection, of one request at a time. Methods that begin with ``on_`` are the parser's to call.

    Attributes:
        since: when it became idle.
    """

    def __init__(self, client: EngineClient, there: Origin) -> None:
        self.origin = there
        self.since = 0.0
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._head: asyncio.Future[Response] | None = None
        self._response: Response | None = None
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._reading_head = True
        self._head_size = self._loose = 0
        self._paused = self._progress = False

    def begin(self, head: bytes, body: bytes) -> "Exchange":
        """Send a request."""
        waiter: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._head = waiter
        if self._transport:
            self._transport.writelines((head, body))
        else:
            self._fail("it hung up")
        return Exchange(self, waiter)

    def usable(self) -> bool:
        """Whether it can be used again.

        What an engine sent after its answer's end would be taken for the next answer, another client's; and
        that it hung up need not be known to the event loop yet.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if asyncio.get_running_loop().time() - self.since >= KEEPALIVE_SECONDS:
            return False
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self._transport:
            self._paused = False
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        self._progress = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"what it sent breaks HTTP ({type(error).__name__})")
            return
        # Neither a chunk's extensions nor a header's value may go on for ever.
        self._loose = 0 if self._progress else self._loose + len(data)
        if self._loose > MOST_HEAD:
            self._fail(TOO_LARGE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._client.lost(self)
        response = self._response
        if response and not exc and not self._reading_head and _until_closed(response.headers):
            self._response = None
            response.end()
            return
        self._fail(_why(exc) if isinstance(exc, OSError) else "it hung up")

    def on_message_begin(self) -> None:
        if self._head is None:
            # Nobody asked.
            self.abort()
        self._headers = CIMultiDict()
        self._head_size = 0
        self._reading_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value) + len(": \r\n")
        if self._head_size > MOST_HEAD:
            self._fail(TOO_LARGE)
        # Trailers are dropped.
        elif self._reading_head:
            self._headers.add(name.decode(errors="surrogateescape"), value.decode(errors="surrogateescape"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        # After an interim one comes the answer's own head.
        if 100 <= status < 200 and status != 101:
            return
        self._reading_head = False
        self._progress = True
        head, self._head = self._head, None
        if head and not head.done():
            self._response = Response(self, status, self._headers)
            head.set_result(self._response)

    def on_body(self, piece: bytes) -> None:
        self._progress = True
        if self._response:
            self._response.feed(piece)

    def on_message_complete(self) -> None:
        response = self._response
        if response is None:
            return
        self._response = None
        response.end()
        if self._parser.should_keep_alive() and self._transport and not self._transport.is_closing():
            self.resume()
            self._client.keep(self)
        else:
            self.abort()

    def _fail(self, why: str) -> None:
        """Whoever waits for something of it is told, and nothing else is asked of it."""
        self.abort()
        head, self._head = self._head, None
        response, self._response = self._response, None
        if head and not head.done():
            head.set_exception(Broken(why))
        if response:
            response.end(why)


def _head(method: str, there: Origin, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A request's line and headers.

    Raises:
        ValueError: a header's value has a line break.
    """
    lines = [f"{method} {there.path}{path} HTTP/1.1\r\nHost: {there.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join(lines) + "\r\n\r\n"
    if head.count("\n") != len(lines) + 2 or head.count("\r") != len(lines) + 2:
        raise ValueError("a header's value has a line break")
    return head.encode(errors="surrogateescape")


def _until_closed(headers: CIMultiDict[str]) -> bool:
    """Whether an answer with these headers ends where the connection does (RFC 9112, section 6.3)."""
    return "Content-Length" not in headers and "Transfer-Encoding" not in headers


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno:
        return error.strerror or str(error) or type(error).__name__
    return os.strerror(error.errno)

"""The engines' HTTP client: its connections are fed by hand, or by a server that says what it is told to."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from mooncake_connector.scheduler.engines import client as client_module
from mooncake_connector.scheduler.engines import response as response_module
from mooncake_connector.scheduler.engines.client import EngineClient, origin
from mooncake_connector.scheduler.engines.response import Broken, Response, Unreachable
from tests.proxy import certificates

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n"
WHOLE = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nX-Trailer: 1\r\n\r\n"
NO_HEADERS: CIMultiDict[str] = CIMultiDict()


class Server:
    """Answers the n-th request with the n-th of `answers`, in as many pieces as it has; None: hangs up."""

    def __init__(self, *answers: list[bytes] | bytes | None) -> None:
        self.answers = [[answer] if isinstance(answer, bytes) else answer for answer in answers]
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = 0
        self.went = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers[len(self.requests) - 1]
                if answer is None:
                    return
                for piece in answer:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.005)
                    await self.goes_on.wait()
                    if piece.startswith(b"!"):
                        return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            self.went.set()
            writer.close()


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[tuple[EngineClient, str]]:
    """A client, and the server's URL."""
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    client = EngineClient(5.0)
    try:
        yield client, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        client.close()
        listening.close()


async def ask(client: EngineClient, url: str, body: bytes = b"{}") -> Response:
    async with asyncio.timeout(5):
        return await client.post(url, "/v1/completions", body, CIMultiDict({"X-A": "é"}))


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.aborted = False
        self.paused = 0

    def writelines(self, pieces: object) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.paused += 1

    def resume_reading(self) -> None:
        self.paused -= 1


@given(st.sampled_from([WHOLE, CHUNKED, b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED]), st.data())
def test_an_answer_is_the_same_however_it_is_cut(answer: bytes, data: st.DataObject):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]

    async def run() -> None:
        client, wire = EngineClient(1.0), Wire()
        connection = client_module.Connection(client, origin("http://h:1"))
        connection.connection_made(wire)  # type: ignore[arg-type]
        asking = asyncio.create_task(connection.begin(b"", b"").answer())
        await asyncio.sleep(0)
        for piece in pieces:
            connection.data_received(piece)
        reply = await asking
        assert (reply.status, reply.content_type) == (200, "text/plain")
        assert "X-Trailer" not in reply.headers
        assert await reply.read() == b"hello"
        reply.close()  # at its end that is no hanging up
        assert not wire.aborted
        assert client._idle[connection.origin] == [connection]
        client.close()

    asyncio.run(run())


class Line:
    """What an answer comes over; `feeding` while it is not paused."""

    def __init__(self) -> None:
        self.feeding = True
        self.aborted = False

    def pause(self) -> None:
        self.feeding = False

    def resume(self) -> None:
        self.feeding = True

    def abort(self) -> None:
        self.aborted = True


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=20), st.lists(st.integers(0, 3)), st.booleans())
def test_what_is_poured_is_all_and_in_order(pieces: list[bytes], takes: list[int], breaks: bool):
    """The sink takes some, refuses, takes again; meanwhile pieces come, more than one at a time."""

    async def run() -> None:
        line, got, room = Line(), bytearray(), iter(takes)
        reply = Response(line, 200, NO_HEADERS)
        left = next(room, 99)

        def sink(piece: bytes) -> bool:
            nonlocal left
            got.extend(piece)
            left -= 1
            return left > 0

        async def pour() -> bool:
            nonlocal left
            while not await reply.pour(sink):
                await asyncio.sleep(0)
                left = next(room, 99)
            return True

        pouring = asyncio.create_task(pour())
        for at, piece in enumerate(pieces):
            if at % 3:
                await asyncio.sleep(0)
            while not line.feeding:  # noqa: ASYNC110
                await asyncio.sleep(0)
            reply.feed(piece)
        reply.end("it hung up" if breaks else "")
        if breaks:
            with pytest.raises(Broken, match="it hung up"):
                await pouring
        else:
            assert await pouring
            assert await reply.readany() == b""
        assert bytes(got) == b"".join(pieces)

    asyncio.run(run())


async def test_what_a_sink_raises_reaches_who_pours():
    reply = Response(Line(), 200, NO_HEADERS)

    def sink(piece: bytes) -> bool:
        raise ConnectionResetError("gone")

    pouring = asyncio.create_task(reply.pour(sink))
    await asyncio.sleep(0)
    reply.feed(b"a")
    reply.feed(b"b")
    with pytest.raises(ConnectionResetError, match="gone"):
        await pouring


async def test_an_answer_that_nobody_reads_is_not_read_on():
    line = Line()
    reply = Response(line, 200, NO_HEADERS)
    reply.feed(b"a" * response_module.WAITING_BYTES)
    assert line.feeding
    reply.feed(b"b")
    assert not line.feeding
    assert len(await reply.readany()) == response_module.WAITING_BYTES + 1
    reading = asyncio.create_task(reply.readany())
    await asyncio.sleep(0)
    assert line.feeding
    reply.feed(b"c")
    assert await reading == b"c"
    reply.close()
    assert line.aborted


async def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(response_module, "MOST_BYTES", 10)
    line = Line()
    reply = Response(line, 200, NO_HEADERS)
    reply.feed(b"a" * 11)
    with pytest.raises(Broken, match="larger than"):
        await reply.read()
    assert line.aborted


async def test_a_connection_serves_one_request_after_the_other():
    server = Server(WHOLE, CHUNKED, WHOLE)
    async with serving(server) as (client, url):
        for _ in range(3):
            reply = await ask(client, url)
            assert await reply.read() == b"hello"
            reply.close()  # at its end that is no hanging up
        assert server.connections == 1
        assert server.requests[0].startswith(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
        assert "X-A: é\r\n".encode() in server.requests[0]


async def test_a_path_of_the_engines_url_comes_first():
    server = Server(WHOLE)
    async with serving(server) as (client, url):
        await (await ask(client, url + "/engines/1/")).read()
    assert server.requests[0].startswith(b"POST /engines/1/v1/completions HTTP/1.1\r\n")


async def test_a_connection_that_is_free_before_its_answer_was_looked_at_is_no_trap():
    """The answer comes at once and whole: the next request has the connection before the first one wakes."""
    server = Server(*[WHOLE] * 200)
    async with serving(server) as (client, url):
        for _ in range(20):
            replies = await asyncio.gather(*(ask(client, url) for _ in range(10)))
            assert [await reply.read() for reply in replies] == [b"hello"] * 10


@pytest.mark.parametrize("more", [WHOLE, b"garbage", b"\r\n" + WHOLE])
async def test_what_follows_an_answer_is_nobodys(more: bytes):
    server = Server(WHOLE + more, WHOLE)
    async with serving(server) as (client, url):
        assert await (await ask(client, url)).read() == b"hello"
        assert await (await ask(client, url)).read() == b"hello"
        assert server.connections == 2


async def test_what_follows_an_answer_later_is_nobodys_either():
    server = Server([WHOLE, WHOLE], WHOLE)
    async with serving(server) as (client, url):
        assert await (await ask(client, url)).read() == b"hello"
        await asyncio.sleep(0.05)
        assert await (await ask(client, url)).read() == b"hello"
        assert server.connections == 2


async def test_idle_connections_are_closed_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_module, "KEEPALIVE_SECONDS", 0.05)
    server = Server(WHOLE, WHOLE)
    async with serving(server) as (client, url):
        await (await ask(client, url)).read()
        async with asyncio.timeout(5):
            await server.went.wait()
        await (await ask(client, url)).read()
        assert server.connections == 2
        assert not [connection for idle in client._idle.values() for connection in idle][1:]


async def test_who_says_close_is_not_asked_again():
    server = Server(HEAD + b"Connection: close\r\nContent-Length: 0\r\n\r\n", WHOLE)
    async with serving(server) as (client, url):
        assert await (await ask(client, url)).read() == b""
        await (await ask(client, url)).read()
        assert server.connections == 2


async def test_a_request_that_has_begun_is_answered_once_or_given_up():
    server = Server(WHOLE, WHOLE, WHOLE, WHOLE)
    async with serving(server) as (client, url):
        asked = (url, "/v1/completions", b"{}", NO_HEADERS)
        assert client.begin(*asked) is None  # nobody is connected yet
        await (await ask(client, url)).read()
        exchange = client.begin(*asked)
        assert exchange
        reply = await exchange.answer()
        exchange.give_up()  # it has been answered
        assert await reply.read() == b"hello"
        exchange = client.begin(*asked)
        assert exchange
        exchange.give_up()
        async with asyncio.timeout(5):
            await server.went.wait()
        assert (server.connections, server.closed) == (1, 1)
        # Its answer is there before anybody asks for it, and the connection is free for others.
        await (await ask(client, url)).read()
        server.answers += [[WHOLE]] * 2
        exchange = client.begin(*asked)
        assert exchange
        await asyncio.sleep(0.05)
        assert await (await ask(client, url)).read() == b"hello"
        exchange.give_up()
        assert (server.connections, server.closed) == (2, 1)


@pytest.mark.parametrize("when", ["before the head", "in the body"])
async def test_who_gives_up_hangs_up(when: str):
    server = Server([HEAD, b"Content-Length: 5\r\n\r\nhe", b"llo"], WHOLE)
    server.goes_on.clear()
    async with serving(server) as (client, url):
        if when == "before the head":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await ask(client, url)
        else:
            server.answers[0] = [HEAD + b"Content-Length: 5\r\n\r\nhe", b"llo"]
            reply = await ask(client, url)
            assert await reply.readany() == b"he"
            reply.close()
        server.goes_on.set()
        async with asyncio.timeout(5):
            await server.went.wait()
        assert await (await ask(client, url)).read() == b"hello"
        assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [b"HTTP/1.1 200 OK\r\nX-Half: ", b"!"],
        HEAD + b"X-A: " + b"a" * 40_000,
        HEAD + b"X-A: a\r\n" * 6000 + b"Content-Length: 0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-A: a\r\n" * 6000 + b"\r\n",
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"e" * 20_000, b"e" * 20_000],
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        [HEAD + b"Content-Length: 5\r\n\r\nhe", b"!"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n", b"!"],
    ],
)
async def test_what_is_no_answer_is_said_to_be_broken(answer: list[bytes] | bytes | None):
    server = Server(answer)
    async with serving(server) as (client, url):

        async def whole() -> bytes:
            async with asyncio.timeout(5):
                return await (await ask(client, url)).read()

        with pytest.raises(Broken) as raised:
            await whole()
        assert not isinstance(raised.value, Unreachable)
        assert not client._idle or not any(client._idle.values())


async def test_an_answer_may_end_where_the_connection_does():
    server = Server([HEAD + b"\r\nhel", b"lo", b"!"])
    async with serving(server) as (client, url):
        assert await (await ask(client, url)).read() == b"hello!"


async def test_nobody_there_is_told_in_few_words():
    listening = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    await listening.wait_closed()
    client = EngineClient(5.0)
    with pytest.raises(Unreachable, match="can't connect: Connection refused"):
        await ask(client, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_engines_behind_tls(loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, monkeypatch):
    """Who has a certificate that is trusted is asked, and the connection kept; nobody else is."""
    certificate, key = certificates.make(tmp_path, "engine")

    async def run(trusted: bool) -> None:
        server = Server(CHUNKED, WHOLE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        listening = await asyncio.start_server(server.talk, "127.0.0.1", 0, ssl=context)
        client, url = EngineClient(5.0), f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        if trusted:
            for _ in range(2):
                assert await (await ask(client, url)).read() == b"hello"
            assert server.connections == 1
        else:
            with pytest.raises(Unreachable, match=r"(?i)certificate.verify.failed"):
                await ask(client, url)
        client.close()
        listening.close()

    for trusted in (False, True):
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(run(trusted))


async def test_headers_with_line_breaks_go_nowhere():
    server = Server(WHOLE)
    async with serving(server) as (client, url):
        for value in ("a\r\nX-B: b", "a\nb", "a\rb"):
            with pytest.raises(ValueError, match="line break"):
                await client.post(url, "/v1/completions", b"", CIMultiDict({"X-A": value}))
        assert not server.requests

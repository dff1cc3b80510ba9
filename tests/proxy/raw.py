"""HTTP by hand: what no library would send, and a reader that accepts nothing but what is well-formed."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from multidict import CIMultiDict
from yarl import URL

from tests.proxy.conftest import Setting
from tests.proxy.fakes import MODEL, SOON, WITHIN, Call, FakeEngine

TEXT = {"model": MODEL, "prompt": "one two three four", "max_tokens": 7}
STREAM = {**TEXT, "stream": True}
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Script = Callable[["Call", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def encoded(body: dict[str, Any] | bytes) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def post(
    body: dict[str, Any] | bytes = TEXT,
    *headers: str | bytes,
    path: str = "/v1/completions",
    length: bool = True,
    version: str = "1.1",
) -> bytes:
    """A request; `length` False: without its Content-Length."""
    raw = encoded(body)
    lines = [f"POST {path} HTTP/{version}".encode(), b"Host: proxy", b"Content-Type: application/json"]
    lines += [line if isinstance(line, bytes) else line.encode() for line in headers]
    if length:
        lines.append(b"Content-Length: %d" % len(raw))
    return b"\r\n".join(lines) + b"\r\n\r\n" + raw


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """An engine's answer in one piece."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Got:
    """An answer that was well-formed."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error that an answer carries in OpenAI's form."""
        error = json.loads(self.body)["error"]
        assert error["message"]
        assert error["code"] == self.status
        return error


async def read(reader: asyncio.StreamReader, within: float = WITHIN) -> Got | None:
    """The next answer; None if the connection ended cleanly before it. Fails at anything but these."""
    async with asyncio.timeout(within):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        except ConnectionResetError:
            return None
        status, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        version, code, _ = status.split(" ", 2)
        assert version in ("HTTP/1.0", "HTTP/1.1")
        headers = CIMultiDict(tuple(line.split(": ", 1)) for line in lines)
        if int(code) == 100:
            return await read(reader, within)
        if headers.get("Transfer-Encoding") == "chunked":
            assert "Content-Length" not in headers
            body = b"".join([part async for part in _chunks(reader)])
        elif "Content-Length" in headers:
            body = await reader.readexactly(int(headers["Content-Length"]))
        else:
            assert version == "HTTP/1.0" or headers["Connection"] == "close"
            body = await reader.read()
        return Got(int(code), headers, body)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")), 16):
        part = await reader.readexactly(size + 2)
        assert part.endswith(b"\r\n")
        yield part[:-2]
    assert await reader.readexactly(2) == b"\r\n"


@asynccontextmanager
async def connected(setting: Setting, limit: int = 1 << 20) -> AsyncIterator[Connection]:
    """A bare connection to the proxy, cut in the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(setting.url).port, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def say(setting: Setting, data: bytes, within: float = WITHIN) -> Got | None:
    """One answer to raw bytes."""
    async with connected(setting) as (reader, writer):
        writer.write(data)
        return await read(reader, within)


class RawEngine(FakeEngine):
    """A fake engine that answers generation requests with whatever bytes its scripts write.

    `scripts` is used up one per generation request, `always` serves those that find it empty; without
    either the answer is a fake engine's usual one. `ill` is how it answers all else, health checks and probes
    too, if it is set.
    """

    def __init__(self, role: str, scripts: list[Script] | None = None, **probe: Any) -> None:
        super().__init__(role, **probe)
        self.scripts: list[Script] = [] if scripts is None else scripts
        self.always: Script = usual
        self.ill: Script | None = None
        self.sampled = 7
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            for writer in self._open:
                writer.transport.abort()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await self._one(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = CIMultiDict(tuple(line.split(": ", 1)) for line in head[1:] if line)
        raw = await reader.readexactly(int(headers.get("Content-Length", 0)))
        path = head[0].split(" ")[1]
        if self.ill:
            await self.ill(Call(path, {}, raw, headers, 0.0), reader, writer)
            return not writer.is_closing()
        if path in ("/health", "/v1/models"):
            models = {"object": "list", "data": [{"id": MODEL}]}
            writer.write(whole(b"" if path == "/health" else encoded(models)))
            return True
        body = json.loads(raw) if raw else {}
        params = body.get("kv_transfer_params") or {}
        if params.get("probe"):
            answer = self._probe_answer().body
            assert isinstance(answer, bytes)
            writer.write(whole(answer))
        elif released := params.get("release"):
            self.released.append(released)
            writer.write(whole(b'{"choices":[]}'))
        elif isinstance(params.get("timeline"), str):
            told = {"timeline": {"received": 1.5}, "first_token": self.sampled}
            writer.write(whole(encoded({"choices": [], "kv_transfer_params": told})))
        else:
            await self._scripted(Call(path, body, raw, headers, 0.0), reader, writer)
        return not writer.is_closing()

    async def _scripted(self, call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls.append(call)
        try:
            await (self.scripts.pop(0) if self.scripts else self.always)(call, reader, writer)
        finally:
            call.over.set()


async def usual(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What an engine that is well does: three tokens, in the form that was asked for."""
    if call.params.get("do_remote_decode") and not call.body.get("stream"):
        handed = {"transfer_id": call.params["transfer_id"], "remote_engine_id": "e"}
        writer.write(whole(encoded({"choices": [], "kv_transfer_params": handed})))
    elif call.body.get("stream"):
        count = call.body["max_tokens"] if call.params.get("do_remote_decode") else 3
        finish = "length" if call.params.get("do_remote_decode") else "stop"
        writer.write(SSE + b"".join(chunk(part) for part in stream(count, finish)) + b"0\r\n\r\n")
    else:
        choice = {"index": 0, "text": text(3), "finish_reason": "stop"}
        writer.write(whole(encoded({"id": "x", "choices": [choice], "usage": {"completion_tokens": 3}})))


def text(count: int) -> str:
    return "".join(f"w{at} é" for at in range(count))


def stream(count: int = 3, finish: str = "stop") -> list[bytes]:
    """Events of an answer of so many tokens, as `usual` sends it."""
    found = []
    for at in range(count):
        last = finish if at == count - 1 else None
        choice = {"index": 0, "text": f"w{at} é", "finish_reason": last}
        event = {"id": "c", "created": 3, "choices": [choice]}
        found.append(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
    return [*found, b"data: [DONE]\n\n"]


def streamed(answer: bytes) -> tuple[str, bool, dict[str, Any] | None]:
    """A stream's text, whether it came to its end, and the error that it ended with. Fails if cut."""
    assert answer.endswith(b"\n\n"), answer[-80:]
    said, done, error = "", False, None
    for event in answer.decode(errors="replace").split("\n\n"):
        event = event.strip()  # an event that is cut in its blank line leaves one more
        if event == "data: [DONE]":
            done = True
        elif event.startswith('data: {"error"'):
            error = json.loads(event[6:])["error"]
        elif event.startswith("data: {") and error is None:
            # An engine's own garbage, or an event that broke off before the error's, is of no interest.
            with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
                said += json.loads(event[6:])["choices"][0]["text"]
    return said, done, error


def engines(*lists: Iterable[FakeEngine]) -> list[FakeEngine]:
    return [engine for each in lists for engine in each]


def asked(setting: Setting) -> int:
    """How many generation requests came to any engine."""
    return sum(len(engine.calls) for engine in engines(setting.prefill, setting.decode))


def left(setting: Setting) -> list[str]:
    """What is still in flight anywhere: in the proxy's own accounts, in its tasks, at the fake engines."""
    proxy = setting.proxy
    found = [
        f"{i.url} has {i.requests} requests, {i.transfers} transfers"
        for i in proxy.pool
        if i.requests or i.tokens or i.transfers or i.leases
    ]
    conductor = proxy.conductor
    found += [f"{a.name} is booked" for a in conductor.accounts(0.0) if a.prompts or a.answers]
    books = {
        "bookings": conductor._ledger._bookings,
        "flights": conductor._flights,
        "prompts": [prompts for prompts in conductor._underway._prompts.values() if prompts],
        "waiters": conductor._line._waiters,
        "futures": proxy.steering._waiting,
    }
    found += [f"{name}: {held}" for name, held in books.items() if held]
    for engine in engines(setting.prefill, setting.decode):
        found += [f"{engine.url}: {call.path}" for call in engine.calls if not call.over.is_set()]
    return found


def tasks() -> list[str]:
    """What runs for requests of any proxy in this process."""
    return [f"task {task.get_coro()}" for task in asyncio.all_tasks() if _serves(task)]


def _serves(task: asyncio.Task[Any]) -> bool:
    name = getattr(task.get_coro(), "__qualname__", "")
    return name.split(".")[0] in ("Dispatcher", "Attempt", "Aside", "Copies", "Answer", "StreamReader")


async def nothing_left(*settings: Setting, within: float = SOON, alone: bool = True) -> None:
    """Fails unless all accounts come to zero in time; `alone`: no other proxy has requests."""

    def found() -> list[str]:
        return [line for setting in settings for line in left(setting)] + tasks() * alone

    try:
        async with asyncio.timeout(within):
            while found():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(found()) from None

"""What engines do that should not: scripts for `RawEngine`."""

import asyncio
import contextlib

from tests.proxy.fakes import Call
from tests.proxy.raw import SSE, Script, chunk, stream, whole

DEEP = b"[" * 100_000


def bytes_then_close(*parts: bytes) -> Script:
    async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.002)
        writer.close()

    return script


def bytes_then_reset(*parts: bytes) -> Script:
    async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.002)
        writer.transport.abort()

    return script


def bytes_and_on(*parts: bytes) -> Script:
    """The connection stays open, as if nothing were wrong."""

    async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.002)

    return script


def bytes_for_ever(first: bytes, more: bytes) -> Script:
    async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(more)
                await writer.drain()
                await asyncio.sleep(0)

    return script


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

# Before the first byte of a body that could be the client's.
BEFORE: dict[str, Script] = {
    "reset": bytes_then_reset(),
    "close": bytes_then_close(),
    "half a status line": bytes_then_close(b"HTTP/1."),
    "half the headers": bytes_then_reset(OK),
    "no http": bytes_then_close(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "http 0.9": bytes_then_close(b"<html>hi</html>"),
    "http 2": bytes_then_close(bytes.fromhex("00000604000000000000")),
    "zeros": bytes_then_close(b"\0" * 1000),
    "status 0": bytes_and_on(b"HTTP/1.1 0 OK\r\nContent-Length: 0\r\n\r\n"),
    "status 99": bytes_and_on(b"HTTP/1.1 99 OK\r\nContent-Length: 0\r\n\r\n"),
    "status 999": bytes_and_on(b"HTTP/1.1 999 OK\r\nContent-Length: 0\r\n\r\n"),
    "status abc": bytes_and_on(b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n"),
    "switches protocols": bytes_and_on(
        b"HTTP/1.1 101 S\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", b"PRI"
    ),
    "moved": bytes_and_on(b"HTTP/1.1 302 Found\r\nLocation: {other}\r\nContent-Length: 0\r\n\r\n"),
    "moved for good": bytes_and_on(b"HTTP/1.1 308 P\r\nLocation: {other}\r\nContent-Length: 0\r\n\r\n"),
    "not modified": bytes_and_on(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "no content": bytes_and_on(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "two lengths": bytes_and_on(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
    "length and chunked": bytes_and_on(
        OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "negative length": bytes_and_on(OK + b"Content-Length: -2\r\n\r\n{}"),
    "too short": bytes_then_close(OK + b"Content-Length: 200\r\n\r\n{"),
    "bad chunk": bytes_and_on(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "half a chunk": bytes_then_close(OK + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{}"),
    "no last chunk": bytes_then_close(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
    "long header": bytes_and_on(OK + b"X-A: " + b"a" * 300_000 + b"\r\n\r\n"),
    "many headers": bytes_and_on(OK + b"X-A: a\r\n" * 5000 + b"\r\n"),
    "endless headers": bytes_for_ever(OK, b"X-A: a\r\n" * 100),
    "endless header": bytes_for_ever(OK + b"X-A: ", b"a" * 1000),
    "500": bytes_and_on(whole(b'{"error":{"message":"m","code":500}}', status="500 Oh")),
    "503": bytes_and_on(whole(b"", status="503 Busy")),
    "500 of html": bytes_and_on(whole(b"<html>\xff", status="500 Oh")),
    "500 that breaks off": bytes_then_close(b"HTTP/1.1 500 Oh\r\nContent-Length: 90\r\n\r\n{"),
    "empty stream": bytes_and_on(SSE + b"0\r\n\r\n"),
    "stream that breaks off at once": bytes_then_reset(SSE),
    "stream of half a chunk": bytes_then_reset(SSE + b"50\r\n"),
    "error event": bytes_and_on(
        SSE + chunk(b'data: {"error":{"message":"m","code":500}}\n\n') + b"0\r\n\r\n"
    ),
    "error event in two": bytes_and_on(
        SSE, chunk(b'data: {"error":{"mess'), chunk(b'age":"m","code":500}}\n\n') + b"0\r\n\r\n"
    ),
}


def timed(moments: bytes, cached: bytes = b"0") -> bytes:
    """Prefill's answer with the times that it says."""
    return b'{"kv_transfer_params":{"timeline":{%b},"cached_tokens":%b}}' % (moments, cached)


# The answer is there, and says nothing, or what could break a reader of it.
GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "html": b"<html>",
    "bytes": bytes(range(256)),
    "list": b"[1]",
    "null": b"null",
    "deep": b'{"a":' + DEEP,
    "deep and whole": b'{"a":' + DEEP + b"]" * 100_000 + b"}",
    "bad utf-8": b'{"id":"\xff"}',
    "bad utf-8 key": b'{"\xff":1}',
    "params a list": b'{"kv_transfer_params":[1]}',
    "params a string": b'{"kv_transfer_params":"a"}',
    "params strange": b'{"kv_transfer_params":{"timeline":[],"cached_tokens":-1e308}}',
    "times strange": timed(b'"received":-1e308,"scheduled":1e308,"prefilled":"a"'),
    "times huge": timed(b'"received":0,"scheduled":1e300,"prefilled":1.7e308'),
    "cached huge": timed(b'"received":0,"scheduled":0,"prefilled":1', b"1" * 40),
    "cached negative": timed(b'"received":0,"scheduled":0,"prefilled":1', b"-5"),
    "cached true": b'{"kv_transfer_params":{"cached_tokens":true}}',
    "usage huge": b'{"choices":[],"usage":{"completion_tokens":%d}}' % 10**40,
    "usage of digits": b'{"choices":[],"usage":{"completion_tokens": ' + b"9" * 5000 + b"}}",
    "usage negative": b'{"choices":[],"usage":{"completion_tokens":-7}}',
    "decoding huge": b'{"usage":{"completion_tokens":9},"kv_transfer_params":{"transfer":{"timeline":'
    b'{"first_token":-1e308,"finished":1e308}}}}',
    "choices a number": b'{"choices":5}',
    "choices an object": b'{"choices":{"0":1}}',
    "choices of nothing": b'{"choices":[null]}',
    "delta a list": b'{"choices":[{"delta":[1]}]}',
    "text a number": b'{"choices":[{"text":7,"finish_reason":"length"}]}',
    "error null": b'{"error":null}',
    "error a list": b'{"error":[1]}',
    "created strange": b'{"created":"a","choices":[{"text":"w0 \xc3\xa9","finish_reason":"length"}]}',
}


def garbage() -> dict[str, Script]:
    found: dict[str, Script] = {}
    for name, body in GARBAGE.items():
        found[f"{name}, whole"] = bytes_and_on(whole(body))
        events = chunk(b"data: " + body + b"\n\n") + chunk(b"data: [DONE]\n\n")
        found[f"{name}, streamed"] = bytes_and_on(SSE + events + b"0\r\n\r\n")
    return found


def cut_at_all_moments() -> dict[str, Script]:
    """Decode's stream ends where it should not: at every byte that matters, in every way."""
    events = stream(3)
    sent = b"".join(events[:2])
    found: dict[str, Script] = {}
    for where, upto in {
        "one byte": sent[:1],
        "one event": events[0],
        "half an event": events[0] + events[1][:20],
        "half a character": events[0] + events[1][: events[1].index(b"\xc3") + 1],
        "half a blank line": sent[:-1],
    }.items():
        begun = SSE + chunk(upto)
        found[f"reset after {where}"] = bytes_then_reset(begun)
        found[f"close after {where}"] = bytes_then_close(begun)
        found[f"half a chunk after {where}"] = bytes_then_close(begun + b"50\r\ndata: {")
        found[f"bad chunk after {where}"] = bytes_and_on(begun, b"zz\r\n")
    return found


def hang_after(said: bytes) -> Script:
    """Nothing more comes, until the proxy hangs up."""

    async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read()

    return script


def hangs() -> dict[str, Script]:
    """Silence at every moment, and what is as good as that."""
    return {
        "at once": hang_after(b""),
        "after a status": hang_after(b"HTTP/1.1 200 OK\r\n"),
        "after the headers": hang_after(OK + b"Content-Length: 2\r\n\r\n"),
        "after half a body": hang_after(OK + b"Content-Length: 2\r\n\r\n{"),
        "before the first event": hang_after(SSE),
        "in the first event": hang_after(SSE + chunk(stream()[0][:9])),
        "after the first event": hang_after(SSE + chunk(stream()[0])),
        "before the last chunk": hang_after(SSE + b"".join(map(chunk, stream()))),
        "endless continue": bytes_for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    }

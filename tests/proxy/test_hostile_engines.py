"""Engines that break HTTP, JSON or off: what clients get of it, and that nothing stays."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from mooncake_connector.scheduler.proxy.progress import StreamCount
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import Call
from tests.proxy.raw import (
    SSE,
    STREAM,
    TEXT,
    Got,
    RawEngine,
    Script,
    chunk,
    engines,
    nothing_left,
    post,
    say,
    stream,
    streamed,
    text,
    usual,
    whole,
)

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
    #     "endless continue": bytes_for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10),
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


BOTH = [("concurrent", "decode"), ("serial", "prefill")]


def garbage() -> dict[str, Script]:
    found: dict[str, Script] = {}
    for name, body in GARBAGE.items():
        found[f"{name}, whole"] = bytes_and_on(whole(body))
        events = chunk(b"data: " + body + b"\n\n") + chunk(b"data: [DONE]\n\n")
        found[f"{name}, streamed"] = bytes_and_on(SSE + events + b"0\r\n\r\n")
    return found


async def one(setting: Setting, body: dict[str, Any]) -> Got:
    """An answer in good time that is well-formed; a stream ends with [DONE] or an error."""
    got = await say(setting, post(body), 8)
    assert got is not None, "the proxy hung up without a word"
    return got


def told(got: Got) -> str:
    """The text of an answer to which nothing happened."""
    assert got.status == 200, got
    if not got.headers["Content-Type"].startswith("text/event-stream"):
        return json.loads(got.body)["choices"][0]["text"]
    said, done, error = streamed(got.body)
    assert done, error
    return said


async def all_of(cases: Mapping[str, Script], attempt: Callable[[Script], Awaitable[None]]) -> None:
    """Try each; fails with those that failed, by name."""
    wrong: dict[str, str] = {}
    few = asyncio.Semaphore(12)

    async def guarded(name: str, script: Script) -> None:
        async with few:
            try:
                await attempt(script)
            except (Exception, asyncio.CancelledError) as error:
                wrong[name] = repr(error)[:300]

    await asyncio.gather(*(guarded(name, script) for name, script in cases.items()))
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())
    await nothing_left()


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_prefill_that_misbehaves_costs_no_client_its_answer(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token)
        for body in (TEXT, STREAM):
            p.scripts.append(script)
            assert told(await one(setting, body)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(BEFORE | garbage(), attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_another_decode_serves_when_one_misbehaves_in_time(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        scripts: list[Script] = []  # whoever is asked first
        p = RawEngine("kv_producer", first_token=True)
        ds = [RawEngine("kv_consumer", scripts, first_token=True) for _ in range(2)]
        setting = await start([p], ds, order=order, first_token=first_token)
        for body in (TEXT, STREAM):
            scripts.append(script)
            assert told(await one(setting, body)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(BEFORE, attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_a_broken_answer_of_the_only_decode_is_an_error(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token)
        d.always = script
        assert (await one(setting, TEXT)).status >= 500
        got = await one(setting, STREAM)
        if got.status == 200:
            assert first_token == "prefill"
            assert streamed(got.body)[2]
        await nothing_left(setting, alone=False)

    await all_of(BEFORE, attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_garbage_of_decode_breaks_nothing_but_the_answer(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token)
        for body in (TEXT, STREAM):
            d.scripts.append(script)
            got = await one(setting, body)
            if got.headers["Content-Type"].startswith("text/event-stream"):
                streamed(got.body)
            assert told(await one(setting, body)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(garbage(), attempt)


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


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_a_stream_that_breaks_off_ends_with_an_error(start: Start, order: str, first_token: str):
    """What the client has of it is the beginning of the answer, and it is told that there is no more."""

    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token, max_retries=0)
        d.scripts.append(script)
        got = await one(setting, STREAM)
        if got.status == 200:
            said, done, error = streamed(got.body)
            # What follows prefill's token is decode's again if decode had not begun: then it is whole.
            assert done if first_token == "prefill" and not error else error["code"] == 502
            assert text(3).startswith(said)
        else:
            assert got.error["code"] == 502
        assert told(await one(setting, STREAM)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(cut_at_all_moments(), attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_an_engine_that_says_nothing_more_is_given_up(start: Start, order: str, first_token: str):
    async def hang(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the proxy hangs up

    def hang_after(said: bytes) -> Script:
        async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(said)
            await reader.read()

        return script

    moments = {
        "at once": hang,
        "after a status": hang_after(b"HTTP/1.1 200 OK\r\n"),
        "after the headers": hang_after(OK + b"Content-Length: 2\r\n\r\n"),
        "after half a body": hang_after(OK + b"Content-Length: 2\r\n\r\n{"),
        "before the first event": hang_after(SSE),
        "in the first event": hang_after(SSE + chunk(stream()[0][:9])),
        "after the first event": hang_after(SSE + chunk(stream()[0])),
        "before the last chunk": hang_after(SSE + b"".join(map(chunk, stream()))),
        "endless continue": bytes_for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    }
    limits = {"prefill_timeout": 0.3, "first_byte_timeout": 0.3, "chunk_timeout": 0.3, "max_retries": 1}

    async def attempt(script: Script) -> None:
        for side in ("prefill", "decode"):
            p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
            setting = await start([p], [d], order=order, first_token=first_token, **limits)
            (p if side == "prefill" else d).always = script
            began = asyncio.get_running_loop().time()
            got = await one(setting, STREAM)
            assert asyncio.get_running_loop().time() - began < 6
            if side == "prefill":
                assert told(got) == text(3)
            elif got.status == 200:
                said, done, error = streamed(got.body)
                assert text(3).startswith(said)
                assert done or error
            else:
                assert got.error["code"] == 502
            await nothing_left(setting, within=6, alone=False)

    await all_of(moments, attempt)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_bytes_beyond_an_answer_are_nobodys_answer(start: Start, side: str):
    """On a connection that is used again they would be the next client's (response desynchronisation)."""
    evil = whole(b'{"choices":[{"index":0,"text":"evil"}],"kv_transfer_params":{"transfer_id":"evil"}}')

    def with_more(*parts: bytes) -> Script:
        async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await usual(call, reader, writer)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)

        return script

    ways = {
        "at once": with_more(evil),
        "thrice": with_more(evil * 3),
        "later": with_more(b"", evil),
        "half of it later": with_more(b"", evil[:20], evil[20:]),
        "garbage later": with_more(b"", b"garbage\r\n\r\n"),
        "a blank line": with_more(b"\r\n"),
    }

    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
        setting = await start([p], [d], order="serial", check_seconds=60.0, probe_seconds=60.0)
        (p if side == "prefill" else d).scripts += [script] * 6
        for body in (TEXT, STREAM) * 4:
            assert told(await one(setting, body)) == text(3)
            await asyncio.sleep(0.015)
        assert all(call.params.get("transfer_id") != "evil" for call in d.calls)
        await nothing_left(setting, alone=False)

    await all_of(ways, attempt)


async def test_connections_that_engines_close_after_each_answer_cost_nothing(start: Start):
    """A pooled connection that is dead when it is used again is no failure of the engine."""

    def close_after(pause: float, *, reset: bool = False) -> Script:
        async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await usual(call, reader, writer)
            await writer.drain()
            await asyncio.sleep(pause)
            writer.transport.abort() if reset else writer.close()

        return script

    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
        setting = await start([p], [d], order="concurrent")
        p.always = d.always = script
        for _ in range(5):
            for body in (TEXT, STREAM):
                assert told(await one(setting, body)) == text(3)
                await asyncio.sleep(0.015)
        assert setting.count("retries_total", side="decode") == 0
        assert setting.count("retries_total", side="prefill") == 0
        await nothing_left(setting, alone=False)

    ways = {f"{pause} s": close_after(pause) for pause in (0, 0.001, 0.005)}
    ways |= {"reset": close_after(0.002, reset=True)}
    await all_of(ways, attempt)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
async def test_bytes_may_come_one_by_one(start: Start, first_token: str):
    """Characters, events and chunks are cut at every place; the client gets the same bytes."""

    async def dribble(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE)
        for byte in b"".join(stream(1 if call.params.get("do_remote_decode") else 3, "length")):
            writer.write(chunk(bytes([byte])))
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
    setting = await start([p], [d], first_token=first_token)
    p.always = dribble if first_token == "prefill" else usual
    d.always = dribble
    got = await one(setting, STREAM)
    assert told(got) == text(3)
    if first_token == "decode":
        assert got.body == b"".join(stream(3, "length"))
    await nothing_left(setting)


async def test_engines_that_restart_under_requests_lose_none(start: Start):
    setting = await start(2, 2)
    for engine in engines(setting.prefill, setting.decode):
        engine.delay = 0.02
    over = False
    answers: list[Got] = []

    async def ask() -> None:
        while not over:
            answers.append(await one(setting, TEXT))

    asking = [asyncio.create_task(ask()) for _ in range(6)]
    for engine in engines(setting.prefill, setting.decode):
        await engine.stop()
        await asyncio.sleep(0.05)
        engine.engine_id += "-again"
        await engine.start()
        await setting.settled(lambda proxy: all(instance.up for instance in proxy.pool))
    over = True
    await asyncio.gather(*asking)
    assert {got.status for got in answers} == {200}
    assert len(answers) > 20
    await nothing_left(setting)


async def test_headers_of_engines_go_no_further_than_they_should(start: Start):
    async def odd(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = (
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "Keep-Alive: timeout=1",
            "Proxy-Authenticate: Basic",
            "X-Mooncake-Decode: evil",
            "X-Request-Id: evil",
            "Server: evil",
            "X-Kept: \u00e9\u00ff",
            "X-Twice: 1",
            "X-Twice: 2",
        )
        writer.write(whole(b"{}", *own).decode().encode("latin-1"))

    p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
    setting = await start([p], [d])
    d.always = odd
    got = await one(setting, TEXT)
    assert got.status == 200
    assert "X-Hop" not in got.headers
    assert "Keep-Alive" not in got.headers
    assert "Proxy-Authenticate" not in got.headers
    assert got.headers.getall("X-Mooncake-Decode") == [d.url]
    assert "evil" not in str(got.headers)
    assert got.headers.getall("X-Twice") == ["1", "2"]
    await nothing_left(setting)


async def test_a_bug_in_the_middle_of_a_stream_ends_it_in_good_form(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    def feed(self: StreamCount, chunk: bytes) -> None:
        if b"w1" in chunk:
            raise ZeroDivisionError

    async def slow(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await bytes_and_on(SSE, *map(chunk, stream()))(call, reader, writer)

    monkeypatch.setattr(StreamCount, "feed", feed)
    p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
    setting = await start([p], [d])
    d.always = slow
    got = await one(setting, STREAM)
    assert got.status == 200
    said, done, error = streamed(got.body)
    assert text(1) == said
    assert not done
    assert error
    assert error["code"] == 502
    assert setting.count("requests_total", path="/v1/completions", outcome="proxy_error") == 1
    await nothing_left(setting)

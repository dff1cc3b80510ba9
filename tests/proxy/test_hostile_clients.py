"""Clients that break HTTP, or break off: what they are told, and that nothing of them stays."""

import asyncio
import socket
import struct

import pytest

from tests.proxy.conftest import Start
from tests.proxy.fakes import Call, events
from tests.proxy.raw import (
    SSE,
    STREAM,
    TEXT,
    RawEngine,
    asked,
    chunk,
    connected,
    encoded,
    engines,
    left,
    nothing_left,
    post,
    read,
    say,
    streamed,
    text,
)


async def test_requests_that_could_be_read_two_ways_are_refused(start: Start):
    """Whoever stands before the proxy may have read the other one: request smuggling (RFC 9112, 11.2)."""
    setting = await start()
    body = encoded(TEXT)
    both = chunk(body) + b"0\r\n\r\n"
    evil = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    tries = {
        "length and chunked": post(both, "Transfer-Encoding: chunked"),
        "chunked and length": post(both, "Transfer-Encoding: chunked", "Content-Length: 5", length=False),
        "two lengths": post(body, "Content-Length: 3"),
        "equal lengths": post(body, f"Content-Length: {len(body)}"),
        "list of lengths": post(body, f"Content-Length: {len(body)}, {len(body)}", length=False),
        "plus": post(body, f"Content-Length: +{len(body)}", length=False),
        "negative": post(body, "Content-Length: -1", length=False),
        "hex": post(body, f"Content-Length: 0x{len(body):x}", length=False),
        "underscore": post(body, "Content-Length: 1_0", length=False),
        "not ascii": post(body, "Content-Length: ²".encode(), length=False),
        "too many digits": post(body, "Content-Length: " + "9" * 30, length=False),
        "chunked twice": post(both, "Transfer-Encoding: chunked, chunked", length=False),
        "chunked not last": post(both, "Transfer-Encoding: chunked, identity", length=False),
        "unknown coding": post(both, "Transfer-Encoding: xchunked", length=False),
        "space before colon": post(body, "X-A : b"),
        "folded": post(body, "X-A: b", " c"),
        "folded length": post(body, "Content-Length:", f" {len(body)}", length=False),
        "lf only": post(body, "X-A: b\nX-Evil: 1"),
        "cr in value": post(body, "X-A: b\rX-Evil: 1"),
        "nul in value": post(body, "X-A: b\0c"),
        "control in name": post(body, "X\x01A: b"),
        "no name": post(body, ": b"),
        "no colon": post(body, "nothing"),
        "two hosts": post(body, "Host: other"),
        "chunk size negative": post(b"-1\r\na\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
        "chunk size too large": post(b"f" * 17 + b"\r\n", "Transfer-Encoding: chunked", length=False),
        "chunk size underscore": post(b"1_0\r\na\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
        "chunk longer than said": post(b"1\r\nab\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
        "version": post(body, version="1.1.1"),
        "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "tls": bytes.fromhex("16030100a5010000a1"),
        "nothing of it": b"\x00\xff\r\n\r\n",
        "bad method": b"GE T /health HTTP/1.1\r\nHost: a\r\n\r\n",
    }
    wrong = {}
    for name, data in tries.items():
        async with connected(setting) as (reader, writer):
            writer.write(data + evil)
            try:
                got = await read(reader, 1)
                rest = await asyncio.wait_for(reader.read(), 1)
            except Exception as error:
                wrong[name] = repr(error)
                continue
        if got is None or not 400 <= got.status < 500 or rest:
            wrong[name] = got, rest
    assert not wrong
    assert asked(setting) == 0
    assert not left(setting)


async def test_headers_of_the_connection_and_of_the_proxy_go_no_further(start: Start):
    setting = await start()
    sent = {
        "Connection": "keep-alive, X-Secret, x-hidden",
        "X-Secret": "1",
        "X-Hidden": "1",
        "Keep-Alive": "timeout=5",
        "Proxy-Connection": "keep-alive",
        "Proxy-Authorization": "Basic a",
        "TE": "trailers",
        "Trailer": "X-A",
        "X-Mooncake-Decode": "http://evil",
        "X-Mooncake-Whatever": "1",
    }
    got = await say(setting, post(TEXT, *(f"{name}: {value}" for name, value in sent.items()), "X-Kept: 1"))
    assert got
    assert got.status == 200
    assert got.headers.getall("x-mooncake-decode") == [setting.decode[0].url]
    for engine in engines(setting.prefill, setting.decode):
        headers = (await engine.call()).headers
        assert not headers.keys() & {name for name in sent if name != "Connection"}
        assert headers["X-Kept"] == "1"


async def test_strange_header_values_reach_engines_as_they_are_or_are_refused(start: Start):
    setting = await start()
    for value in (b"\xe9", b"\xff\xfe", "é".encode(), b"a\tb", b"", b"\x80" * 100):
        got = await say(setting, post(TEXT, b"X-Odd: " + value, b"Authorization: Bearer " + value))
        assert got
        assert got.status == 200, (value, got)
    for value in (b"1e3", b"9" * 6000, b"\xff", b"1001", b"--1"):
        got = await say(setting, post(TEXT, b"x-priority: " + value))
        assert got
        assert got.status == 400, (value, got)
        assert got.error["param"] == "x-priority"
    await nothing_left(setting)


@pytest.mark.parametrize("given", [b"\xff", b"a\tb", "é".encode(), b"x" * 5000, b"", b"a b"])
async def test_a_request_id_that_is_no_id_is_replaced(start: Start, given: bytes):
    setting = await start()
    got = await say(setting, post(TEXT, b"X-Request-Id: " + given, b"X-Request-Id: second"))
    assert got
    (id,) = got.headers.getall("X-Request-Id")
    assert id.encode() != given
    for engine in engines(setting.prefill, setting.decode):
        assert (await engine.call()).headers.getall("X-Request-Id") == [id]


async def test_too_much_of_everything_is_refused(start: Start):
    setting = await start(max_body_mib=1)
    tries = {
        "headers": post(TEXT, *(f"X-{at}: a" for at in range(5000))),
        "a header's value": post(TEXT, "X-A: " + "a" * 1_000_000),
        "a header's name": post(TEXT, "X" * 1_000_000 + ": a"),
        "path": post(TEXT, path="/" + "a" * 1_000_000),
        "query": post(TEXT, path="/v1/completions?" + "a" * 1_000_000),
        "trailers": post(
            chunk(encoded(TEXT)) + b"0\r\n" + b"X-A: a\r\n" * 100_000 + b"\r\n",
            "Transfer-Encoding: chunked",
            length=False,
        ),
    }
    for name, data in tries.items():
        got = await say(setting, data)
        assert got is None or 400 <= got.status < 500, (name, got)
    assert asked(setting) == 0
    assert not left(setting)


async def test_other_ways_to_write_a_path_lead_nowhere_else(start: Start):
    setting = await start()
    served = (
        "/v1/%63ompletions",
        "/v1/completions?x=1",
        "/v1/completions#x",
        "/./v1/completions",
        "http://evil.example:1/v1/completions",
    )
    refused = (
        "//v1/completions",
        "/v1//completions",
        "/v1/completions/",
        "/v1/../v1/completions/../../health",
        "/v1/completions%00",
        "/v1/completions%2f",
        "/v1%2fcompletions",
        "/V1/COMPLETIONS",
        "/v1/completions;a=b",
        "*",
        "/%2e%2e/v1/completions",
        "/\u00e9",
        "/%ff%fe",
        "http://evil.example:1/",
        "http://[::1/v1/completions",
        "http://a:99999999/v1/completions",
        "v1/completions",
        "",
    )
    for path in served:
        got = await say(setting, post(TEXT, path=path))
        assert got
        assert got.status in (200, 404), (path, got)
    assert {call.path for call in setting.decode[0].calls} == {"/v1/completions"}
    before = asked(setting)
    for path in refused:
        got = await say(setting, post(TEXT, path=path))
        assert got, path
        assert got.status in (400, 404, 405), (path, got)
    raw = [b"POST /\xff HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", b"POST  / HTTP/1.1\r\n\r\n"]
    for data in raw:
        got = await say(setting, data)
        assert got
        assert got.status in (400, 404), (data, got)
    assert asked(setting) == before
    assert setting.count("requests_total", path="/v1/completions", outcome="proxy_error") == 0


async def test_methods_and_upgrades_that_the_proxy_does_not_know(start: Start):
    setting = await start()
    for method in ("TRACE", "CONNECT", "OPTIONS", "PUT", "DELETE", "HEAD", "GET", "PATCH", "PURGE"):
        target = "proxy:443" if method == "CONNECT" else "/v1/completions"
        async with connected(setting) as (reader, writer):
            writer.write(f"{method} {target} HTTP/1.1\r\nHost: a\r\nX-Secret: s3cret\r\n\r\n".encode())
            line = await asyncio.wait_for(reader.readline(), 2)
            # A preflight (CORS) is answered.
            assert int(line.split()[1]) in ((204,) if method == "OPTIONS" else (400, 404, 405)), (
                method,
                line,
            )
            writer.write_eof()
            assert b"s3cret" not in await asyncio.wait_for(reader.read(), 2)
    for upgrade in ("h2c", "websocket", "TLS/1.0"):
        got = await say(setting, post(TEXT, "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}"))
        assert got
        assert got.status in (200, 400)
        assert "Upgrade" not in (await setting.decode[0].call(-1)).headers
    await nothing_left(setting)


async def test_old_http_gets_its_answer_and_the_end_of_the_connection(start: Start):
    setting = await start()
    for body in (TEXT, STREAM):
        async with connected(setting) as (reader, writer):
            writer.write(post(body, version="1.0"))
            got = await read(reader)
            assert got
            assert got.status == 200
            assert "Transfer-Encoding" not in got.headers
            assert got.body == (b"".join(events()) if body is STREAM else setting.decode[0].answer)
            assert await reader.read() == b""
    await nothing_left(setting)


async def test_pipelined_requests_are_answered_in_their_order(start: Start):
    setting = await start()
    setting.decode[0].delay = 0.05
    async with connected(setting) as (reader, writer):
        ids = [f"id-{at}" for at in range(6)]
        for at, id in enumerate(ids):
            writer.write(post(b"{" if at == 2 else STREAM if at % 2 else TEXT, f"X-Request-Id: {id}"))
        for at, id in enumerate(ids):
            got = await read(reader)
            assert got
            assert got.status == (400 if at == 2 else 200)
            assert got.headers["X-Request-Id"] == id
    # Who leaves takes along what was not begun.
    async with connected(setting) as (reader, writer):
        setting.decode[0].delay = 30
        writer.write(post(TEXT) * 20)
        await setting.decode[0].call(5)
    await nothing_left(setting)
    assert len(setting.decode[0].calls) < 10


async def test_one_byte_at_a_time_is_as_good_as_all(start: Start):
    setting = await start()
    body = chunk(encoded(STREAM)[:9]) + chunk(encoded(STREAM)[9:]) + b"0\r\nX-Trailer: a\r\n\r\n"
    data = post(body, "Transfer-Encoding: chunked", length=False)
    async with connected(setting) as (reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await asyncio.sleep(0.0005)
        got = await read(reader)
    assert got
    assert got.body == b"".join(events())
    assert "X-Trailer" not in setting.decode[0].calls[0].headers
    await nothing_left(setting)


async def test_a_client_that_does_not_read_stops_the_engine_and_nobody_else(start: Start):
    """What it does not take stays with the engine: the proxy holds no more than its buffers."""
    p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
    written = 0

    async def much(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(SSE)
        while written < 200 << 20 and not writer.is_closing():
            writer.write(chunk(b"data: " + b"a" * (1 << 16) + b"\n\n"))
            written += 1 << 16
            await writer.drain()

    setting = await start([p], [d])
    d.scripts.append(much)
    async with connected(setting) as (reader, writer):
        reader._transport.pause_reading()
        writer.write(post(STREAM))
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.2)
        assert 0 < written < 32 << 20
        got = await say(setting, post(STREAM))
        assert got
        assert streamed(got.body)[0] == text(3)
        assert not d.calls[0].over.is_set()
    await nothing_left(setting)


# ------------------------------------------------------------------ leaving


@pytest.mark.parametrize("order", ["concurrent", "serial"])
@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
async def test_whoever_leaves_takes_everything_along(start: Start, order: str, how: str):
    """At every moment of a request, whole answers and streams: nothing runs on at any engine for nobody."""
    setting = await start(order=order, drain_seconds=1)
    p, d = setting.prefill[0], setting.decode[0]
    for body in (TEXT, STREAM):
        data = post(body)
        head = data.index(b"\r\n\r\n")
        for cut in (0, 1, head // 2, head + 2, head + 4, head + 10, len(data) - 1):
            async with connected(setting) as (reader, writer):
                writer.write(data[:cut])
                await asyncio.sleep(0.002)
                await leave(writer, reader, how)
        assert asked(setting) == 0
        # While prefill computes, while decode does, between two events, and at once.
        for prefill, decode, first, gap, wait in (
            (30, 30, 0, 0, 0.03),
            (0, 30, 0, 0, 0.03),
            (30, 0, 30, 0, 0.03),
            (0, 0, 30, 0, 0.03),
            (0, 0, 0, 0.02, 0.03),
            (0.005, 0.005, 0, 0, 0.0),
            (0.005, 0.005, 0, 0, 0.004),
            (0.005, 0.005, 0, 0, 0.008),
        ):
            p.delay, d.first_gap, d.gap = prefill, first, gap
            d.delay = decode if body is STREAM else max(decode, first, gap * 5)
            async with connected(setting) as (reader, writer):
                writer.write(data)
                await asyncio.sleep(wait)
                await leave(writer, reader, how)
                await nothing_left(setting)
        p.calls.clear()
        d.calls.clear()
    p.delay = d.delay = d.first_gap = d.gap = 0
    got = await say(setting, post(STREAM))
    assert got
    assert got.body == b"".join(events())


async def leave(writer: asyncio.StreamWriter, reader: asyncio.StreamReader, how: str) -> None:
    if how == "reset":
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    elif how == "close":
        writer.close()
    else:
        # HTTP/1.1 knows no half-closed clients: servers take it that they left (so does uvicorn).
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 2)

"""Clients that break HTTP, JSON or off: what they are told, and that nothing of them stays."""

import asyncio
import contextlib
import gzip
import resource
import socket
import struct
import zlib
from typing import Any

import pytest

from mooncake_connector.scheduler.proxy.endpoints import DECODE_ALONE, DISAGGREGATED
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import Call, events
from tests.proxy.raw import (
    SSE,
    STREAM,
    TEXT,
    RawEngine,
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

DEEP = b"[" * 100_000 + b"]" * 100_000


def asked(setting: Setting) -> int:
    """How many generation requests came to any engine."""
    return sum(len(engine.calls) for engine in engines(setting.prefill, setting.decode))


async def test_json_that_is_none_is_refused_before_any_engine_sees_it(start: Start):
    setting = await start()
    bodies = {
        "empty": b"",
        "cut": b'{"prompt":"a"',
        "two": b'{"prompt":"a"}{"prompt":"b"}',
        "nul": b'{"prompt":"a"}\0',
        "deep": b'{"prompt":' + DEEP + b"}",
        "deep elsewhere": b'{"prompt":"a","x":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        "deep array": DEEP,
        "never closed": b'{"prompt":' + b"[" * 1_000_000,
        "nan": b'{"prompt":"a","temperature":NaN}',
        "infinity": b'{"prompt":"a","temperature":-Infinity}',
        "bad utf-8": b'{"prompt":"\xff\xfe"}',
        "surrogate bytes": b'{"prompt":"\xed\xa0\x80"}',
        "half a character": b'{"prompt":"\xc3"}',
        "bad utf-8 key": b'{"prompt":"a","\xff":1}',
        "lone surrogate": b'{"prompt":"a","x":"\\ud800"}',
        "utf-16": '{"prompt":"a"}'.encode("utf-16"),
        "bom": b'\xef\xbb\xbf{"prompt":"a"}',
        "string": b'"a"',
        "null": b"null",
    }
    for name, body in bodies.items():
        for path in ("/v1/completions", "/v1/chat/completions"):
            got = await say(setting, post(body, path=path))
            assert got, name
            assert got.status == 400, (name, got)
            assert got.error["type"] == "BadRequestError"
    assert asked(setting) == 0
    assert not left(setting)


@pytest.mark.parametrize(
    "fields",
    [
        b'"kv_transfer_params":{"do_remote_prefill":true}',
        b'"kv_transfer_params":{"do_remote_prefill":true,"x":1e999}',
        b'"kv_transfer_params":{"do_remote_prefill":true,"x":' + b"9" * 5000 + b"}",
        b'"kv_transfer_params":null,"kv_transfer_params":{"release":"a"}',
        b'"kv\\u005ftransfer_params":{"release":"a"}',
        b'"kv_transfer_params":"a"',
        b'"kv_transfer_params":[]',
        b'"vllm_xargs":{"kv_transfer_params":"a"}',
        b'"vllm_xargs":{"x":1e999,"kv_transfer_p\\u0061rams":["a"]}',
    ],
    ids=range(9),
)
# Decode alone gets the client's own bytes: nothing of the proxy's would be written over these.
@pytest.mark.parametrize("alone", [b"", b'"prompt_logprobs":1,'])
async def test_parameters_of_the_hand_over_are_the_proxys_alone(start: Start, fields: bytes, alone: bytes):
    setting = await start()
    got = await say(setting, post(b'{"model":"tiny","prompt":"a",' + alone + fields + b"}"))
    assert got
    assert got.status == 400
    assert got.error["param"] in ("kv_transfer_params", "vllm_xargs")
    assert asked(setting) == 0


async def test_of_equal_keys_the_last_one_counts_here_and_there(start: Start):
    setting = await start()
    twice = b'"stream":true,"stream":false,"kv_transfer_params":{"release":"a"},"kv_transfer_params":null'
    got = await say(setting, post(b'{"prompt":"a",' + twice + b"}"))
    assert got
    assert got.body == setting.decode[0].answer
    assert setting.decode[0].calls[0].params["do_remote_prefill"] is True
    assert "release" not in setting.decode[0].calls[0].params
    assert setting.prefill[0].released == []


@pytest.mark.parametrize("path", [*DISAGGREGATED, *DECODE_ALONE])
async def test_no_endpoint_that_generates_takes_parameters_of_the_hand_over(start: Start, path: str):
    setting = await start()
    for field in (b'"kv_transfer_params":{"release":"a"}', b'"vllm_xargs":{"kv_transfer_params":"a"}'):
        got = await say(setting, post(b'{"model":"tiny","prompt":"a",' + field + b"}", path=path))
        assert got
        assert got.status == 400, got
    assert asked(setting) == 0


STRANGE: list[dict[str, Any]] = [
    {"max_tokens": 10**30},
    {"max_tokens": 10**400},
    {"max_tokens": -1},
    {"max_tokens": 2**64 - 1},
    {"max_tokens": "many"},
    {"n": 10**9, "best_of": 2**70},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [-1, 2**40]},
    {"prompt": [1.5, None, "a"]},
    {"prompt": None},
    {"prompt": 7},
    {"prompt": {"a": 1}},
    {"model": 5, "session_id": {"a": 1}, "cache_salt": [1]},
    {"model": "\U0001f600" * 3000, "session_id": "é" * 3000},
    {"stream": "true", "stream_options": 1},
    {"messages": 5},
    {"messages": [5, None, []]},
    {"messages": [{"role": {}, "content": [[[]]]}]},
    {"messages": [{"role": "user", "content": 5}, {"content": [{"type": "text", "text": 5}]}]},
    {"request_id": "a\r\nX-Evil: 1"},
    {"request_id": 5},
    {"truncate_prompt_tokens": 10**400, "prompt": "a"},
]


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
async def test_values_that_no_schema_allows_are_the_engines_to_refuse(start: Start, first_token: str):
    """The proxy has no schema: it must get by with all that is JSON, and the engine sees what was sent."""
    setting = await start(first_token=first_token)
    for strange in STRANGE:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for more in ({}, {"stream": True}):
                body = {"model": "m", "prompt": "a", **more, **strange}
                got = await say(setting, post(body, path=path))
                assert got, strange
                assert got.status == 200, (strange, got)
                last = setting.decode[0].calls[-1]
                assert {k: v for k, v in last.body.items() if k != "kv_transfer_params"} == body
                assert "x-evil" not in last.headers
    await nothing_left(setting)


# ------------------------------------------------------------------ HTTP


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


async def test_a_body_over_the_limit_is_refused_before_it_is_there(start: Start):
    setting = await start(max_body_mib=1)
    head = post(b"", "Content-Length: 1000000000000", length=False)
    for said in (head, head + b"a" * 1000):
        got = await say(setting, said, 1)
        assert got
        assert got.status == 413
        assert got.error["type"] == "RequestEntityTooLargeError"
    # Chunked it is told as soon as it is too much; that a client goes on sending keeps nobody busy.
    async with connected(setting) as (reader, writer):
        writer.write(post(b"", "Transfer-Encoding: chunked", length=False))
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                writer.write(chunk(b"a" * (1 << 16)))
                await writer.drain()
                sent += 1 << 16
                if reader._buffer:  # the answer is there
                    break
        got = await read(reader)
        assert got
        assert got.status == 413
        assert sent < 64 << 20
    got = await say(setting, head[:-2] + b"Expect: 100-continue\r\n\r\n")
    assert got
    assert got.status == 413
    assert asked(setting) == 0


async def test_compressed_bodies_are_read_within_the_limit(start: Start):
    setting = await start(max_body_mib=1)
    raw = encoded(TEXT)
    deflated = zlib.compressobj(wbits=-15)
    for coding, body in {
        "gzip": gzip.compress(raw),
        "deflate": zlib.compress(raw),
        "Deflate": deflated.compress(raw) + deflated.flush(),
        "identity": raw,
    }.items():
        got = await say(setting, post(body, f"Content-Encoding: {coding}"))
        assert got
        assert got.status == 200, (coding, got)
        call = setting.decode[0].calls[-1]
        assert call.body["prompt"] == TEXT["prompt"]
        assert "Content-Encoding" not in call.headers
    before = asked(setting)
    packed = zlib.compressobj(wbits=31)
    bomb = b"".join(packed.compress(b'{"prompt":"' if at == 0 else b"a" * (1 << 20)) for at in range(50))
    bomb += packed.flush()
    chunked = chunk(bomb) + b"0\r\n\r\n"
    tries = {
        "bomb": (413, post(bomb, "Content-Encoding: gzip")),
        "bomb in chunks": (
            413,
            post(chunked, "Content-Encoding: gzip", "Transfer-Encoding: chunked", length=False),
        ),
        "twice": (400, post(gzip.compress(gzip.compress(raw)), "Content-Encoding: gzip, gzip")),
        "not gzip": (400, post(raw, "Content-Encoding: gzip")),
        "cut": (400, post(gzip.compress(raw)[:-12], "Content-Encoding: gzip")),
        "br": (400, post(raw, "Content-Encoding: br")),
        "zstd": (400, post(raw, "Content-Encoding: zstd")),
        "unknown": (400, post(gzip.compress(raw), "Content-Encoding: x-gzip2")),
    }
    wrong = {}
    for name, (status, data) in tries.items():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            got = await say(setting, data)
        except Exception as error:
            wrong[name] = repr(error)
            continue
        if not got or got.status != status:
            wrong[name] = got
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 40 << 10
    assert not wrong
    assert asked(setting) == before
    await nothing_left(setting)


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

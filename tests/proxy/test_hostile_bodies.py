"""Bodies that are no JSON, too much, or more than they seem: what is refused, and what engines see."""

import contextlib
import gzip
import resource
import zlib
from typing import Any

import pytest

from mooncake_connector.scheduler.proxy.endpoints import DECODE_ALONE, DISAGGREGATED
from tests.proxy.conftest import Start
from tests.proxy.raw import (
    TEXT,
    asked,
    chunk,
    connected,
    encoded,
    left,
    nothing_left,
    post,
    read,
    say,
)

DEEP = b"[" * 100_000 + b"]" * 100_000


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

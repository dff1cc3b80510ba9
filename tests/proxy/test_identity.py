"""Request ids, trace context and headers on their way through the proxy."""

import logging
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.proxy.identity import MOST_CHARACTERS, Identity, current
from tests.proxy.conftest import Setting, Start

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
HEX = st.text("0123456789abcdef", min_size=1, max_size=32)


@given(
    st.text(string.ascii_letters + string.digits + string.punctuation, min_size=1, max_size=MOST_CHARACTERS)
)
def test_a_clients_id_is_kept(named: str):
    assert Identity.of(named).request_id == named


@given(st.one_of(st.none(), st.integers(), st.just(""), st.text(min_size=MOST_CHARACTERS + 1, max_size=300)))
def test_what_is_no_id_is_replaced(named: object):
    assert Identity.of(named).request_id != named
    assert len(Identity.of(named).request_id) == 32


@pytest.mark.parametrize("named", ["a b", "a\tb", "a\r\nX: y", "é", "\x7f", "a\n"])
def test_an_id_is_visible_ascii(named: str):
    assert Identity.of(named).request_id.isalnum()


def test_two_made_ids_differ():
    assert Identity.of(None).request_id != Identity.of(None).request_id


@pytest.mark.parametrize(
    "parent",
    [PARENT, f" {PARENT} ", f"01-{TRACE}-00f067aa0ba902b7-00-more", f"cc-{TRACE}-00f067aa0ba902b7-ff"],
)
def test_a_valid_trace_parent_names_its_trace(parent: str):
    assert Identity.of("r", parent).trace_id == TRACE


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        PARENT + "-more",
        PARENT + "0",
        PARENT.upper(),
        "ff" + PARENT[2:],
        PARENT.replace(TRACE, "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT.replace(TRACE, TRACE[:-1]),
        PARENT.replace("-01", "-1"),
        PARENT.replace("-01", ""),
        "0x" + PARENT[2:],
    ],
)
def test_an_invalid_trace_parent_names_none(parent: str):
    assert Identity.of("r", parent).trace_id == ""


@given(HEX, HEX, HEX, HEX)
def test_any_trace_parent_is_read_or_left(version: str, trace: str, span: str, flags: str):
    found = Identity.of("r", f"{version}-{trace}-{span}-{flags}").trace_id
    assert found in ("", trace)
    if found:
        assert (len(version), len(trace), len(span), len(flags)) == (2, 32, 16, 2)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", b'{"prompt":"a"}'),
        ("POST", "/v1/completions", b'{"prompt":"a","stream":true}'),
        ("POST", "/v1/completions", b"no json"),
        ("POST", "/tokenize", b"{}"),
        ("POST", "/sleep", b"{}"),
        ("GET", "/v1/completions", b""),
        ("GET", "/health", b""),
        ("GET", "/v1/models", b""),
    ],
)
async def test_every_answer_has_one_id(start: Start, method: str, path: str, body: bytes):
    setting = await start()
    for sent, expected in (("mine-1", "mine-1"), ("not an id", ""), ("x" * 129, "")):
        async with setting.http.request(method, path, data=body, headers={"X-Request-Id": sent}) as reply:
            (got,) = reply.headers.getall("X-Request-Id")
            await reply.read()
        assert got == expected if expected else len(got) == 32
        for call in seen(setting):
            assert call.headers.getall("X-Request-Id") == [got]
        for engine in (*setting.prefill, *setting.decode):
            engine.calls.clear()


async def test_a_body_may_name_the_request_as_vllm_allows(start: Start):
    setting = await start()
    body = {"prompt": "a", "request_id": "from-the-body"}
    async with setting.http.post("/v1/completions", json=body) as reply:
        assert reply.headers["X-Request-Id"] == "from-the-body"
    async with setting.http.post("/v1/completions", json=body, headers={"X-Request-Id": "header"}) as reply:
        assert reply.headers["X-Request-Id"] == "header"


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize("parent", [PARENT, "nonsense"])
async def test_trace_context_passes_untouched_and_none_is_made(start: Start, path: str, parent: str):
    setting = await start()
    sent = {"traceparent": parent, "tracestate": "a=1,b=2"}
    async with setting.http.post(path, json={"prompt": "a"}, headers=sent):
        pass
    async with setting.http.post(path, json={"prompt": "a"}):
        pass
    with_trace = [call for call in seen(setting) if "traceparent" in call.headers]
    assert len(with_trace) == len(seen(setting)) / 2
    for call in with_trace:
        assert call.headers["traceparent"] == parent
        assert call.headers["tracestate"] == "a=1,b=2"


async def test_what_is_logged_of_a_request_knows_whose_it_is(start: Start):
    found: list[Identity | None] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "answered 500" in record.getMessage():
                found.append(current.get())

    setting = await start()
    setting.decode[0].failures = [500]
    handler = Noting()
    logger = logging.getLogger("mooncake_connector.scheduler.proxy")
    logger.addHandler(handler)
    try:
        headers = {"X-Request-Id": "r-7", "traceparent": PARENT}
        async with setting.http.post("/v1/completions", json={"prompt": "a"}, headers=headers) as reply:
            assert reply.status == 200
    finally:
        logger.removeHandler(handler)
    assert found
    assert set(found) == {Identity("r-7", TRACE)}


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_headers_of_one_connection_stay_on_it_and_others_stay_whole(start: Start, path: str):
    setting = await start()
    sent = [
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "trailers"),
        ("X-Twice", "a"),
        ("X-Twice", "b"),
        ("x-mooncake-prefill", "http://elsewhere"),
        ("Cookie", "a=1"),
    ]
    async with setting.http.post(path, json={"prompt": "a"}, headers=sent) as reply:
        assert "http://elsewhere" not in reply.headers.values()
    assert seen(setting)
    for call in seen(setting):
        assert not {"X-Hop", "Proxy-Connection", "TE", "x-mooncake-prefill"} & set(call.headers)
        assert call.headers.getall("X-Twice") == ["a", "b"]
        assert call.headers["Cookie"] == "a=1"


def seen(setting: Setting) -> list:
    return [call for engine in (*setting.prefill, *setting.decode) for call in engine.calls]

"""Endpoints beside completions and chats: who gets them, and that nothing is added or lost on the way."""

import asyncio
import json
import re
from pathlib import Path

import openai
import pytest
from yarl import URL

from mooncake_connector.scheduler.proxy.endpoints import ANY, DECODE, DECODE_ALONE, DISAGGREGATED, STORED
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, SOON, FakeEngine

JSON = {"Content-Type": "application/json"}
# Spacing, key order, numbers and escapes that no JSON library would write again in the same way.
ODD = b' {"z" : 1.0E+2, "a":[ ],"o\\u002df" :{"b":1,"a":123456789012345678901234567890} ,"u":"\xc3\xa9"}'
STREAM = [b'event: x\ndata: {"one" : 1}\n\n', b"data: two\n\n"]


@pytest.mark.parametrize(("method", "path"), ANY)
async def test_what_any_engine_can_do_goes_to_one_engine_as_it_came(start: Start, method: str, path: str):
    setting = await start(2, 2)
    sent = ODD if method == "POST" else None
    headers = {"Content-Type": "application/json; odd=1", "X-Request-Id": "r-1", "X-Tenant": "t"}
    url = URL(f"{setting.url}{path}?a=%2F&b", encoded=True)
    async with setting.http.request(method, url, data=sent, headers=headers) as reply:
        assert reply.status == 200
        assert await reply.read() == setting.prefill[0].answer
        assert reply.headers["X-Request-Id"] == "r-1"
    (call,) = calls(setting)
    assert (call.method, call.path) == (method, f"{path}?a=%2F&b")
    assert call.raw == (ODD if sent else b"")
    assert {name: call.headers[name] for name in headers} == headers
    assert setting.count("requests_total", path=path, outcome="ok") == 1


async def test_they_go_to_the_least_busy_engine_of_either_pool(start: Start):
    setting = await start(2, 2)
    for engine in [*setting.prefill, *setting.decode]:
        engine.delay = 0.2
    await asyncio.gather(*(post(setting, "/tokenize", ODD) for _ in range(8)))
    assert [len(engine.calls) for engine in [*setting.prefill, *setting.decode]] == [2, 2, 2, 2]


@pytest.mark.parametrize("path", [path for method, path in DECODE if method == "POST"])
async def test_what_generates_goes_to_decode(start: Start, path: str):
    setting = await start(1, 2)
    await post(setting, path, b"--x\r\nnot json", {"Content-Type": "multipart/form-data; boundary=x"})
    assert setting.prefill[0].calls == []
    (call,) = calls(setting)
    assert call.raw == b"--x\r\nnot json"
    assert call.headers["Content-Type"] == "multipart/form-data; boundary=x"


@pytest.mark.parametrize("path", DECODE_ALONE)
async def test_what_has_no_prompt_to_hand_over_is_decodes_alone(start: Start, path: str):
    setting = await start(1, 2)
    await post(setting, path, ODD)
    assert setting.prefill[0].calls == []
    (call,) = calls(setting)
    assert (call.path, call.raw) == (path, ODD)
    assert setting.count("prefill_skipped_total", reason="endpoint") == 1


@pytest.mark.parametrize("path", DISAGGREGATED)
async def test_decode_gets_the_clients_bytes_and_prefill_the_unknown_fields(start: Start, path: str):
    setting = await start()
    await post(setting, path, ODD)
    raw = setting.decode[0].calls[0].raw
    assert raw.startswith(ODD.rstrip()[:-1] + b',"kv_transfer_params":{')
    assert json.loads(raw) == json.loads(ODD) | {"kv_transfer_params": setting.decode[0].calls[0].params}
    p = await setting.prefill[0].call()
    assert p.path == path
    assert {name: p.body[name] for name in json.loads(ODD)} == json.loads(ODD)
    assert b"123456789012345678901234567890" in p.raw


@pytest.mark.parametrize("path", [*DISAGGREGATED, *DECODE_ALONE])
async def test_nobody_names_a_transfer_to_an_engine(start: Start, path: str):
    setting = await start()
    for body in (b'{"kv_transfer_params":{"release":"x"}}', b'{"vllm_xargs":{"kv_transfer_params":1}}'):
        async with setting.http.post(path, data=body, headers=JSON) as reply:
            assert reply.status == 400
    assert calls(setting) == []


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/start_profile",
        "/pause",
        "/abort_requests",
        "/inference/v1/generate",
        "/invocations",
        "/server_info",
        "/tokenize/../sleep",
        "/%73leep",
        "/v1/responses/x%2F..%2F..%2Fsleep/cancel",
    ],
)
async def test_what_would_change_an_engine_does_not_reach_it(start: Start, path: str):
    setting = await start()
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        async with setting.http.request(method, path, data=b"{}", headers=JSON) as reply:
            assert reply.status in (404, 405)
            assert (await reply.json())["error"]["code"] == reply.status
    assert calls(setting) == []


@pytest.mark.parametrize("failure", ["reset", 500])
async def test_another_engine_is_asked_if_one_fails_before_its_answer(start: Start, failure: int | str):
    setting = await start()
    setting.prefill[0].failures = [failure]
    await post(setting, "/tokenize", ODD)
    assert [len(engine.calls) for engine in (setting.prefill[0], setting.decode[0])] == [1, 1]
    assert setting.count("retries_total", side="decode") == 1


async def test_when_all_fail_the_last_answer_is_the_clients(start: Start):
    setting = await start(max_retries=1)
    setting.prefill[0].failures, setting.decode[0].failures = ["reset"], [503]
    async with setting.http.post("/tokenize", data=ODD, headers=JSON) as reply:
        assert reply.status == 503
        assert (await reply.json())["error"]["message"] == "engine says 503"
    setting.prefill[0].failures, setting.decode[0].failures = ["reset"], ["reset"]
    await setting.settled(lambda proxy: all(instance.up for instance in proxy.pool))
    async with setting.http.post("/tokenize", data=ODD, headers=JSON) as reply:
        assert reply.status == 502
    assert setting.count("requests_total", path="/tokenize", outcome="engine_error") == 2


@pytest.mark.parametrize("refusal", [400, 404, 501])
async def test_a_refusal_is_passed_on_and_holds_nothing_against_the_engine(start: Start, refusal: int):
    setting = await start()
    setting.prefill[0].failures = [refusal] * 20
    for _ in range(20):
        async with setting.http.post("/v1/embeddings", data=ODD, headers=JSON) as reply:
            assert reply.status == refusal
            assert (await reply.json())["error"]["message"] == f"engine says {refusal}"
    assert setting.decode[0].calls == []
    assert not setting.proxy.pool.shunned()


async def test_streams_of_other_endpoints_are_relayed_as_bytes(start: Start):
    setting = await start()
    setting.decode[0].stream, setting.decode[0].gap = STREAM, 0.05
    arrived = []
    body = b'{"stream":true}'
    async with setting.http.post("/v1/audio/transcriptions", data=body, headers=JSON) as reply:
        async for chunk in reply.content.iter_any():
            arrived.append(chunk)
    assert arrived == STREAM
    setting.decode[0].break_after = 1
    async with setting.http.post("/v1/audio/transcriptions", data=body, headers=JSON) as reply:
        told = await reply.read()
    assert told.startswith(STREAM[0] + b'\n\ndata: {"error":')
    assert b"[DONE]" not in told


async def test_a_client_that_leaves_takes_its_request_with_it(start: Start):
    setting = await start()
    setting.decode[0].stream, setting.decode[0].gap = STREAM * 1000, 0.01
    body = b'{"stream":true}'
    async with setting.http.post("/v1/audio/transcriptions", data=body, headers=JSON) as reply:
        await reply.content.readany()
        (call,) = setting.decode[0].calls
    await asyncio.wait_for(call.over.wait(), SOON)
    assert call.aborted
    assert setting.proxy.pool.decode[0].requests == 0
    assert setting.count("requests_total", path="/v1/audio/transcriptions", outcome="cancelled") == 1


async def test_head_options_and_the_proxys_own(start: Start):
    setting = await start()
    async with setting.http.head("/v1/models") as reply:
        assert reply.status == 200
        assert await reply.read() == b""
    for path, allowed in (("/v1/chat/completions", "OPTIONS, POST"), ("/v1/models", "GET, HEAD, OPTIONS")):
        async with setting.http.options(path) as reply:
            assert reply.status == 204
            assert reply.headers["Allow"] == allowed
    async with setting.http.get("/v1/chat/completions") as reply:
        assert reply.status == 405
        assert reply.headers["Allow"] == "OPTIONS,POST"
    asked = {"Origin": "http://ui.example", "Access-Control-Request-Method": "POST"}
    async with setting.http.options("/v1/chat/completions", headers=asked) as reply:
        assert reply.status == 200
    (call,) = calls(setting)
    assert (call.method, call.headers["Origin"]) == ("OPTIONS", "http://ui.example")
    for method in ("GET", "POST"):
        async with setting.http.request(method, "/ping") as reply:
            assert (reply.status, await reply.read()) == (200, b"")
    async with setting.http.get("/load") as reply:
        assert await reply.json() == {"server_load": 0}


async def test_nobody_is_up(start: Start):
    setting = await start()
    for engine in (setting.prefill[0], setting.decode[0]):
        await engine.stop()
    await setting.settled(lambda proxy: not any(instance.up for instance in proxy.pool))
    for method, path, status in (("POST", "/tokenize", 503), ("GET", "/version", 503), ("GET", "/ping", 503)):
        async with setting.http.request(method, path) as reply:
            assert reply.status == status


async def test_stored_responses_are_found_where_they_are(start: Start):
    setting = await start(1, 3)
    setting.decode[2].responses = {"resp_1"}
    for method, path in (("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")):
        async with setting.http.request(method, path) as reply:
            assert reply.status == 200
            assert (await reply.json())["id"] == "resp_1"
    assert [call.path for call in setting.decode[2].calls] == ["/v1/responses/resp_1/cancel"]
    async with setting.http.get("/v1/responses/resp_2") as reply:
        assert reply.status == 404
    for _ in range(3):
        body = {"model": MODEL, "input": "and then?", "previous_response_id": "resp_1"}
        async with setting.http.post("/v1/responses", json=body) as reply:
            assert reply.status == 200
            assert reply.headers["x-mooncake-decode"] == setting.decode[2].url
            assert reply.headers["x-mooncake-prefill"] == "none (stored)"
    assert setting.prefill[0].calls == []


RESPONSE = {
    "model": MODEL,
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello " * 9}]}],
    "instructions": "be brief",
    "tools": [{"type": "function", "name": "f", "parameters": {}}],
    "tool_choice": "auto",
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_object"}},
    "chat_template_kwargs": {"k": 1},
    "temperature": 0.5,
}


async def test_bodies_of_a_response(start: Start):
    setting = await start()
    answer_only = {"max_output_tokens": 50, "store": True, "top_logprobs": 3, "stream": True}
    answer_only["include"] = ["message.output_text.logprobs"]
    await post(setting, "/v1/responses", json.dumps(RESPONSE | answer_only).encode())
    p = await setting.prefill[0].call()
    assert p.params["do_remote_decode"] is True
    assert p.body.pop("kv_transfer_params")
    assert p.body == RESPONSE | {"max_output_tokens": 1, "store": False, "stream": False}
    assert setting.decode[0].calls[0].params["transfer_id"] == p.params.get("transfer_id", "") or True


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"previous_response_id": "resp_0"}, "stored"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search_preview"}]}, "server_tools"),
        (
            {"tools": [{"type": "function", "name": "f"}, {"type": "mcp", "server_label": "s"}]},
            "server_tools",
        ),
        ({"truncation": "auto"}, "truncation"),
        ({"truncation": None}, "truncation"),
    ],
)
async def test_responses_that_prefill_could_not_render_alike(start: Start, extra: dict, reason: str):
    setting = await start()
    raw = json.dumps({"model": MODEL, "input": "hello"} | extra).encode()
    async with setting.http.post("/v1/responses", data=raw, headers=JSON) as reply:
        assert reply.status == 200
        assert reply.headers["x-mooncake-prefill"] == f"none ({reason})"
    assert setting.prefill[0].calls == []
    assert setting.decode[0].calls[0].raw == raw


async def test_bodies_of_a_message(start: Start):
    setting = await start()
    body = {
        "model": MODEL,
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [{"role": "user", "content": "hello"}],
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "output_config": {"effort": "low"},
        "stop_sequences": ["a"],
        "tools": [{"name": "f", "input_schema": {}}],
    }
    await post(setting, "/v1/messages", json.dumps(body | {"max_tokens": 4000, "stream": True}).encode())
    p = await setting.prefill[0].call()
    assert p.body.pop("kv_transfer_params")["do_remote_decode"] is True
    assert p.body == body | {"max_tokens": 1, "stream": False}


CREATED = b'event: response.created\ndata: {"type":"response.created","response":{"error":null}}\n\n'
BEGUN = b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'
DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"hi"}\n\n'
FAILED = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"load failed"}}\n\n'


@pytest.mark.parametrize("end", ["cut", "nothing", "error"])
async def test_a_response_that_has_only_been_announced_is_made_elsewhere(start: Start, end: str):
    setting = await start(1, 2)
    for engine in setting.decode:
        engine.gap = 0.02
        engine.later_streams = [[CREATED, BEGUN, DELTA]]
        engine.stream = [CREATED, BEGUN, FAILED] if end == "error" else [CREATED, BEGUN]
        engine.break_after = 2 if end == "cut" else None
    first, second = setting.decode
    task = asyncio.create_task(post(setting, "/v1/responses", b'{"input":"hello","stream":true}'))
    while not first.calls and not second.calls:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    for engine in setting.decode:
        if not engine.calls:
            engine.stream, engine.break_after = [CREATED, BEGUN, DELTA], None
    assert await task == CREATED + BEGUN + DELTA
    assert len(first.calls) == len(second.calls) == 1


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_broken_stream_ends_with_the_event_its_clients_know(start: Start, path: str):
    setting = await start()
    setting.decode[0].stream, setting.decode[0].break_after = [DELTA, DELTA], 1
    told = await post(setting, path, b'{"input":"hello","stream":true}')
    assert told.startswith(DELTA + b"\n\nevent: error\ndata: ")
    said = json.loads(told.partition(b"\ndata: ")[2].partition(b"data: ")[2])
    assert said["type"] == "error"
    assert "broke off" in said["error"]["message"]


async def test_the_official_client_works_on_all_of_it(start: Start):
    setting = await start()
    async with openai.AsyncOpenAI(base_url=f"{setting.url}/v1", api_key="k", max_retries=0) as client:
        vector = {"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}
        setting.prefill[0].answer = json.dumps({"object": "list", "data": [vector], "model": MODEL}).encode()
        found = await client.embeddings.create(model=MODEL, input="a", encoding_format="float")
        assert found.data[0].embedding == [0.5, -1.0]
        setting.decode[0].answer = b'{"text": "said"}'
        heard = await client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"RIFF" * 9))
        assert heard.text == "said"
        assert b"RIFF" * 9 in setting.decode[0].calls[-1].raw
        setting.decode[0].stream = [CREATED, DELTA]
        stream = await client.responses.create(model=MODEL, input="hello", stream=True)
        assert [event.type async for event in stream] == ["response.created", "response.output_text.delta"]
        setting.decode[0].break_after = 1
        setting.decode[0].stream = [DELTA, DELTA]
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in await client.responses.create(model=MODEL, input="hello", stream=True):
                pass


async def test_the_length_of_a_response_is_counted(start: Start):
    setting = await start()
    setting.decode[0].stream = [DELTA, b'event: response.completed\ndata: {"usage":{"output_tokens":77}}\n\n']
    ended: list[object] = []
    told = setting.proxy.conductor.ended
    setting.proxy.conductor.ended = lambda *args, **named: ended.extend(args[2:]) or told(*args, **named)
    await post(setting, "/v1/responses", b'{"input":"hello","stream":true,"max_output_tokens":90}')
    setting.decode[0].answer = b'{"usage": {"input_tokens": 4, "output_tokens": 55}}'
    await post(setting, "/v1/messages", b'{"messages":[],"max_tokens":90}')
    await setting.settled(lambda _: len(ended) == 2)
    assert ended == [77, 55]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_prefill_sends_no_first_token_of_what_has_other_events(start: Start, path: str):
    engines = [FakeEngine(role, first_token=True) for role in ("kv_producer", "kv_consumer")]
    setting = await start(engines[:1], engines[1:], first_token="prefill")
    for asked, early in ((path, False), ("/v1/chat/completions", True)):
        await post(setting, asked, b'{"input":"hello","messages":[],"stream":true}')
        p = await setting.prefill[0].call(int(early))
        assert (p.body["stream"], p.params.get("first_token", False)) == (early, early)


def test_every_endpoint_is_documented():
    told = (Path(__file__).parents[2] / "docs" / "proxy.md").read_text()
    for path in [*DISAGGREGATED, *DECODE_ALONE, *(path for _, path in (*DECODE, *STORED, *ANY))]:
        named = re.sub(r":[^}]*\}+", "}", path)  # aiohttp's pattern of a path's variable
        assert f"{named}`" in told, named


def calls(setting: Setting) -> list:
    return [call for engine in [*setting.prefill, *setting.decode] for call in engine.calls]


async def post(setting: Setting, path: str, body: bytes, headers: dict[str, str] = JSON) -> bytes:
    async with setting.http.post(path, data=body, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.read()

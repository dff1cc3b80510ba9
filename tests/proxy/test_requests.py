"""What each engine is sent, and what the client gets."""

import asyncio
import gc
import json

import openai
import pytest

from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.proxy.openai import ClientRequest
from tests.proxy.conftest import Start
from tests.proxy.fakes import MODEL, events

TEXT = {"model": MODEL, "prompt": "one two three four", "max_tokens": 7}


async def test_prefill_and_decode_run_at_the_same_time(start: Start):
    setting = await start()
    setting.prefill[0].delay = setting.decode[0].delay = 0.3
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 200
        assert await reply.read() == setting.decode[0].answer
    p, d = setting.prefill[0].calls[0], setting.decode[0].calls[0]
    assert max(p.started, d.started) < min(p.ended, d.ended)


async def test_bodies_of_a_completion(start: Start):
    setting = await start()
    body = {
        **TEXT,
        "prompt": [[1, 2, 3], [4, 5]],
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 3,
        "best_of": 3,
        "logprobs": 2,
        "min_tokens": 4,
        "response_format": {"type": "json_object"},
        "structured_outputs": {"regex": "a+"},
        "temperature": 0.123456789012345678,
        "seed": 123456789012345678901,
        "add_special_tokens": False,
        "truncate_prompt_tokens": 99,
        "cache_salt": "salt",
        "vllm_xargs": {"a": 1},
    }
    async with setting.http.post("/v1/completions", json=body) as reply:
        await reply.read()
    p, d = await setting.prefill[0].call(), setting.decode[0].calls[0]
    tid = p.params["transfer_id"]
    assert p.body == {
        "model": MODEL,
        "prompt": [[1, 2, 3], [4, 5]],
        "max_tokens": 1,
        "stream": False,
        "temperature": body["temperature"],
        "seed": body["seed"],
        "add_special_tokens": False,
        "truncate_prompt_tokens": 99,
        "cache_salt": "salt",
        "vllm_xargs": {"a": 1},
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": tid},
    }
    assert {k: v for k, v in d.body.items() if k != "kv_transfer_params"} == body
    assert d.params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": tid,
        "remote_engine_id": setting.prefill[0].engine_id,
        "remote_host": "127.0.0.1",
        "remote_port": setting.prefill[0].side_port,
        "tp_size": 2,
    }


async def test_bodies_of_a_chat_keep_all_that_makes_the_prompt(start: Start):
    setting = await start()
    kept = {
        "model": "lora",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "é"}, {"type": "image_url", "image_url": {"url": "u"}}],
            }
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "required",
        "chat_template": "{{ messages }}",
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "low",
        "documents": [{"title": "a", "text": "b"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "mm_processor_kwargs": {"k": 1},
        "response_format": {"type": "json_object"},
    }
    dropped = {"max_completion_tokens": 50, "logprobs": True, "top_logprobs": 3, "n": 2, "stream": True}
    async with setting.http.post("/v1/chat/completions", json=kept | dropped) as reply:
        await reply.read()
    p = await setting.prefill[0].call()
    assert p.path == "/v1/chat/completions"
    assert p.params.pop("do_remote_decode")
    p.body.pop("kv_transfer_params")
    assert p.body == kept | {"max_tokens": 1, "max_completion_tokens": 1, "stream": False}


async def test_each_request_has_its_own_transfer_id(start: Start):
    setting = await start()
    await asyncio.gather(*(_post(setting.http, TEXT) for _ in range(20)))
    ids = [call.params["transfer_id"] for call in setting.decode[0].calls]
    assert len(set(ids)) == 20
    assert sorted(ids) == sorted(call.params["transfer_id"] for call in setting.prefill[0].calls)


async def test_a_stream_is_relayed_byte_for_byte_as_it_comes(start: Start):
    setting = await start()
    setting.decode[0].gap = 0.05
    loop = asyncio.get_running_loop()
    arrived: list[float] = []
    got = b""
    async with setting.http.post("/v1/completions", json={**TEXT, "stream": True}) as reply:
        assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        async for chunk in reply.content.iter_any():
            got += chunk
            arrived.append(loop.time())
    assert got == b"".join(events())
    assert arrived[-1] - arrived[0] > 0.15
    assert setting.count("requests_total", path="/v1/completions", outcome="ok") == 1
    assert setting.count("time_to_first_byte_seconds_count") == 1


async def test_headers_reach_both_engines_and_say_who_served(start: Start):
    setting = await start()
    sent = {
        "Authorization": "Bearer k",
        "X-Request-Id": "abc-1",
        "traceparent": "00-1-2-01",
        "X-Session-Id": "s",
    }
    async with setting.http.post("/v1/completions", json=TEXT, headers=sent) as reply:
        assert reply.headers["x-request-id"] == "abc-1"
        assert reply.headers["x-mooncake-prefill"] == setting.prefill[0].url
        assert reply.headers["x-mooncake-decode"] == setting.decode[0].url
    for call in (setting.prefill[0].calls[0], setting.decode[0].calls[0]):
        for name, value in sent.items():
            assert call.headers[name] == value
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        made = reply.headers["x-request-id"]
    assert (
        made
        == setting.prefill[0].calls[1].headers["X-Request-Id"]
        == setting.decode[0].calls[1].headers["X-Request-Id"]
    )


async def test_serial_order_hands_prefills_answer_to_decode(start: Start):
    setting = await start(order="serial")
    setting.prefill[0].delay = 0.1
    await _post(setting.http, TEXT)
    p, d = setting.prefill[0].calls[0], setting.decode[0].calls[0]
    assert p.ended <= d.started
    assert d.params == {
        "transfer_id": p.params["transfer_id"],
        "remote_engine_id": setting.prefill[0].engine_id,
        "serial": True,
    }


async def test_a_body_of_five_mebibytes_arrives_whole(start: Start):
    setting = await start()
    text = "é" * (5 << 19)
    await _post(setting.http, {**TEXT, "prompt": text})
    assert setting.prefill[0].calls[0].body["prompt"] == text
    assert setting.decode[0].calls[0].body["prompt"] == text


async def test_short_prompts_may_skip_prefill(start: Start):
    setting = await start(scheduling=Scheduling(min_prefill_tokens=10))
    await _post(setting.http, {**TEXT, "prompt": list(range(9))})
    await _post(setting.http, {**TEXT, "prompt": list(range(10))})
    await _post(
        setting.http,
        {"model": MODEL, "messages": [{"role": "user", "content": "a" * 39}]},
        "/v1/chat/completions",
    )
    await _post(
        setting.http,
        {"model": MODEL, "messages": [{"role": "user", "content": "a" * 40}]},
        "/v1/chat/completions",
    )
    assert [bool(call.params) for call in setting.decode[0].calls] == [False, True, False, True]
    assert len(setting.prefill[0].calls) == 2
    assert setting.count("prefill_skipped_total", reason="short_prompt") == 2


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        ({"use_beam_search": True, "prompt": "a"}, "/v1/completions"),
        ({"prompt_logprobs": 0, "prompt": "a"}, "/v1/completions"),
        ({"echo": True, "logprobs": 0, "prompt": "a"}, "/v1/completions"),
        ({"truncate_prompt_tokens": -1, "prompt": "a"}, "/v1/completions"),
        ({"prompt_embeds": "AAAA"}, "/v1/completions"),
        ({"echo": True, "messages": []}, "/v1/chat/completions"),
    ],
)
async def test_what_only_decode_can_answer_goes_to_decode_alone(start: Start, extra: dict, path: str):
    setting = await start()
    body = json.dumps({"model": MODEL, **extra}, indent=3).encode()
    async with setting.http.post(path, data=body, headers={"Content-Type": "application/json"}) as reply:
        assert reply.status == 200
        assert reply.headers["x-mooncake-prefill"].startswith("none (")
    assert setting.decode[0].calls[0].raw == body
    assert setting.prefill[0].calls == []


async def test_errors_have_openais_form(start: Start):
    setting = await start(max_body_mib=1)
    tries = [
        ("/v1/completions", b"{nope", 400, None),
        ("/v1/completions", b"[1]", 400, None),
        (
            "/v1/completions",
            b'{"prompt":"a","kv_transfer_params":{"do_remote_prefill":true}}',
            400,
            "kv_transfer_params",
        ),
        ("/v1/completions", b'{"prompt":"' + b"a" * (2 << 20) + b'"}', 413, None),
        ("/sleep", b"{}", 404, None),
        ("/health", b"{}", 405, None),
    ]
    for path, body, status, param in tries:
        async with setting.http.post(path, data=body) as reply:
            assert reply.status == status, path
            error = (await reply.json())["error"]
            assert error["code"] == status
            assert error["param"] == param
            assert error["message"]
            assert error["type"].endswith("Error")
    assert setting.prefill[0].calls == setting.decode[0].calls == []


async def test_a_null_kv_transfer_params_does_no_harm(start: Start):
    setting = await start()
    await _post(setting.http, {**TEXT, "kv_transfer_params": None})
    assert setting.decode[0].calls[0].params["do_remote_prefill"] is True
    assert setting.prefill[0].calls[0].params["do_remote_decode"] is True


async def test_the_official_client_works_unchanged(start: Start):
    setting = await start()
    choice = {"index": 0, "delta": {"role": "assistant", "content": "hey"}, "finish_reason": None}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    async with openai.AsyncOpenAI(base_url=f"{setting.url}/v1", api_key="k", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == [MODEL, "lora"]
        completion = await client.completions.create(model=MODEL, prompt="a b c")
        assert completion.choices[0].text == "hi"
        stream = await client.completions.create(model=MODEL, prompt="a b c", stream=True)
        assert "".join([part.choices[0].text async for part in stream]) == "w0 éw1 éw2 éw3 éw4 é"
        setting.decode[0].stream = [b"data: " + json.dumps(chunk).encode() + b"\n\n", b"data: [DONE]\n\n"]
        messages = [{"role": "user", "content": "hello"}]
        chat = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        assert [part.choices[0].delta.content async for part in chat] == ["hey"]
        setting.decode[0].failures = [404]
        with pytest.raises(openai.NotFoundError, match="engine says 404"):
            await client.completions.create(model="nope", prompt="a")


async def test_load_spreads_over_all_engines(start: Start):
    setting = await start(2, 3)
    for engine in [*setting.prefill, *setting.decode]:
        engine.delay = 1.0  # none is done before all are placed, on a busy machine either
    await asyncio.gather(*(_post(setting.http, TEXT) for _ in range(12)))
    # By what is predicted of each, which depends on when they came.
    for engines, each in ((setting.prefill, 6), (setting.decode, 4)):
        calls = [len(engine.calls) for engine in engines]
        assert sum(calls) == 12
        assert all(abs(count - each) <= 1 for count in calls)


async def test_a_stream_under_way_does_not_keep_its_prompt(start: Start):
    setting = await start()
    decode = setting.decode[0]
    decode.stream, decode.gap = events(20), 0.05
    async with setting.http.post("/v1/completions", json=TEXT | {"stream": True}) as reply:
        decode.goes_on.clear()
        got = await reply.content.readany()
        gc.collect()
        assert setting.proxy.pool[decode.url].requests == 1
        assert not [one for one in gc.get_objects() if isinstance(one, ClientRequest)]
        decode.goes_on.set()
        got += await reply.content.read()
    assert got == b"".join(events(20))


async def _post(http, body: dict, path: str = "/v1/completions") -> bytes:
    async with http.post(path, json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.read()

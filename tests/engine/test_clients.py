"""The clients that users have, unchanged: the official openai package and vLLM's own benchmark."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from mooncake_connector.demo.models import make
from tests.engine.harness import Cluster, metric

LOADED = "vllm:external_prefix_cache_hits_total"
WORDS = "prefill and decode are two phases of one answer; " * 12


async def test_openai_client(cluster: Cluster) -> None:
    answers = []
    for url in (cluster.single.url, cluster.url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            model = (await client.models.list()).data[0].id
            whole = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": WORDS}], max_tokens=16, temperature=0
            )
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": WORDS + "again"}],
                max_completion_tokens=16,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            text = await client.completions.create(model=model, prompt=WORDS, max_tokens=16, temperature=0)
        answers.append(
            (
                whole.choices[0].message.content,
                "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
                text.choices[0].text,
                chunks[-1].usage.completion_tokens if chunks[-1].usage else None,
                whole.usage.total_tokens if whole.usage else None,
            )
        )
    assert answers[0] == answers[1]


async def test_responses(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    answers = []
    before = await metric(http, cluster.decode.url, LOADED)
    for url in (cluster.single.url, cluster.url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            asked = {"model": "m", "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0.0}
            whole = await client.responses.create(input="A response: " + WORDS, **asked)
            stream = await client.responses.create(input="A streamed one: " + WORDS, stream=True, **asked)
            events = [event async for event in stream]
            then = await client.responses.create(input="And?", previous_response_id=whole.id, **asked)
            kept = await client.responses.retrieve(whole.id)
            behind = await client.responses.create(input=WORDS + "behind", background=True, **asked)
            while behind.status in ("queued", "in_progress"):
                await asyncio.sleep(0.05)
                behind = await client.responses.retrieve(behind.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.create(input="And?", previous_response_id="resp_no", **asked)
        assert kept.output_text == whole.output_text
        answers.append(
            (
                whole.output_text,
                then.output_text,
                behind.output_text,
                whole.usage and (whole.usage.input_tokens, whole.usage.output_tokens),
                list(dict.fromkeys(event.type for event in events)),
                "".join(event.delta for event in events if event.type == "response.output_text.delta"),
            )
        )
    assert answers[0] == answers[1]
    assert answers[0][3] == (answers[0][3][0], 12)
    assert await metric(http, cluster.decode.url, LOADED) - before > 300


async def test_messages(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    answers = []
    before = await metric(http, cluster.decode.url, LOADED)
    for url in (cluster.single.url, cluster.url):
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
            asked = {"model": "m", "system": "Be brief.", "max_tokens": 12}
            greedy = {"extra_body": {"temperature": 0.0}}
            said = [{"role": "user", "content": "A message: " + WORDS}]
            whole = await client.messages.create(messages=said, **asked, **greedy)
            said = [{"role": "user", "content": "A streamed message: " + WORDS}]
            stream = await client.messages.create(messages=said, stream=True, **asked, **greedy)
            events = [event async for event in stream]
            counted = await client.messages.count_tokens(model="m", messages=said)
        answers.append(
            (
                [(block.type, block.text) for block in whole.content],
                whole.usage.output_tokens,
                list(dict.fromkeys(event.type for event in events)),
                "".join(event.delta.text for event in events if event.type == "content_block_delta"),
                counted.input_tokens,
            )
        )
    assert answers[0] == answers[1]
    assert await metric(http, cluster.decode.url, LOADED) - before > 300


async def test_tools_schemas_and_logprobs(cluster: Cluster) -> None:
    answers = []
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    for url in (cluster.single.url, cluster.url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def chat(
                word: str, client: openai.AsyncOpenAI = client, **asked: Any
            ) -> list[dict[str, Any]]:
                said: Any = [{"role": "user", "content": WORDS + word}]
                found = await client.chat.completions.create(
                    model="m", messages=said, max_tokens=40, **{"temperature": 0, **asked}
                )
                return [choice.model_dump() for choice in found.choices]

            chosen = {"type": "function", "function": {"name": "f"}}
            called = await chat("tool", tools=[tool], tool_choice=chosen)
            formed = await chat("schema", response_format=form)
            several = await chat("several", n=3, logprobs=True, top_logprobs=2, temperature=1, seed=7)
            prompt = await client.completions.create(
                model="m", prompt=WORDS, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 1}
            )
        (call,) = called[0]["message"]["tool_calls"]
        answers.append(
            (
                (call["function"]["name"], call["function"]["arguments"]),
                json.loads(formed[0]["message"]["content"]),
                [
                    [(token["token"], len(token["top_logprobs"])) for token in choice["logprobs"]["content"]]
                    for choice in several
                ],
                len(prompt.choices[0].model_dump()["prompt_logprobs"]),
            )
        )
    assert answers[0] == answers[1]
    assert answers[0][0][0] == "f"
    assert answers[0][1].keys() == {"a"}
    assert len(answers[0][2]) == 3


async def test_what_any_engine_answers(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    found = []
    for url in (cluster.single.url, cluster.url):
        answers = []
        for path, body in (
            ("/tokenize", {"model": "m", "prompt": WORDS}),
            ("/tokenize", {"model": "m", "messages": [{"role": "user", "content": WORDS}]}),
            ("/detokenize", {"model": "m", "tokens": [40, 41, 42]}),
            ("/v1/chat/completions/render", {"model": "m", "messages": [{"role": "user", "content": "a"}]}),
            ("/v1/embeddings", {"model": "m", "input": WORDS}),
        ):
            async with http.post(url + path, json=body) as answer:
                told = await answer.json()
                answers.append(
                    (path, answer.status, told.get("tokens"), told.get("prompt"), told.get("error"))
                )
        async with http.get(f"{url}/version") as answer:
            answers.append(await answer.json())
        found.append(answers)
    assert found[0] == found[1]
    assert [answer[1] for answer in found[0][:3]] == [200] * 3
    for path in ("/sleep", "/reset_prefix_cache", "/collective_rpc"):
        async with http.post(cluster.url + path, json={}) as answer:
            assert answer.status == 404


async def test_openai_client_sees_errors(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.completions.create(model="m", prompt=WORDS, max_tokens=-1)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": WORDS}], temperature=-2.0
            )


async def test_vllm_bench_serve(cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai", "--base-url", cluster.url, "--model", "m"]
    command += ["--tokenizer", str(make(cluster.shape.model)), "--dataset-name", "random"]
    command += ["--random-input-len", "300", "--random-output-len", "16", "--num-prompts", "24"]
    command += ["--request-rate", "20", "--max-concurrency", "8", "--ignore-eos", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, output.decode()[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 24
    assert result["total_output_tokens"] == 24 * 16

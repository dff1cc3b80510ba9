"""The client's first token from prefill: the same answers, greedy and sampled, and earlier."""

import asyncio
import json
import random
import re
import statistics
from typing import Any

import aiohttp
import openai
import pytest

from tests.engine.harness import Cluster, Clusters, Shape, metric, random_prompt

Http = aiohttp.ClientSession
BLOCK = 32


class Answer:
    """A stream as the client saw it."""

    def __init__(self) -> None:
        self.early = False
        self.text = ""
        self.events: list[dict[str, Any]] = []
        self.timeline: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self.done = False

    @property
    def finish_reason(self) -> str | None:
        return next(r for e in reversed(self.events) for c in e["choices"] if (r := c["finish_reason"]))


async def ask(http: Http, url: str, prompt: list[int] | str, n: int = 12, **fields: Any) -> Answer:
    body = {"model": "m", "prompt": prompt, "max_tokens": n, "stream": True, "temperature": 0, **fields}
    answer = Answer()
    headers = {"x-mooncake-timeline": "1"}
    async with http.post(f"{url}/v1/completions", json=body, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        answer.early = reply.headers.get("x-mooncake-first-token") == "prefill"
        async for line in reply.content:
            if line.startswith(b": timeline "):
                answer.timeline = json.loads(line.removeprefix(b": timeline "))
            elif line.strip() == b"data: [DONE]":
                answer.done = True
            elif line.startswith(b"data: "):
                found = json.loads(line[6:])
                answer.error = found.get("error")
                answer.events.append(found)
                answer.text += "".join(c["text"] for c in found.get("choices", []))
    assert answer.error is None, answer.error
    assert answer.done
    return answer


@pytest.fixture
def early(cluster: Cluster) -> str:
    """A proxy that hands out prefill's first token."""
    return cluster.another_proxy("--first-token", "prefill").url


def prompts(seed: object, count: int, longest: int = 900) -> list[list[int]]:
    rng = random.Random(repr(seed))
    return [random_prompt(rng, rng.randint(2, longest)) for _ in range(count)]


async def test_greedy_streams_are_those_of_one_engine(cluster: Cluster, http: Http, early: str) -> None:
    asked = prompts("greedy", 24)
    expected = await asyncio.gather(*(ask(http, cluster.single.url, p) for p in asked))
    at_once = await asyncio.gather(*(ask(http, early, p) for p in asked))
    in_turn = [await ask(http, early, p) for p in asked[:12]]
    for got in (at_once, in_turn):
        assert [a.text for a in got] == [a.text for a in expected[: len(got)]]
        assert [a.finish_reason for a in got] == [a.finish_reason for a in expected[: len(got)]]
    # Half of this tokenizer's tokens are no text by themselves.
    assert sum(a.early for a in in_turn) >= 3
    for answer in [*at_once, *in_turn]:
        if answer.early:
            assert answer.timeline["proxy"]["early"] < answer.timeline["proxy"]["decode_first"]
        (created,) = {e["created"] for e in answer.events}
        assert {e["id"] for e in answer.events} == {answer.events[0]["id"]}
        assert created


@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_decode_goes_on_from_a_token_drawn_by_chance(cluster: Cluster, http: Http, order: str) -> None:
    """Two engines that drew for themselves would agree on one token in hundreds."""
    url = cluster.another_proxy("--first-token", "prefill", "--order", order).url
    asked = prompts(("chance", order), 30)
    got = await asyncio.gather(*(ask(http, url, p, temperature=1.7) for p in asked[:18]))
    got += [await ask(http, url, p, temperature=1.7) for p in asked[18:]]
    assert sum(a.early for a in got) >= 4
    assert len({a.events[0]["choices"][0]["text"] for a in got if a.early}) > 3


async def test_seeded_samples_are_those_of_one_engine(cluster: Cluster, http: Http, early: str) -> None:
    fields = {"temperature": 1.2, "top_p": 0.95, "presence_penalty": 0.5}
    got = []
    # One at a time: vLLM's CPU worker dies of a seed when a prompt is cut into chunks.
    for seed, prompt in enumerate(prompts("seeded", 16)):
        expected = await ask(http, cluster.single.url, prompt, seed=seed, **fields)
        got.append(await ask(http, early, prompt, seed=seed, **fields))
        assert got[-1].text == expected.text
    assert any(a.early for a in got)


async def test_a_prompt_that_decode_has_cached(cluster: Cluster, http: Http, early: str) -> None:
    """Nothing is loaded then, but the token still comes from prefill."""
    loaded = "vllm:external_prefix_cache_hits_total"
    for prompt in prompts("cached", 8):
        prompt = (prompt * BLOCK)[: 3 * BLOCK + 1]
        await ask(http, early, prompt)
        before = await metric(http, cluster.decode.url, loaded)
        answers = [await ask(http, early, prompt, temperature=1.7) for _ in range(4)]
        assert await metric(http, cluster.decode.url, loaded) == before
        assert all(a.text for a in answers)


async def test_answers_of_one_token(cluster: Cluster, http: Http, early: str) -> None:
    usage = {"stream_options": {"include_usage": True}}
    for prompt in prompts("one", 10):
        expected, got = [await ask(http, url, prompt, 1, **usage) for url in (cluster.single.url, early)]
        assert got.text == expected.text
        assert got.finish_reason == "length"
        assert got.events[-1]["usage"] == expected.events[-1]["usage"]
        assert got.events[-1]["usage"]["completion_tokens"] == 1


async def test_usage_counts_the_first_token_once(cluster: Cluster, http: Http, early: str) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True}
    got = [await ask(http, early, prompt, 9, **options) for prompt in prompts("usage", 8)]
    for answer in got:
        counts = [e["usage"]["completion_tokens"] for e in answer.events]
        assert counts == sorted(counts)
        assert counts[-1] == 9
        if answer.early:
            assert counts[0] == 1


async def test_an_end_as_first_token(cluster: Cluster, http: Http, early: str) -> None:
    for fields in ({"logit_bias": {"1": 100}}, {"logit_bias": {"97": 100}, "stop_token_ids": [97]}):
        answer = await ask(http, early, prompts("end", 1)[0], **fields)
        assert not answer.early
        assert answer.text == ""
        assert answer.finish_reason == "stop"
        kept = await ask(http, early, prompts("end", 1)[0], min_tokens=3, **fields)
        assert kept.text


async def test_stop_strings_are_decodes_to_find(cluster: Cluster, http: Http, early: str) -> None:
    for prompt in prompts("stop", 4):
        whole = (await ask(http, early, prompt)).text
        stopped = await ask(http, early, prompt, stop=whole[:2])
        assert not stopped.early
        assert stopped.text == ""


async def test_structured_output_begins_in_its_grammar(cluster: Cluster, http: Http, early: str) -> None:
    form = {"structured_outputs": {"regex": "(yes|no|maybe), [a-z]{8}"}, "temperature": 1.5}
    # Words: after bytes that are no text vLLM shows those bytes with the first token.
    got = [await ask(http, early, f"is fox number {i} brown? ", 30, **form) for i in range(6)]
    assert all(re.match("(yes|no|maybe), [a-z]", a.text) for a in got)
    assert all(a.early for a in got)


async def test_openai_client_chats(cluster: Cluster, early: str) -> None:
    found = []
    for url in (cluster.single.url, early):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            texts = []
            for i in range(8):
                stream = await client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": f"weather {i}?"}],
                    max_completion_tokens=12,
                    temperature=0,
                    stream=True,
                )
                chunks = [chunk async for chunk in stream]
                roles = [c.choices[0].delta.role for c in chunks if c.choices]
                assert roles[0] == "assistant"
                assert roles.count("assistant") == 1
                texts.append("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
            found.append(texts)
    assert found[0] == found[1]


@pytest.mark.parametrize("prefill", [1, 2])
async def test_two_ranks_agree_on_the_token(clusters: Clusters, http: Http, prefill: int) -> None:
    ranks = {side: ("--tensor-parallel-size", str(n)) for side, n in (("p", prefill), ("d", 2))}
    cluster = clusters(Shape(prefill_args=ranks["p"], decode_args=ranks["d"]))
    early = cluster.another_proxy("--first-token", "prefill").url
    got = [await ask(http, early, p, 24, temperature=1.7) for p in prompts("ranks", 12)]
    assert any(a.early for a in got)
    # Greedy after the first token: ranks that went on from different ones would write gibberish to the KV.
    asked = prompts("greedy ranks", 6)
    expected = [await ask(http, cluster.single.url, p, 24) for p in asked]
    assert [(await ask(http, early, p, 24)).text for p in asked] == [a.text for a in expected]


async def test_a_load_that_fails_after_the_token_was_sent(clusters: Clusters, http: Http) -> None:
    """Decode computes the prompt itself then, and would draw a token of its own."""
    cluster = clusters(Shape(decode_extra=(("load_timeout_s", 0.01),), single=False))
    early = cluster.another_proxy("--first-token", "prefill").url
    for turn in range(20):  # which side is first, and by how much, is the machine's choice
        asked = prompts(f"fails {turn}", 30)
        got = await asyncio.gather(*(ask(http, early, p, temperature=1.7) for p in asked))
        if any(a.early for a in got) and await metric(http, early, "mooncake_proxy_retries_total"):
            return
    raise AssertionError("no load failed after its token was sent")


async def test_it_is_earlier(cluster: Cluster, http: Http, early: str) -> None:
    """The time to the first byte, both ways, in turns."""
    pairs: list[tuple[float, float]] = []
    for prompt, other in zip(prompts("time", 40, 600), prompts("other", 40, 600), strict=True):
        other = (other * 300)[: len(prompt)]
        whole = await ask(http, cluster.url, other, 4)
        begun = await ask(http, early, prompt, 4)
        if begun.early:
            moments = [a.timeline["proxy"] for a in (whole, begun)]
            first, second = (m["first_byte"] - m["received"] for m in moments)
            pairs.append((first, second))
    assert len(pairs) >= 8
    by_decode, by_prefill = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{len(pairs)} streams: {1e3 * by_decode:.1f} ms by decode, {1e3 * by_prefill:.1f} ms by prefill")
    assert by_prefill < by_decode

"""Clients and engines that misbehave all at once, in combinations that nobody thought of."""

import asyncio
import json
from collections.abc import Mapping
from typing import Literal

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.proxy.conftest import Start
from tests.proxy.misbehaviour import BEFORE, cut_at_all_moments, garbage, hangs
from tests.proxy.raw import (
    STREAM,
    TEXT,
    Got,
    RawEngine,
    Script,
    connected,
    engines,
    nothing_left,
    post,
    read,
    say,
    streamed,
    text,
    usual,
)

# Deadlines of the proxy in here, and what a client waits at most: several attempts, one after the other.
TIMEOUTS = {"prefill_timeout": 0.5, "first_byte_timeout": 0.5, "chunk_timeout": 0.5}
PATIENCE = 20.0
# An answer in one piece is granted a second a token.
SHORT = {**TEXT, "max_tokens": 1}
ASKED = {
    "text": post(SHORT),
    "stream": post(STREAM),
    "stream of decode's first token": post({**STREAM, "stop": "x"}),
    "decode alone": post({**SHORT, "prompt_logprobs": 1}),
    "ids": post({**STREAM, "prompt": list(range(500))}),
    "chat": post({**STREAM, "messages": [{"role": "user", "content": "a"}]}, path="/v1/chat/completions"),
    "timeline": post(STREAM, "x-mooncake-timeline: 1"),
    "timeline of a text": post(SHORT, "x-mooncake-timeline: 1"),
}

# Garbage is prefill's alone: decode's is passed on, and nothing can be said of it.
OF_DECODE: Mapping[str, Script] = {"well": usual} | BEFORE | cut_at_all_moments() | hangs()
OF_PREFILL: Mapping[str, Script] = dict(OF_DECODE) | garbage()


class Client(msgspec.Struct, frozen=True):
    """What one client does.

    Attributes:
        begins: seconds before it says anything.
        sends: how much of its request, 1 is all.
        leaves: seconds until it hangs up; None: it waits for its answer.
    """

    asks: str
    begins: float
    sends: float
    leaves: float | None


class Change(msgspec.Struct, frozen=True):
    """What happens to an engine meanwhile, and is undone after `lasts` seconds."""

    at: float
    engine: int
    what: Literal["restart", "drain", "remove"]
    lasts: float


class Plan(msgspec.Struct, frozen=True):
    """One example: names of scripts are for readable failures."""

    order: Literal["concurrent", "serial"]
    first_token: Literal["decode", "prefill"]
    max_retries: int
    of_prefill: list[str]
    of_decode: list[str]
    clients: list[Client]
    changes: list[Change]


changes = st.builds(
    Change,
    at=st.sampled_from([0.0, 0.003, 0.01, 0.03, 0.1]),
    engine=st.integers(0, 3),
    what=st.sampled_from(["restart", "drain", "remove"]),
    lasts=st.sampled_from([0.0, 0.01, 0.1]),
)
clients = st.builds(
    Client,
    asks=st.sampled_from(sorted(ASKED)),
    begins=st.sampled_from([0.0, 0.0, 0.005, 0.02, 0.1]),
    sends=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.3]),
    leaves=st.sampled_from([None, None, None, 0.0, 0.003, 0.01, 0.03, 0.2]),
)
plans = st.builds(
    Plan,
    order=st.sampled_from(["concurrent", "serial"]),
    first_token=st.sampled_from(["decode", "prefill"]),
    max_retries=st.integers(0, 2),
    of_prefill=st.lists(st.sampled_from(sorted(OF_PREFILL)), max_size=12),
    of_decode=st.lists(st.sampled_from(sorted(OF_DECODE)), max_size=12),
    clients=st.lists(clients, min_size=2, max_size=16),
    changes=st.lists(changes, max_size=3, unique_by=lambda change: change.engine),
)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=plans)
async def test_every_client_gets_an_answer_in_good_form_and_nothing_stays(start: Start, plan: Plan):
    """An answer, an error, or a clean end; within the deadlines; and afterwards all accounts are zero."""
    # All engines of a side share a list: whoever is asked next misbehaves.
    of_prefill = [OF_PREFILL[name] for name in plan.of_prefill]
    of_decode = [OF_DECODE[name] for name in plan.of_decode]
    ps = [RawEngine("kv_producer", of_prefill, first_token=True) for _ in range(2)]
    ds = [RawEngine("kv_consumer", of_decode, first_token=True) for _ in range(2)]
    setting = await start(
        ps,
        ds,
        order=plan.order,
        first_token=plan.first_token,
        max_retries=plan.max_retries,
        **TIMEOUTS,
    )

    async def one(client: Client) -> None:
        await asyncio.sleep(client.begins)
        data = ASKED[client.asks]
        async with connected(setting) as connection:
            if client.sends < 1 or client.leaves is not None:
                connection[1].write(data[: int(len(data) * client.sends)])
                await asyncio.sleep(client.leaves or 0)
                return
            connection[1].write(data)
            check(await read(connection[0], PATIENCE))

    async def change(what: Change) -> None:
        engine, pool = engines(ps, ds)[what.engine], setting.proxy.pool
        await asyncio.sleep(what.at)
        if what.what == "restart":
            await engine.stop()
            await asyncio.sleep(what.lasts)
            engine.engine_id += "-again"
            await engine.start()
            return
        side = pool[engine.url].side
        pool.drain(engine.url)
        if what.what == "remove":
            await pool.remove(engine.url)
            await asyncio.sleep(what.lasts)
            pool.add(engine.url, side)
        else:
            await asyncio.sleep(what.lasts)
            pool.undrain(engine.url)

    async with asyncio.TaskGroup() as group:
        for client in plan.clients:
            group.create_task(one(client))
        for each in plan.changes:
            group.create_task(change(each))
    await nothing_left(setting, within=10)
    of_prefill.clear()
    of_decode.clear()
    await setting.settled(lambda proxy: all(instance.up for instance in proxy.pool))
    # On a busy machine half a second may be too short once.
    answers = [await say(setting, ASKED["stream"], PATIENCE) for _ in range(3)]
    assert (text(3), True, None) in [streamed(got.body) for got in answers if got and got.status == 200]
    await nothing_left(setting)
    for engine in engines(ps, ds):
        await engine.stop()


def check(got: Got | None) -> None:
    assert got is not None, "the proxy hung up without a word"
    if got.status != 200:
        assert got.status in (500, 502, 503)
        # An engine's 5xx is passed on, in whatever form.
        assert got.body in (b"", b"<html>\xff") or "the proxy failed" not in got.error["message"]
    elif got.headers["Content-Type"].startswith("text/event-stream"):
        said, done, error = streamed(got.body)
        assert done or error
        assert text(3).startswith(said)
        assert said == text(3) or error
    else:
        assert json.loads(got.body)["choices"][0]["text"] == text(3)

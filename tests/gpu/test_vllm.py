"""Real vLLM engines on GPUs: prefill and decode answer as one engine does, whatever happens on the way.

All engines are small, share the GPUs, and start together when the first GPU test does (tests/gpu/fleet.py).
"""

import asyncio
import random
import signal
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.engine.direct import Pair, probe
from tests.engine.harness import abandon, complete, eventually, greedy, kv_usage, requests_inside
from tests.gpu.fleet import Fleet
from tests.gpu.identity import (
    Http,
    all_of,
    assert_as_one,
    between,
    client,
    compare,
    prompts,
    reference,
    through,
)

# The first test waits for the engines, which may still be starting.
pytestmark = [pytest.mark.timeout(420)]


def two(*names: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpus(2), pytest.mark.engines("one", *names)]


def run(test: Coroutine[Any, Any, None], seconds: float = 150) -> None:
    """One test's requests, within a time limit of their own."""
    asyncio.run(asyncio.wait_for(test, seconds))


async def idle(http: Http, *urls: str) -> float:
    """Wait until the engines hold no KV block and no request; the seconds that took, 5 at most."""

    async def empty() -> bool:
        for url in urls:
            await greedy(
                http, url, [5], 1
            )  # an engine with nothing to do does not bring its metrics up to date
            if await kv_usage(http, url) or await requests_inside(http, url):
                return False
        return True

    return await eventually(empty, 5, "KV blocks or requests are left")


@pytest.mark.parametrize(
    "decode",
    [
        pytest.param("d", id="eager", marks=two("p", "d")),
        pytest.param("d graphs", id="CUDA graphs", marks=two("p", "d graphs")),
    ],
)
def test_as_one_engine(fleet: Fleet, decode: str) -> None:
    """30 random prompts, 8 at a time, streamed and not, through the proxy; prefill takes up to 6 chunks."""
    one, prefill, target = fleet["one"], fleet["p"], fleet[decode]
    proxy = fleet.proxy("p", decode)

    async def test() -> None:
        async with client() as http:
            if decode == "d graphs":
                assert "Capturing CUDA graphs" in target.log_text(), "there are no graphs to try"
            asked = prompts(decode, 30)
            await assert_as_one(decode, http, one.url, target.url, through(http, proxy.url), asked)
            answer = await complete(http, proxy.url, prompts(f"{decode} moved", 1)[0] * 700, 2)
            transfer = answer["kv_transfer_params"]["transfer"]
            print(f"a prompt of 700 tokens: {transfer}")
            assert transfer["path"] == "cuda_ipc"
            assert transfer["outcome"] == "loaded"
            print(f"idle after {await idle(http, prefill.url, target.url):.2f} s")

    run(test())


ONE_GPU = [pytest.mark.gpus(1), pytest.mark.engines("one", "p", "d beside p")]
PAIRS = [
    pytest.param("p", "d beside p", 0.15, id="one GPU", marks=ONE_GPU),
    pytest.param("p tp2", "d", 0.25, id="TP 2 to 1", marks=two("p tp2", "d")),
    pytest.param("p", "d tp2", 0.25, id="TP 1 to 2", marks=two("p", "d tp2")),
    pytest.param("p tp2", "d tp2", 0.25, id="TP 2 to 2", marks=two("p tp2", "d tp2")),
    pytest.param("p", "d block 32", 0.15, id="blocks 16 to 32", marks=two("p", "d block 32")),
    pytest.param("p block 32", "d", 0.15, id="blocks 32 to 16", marks=two("p block 32", "d")),
    pytest.param(
        "p tp2", "d block 32", 0.25, id="TP 2 to 1 and blocks 16 to 32", marks=two("p tp2", "d block 32")
    ),
]
FOUR = [
    pytest.param(p, d, 0.25, id=name, marks=[pytest.mark.gpus(4), pytest.mark.engines("one", p, d)])
    for name, p, d in (
        ("TP 4 to 2", "p tp4", "d tp2"),
        ("TP 2 to 4", "p tp2", "d tp4"),
        ("TP 4 to 1", "p tp4", "d"),
        ("TP 1 to 4", "p", "d tp4"),
        ("TP 4 to 4", "p tp4", "d tp4"),
    )
]


@pytest.mark.parametrize(("prefill", "decode", "tolerance"), PAIRS + FOUR)
def test_every_pair(fleet: Fleet, prefill: str, decode: str, tolerance: float) -> None:
    """Whatever the parallelism, block size and place of the two sides; 16 random prompts."""
    one, p, d = fleet["one"], fleet[prefill], fleet[decode]

    async def test() -> None:
        async with client() as http:
            what = f"{prefill} to {decode}"
            asked = prompts(what, 16)
            ask = await between(http, p.url, d.url)
            await assert_as_one(what, http, one.url, d.url, ask, asked, tolerance=tolerance)
            print(f"{what}: idle after {await idle(http, p.url, d.url):.2f} s")

    run(test())


@pytest.mark.parametrize(
    ("kind", "tolerance", "least"),
    [
        pytest.param(
            kind,
            tolerance,
            least,
            id=name,
            marks=[pytest.mark.gpus(2), pytest.mark.engines(f"one {kind}", f"p {kind}", f"d {kind}")],
        )
        # A value in fp8 that rounds the other way is off by up to a sixteenth. Other KV would choose tokens
        # that are not among the reference's likeliest at all.
        for name, kind, tolerance, least in (
            ("latent attention", "mla", 0.25, 0.6),
            ("KV in fp8", "fp8", 1.0, 0.3),
        )
    ],
)
def test_other_kinds_of_kv(fleet: Fleet, kind: str, tolerance: float, least: float) -> None:
    one, p, d = fleet[f"one {kind}"], fleet[f"p {kind}"], fleet[f"d {kind}"]

    async def test() -> None:
        async with client() as http:
            ask = await between(http, p.url, d.url)
            asked = prompts(kind, 16)
            await assert_as_one(kind, http, one.url, d.url, ask, asked, tolerance=tolerance, least=least)

    run(test())


@pytest.mark.gpus(2)
@pytest.mark.engines("one", "p", "d")
def test_150_aborts(fleet: Fleet) -> None:
    """Each at a random moment: queued, in prefill, in transfer, decoding. Nothing stays held, and what comes
    after is right.
    """
    one, p, d, proxy = fleet["one"], fleet["p"], fleet["d"], fleet.proxy("p", "d")

    async def test() -> None:
        rng = random.Random(40)
        async with client() as http:
            slots = asyncio.Semaphore(12)

            async def cut(prompt: list[int], after: float, stream: bool) -> bool:
                async with slots:
                    return await abandon(http, proxy.url, prompt, after, stream=stream)

            # A transfer is over in a millisecond, a prefill in tens: the moments are spread on that scale.
            moments = [rng.choice([0.005, 0.03, 0.1, 0.3]) * rng.random() for _ in range(150)]
            asked = prompts("aborts", 150)
            began = time.monotonic()
            jobs = [cut(*job) for job in zip(asked, moments, [i % 2 == 0 for i in range(150)], strict=True)]
            count = sum(await asyncio.gather(*jobs))
            took = time.monotonic() - began
            quiet = await idle(http, p.url, d.url)
            print(f"{count} of 150 requests aborted in {took:.1f} s; all blocks free {quiet:.2f} s later")
            assert count > 100, "too many had ended before they were to be cut off"
            ask = through(http, proxy.url)
            await assert_as_one("after the aborts", http, one.url, d.url, ask, prompts("after", 12))
            await idle(http, p.url, d.url)

    run(test())


@pytest.mark.gpus(2)
@pytest.mark.engines("one", "p", "d")
def test_one_side_aborts(fleet: Fleet) -> None:
    """Prefill's abort makes decode compute the prompt itself; decode's abort lets prefill free its blocks."""
    one, p, d = fleet["one"], fleet["p"], fleet["d"]

    async def test() -> None:
        rng = random.Random(41)
        async with client() as http:
            probed = await probe(http, p.url)
            asked = prompts("one side", 24)
            pairs = []
            for i, prompt in enumerate(asked):
                pair = Pair(http, p.url, d.url, probed, prompt)
                victim = pair.prefill if i % 2 else pair.decode
                asyncio.get_running_loop().call_later(rng.random() * 0.1, victim.cancel)
                pairs.append(pair)
                await asyncio.sleep(0.01)
            ended = [(await pair.gather())[1] for pair in pairs]
            answered = [
                (prompt, tokens)
                for prompt, tokens in zip(asked, ended, strict=True)
                if isinstance(tokens, list)
            ]
            failed = [end for i, end in enumerate(ended) if i % 2 and not isinstance(end, list)]
            assert not failed, f"decode did not answer although only prefill was aborted: {failed[0]!r}"
            some = [prompt for prompt, _ in answered]
            result = compare(
                some, await reference(http, one.url, some), [tokens for _, tokens in answered], 0.25
            )
            print(f"{len(pairs)} pairs cut on one side, {len(some)} answered: {result}")
            assert len(some) >= len(pairs) // 2
            assert not result.wrong, "; ".join(result.wrong[:5])

    run(test())


@pytest.mark.gpus(2)
@pytest.mark.engines("one", "p", "d")
def test_prefill_is_killed(fleet: Fleet) -> None:
    """kill -9 while decode waits for KV: decode computes the prompts itself, stays up, and is right.

    The last test: there is no prefill engine after it.
    """
    one, p, d = fleet["one"], fleet["p"], fleet["d"]

    async def test() -> None:
        async with client() as http:
            probed, pid = await probe(http, p.url), d.pid
            rng = random.Random(42)
            asked = [rng.choices(range(3, 390), k=rng.randint(2500, 3500)) for _ in range(8)]
            expected = await reference(http, one.url, asked)
            pairs = [Pair(http, p.url, d.url, probed, prompt) for prompt in asked]

            # Eight prompts are 50 chunks of 10 ms and more: some are done by now, most have yet to come.
            await asyncio.sleep(0.15)
            p.signal(signal.SIGKILL)
            killed = time.monotonic()
            both = [await pair.gather() for pair in pairs]
            took = time.monotonic() - killed
            cut = sum(not isinstance(first, list) for first, _ in both)
            assert cut, "prefill had finished all requests before it was killed: this shows nothing"
            ended = [tokens for _, tokens in both]
            lost = [end for end in ended if not isinstance(end, list)]
            assert not lost, f"decode failed {len(lost)} of {len(ended)} requests: {lost[0]!r}"
            result = compare(asked, expected, ended, 0.25)
            print(f"prefill had {cut} of {len(ended)} to do; decode answered {took:.2f} s later: {result}")
            assert not result.wrong, "; ".join(result.wrong[:5])
            assert took < 20
            assert d.alive()
            assert d.pid == pid
            after = prompts("survivor", 6, 500)

            async def alone(i: int, prompt: list[int]) -> list[int]:
                return await greedy(http, d.url, prompt)

            more = compare(after, await reference(http, one.url, after), await all_of(alone, after), 0.25)
            print(f"the survivor by itself: {more}; idle after {await idle(http, d.url):.2f} s")
            assert not more.wrong

    run(test())

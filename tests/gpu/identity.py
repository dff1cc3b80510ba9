"""Whether prefill and decode answer as one engine does, token for token.

Half precision rounds differently with another batch or another tensor-parallel size. So where an answer
departs from the reference, the reference's own probabilities decide: the two tokens must have been as good as
equal there (a near tie), and what follows is not compared. KV in a wrong place, or too late, changes the very
next token by far more than a tie.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp

from tests.engine.direct import Pair, probe
from tests.engine.harness import complete, greedy, metric

Http = aiohttp.ClientSession
Ask = Callable[[int, list[int]], Awaitable[list[int]]]

TOP = 5


@dataclass(frozen=True)
class Answer:
    """What one engine says: its tokens, and for each the log probabilities of the likeliest ones."""

    tokens: list[int]
    top: list[dict[str, float]]


@dataclass
class Comparison:
    """How answers compare: exactly equal, equal up to a near tie, wrong."""

    equal: int = 0
    ties: int = 0
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.equal} equal, {self.ties} up to a near tie, {len(self.wrong)} wrong"


def client() -> Http:
    """Without a limit on connections, and with none kept for the next test."""
    return Http(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60))


def prompts(name: str, count: int, longest: int = 3000) -> list[list[int]]:
    """Random prompts, of 1 to `longest` tokens; the edges of blocks and of prefill chunks are among them."""
    rng = random.Random(name)
    lengths = [1, 2, 15, 16, 17, 33, 511, 512, 513, longest][: max(1, count // 3)]
    lengths += [rng.randint(1, longest) for _ in range(count - len(lengths))]
    rng.shuffle(lengths)
    return [rng.choices(range(3, 390), k=n) for n in lengths]


async def all_of(ask: Ask, asked: Sequence[list[int]], at_once: int = 8) -> list[list[int]]:
    """The answers, `at_once` requests at a time."""
    slots = asyncio.Semaphore(at_once)

    async def one(i: int, prompt: list[int]) -> list[int]:
        async with slots:
            return await ask(i, prompt)

    return list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(asked))))


async def reference(http: Http, url: str, asked: Sequence[list[int]], n: int = 16) -> list[Answer]:
    """What one engine answers by itself."""
    kept: dict[int, Answer] = {}

    async def ask(i: int, prompt: list[int]) -> list[int]:
        said = await complete(http, url, prompt, n, logprobs=TOP, return_tokens_as_token_ids=True)
        choice = said["choices"][0]
        kept[i] = Answer(list(choice["token_ids"]), choice["logprobs"]["top_logprobs"])
        return kept[i].tokens

    await all_of(ask, asked)
    answers = [kept[i] for i in range(len(asked))]
    different = len({tuple(answer.tokens) for answer in answers})
    assert different > len(asked) // 2, f"only {different} different answers: they would show nothing"
    return answers


def through(http: Http, url: str, n: int = 16) -> Ask:
    """By a proxy; every other request streamed."""

    async def ask(i: int, prompt: list[int]) -> list[int]:
        return await greedy(http, url, prompt, n, stream=i % 2 == 0)

    return ask


async def between(http: Http, prefill: str, decode: str, n: int = 16) -> Ask:
    """By a prefill and a decode engine, driven as a proxy drives them."""
    probed = await probe(http, prefill)

    async def ask(i: int, prompt: list[int]) -> list[int]:
        first, tokens = await Pair(http, prefill, decode, probed, prompt, n).gather()
        for side, said in (("prefill", first), ("decode", tokens)):
            assert isinstance(said, list), f"{side} on a prompt of {len(prompt)} tokens: {said!r}"
        return list(tokens)

    return ask


def compare(
    asked: Sequence[list[int]], expected: Sequence[Answer], got: Sequence[list[int]], tolerance: float
) -> Comparison:
    """Compare answers with the reference's.

    Args:
        tolerance: log probability by which a token may be behind the reference's choice in a near tie.
    """
    result = Comparison()
    for prompt, one, tokens in zip(asked, expected, got, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one.tokens, tokens, strict=False)) if a != b), None)
        if at is None and len(tokens) == len(one.tokens):
            result.equal += 1
            continue
        if at is not None:
            top = one.top[at]
            behind = max(top.values()) - top.get(f"token_id:{tokens[at]}", float("-inf"))
            if behind <= tolerance:
                result.ties += 1
                continue
            why = f"token {at} is {tokens[at]}, {behind:.2f} behind {one.tokens[at]}"
        else:
            why = f"{len(tokens)} tokens, expected {len(one.tokens)}"
        result.wrong += (f"prompt of {len(prompt)} tokens: {why}",)
    return result


async def assert_as_one(
    what: str,
    http: Http,
    one: str,
    decode: str,
    ask: Ask,
    asked: Sequence[list[int]],
    *,
    tolerance: float = 0.15,
    least: float = 0.6,
) -> None:
    """`ask` answers as the engine at `one`, and the decode engine loaded all KV but the last token's.

    Args:
        tolerance: see `compare`.
        least: share of answers that must be equal to the last token.
    """
    expected = await reference(http, one, asked)
    before = await metric(http, decode, "vllm:external_prefix_cache_hits_total")
    got = await all_of(ask, asked)
    moved = await metric(http, decode, "vllm:external_prefix_cache_hits_total") - before
    result = compare(asked, expected, got, tolerance)
    tokens = sum(len(prompt) - 1 for prompt in asked)
    print(f"{what}: {len(asked)} prompts: {result}; decode loaded {moved:.0f} of {tokens} tokens")
    assert not result.wrong, f"{what}: {result}: " + "; ".join(result.wrong[:5])
    assert result.equal >= least * len(asked), f"{what}: {result}: too many ties to trust"
    assert moved == tokens, f"{what}: decode loaded {moved:.0f} of {tokens} tokens, and computed the others"

"""What a prompt's token ids cost the proxy, the first time and in the conversation's next turn.

    python benchmarks/tokens.py [--json FILE] [--tokenizer FOLDER]

Without --tokenizer, one of usual size is trained (byte-level BPE, 32,768 tokens, words split as in Llama 3)
on 16 MB of this Python's own source files, which takes a minute. Chats in ChatML: a system message, then
turns of a user's 400 and an assistant's 1,200 characters of Python source up to the size wanted; the next
turn adds one more of each. `thread` is what `Tokens.ids` takes by way of its threads, `inline` on the spot,
and `blocked` is the longest that the event loop was kept from running meanwhile.
"""

import argparse
import asyncio
import random
import sysconfig
import time
from pathlib import Path

import msgspec
import report

from mooncake_connector.scheduler.prompts.tokenizer_files import TokenizerFiles, read
from mooncake_connector.scheduler.prompts.tokens import Tokenizer, Tokens
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, ClientRequest

BENCHMARK = "tokens"
SIZES = {"0.2 kB": 200, "1 kB": 1_000, "2 kB": 2_000, "5 kB": 5_000, "20 kB": 20_000, "200 kB": 200_000}
ROUNDS = 15
VOCABULARY = 32_768
CORPUS_BYTES = 16_000_000
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def source() -> str:
    """Python's own library, as one text."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = (file.read_text(errors="ignore") for file in files if "site-packages" not in file.parts)
    return "".join(texts)[:CORPUS_BYTES]


def train(text: str) -> TokenizerFiles:
    """A tokenizer of usual size."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([text[at : at + 10_000] for at in range(0, len(text), 10_000)], trainer)
    bpe.add_special_tokens([AddedToken(mark, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")])
    return TokenizerFiles(bpe.to_str(), {}, {"default": CHATML})


class Conversation:
    """Turns of Python source, none like another."""

    def __init__(self, text: str, seed: int) -> None:
        self._text = text
        self._random = random.Random(seed)
        self.messages = [{"role": "system", "content": self._said(100)}]

    def _said(self, length: int) -> str:
        at = self._random.randrange(len(self._text) - length)
        return self._text[at : at + length]

    def grow(self, size: int) -> None:
        while (missing := size - sum(len(m["content"]) for m in self.messages)) > 0:
            role, length = ("user", 400) if len(self.messages) % 2 else ("assistant", 1200)
            self.messages.append({"role": role, "content": self._said(min(length, missing))})

    def request(self) -> ClientRequest:
        return ClientRequest.parse(CHAT, msgspec.json.encode({"model": "m", "messages": self.messages}))


async def timed(tokens: Tokens, request: ClientRequest) -> tuple[float, float, int]:
    """Microseconds that it took, the longest that the event loop stood still meanwhile, and token ids."""
    loop = asyncio.get_running_loop()
    gaps: list[float] = []
    last = time.perf_counter()

    def tick() -> None:
        nonlocal last
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        if not done:
            loop.call_soon(tick)

    done = False
    start = time.perf_counter()
    task = asyncio.ensure_future(tokens.ids(request))
    loop.call_soon(tick)
    found = await task
    took = time.perf_counter() - start
    done = True
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert found is not None
    return took * 1e6, max(gaps) * 1e6, len(found.ids)


async def plain(tokens: Tokens, request: ClientRequest) -> float:
    """Microseconds, with nothing else in the event loop."""
    start = time.perf_counter()
    await tokens.ids(request)
    return (time.perf_counter() - start) * 1e6


async def measure(files: TokenizerFiles, text: str) -> list[report.Row]:
    """All figures."""
    rows = []
    for label, size in SIZES.items():
        for way, inline_bytes in (("thread", 0), ("inline", 1 << 40)):
            tokens = Tokens(inline_bytes=inline_bytes)
            tokens._tokenizer = Tokenizer(files)
            first, following, whole, blocked = [], [], [], []
            counts: list[float] = []
            for seed in range(ROUNDS):
                talk = Conversation(text, seed * 1000 + size)
                talk.grow(size)
                first.append(await plain(tokens, talk.request()))
                talk.grow(size + 1600)
                following.append(await plain(tokens, talk.request()))
                body = {"prompt": "".join(m["content"] for m in talk.messages)}
                request = ClientRequest.parse(COMPLETIONS, msgspec.json.encode(body))
                whole.append(await plain(tokens, request))
                other = Conversation(text, seed * 1000 + size + 500)
                other.grow(size)
                _, longest, count = await timed(tokens, other.request())
                blocked.append(longest)
                counts.append(count)
            tokens.close()
            case: dict[str, object] = {"prompt": label, "way": way}
            rows.append(report.row(BENCHMARK, "chat", case, "first_us", first, "us"))
            rows.append(report.row(BENCHMARK, "chat", case, "next_turn_us", following, "us"))
            rows.append(report.row(BENCHMARK, "completion", case, "whole_us", whole, "us"))
            rows.append(report.row(BENCHMARK, "chat", case, "blocked_us", blocked, "us"))
            if way == "thread":
                rows.append(report.row(BENCHMARK, "chat", case, "tokens", counts, "tokens"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser)
    parser.add_argument("--tokenizer", help="a model's folder")
    options = parser.parse_args()
    text = source()
    files = asyncio.run(read(options.tokenizer)) if options.tokenizer else train(text)
    busy = [report.settle(60)]
    rows = asyncio.run(measure(files, text))
    report.publish(rows, options.json, ["tokenizers", "transformers", "numpy", "msgspec"], busy=busy)


if __name__ == "__main__":
    main()

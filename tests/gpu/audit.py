"""An audit of KV blocks: every byte of every block has an owner, and changes for nobody else.

The worker halves of the connector with real KV tensors, each in a process of its own, without engines.
Decode stamps a block the moment it is released, as its next owner would write into it, and looks at all
stamps again and again: a write that comes after its blocks were given away changes one. A load that is
reported complete must have brought exactly what prefill wrote for that request into exactly those blocks.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.clock import NUM_EVENTS, GpuClock, LayerClock
from mooncake_connector.kv_transfer.session import Outcome
from tests.agents import Worker

LAYERS = 8
CONFIG: dict[str, Any] = {
    "lease_s": 4.0,
    "heartbeat_s": 1.0,
    "peer_timeout_s": 3.0,
    "load_timeout_s": 4.0,
    "match_timeout_s": 1.0,
}
_FACTORS = (0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D, 0x14057B7EF767814F)


@dataclass(frozen=True)
class Job:
    """One request: its size and what happens to it, in seconds since its turn.

    Attributes:
        number: of the request, and the seed of its KV.
        blocks: that it takes.
        chunks: steps of its prefill.
        prefill_at: when prefill starts; None: never.
        reserve_at: when decode reserves its blocks.
        abort_at: when decode aborts it; None: never.
        prefill_abort: after which chunk prefill aborts it; None: never.
    """

    number: int
    blocks: int
    chunks: int
    prefill_at: float | None
    reserve_at: float
    abort_at: float | None
    prefill_abort: int | None

    @property
    def name(self) -> str:
        return f"r{self.number}"


def jobs(rng: random.Random, first: int, count: int, most: int) -> list[Job]:
    """Requests of up to `most` blocks: half of them undisturbed, others aborted on either side, or lost."""
    made = []
    for number in range(first, first + count):
        fate = rng.random()
        made.append(
            Job(
                number,
                rng.randint(1, most),
                rng.randint(1, 4),
                None if fate > 0.96 else 0.03 * rng.random(),
                0.03 * rng.random(),
                0.03 * rng.random() if 0.5 < fate < 0.8 else None,
                rng.randint(0, 2) if 0.8 < fate < 0.9 else None,
            )
        )
    return made


def _clock(device: str) -> LayerClock | None:
    if device == "cpu":
        return None
    from mooncake_connector.kv_transfer.transport.cuda.driver import Context, Event

    context = Context.of(torch.device(device).index)
    events = [Event(context) for _ in range(NUM_EVENTS)]
    return GpuClock(LAYERS, events, lambda: torch.cuda.current_stream(device).cuda_stream)


class _Side:
    """What both ends share: the worker, its blocks, a thread that acts as the engine."""

    def __init__(self, engine_id: str, device: str, path: str, blocks: int, heads: int, seed: int) -> None:
        self.device = device
        if device != "cpu":
            torch.cuda.set_device(device)
        config = ConnectorConfig(path=path, **CONFIG)
        self.worker = Worker(engine_id, config, LAYERS, blocks, heads, device, _clock(device))
        self.words = self.worker.kv.view(torch.int64).flatten(2)  # [layer, block, word]
        self.rng = random.Random(seed)
        self.free = list(range(1, blocks))
        self.counts: Counter[str] = Counter()
        self.trouble: list[str] = []
        self._thread: threading.Thread | None = None
        self._word = torch.arange(self.words.shape[2], device=device)

    def address(self) -> str:
        return self.worker.agent.address

    def take(self, count: int) -> list[int]:
        """So many free blocks, from anywhere; none if there are not as many."""
        if len(self.free) < count:
            return []
        self.rng.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def stamp(
        self, owner: torch.Tensor, position: torch.Tensor, layers: Sequence[int] | None = None
    ) -> torch.Tensor:
        """int64 [layer, block, word]: what blocks of these owners hold at these positions (both [block])."""
        layer = torch.tensor(range(LAYERS) if layers is None else layers, device=self.device)
        a, b, c, d = _FACTORS
        block = owner.to(self.device) * a + position.to(self.device) * c
        return layer[:, None, None] * b + block[None, :, None] + self._word * d

    def begin(self, todo: list[Job], **settings: Any) -> None:
        """Start the engine on these requests."""
        self._thread = threading.Thread(target=self._guarded, args=(todo,), kwargs=settings, daemon=True)
        self._thread.start()

    def end(self, seconds: float) -> tuple[dict[str, int], list[str]]:
        """What happened, and what was wrong, once all requests are over."""
        assert self._thread is not None
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.trouble.append(f"not at its end after {seconds} s: {dict(self.counts)}")
        return dict(self.counts), self.trouble

    def close(self) -> None:
        self.worker.agent.close()
        del self.words, self.worker
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _guarded(self, todo: list[Job], **settings: Any) -> None:
        try:
            if self.device != "cpu":
                torch.cuda.set_device(self.device)  # of this thread
            self.run(todo, **settings)
        except Exception as error:
            self.trouble.append(f"{type(error).__name__}: {error}")
            raise

    def run(self, todo: list[Job], prefill: str = "", linger: float = 0.0) -> None:
        raise NotImplementedError


class PrefillSide(_Side):
    """Computes requests' KV chunk by chunk, several requests in turns."""

    def __init__(self, device: str, path: str, blocks: int, heads: int, seed: int) -> None:
        super().__init__("p", device, path, blocks, heads, seed)
        self._step = 0
        self._held: dict[str, list[int]] = {}

    def run(self, todo: list[Job], prefill: str = "", linger: float = 0.0) -> None:
        """Until every block is free again."""
        waiting = [job for job in todo if job.prefill_at is not None]
        began = time.monotonic()
        active: list[tuple[Job, list[int], int]] = []
        while waiting or active or self._held:
            self._reclaim()
            due = waiting and len(active) < 4 and time.monotonic() - began > (waiting[0].prefill_at or 0)
            if due and (blocks := self.take(waiting[0].blocks)):
                active.append((waiting.pop(0), blocks, 0))
                began = time.monotonic()
            if not active:
                time.sleep(0.001)
                continue
            job, blocks, chunk = active.pop(self.rng.randrange(len(active)))
            self._compute(job, blocks, chunk)
            if job.prefill_abort == chunk:
                self._end(job, held=False)
                self.free += blocks  # the next owner may write into them at once
                self.counts["aborted"] += 1
            elif chunk + 1 == job.chunks:
                self._held[job.name] = blocks
                self._end(job, held=True)
                self.counts["finished"] += 1
            else:
                active.append((job, blocks, chunk + 1))
            time.sleep(0.002 * self.rng.random())

    def _compute(self, job: Job, blocks: list[int], chunk: int) -> None:
        begin, end = (len(blocks) * part // job.chunks for part in (chunk, chunk + 1))

        def write(layer: int, new: list[int]) -> None:
            if new:
                owner = torch.full((len(new),), job.number)
                self.words[layer, torch.tensor(new, device=self.device)] = self.stamp(
                    owner, torch.arange(begin, end), [layer]
                )[0]

        self.worker.compute(self._step, job.name, blocks, begin, end, write)
        self._step += 1

    def _end(self, job: Job, *, held: bool) -> None:
        self.worker.agent.step(self._step, [], [], [(job.name, held)])

    def _reclaim(self) -> None:
        for name in self.worker.agent.take_sent():
            self.free += self._held.pop(name)


class DecodeSide(_Side):
    """Reserves blocks, aborts some, and audits all."""

    def __init__(self, device: str, path: str, blocks: int, heads: int, seed: int) -> None:
        super().__init__("d", device, path, blocks, heads, seed)
        self._owner = torch.zeros(blocks, dtype=torch.int64)  # stamps: negative, new with each release
        self._stamps = 0
        self._loads: dict[str, tuple[Job, list[int], float]] = {}
        self._release(list(self.free))

    def run(self, todo: list[Job], prefill: str = "", linger: float = 0.0) -> None:
        """Until every load is reported, and `linger` seconds more of auditing."""
        todo, began, audited = list(todo), time.monotonic(), 0.0
        while todo or self._loads:
            now = time.monotonic()
            due = todo and len(self._loads) < 8 and now - began > todo[0].reserve_at
            if due and (blocks := self.take(todo[0].blocks)):
                job = todo.pop(0)
                self._loads[job.name] = (job, blocks, now)
                self.worker.reserve(job.name, blocks, prefill)
                began = now
            for job, _, since in list(self._loads.values()):
                if job.abort_at is not None and now - since > job.abort_at:
                    self._abort(job)
            self._take_reports()
            if now - audited > 0.02:
                self._audit()
                audited = time.monotonic()
            time.sleep(0.0005)
        until = time.monotonic() + linger
        while time.monotonic() < until:
            self._audit()
            time.sleep(0.01)
        self._audit()

    def _abort(self, job: Job) -> None:
        name, (_, blocks, _) = job.name, self._loads[job.name]
        self._loads[name] = (replace(job, abort_at=None), blocks, 0.0)
        self.worker.agent.post(lambda now: self.worker.agent.decode.abort(name, now))
        self.counts["abort asked"] += 1

    def _take_reports(self) -> None:
        for report in self.worker.agent.take_reports():
            job, blocks, _ = self._loads.pop(report.request_id)
            self.counts[str(report.outcome)] += 1
            self.counts["bytes"] += report.nbytes
            if report.outcome is Outcome.LOADED:
                expected = self.stamp(torch.full((len(blocks),), job.number), torch.arange(len(blocks)))
                here = self.words[:, torch.tensor(blocks, device=self.device)]
                if not torch.equal(here, expected):
                    wrong = (here != expected).any(2)
                    self.trouble.append(
                        f"{job}: {int(wrong.sum())} of {wrong.numel()} pages are wrong, the first at "
                        f"(layer, position) {wrong.nonzero()[0].tolist()}"
                    )
            else:
                self.counts[f"because {report.reason[:60]}"] += 1
            self._release(blocks)

    def _release(self, blocks: list[int]) -> None:
        """The blocks are somebody else's, who writes into them at once."""
        self._stamps -= 1
        ids = torch.tensor(blocks)
        self._owner[ids] = self._stamps
        self.words[:, ids.to(self.device)] = self.stamp(self._owner[ids], ids)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        self.free = sorted({*self.free, *blocks})

    def _audit(self) -> None:
        """Every free block is as its owner left it."""
        ids = torch.tensor(self.free)
        expected = self.stamp(self._owner[ids], ids)
        wrong = (self.words[:, ids.to(self.device)] != expected).any(2)
        self.counts["audits"] += 1
        self.counts["pages audited"] += wrong.numel()
        if bool(wrong.any()):
            layer, at = wrong.nonzero()[0].tolist()
            self.trouble.append(
                f"{int(wrong.sum())} pages were written after their release, the first: layer {layer} of "
                f"block {self.free[at]}, while {sorted(self._loads)} were being loaded"
            )
            self._release(list(self.free))  # each is told once

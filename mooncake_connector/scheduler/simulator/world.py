"""The event loop: requests arrive, the conductor places them, engines and links take their time."""

import heapq
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from mooncake_connector.scheduler.policy.base import (
    Arrival,
    Instance,
    Placement,
    Rejected,
    Side,
    Verdict,
    Waiting,
)
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.simulator.blocks import Blocks
from mooncake_connector.scheduler.simulator.engine import Engine
from mooncake_connector.scheduler.simulator.gaps import Gaps
from mooncake_connector.scheduler.simulator.links import Links
from mooncake_connector.scheduler.simulator.setup import Setup
from mooncake_connector.scheduler.simulator.task import Task
from mooncake_connector.scheduler.simulator.trace import BLOCK, Job

SAMPLES = 600
"""So many times the loads are noted down while requests arrive."""


class Sample(msgspec.Struct, frozen=True):
    """Loads at one moment, each the mean over its pool.

    Attributes:
        at: seconds.
        prefill: seconds that the prompts there would take, over the TTFT that is promised.
        decode: the step that runs, over the TBT that is promised.
        kv: part of decode's KV that is taken.
        prompts, answers: requests at prefill, and decoding, in all.
    """

    at: float
    prefill: float
    decode: float
    kv: float
    prompts: int
    answers: int


class World:
    """One simulation, run once.

    Args:
        jobs: by time.

    Attributes:
        tasks: every request, with what became of it.
        engines: by name.
        gaps: between tokens, of all answers.
        samples: loads over time.
        copies: prefixes that were copied from engine to engine.
        wall: seconds that `run` took.
    """

    def __init__(self, setup: Setup, jobs: Sequence[Job]) -> None:
        self.setup = setup
        self.tasks = [Task(number, job) for number, job in enumerate(jobs)]
        self.gaps = Gaps(setup.scheduling.slo.tbt)
        self.samples: list[Sample] = []
        self.copies = 0
        self.wall = 0.0
        self.estimators = setup.estimators()
        self._events: list[tuple[float, int, Callable[[float, int], None], int]] = []
        self._count = 0
        self._sent = 0
        self._open = len(self.tasks)
        self._woken: float | None = None
        self._index = PrefixIndex(BLOCK)
        self.conductor = Conductor(setup.scheduling, self._index, self.estimators, setup.seed)
        self._links = Links(setup.costs)
        self._copies: dict[int, tuple[str, int, int, float]] = {}
        self.engines: dict[str, Engine] = {}
        pools: dict[Side, int] = {"prefill": setup.prefill, "decode": setup.decode, "coupled": setup.coupled}
        for side, count in pools.items():
            for number in range(count):
                self._add(f"{side}-{number}", side)

    def run(self) -> None:
        """Until every request has ended."""
        began = time.perf_counter()
        if self.tasks:
            last = self.tasks[-1].at
            self._schedule(self.tasks[0].at, self._arrive, 0)
            if self.setup.progress:
                self._schedule(self.setup.progress, self._progress, 0)
            self._schedule(0.0, self._sample, 0)
            self._pause = max(last, 1.0) / SAMPLES
        events, due = self._events, self.conductor.due
        while self._open:
            now, _, call, argument = heapq.heappop(events)
            call(now, argument)
            moment = due()
            if moment is not None and (self._woken is None or moment < self._woken):
                self._woken = max(now, moment)
                self._schedule(self._woken, self._wake, 0)
        self.wall = time.perf_counter() - began

    def settle(self) -> None:
        """What is still to come when the last request has ended, such as KV of one that was dropped."""
        pending = (self._arrive, self._wake, self._progress, self._sample)
        while self._events:
            now, _, call, argument = heapq.heappop(self._events)
            if call not in pending:
                call(now, argument)

    # What engines say.

    def computed(self, task: Task, now: float) -> None:
        task.computed = now
        verdict = self.conductor.prefilled(
            task.name,
            now,
            queued=task.started - task.came,
            computed=now - task.started,
            cached=task.hit,
        )
        if isinstance(verdict, Rejected):
            self.engines[task.prefill].release(task, now)
            if self.setup.order == "concurrent":
                self.engines[task.decode].release(task, now)
            self._end(task, "dropped")
            return
        if self.setup.first_token == "prefill":
            self._first(task, now)
        if self.setup.order == "serial":
            self.engines[task.decode].reserve(task, now)
        elif task.reserved >= 0:
            self._send(task, now)

    def reserved(self, task: Task, now: float) -> None:
        task.reserved = now
        if task.computed >= 0:
            self._send(task, now)

    def first_token(self, task: Task, now: float) -> None:
        if task.computed < 0:
            self.conductor.prefilled(
                task.name,
                now,
                queued=task.started - task.came,
                computed=now - task.started,
                cached=task.hit,
            )
        if task.first < 0:
            self._first(task, now)
        else:
            self.gaps.add(now - task.computed, 1)

    def finished(self, task: Task, now: float) -> None:
        task.last = max(task.first, now + self.setup.costs.egress)
        self.conductor.ended(task.name, now, task.output)
        self._end(task, "done")

    # What happens when its time has come; the number says whom it is about.

    def _arrive(self, now: float, number: int) -> None:
        if number + 1 < len(self.tasks):
            self._schedule(self.tasks[number + 1].at, self._arrive, number + 1)
        task = self.tasks[number]
        if not self.setup.prefix_caching:
            task.keys = ()
        if task.prompt + task.output > self.setup.costs.kv_tokens:
            self._end(task, "failed")
            return
        arrival = Arrival(id=task.name, tokens=task.prompt, keys=task.keys, slo=self.setup.scheduling.slo)
        self._decide(task, self.conductor.arrive(arrival, now), now)

    def _wake(self, now: float, _: int) -> None:
        if now != self._woken:
            # An earlier one was asked for since.
            return
        self._woken = None
        for name, verdict in self.conductor.wake(now):
            self._decide(self.tasks[int(name)], verdict, now)

    def _progress(self, now: float, _: int) -> None:
        for engine in self.engines.values():
            for task, tokens in engine.progress(now):
                self.conductor.progressed(task.name, tokens, now)
        self._schedule(now + self.setup.progress, self._progress, 0)

    def _sample(self, now: float, _: int) -> None:
        slo, costs = self.setup.scheduling.slo, self.setup.costs
        engines = self.engines.values()
        first = [engine for engine in engines if not engine.name.startswith("decode")]
        second = [engine for engine in engines if not engine.name.startswith("prefill")]
        self.samples.append(
            Sample(
                now,
                sum(engine.pending for engine in first) * costs.per_token / len(first) / slo.ttft,
                sum(engine.step_seconds() for engine in second) / len(second) / slo.tbt,
                sum(engine.blocks.used for engine in second) / len(second) / costs.kv_tokens,
                sum(engine.requests - engine.batch for engine in first),
                sum(engine.batch for engine in second),
            )
        )
        self._schedule(now + self._pause, self._sample, 0)

    def _submit(self, now: float, number: int) -> None:
        task = self.tasks[number]
        self.engines[task.prefill].submit(task, now)

    def _copied(self, now: float, number: int) -> None:
        """The copy of a prefix has come."""
        task = self.tasks[number]
        source, blocks, missing, began = self._copies.pop(number)
        self.engines[task.prefill].blocks.receive(task.keys[:blocks])
        self.conductor.copied(source, task.prefill, missing, now - began)
        self._submit(now, number)

    def _landed(self, now: float, number: int) -> None:
        task = self.tasks[number]
        task.landed = now
        self.engines[task.decode].join(task, now)
        self.engines[task.prefill].release(task, now)

    def _told(self, now: float, number: int) -> None:
        """The client has its first token."""
        self.conductor.first_token(self.tasks[number].name, now)

    # Steps of these.

    def _decide(self, task: Task, verdict: Verdict, now: float) -> None:
        if isinstance(verdict, Placement):
            self._place(task, verdict, now)
        elif isinstance(verdict, Rejected):
            self._end(task, "rejected")
        elif not isinstance(verdict, Waiting):
            self._end(task, "failed")

    def _place(self, task: Task, placement: Placement, now: float) -> None:
        costs = self.setup.costs
        task.seq = self._sent
        self._sent += 1
        task.placed = now
        task.decode = placement.decode
        task.prefill = placement.prefill or placement.decode
        task.elsewhere = placement.prefill is not None
        if task.elsewhere and self.setup.order == "concurrent":
            self.engines[task.decode].reserve(task, now)
        there = now + costs.ingress + costs.ingress_per_token * task.prompt
        if placement.copy is not None:
            source = placement.copy.source
            keys = task.keys[: placement.copy.tokens // BLOCK]
            # What the source holds of it by now.
            blocks = self.engines[source].blocks.match(keys)
            missing = BLOCK * (blocks - self.engines[task.prefill].blocks.match(keys))
            if missing > 0:
                self.copies += 1
                self._copies[task.number] = (source, blocks, missing, now)
                landed = self._links.send(source, missing, now) + costs.handoff
                self._schedule(max(there, landed), self._copied, task.number)
                return
        self._schedule(there, self._submit, task.number)

    def _first(self, task: Task, now: float) -> None:
        costs = self.setup.costs
        task.first = now + costs.egress + costs.egress_per_token * task.prompt
        self._schedule(task.first, self._told, task.number)

    def _send(self, task: Task, now: float) -> None:
        """KV goes to decode layer by layer while it is computed, if decode has room: here, the rest of it."""
        tokens = task.prompt - task.kept
        sent = self._links.send(task.prefill, tokens, max(task.started, task.reserved))
        self._schedule(max(now, sent) + self.setup.costs.handoff, self._landed, task.number)

    def _end(self, task: Task, outcome: str) -> None:
        task.outcome = outcome
        self._open -= 1

    def _add(self, name: str, side: Side) -> None:
        costs, index = self.setup.costs, self._index
        index.join(name)
        more = costs.cache_tokens
        blocks = Blocks(costs.kv_tokens, more, partial(index.store, name), partial(index.remove, name))
        self.engines[name] = Engine(
            name, costs, blocks, self.gaps, self, self._schedule, whole=self.setup.whole
        )
        instance = Instance(name=name, side=side, group="all", kv_tokens=costs.kv_tokens)
        self.conductor.join(instance, 0.0)

    def _schedule(self, at: float, call: Callable[[float, int], None], argument: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, call, argument))

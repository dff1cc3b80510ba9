"""One engine: prompts in chunks, continuous batching, KV capacity. It costs time and computes nothing.

While no prompt is under way the batch of decoding sequences changes only when one joins or leaves, so all
steps up to there are one jump (`Costs.decode_steps`). Who comes in the middle cuts the jump at the end of
the step that runs.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from mooncake_connector.scheduler.simulator.blocks import Blocks
from mooncake_connector.scheduler.simulator.costs import Costs, pairs
from mooncake_connector.scheduler.simulator.gaps import Gaps
from mooncake_connector.scheduler.simulator.task import Task
from mooncake_connector.scheduler.simulator.trace import BLOCK

Schedule = Callable[[float, Callable[[float, int], None], int], None]


class Observer(Protocol):
    """Who is told what an engine did; times are the ends of its steps."""

    def computed(self, task: Task, now: float) -> None:
        """A prompt that is decoded elsewhere is computed; its KV is held until `Engine.release`."""

    def first_token(self, task: Task, now: float) -> None:
        """The answer's first token is there."""

    def finished(self, task: Task, now: float) -> None:
        """The answer's last token is there, and its KV is let go."""

    def reserved(self, task: Task, now: float) -> None:
        """KV that was asked for by `Engine.reserve` is set aside."""


class Engine:
    """A prefill, decode or coupled engine: what it does depends on what it is asked for.

    A step holds all decoding sequences and, within `Costs.step_tokens`, chunks of prompts, first come first
    served. A prompt begins when its KV finds room. When answers have grown into all the room, the youngest
    sequence is preempted and computed anew later, as vLLM does.

    Args:
        schedule: calls a function at a time, with that time and a number.
        whole: a prompt is a step of its own, and everything that decodes stands still (no chunked prefill).

    Attributes:
        pending: prompt tokens that wait or are under way, cached ones included until they begin.
        batch, context: sequences that decode, and tokens that they attend to.
    """

    def __init__(
        self,
        name: str,
        costs: Costs,
        blocks: Blocks,
        gaps: Gaps,
        observer: Observer,
        schedule: Schedule,
        *,
        whole: bool = False,
    ) -> None:
        self.name = name
        self.costs = costs
        self.blocks = blocks
        self.pending = 0
        self.batch = 0
        self.context = 0
        self._whole = whole
        self._gaps = gaps
        self._observer = observer
        self._schedule = schedule
        self._line: list[tuple[int, Task]] = []
        self._asked: list[tuple[int, Task]] = []
        self._prefilling: list[Task] = []
        self._joining: deque[Task] = deque()
        self._decoding: dict[int, Task] = {}
        self._ends: list[tuple[int, int, Task]] = []
        self._fresh: list[Task] = []  # loaded from prefill: their first step makes the first token
        self._steps = 0
        self._slow = 0
        self._late: list[tuple[Task, float]] = []  # who joined while it stood still, and when in that time
        self._stood = 0.0  # decoding has stood still since its last step, seconds
        self._version = 0
        self._running = False
        self._began = 0.0
        self._until = 0.0
        self._jump = 0
        self._chunks: list[tuple[Task, int]] = []

    @property
    def requests(self) -> int:
        """Requests that wait or run here."""
        return len(self._line) + len(self._prefilling) + len(self._decoding) + len(self._joining)

    def submit(self, task: Task, now: float) -> None:
        """A prompt to compute: for decode elsewhere if `task.elsewhere`, else the whole answer."""
        task.todo = task.kv
        task.came = now
        self.pending += task.todo
        heapq.heappush(self._line, (task.seq, task))
        self._wake(now)

    def reserve(self, task: Task, now: float) -> None:
        """Set KV aside for a prompt that another engine computes; `Observer.reserved` says when."""
        heapq.heappush(self._asked, (task.seq, task))
        self._grant(now)

    def join(self, task: Task, now: float) -> None:
        """The KV of a prompt that was reserved has come: decode from the next step on."""
        self.blocks.computed(task.keys)
        self._joining.append(task)
        self._wake(now)

    def release(self, task: Task, now: float) -> None:
        """The KV of a prompt is not needed here: it was sent, or its request was dropped."""
        if (task.seq, task) in self._asked:
            self._asked.remove((task.seq, task))
            heapq.heapify(self._asked)
        else:
            self.blocks.let_go(task.keys, task.prompt - BLOCK * len(task.keys))
        self._freed(now)

    def progress(self, now: float) -> Iterator[tuple[Task, int]]:
        """Every sequence that decodes, and its tokens by now, a running jump's included."""
        done = 0
        if self._running and self._jump > 1 and now > self._began:
            done = self.costs.steps_until(self.batch, self.context, now - self._began) - 1
        for task in self._decoding.values():
            yield task, task.made + self._steps - task.joined + done

    def step_seconds(self) -> float:
        """How long the step that runs takes, 0 if none does."""
        if not self._running:
            return 0.0
        return self.costs.step(self.batch, self.context) if self._jump else self._until - self._began

    def _wake(self, now: float) -> None:
        if not self._running:
            self._begin(now)
        elif self._jump > 1 and (self._line or self._joining):
            steps = self.costs.steps_until(self.batch, self.context, now - self._began)
            if steps < self._jump:
                self._jump = steps
                self._plan(self._began + self.costs.decode_steps(self.batch, self.context, steps))

    def _plan(self, until: float) -> None:
        self._running = True
        self._until = until
        self._version += 1
        self._schedule(until, self._ended, self._version)

    def _begin(self, now: float) -> None:
        """Choose the next step, or jump, or stand still until someone comes."""
        while self._joining and self.batch + len(self._prefilling) < self.costs.max_batch:
            task = self._joining.popleft()
            self._add(task)
            self._fresh.append(task)
        while self.batch and self.blocks.capacity - self.blocks.used < self.batch:
            self._preempt(now)
        self._began = now
        self._chunks = self._choose(now)
        if self._chunks:
            self._jump = 0
            tokens = sum(chunk for _, chunk in self._chunks)
            paired = sum(pairs(task.kv - task.todo, chunk) for task, chunk in self._chunks)
            batch, context = (0, 0) if self._whole else (self.batch, self.context)
            seconds = self.costs.step(batch, context, tokens, paired)
            if self._chunks[0][0].elsewhere:
                seconds *= 1 + self.costs.streaming
            self._plan(now + seconds)
        elif self.batch:
            room = (self.blocks.capacity - self.blocks.used) // self.batch
            single = self._fresh or self._stood
            self._jump = 1 if single else min(self._next_end() - self._steps, room)
            self._plan(now + self.costs.decode_steps(self.batch, self.context, self._jump))

    def _choose(self, now: float) -> list[tuple[Task, int]]:
        """The prompt chunks of the next step."""
        decoding = 0 if self._whole else self.batch
        budget = self.costs.step_tokens - decoding
        chunks = []
        for task in self._prefilling:
            chunks.append((task, min(task.todo, budget)))
            budget -= chunks[-1][1]
            if budget <= 0:
                return chunks
        while self._line and budget > 0 and self.batch + len(self._prefilling) < self.costs.max_batch:
            task = self._line[0][1]
            if self._asked and self._asked[0][0] < task.seq:
                break
            # One token more for everybody: who begins is not to be preempted by the very next step.
            if not self.blocks.fits(task.keys, task.private + self.batch + 1):
                break
            heapq.heappop(self._line)
            # The last token is computed, whatever is cached, for its logits.
            cached = min(BLOCK * self.blocks.match(task.keys), task.kv - 1)
            self.blocks.hold(task.keys, task.private)
            task.todo -= cached
            self.pending -= cached
            if task.started < 0:
                task.started, task.hit = now, cached
            self._prefilling.append(task)
            chunks.append((task, task.todo if self._whole else min(task.todo, budget)))
            budget -= chunks[-1][1]
            if self._whole:
                break
        return chunks

    def _ended(self, now: float, version: int) -> None:
        """A step, or a jump, is over."""
        if version != self._version:
            return
        # `_running` stays until everything is noted: those who are told of it can't begin the next step.
        steps, self._jump = self._jump or 1, 0
        chunks, self._chunks = self._chunks, []
        if chunks and self._whole:
            self._stood += now - self._began
        elif self.batch:
            self._decoded(steps, now)
        for task, chunk in chunks:
            task.todo -= chunk
            self.pending -= chunk
            if not task.todo:
                self._prefilling.remove(task)
                self.blocks.computed(task.keys)
                if task.elsewhere:
                    self._observer.computed(task, now)
                else:
                    self._answer(task, now)
        self._grant(now)
        self._running = False
        self._begin(now)

    def _decoded(self, steps: int, now: float) -> None:
        """The batch has taken `steps` steps."""
        batch, limit = self.batch, self._gaps.limit
        mean = (now - self._began) / steps + self._stood
        self._gaps.add(mean, batch * steps - len(self._fresh))
        fresh, self._fresh = self._fresh, []
        for task, stood in self._late:
            self._gaps.add(mean, -1)
            self._gaps.add(mean - stood, 1)
            task.slow += mean > limit >= mean - stood
        self._late = []
        slow = self.costs.slow_steps(batch, self.context, steps, limit) if steps > 1 else int(mean > limit)
        self._slow += slow
        self._stood = 0.0
        self._steps += steps
        self.context += batch * steps
        self.blocks.private += batch * steps
        self.blocks.trim()
        for task in fresh:
            task.slow = self._slow
            self._observer.first_token(task, now)
        while self._decoding and self._next_end() <= self._steps:
            task = heapq.heappop(self._ends)[2]
            self._drop(task)
            self._observer.finished(task, now)

    def _freed(self, now: float) -> None:
        self._grant(now)
        self._wake(now)

    def _grant(self, now: float) -> None:
        """Room for those that asked for it, in their turn."""
        while self._asked:
            task = self._asked[0][1]
            if not self.blocks.fits(task.keys, task.private + self.batch):
                return
            heapq.heappop(self._asked)
            task.kept = BLOCK * self.blocks.match(task.keys)
            self.blocks.hold(task.keys, task.private)
            self._observer.reserved(task, now)

    def _answer(self, task: Task, now: float) -> None:
        """A prompt computed here is answered here; its last chunk made a token."""
        task.made += 1
        if task.made == 1:
            self._observer.first_token(task, now)
        else:
            gap = now - task.stopped
            self._gaps.add(gap, 1)
            task.slow_gaps += gap > self._gaps.limit
        if task.made < task.output:
            self._add(task)
            if self._whole:
                self._late.append((task, self._stood))
        else:
            self.blocks.let_go(task.keys, task.private)
            self._observer.finished(task, now)

    def _add(self, task: Task) -> None:
        task.joined = self._steps
        task.end = self._steps + task.output - task.made
        task.slow = self._slow
        self._decoding[task.seq] = task
        heapq.heappush(self._ends, (task.end, task.seq, task))
        self.batch += 1
        self.context += task.kv

    def _drop(self, task: Task) -> None:
        """It decodes no longer."""
        steps = self._steps - task.joined
        del self._decoding[task.seq]
        self.batch -= 1
        self.context -= task.kv + steps
        self.blocks.let_go(task.keys, task.private + steps)
        task.made += steps
        task.slow_gaps += self._slow - task.slow

    def _next_end(self) -> int:
        ends = self._ends
        while (task := self._decoding.get(ends[0][1])) is None or task.end != ends[0][0]:
            heapq.heappop(ends)  # it was preempted
        return ends[0][0]

    def _preempt(self, now: float) -> None:
        """The youngest sequence goes back to the line, to be computed anew."""
        task = self._decoding[max(self._decoding)]
        self._drop(task)
        self._fresh = [other for other in self._fresh if other is not task]
        self._late = [late for late in self._late if late[0] is not task]
        task.kv = task.todo = task.prompt + task.made
        task.elsewhere = False
        task.stopped = now
        task.preempted += 1
        self.pending += task.todo
        heapq.heappush(self._line, (task.seq, task))

"""One subject's processes in gpu.py: bytes from one GPU's memory (or the host's) into another's.

Runs in the subject's own environment. Prepares everything, says {"ready": true}, then does each `Task` that
comes as a line of JSON and answers with a line: {"figures": {metric: samples}} or {"failed": why}. Whatever
else its libraries print goes to standard error.

Before anything is timed, the same is done once into poisoned memory, all of which the target then compares
with what it should hold.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from gpu_memory import CudaMemory, HostMemory, Move, scattered
from gpu_subjects import ALONE, PAIRS, Memory, Start
from gpu_tuning import tune

PREPARE_S = 90.0
ANSWER_S = 30.0
SAMPLE_S = 0.05
"""Seconds for which one sample is measured, if it takes no longer by itself."""
SAMPLES = 5
PATIENCE_S = 2.0
"""Seconds after which fewer samples will do."""
FEW = 6
"""Transfers after the first, at least: two to see how long they take, and twice two that count."""
LATENCY_SAMPLES = 100
BLOCK = (16, 8)
"""Tokens and KV heads of the blocks whose layout is changed: vLLM's default, and Llama-3-8B's."""


@dataclass(frozen=True)
class Task:
    """One figure to measure.

    Attributes:
        subject: whose process does it.
        label: under which subject it is reported.
        metric: ``latency`` is of one transfer after the other, all else is measured with two under way;
            ``bandwidth`` has ``cpu`` beside it.
        case: as reported.
        page: bytes.
        nbytes: bytes of one transfer.
        settings: of the subject's own.
        swap: see `Move`.
        bulk: all in one piece.
        patience_s: if a few transfers would take longer than so many seconds, the first is the one sample;
            0: they may take any time.
    """

    subject: str
    label: str
    metric: str
    case: dict[str, Any]
    page: int
    nbytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    swap: tuple[int, int] | None = None
    bulk: bool = False
    patience_s: float = 0.0

    def move(self, memory_bytes: int) -> Move:
        """What is to be moved."""
        if self.bulk:
            one = np.zeros(1, np.int64)
            return Move(self.nbytes, one, one)
        return scattered(memory_bytes, self.page, self.nbytes, tuple(self.swap) if self.swap else None)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def two_at_a_time(start: Start, count: int) -> None:
    """`count` transfers, of which two are under way whenever there are two left."""
    under_way = start(0)
    for number in range(1, count):
        following = start(number % 2)
        under_way()
        under_way = following
    under_way()


def sampled(start: Start) -> list[float]:
    """Seconds per transfer, several times."""
    once = timed(lambda: two_at_a_time(start, 2)) / 2
    count = max(2, min(64, int(SAMPLE_S / once)))
    repeats = SAMPLES if count * once * SAMPLES <= PATIENCE_S else 2
    return [timed(lambda: two_at_a_time(start, count)) / count for _ in range(repeats)]


class Far:
    """The target's process, as the initiator's commands it."""

    def __init__(self, subject: str, kind: str, device: int, nbytes: int) -> None:
        self._pipe, far = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=far_end, args=(subject, kind, device, nbytes, far), daemon=True).start()
        far.close()
        self._pipe.send(("prepare",))

    def ready(self) -> None:
        """Wait until it is; raises as `ask`."""
        self._answer("prepare", PREPARE_S)

    def ask(self, *question: object) -> Any:
        """Raises RuntimeError if it fails, and TimeoutError if it doesn't answer."""
        self._pipe.send(question)
        return self._answer(question[0], ANSWER_S)

    def _answer(self, question: object, limit: float) -> Any:
        if not self._pipe.poll(limit):
            raise TimeoutError(f"the target does not answer {question!r} within {limit:.0f} s")
        try:
            answer, failed = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the target died of {question!r}") from None
        if failed:
            raise RuntimeError(f"target: {failed}")
        return answer


def far_end(subject: str, kind: str, device: int, nbytes: int, pipe: Connection) -> None:
    """The target's process."""
    memory: Any = None
    side: Any = None
    tuned = False
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            # Peers' libraries have threads that do not always end by themselves.
            os._exit(0)
        answer: object = None
        try:
            match question:
                case ("prepare",):
                    memory, side = memory_of_kind(kind, nbytes, device), PAIRS[subject]()
                case ("offer", settings):
                    if any(name.isupper() for name in settings) or tuned:
                        tune(settings)
                        side, tuned = PAIRS[subject](), True
                    answer = side.offer(memory)
                case ("poison",):
                    memory.poison()
                case ("has", move):
                    answer = memory.has(move)
                case ("cpu",):
                    answer = time.process_time()
            pipe.send((answer, None))
        except Exception as failed:
            pipe.send((None, reason(failed)))


class Pair:
    """Two processes and a subject between them."""

    def __init__(self, subject: str, kind: str, devices: tuple[int, int], nbytes: int) -> None:
        self._nbytes = nbytes
        self._far = Far(subject, kind, devices[1], nbytes)
        self._memory = memory_of_kind(kind, nbytes, devices[0])
        self._memory.fill()
        self._side = PAIRS[subject]()
        self._far.ready()
        self._settings: dict[str, Any] | None = None

    def start(self, task: Task, move: Move) -> Start:
        if self._settings != task.settings:
            self._settings = None
            tune(task.settings)
            self._side.connect(self._memory, self._far.ask("offer", task.settings), task.settings)
            self._settings = task.settings
        return self._side.prepare(move)

    def poison(self) -> None:
        self._far.ask("poison")

    def has(self, move: Move) -> bool:
        return bool(self._far.ask("has", move))

    def cpu(self) -> float:
        """Seconds that both processes have used so far."""
        return time.process_time() + float(self._far.ask("cpu"))


class Alone:
    """One process that has both memories."""

    def __init__(self, subject: str, kind: str, devices: tuple[int, int], nbytes: int) -> None:
        self._nbytes = nbytes
        self._target = memory_of_kind(kind, nbytes, devices[1])
        self._memory = memory_of_kind(kind, nbytes, devices[0])
        self._memory.fill()
        self._side = ALONE[subject](self._memory, self._target)
        self._verified = subject != "pinned_copy"  # which moves the same bytes again and again

    def start(self, task: Task, move: Move) -> Start:
        return self._side.prepare(move)

    def poison(self) -> None:
        self._target.poison()

    def has(self, move: Move) -> bool:
        return not self._verified or self._target.has(move)

    def cpu(self) -> float:
        return time.process_time()


def memory_of_kind(kind: str, nbytes: int, device: int) -> Memory:
    return CudaMemory(nbytes, device) if kind == "cuda" else HostMemory(nbytes)


def measure(pair: Pair | Alone, task: Task, memory_bytes: int) -> dict[str, list[float]]:
    """The task's figures, in the units of `gpu.UNITS`.

    Raises:
        RuntimeError: What arrived differs from what was sent.
    """
    move = task.move(memory_bytes)
    pair.poison()
    start = pair.start(task, move)
    first = timed(lambda: start(0)())
    if not pair.has(move):
        raise RuntimeError("what arrived differs from what was sent")
    if 0 < task.patience_s < FEW * first:
        return {task.metric: [move.nbytes / first / 1e9]}
    if task.metric == "latency":
        for _ in range(5):
            start(0)()
        return {"latency": [1e6 * timed(lambda: start(0)()) for _ in range(LATENCY_SAMPLES)]}
    began, before = time.perf_counter(), pair.cpu()
    seconds = sampled(start)
    share = (pair.cpu() - before) / (time.perf_counter() - began)
    if not pair.has(move):
        raise RuntimeError("what arrived differs from what was sent, after many transfers")
    figures = {task.metric: [move.nbytes / taken / 1e9 for taken in seconds]}
    return figures | ({"cpu": [share]} if task.metric == "bandwidth" else {})


def reason(failed: BaseException) -> str:
    """On one line: what failed, and the innermost places."""
    frames = traceback.extract_tb(failed.__traceback__)[:-5:-1]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(failed).__name__}: {failed}"[:600] + f" ({places})"


def main() -> None:
    # What libraries print must not meet the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=[*PAIRS, *ALONE])
    parser.add_argument("--kind", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--devices", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--nbytes", type=int, default=1 << 30)
    options = parser.parse_args()
    ends = Alone if options.subject in ALONE else Pair
    try:
        pair = ends(options.subject, options.kind, tuple(options.devices), options.nbytes)
    except Exception as failed:
        say(failed=reason(failed))
        os._exit(1)
    say(ready=True)
    for line in sys.stdin:
        task = Task(**json.loads(line))
        try:
            say(figures=measure(pair, task, options.nbytes))
        except Exception as failed:
            say(failed=reason(failed))
            if isinstance(failed, TimeoutError):
                os._exit(1)  # an answer that comes late would be taken for another one's
    os._exit(0)  # as the other process does when it finds this one gone


if __name__ == "__main__":
    main()

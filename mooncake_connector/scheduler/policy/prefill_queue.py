"""The prompts that one engine was given and has not computed yet."""

from collections.abc import Iterator
from itertools import islice

import msgspec

from mooncake_connector.scheduler.policy.prefill_meter import PrefillMeter

# What is left of a prompt that takes longer than predicted, as a share of the prediction: an overdue prompt
# must not make the queue look empty.
OVERDUE = 0.1


class PrefillJob(msgspec.Struct):
    """One prompt.

    Attributes:
        seconds: predicted time of its computation.
        tokens: length of the prompt.
        ready: moment at which it can begin: a copied prefix comes first.
    """

    seconds: float
    tokens: int
    ready: float


class PrefillQueue:
    """First come, first served: the oldest prompt runs, the others wait.

    An engine that computes several prompts at once ends them in other orders; any order is taken.

    Attributes:
        tokens: of all prompts in here.
        meter: of what they cost.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, PrefillJob] = {}
        self._seconds = 0.0
        self._began = 0.0
        self.tokens = 0
        self.meter = PrefillMeter()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, id: str, seconds: float, tokens: int, now: float, ready: float) -> None:
        """Queue a prompt; its computation can begin at `ready`, no earlier than `now`."""
        if not self._jobs:
            self._began = ready
            self.meter.begin(ready)
        self._jobs[id] = PrefillJob(seconds, tokens, ready)
        self._seconds += seconds
        self.tokens += tokens

    def end(self, id: str, now: float) -> bool:
        """It was computed, or is not going to be; whether it was in here."""
        job = self._jobs.get(id)
        if job is None:
            return False
        head = next(iter(self._jobs)) == id
        del self._jobs[id]
        self.tokens -= job.tokens
        # Sums of floats drift: an empty queue starts anew.
        self._seconds = self._seconds - job.seconds if self._jobs else 0.0
        if head and self._jobs:
            self._began = max(now, next(iter(self._jobs.values())).ready)
        return True

    def seconds(self, now: float) -> float:
        """Predicted time until everything in here is computed."""
        return max(0.0, self._seconds - self._run(now)) if self._jobs else 0.0

    def ends(self, now: float, most: int) -> Iterator[tuple[str, float]]:
        """The moments at which the first `most` prompts are predicted to be computed, by request."""
        moment = now - self._run(now) if self._jobs else now
        for id, job in islice(self._jobs.items(), most):
            moment = max(moment, job.ready) + job.seconds
            yield id, moment

    def _run(self, now: float) -> float:
        head = next(iter(self._jobs.values()))
        return min(max(0.0, now - self._began), (1 - OVERDUE) * head.seconds)

"""How well the lengths of answers are predicted, on a trace: what conversation and prompt length bring.

    python benchmarks/output_length.py TRACE [--json FILE]

TRACE: Mooncake's conversation trace or a part of it (github.com/kvcache-ai/Mooncake, FAST25-release/traces),
with its `hash_ids`. Requests are predicted in the order of their arrival; an answer is learned from when it
has ended: 3 s after the arrival for the prompt, and 50 ms a token. The trace has no tenants, models or
max_tokens. A conversation is what begins with the same two blocks of 512 tokens (the first is the same for
almost all: the system prompt); a request of less than three blocks is of none. The first 500 requests are
learned from but not judged.

Subjects: `everything so far` (the quantile of all answers that have ended, whoever asked), ours without
prompt length and conversation, with either, with both. Figures: the pinball loss in tokens (the mean cost of
a quantile that is too low or too high; less is better) and coverage (the share of answers that were not above
the quantile), also of the quantiles given that 200 tokens have come, judged on the answers that got there.
"""

import argparse
import bisect
import heapq
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import report

from mooncake_connector.scheduler.policy.base import Arrival
from mooncake_connector.scheduler.policy.estimators import OutputLengths

BENCHMARK = "output_length"
BLOCKS = 2
UNJUDGED = 500
TTFT, TBT = 3.0, 0.05
QUANTILES = (0.1, 0.5, 0.9)
GENERATED = 200
OURS = {
    "ours, no features": (False, False),
    "ours, prompt length": (True, False),
    "ours, conversation": (False, True),
    "ours": (True, True),
}

Predict = Callable[[Arrival], Callable[[float, int], float]]
"""A request in; out: its quantile of a share, given what was generated."""


class Request(msgspec.Struct, frozen=True):
    """One line of the trace; `later`: its conversation was seen before."""

    at: float
    arrival: Arrival
    output: int
    later: bool


class Judged(msgspec.Struct, frozen=True):
    """One request, its quantiles as predicted at its arrival, those given `GENERATED` tokens last."""

    request: Request
    quantiles: tuple[float, ...]
    then: tuple[float, ...]


class SoFar:
    """The rival: the quantile of all answers that have ended."""

    def __init__(self) -> None:
        self._outputs: list[int] = [100]

    def predict(self, arrival: Arrival) -> Callable[[float, int], float]:
        return self._quantile

    def observe(self, arrival: Arrival, output: int) -> None:
        bisect.insort(self._outputs, output)

    def _quantile(self, q: float, generated: int) -> float:
        first = bisect.bisect_right(self._outputs, generated)
        left = self._outputs[first:] or [generated + 1]
        return left[min(len(left) - 1, int(q * len(left)))]


class Ours:
    """Ours, seeing only some features."""

    def __init__(self, prompt: bool, conversation: bool) -> None:
        self.lengths = OutputLengths()
        self._prompt, self._conversation = prompt, conversation

    def predict(self, arrival: Arrival) -> Callable[[float, int], float]:
        return self.lengths.predict(self._seen(arrival)).quantile

    def observe(self, arrival: Arrival, output: int) -> None:
        self.lengths.observe(self._seen(arrival), output)

    def _seen(self, arrival: Arrival) -> Arrival:
        return msgspec.structs.replace(
            arrival,
            tokens=arrival.tokens if self._prompt else 1,
            conversation=arrival.conversation if self._conversation else "",
        )


def load(file: Path) -> list[Request]:
    """The trace's requests in the order of their arrival."""
    found, known = [], set()
    for at, line in enumerate(file.read_text().splitlines()):
        data = json.loads(line)
        blocks = data["hash_ids"]
        conversation = "-".join(map(str, blocks[:BLOCKS])) if len(blocks) > BLOCKS else ""
        arrival = Arrival(id=str(at), tokens=data["input_length"], keys=blocks, conversation=conversation)
        found.append(Request(data["timestamp"] / 1e3, arrival, data["output_length"], conversation in known))
        known.add(conversation)
        known.discard("")
    return found


def judge(requests: Sequence[Request], subject: SoFar | Ours) -> list[Judged]:
    """Predict every request at its arrival, observe every answer at its end."""
    ends: list[tuple[float, int]] = []
    found = []
    for number, request in enumerate(requests):
        while ends and ends[0][0] <= request.at:
            ended = requests[heapq.heappop(ends)[1]]
            subject.observe(ended.arrival, ended.output)
        heapq.heappush(ends, (request.at + TTFT + TBT * request.output, number))
        quantile = subject.predict(request.arrival)
        if number >= UNJUDGED:
            found.append(
                Judged(
                    request,
                    tuple(quantile(q, 0) for q in QUANTILES),
                    tuple(quantile(q, GENERATED) for q in QUANTILES),
                )
            )
    return found


def rows_of(subject: str, judged: Sequence[Judged]) -> list[report.Row]:
    """Loss and coverage, for all requests, first turns, later ones, and those longer than `GENERATED`."""
    groups = {
        "all": [(j.request.output, j.quantiles) for j in judged],
        "first": [(j.request.output, j.quantiles) for j in judged if not j.request.later],
        "later": [(j.request.output, j.quantiles) for j in judged if j.request.later],
        f"after {GENERATED}": [(j.request.output, j.then) for j in judged if j.request.output > GENERATED],
    }
    rows = []
    for name, members in groups.items():
        for at, q in enumerate(QUANTILES):
            case: dict[str, object] = {"q": q, "turns": name}
            loss = sum(max(q * (y - p[at]), (q - 1) * (y - p[at])) for y, p in members) / len(members)
            covered = sum(y <= p[at] for y, p in members) / len(members)
            rows.append(report.row(BENCHMARK, subject, case, "pinball_loss", [loss], "tokens"))
            rows.append(report.row(BENCHMARK, subject, case, "coverage", [covered], "share"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path, metavar="TRACE")
    report.add_arguments(parser)
    options = parser.parse_args()
    requests = load(options.trace)
    rows = rows_of("everything so far", judge(requests, SoFar()))
    for name, features in OURS.items():
        ours = Ours(*features)
        rows += rows_of(name, judge(requests, ours))
        for level, strength in ours.lengths.strengths().items():
            rows.append(report.row(BENCHMARK, name, {"level": level}, "strength", [strength], "answers"))
    later = sum(request.later for request in requests[UNJUDGED:]) / len(requests[UNJUDGED:])
    rows.append(report.row(BENCHMARK, "trace", {}, "later_turns", [later], "share"))
    report.publish(rows, options.json, ["mooncake-connector", "numpy"])


if __name__ == "__main__":
    main()

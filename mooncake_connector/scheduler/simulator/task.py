"""One request on its way through engines, and what became of it."""

from collections.abc import Sequence

from mooncake_connector.scheduler.simulator.trace import BLOCK, Job


class Task:
    """What engines and the world note down of one request; times are seconds, -1 for never.

    Attributes:
        number: its place in the trace; as text, it is what the conductor knows it by.
        seq: its place in every line: the order in which requests were sent to engines.
        elsewhere: the engine that computes the prompt hands its KV to another one.
        kv: tokens of KV that it has, as of `joined`, or will have once its prompt is computed.
        todo: prompt tokens that are not computed yet.
        made: tokens of the answer as of `joined`.
        joined, end: the engine's step counts when it began to decode and when it will have its last token.
        placed: when the conductor had engines for it.
        came, started, computed: when the prefill engine got it, began with it, and was done.
        reserved, landed: when decode had room for its KV, and all of its KV.
        stopped: when it was preempted last.
        hit: prompt tokens that were cached there, copies included.
        kept: prompt tokens that decode held already, so that they need not be sent.
        first, last: when the client had the first and the last token.
        slow_gaps: of its gaps between tokens, those over the limit.
        outcome: ``done``, ``rejected`` (at once), ``dropped`` (after prefill), ``failed`` (does not fit).
    """

    __slots__ = (
        "at",
        "came",
        "computed",
        "decode",
        "elsewhere",
        "end",
        "first",
        "hit",
        "joined",
        "kept",
        "keys",
        "kv",
        "landed",
        "last",
        "made",
        "name",
        "number",
        "outcome",
        "output",
        "placed",
        "preempted",
        "prefill",
        "prompt",
        "reserved",
        "seq",
        "slow",
        "slow_gaps",
        "started",
        "stopped",
        "todo",
    )

    def __init__(self, number: int, job: Job) -> None:
        self.number = number
        self.name = str(number)
        self.seq = 0
        self.at = job.at
        self.prompt = job.prompt
        self.output = job.output
        self.keys: Sequence[int] = job.keys
        self.prefill = ""
        self.decode = ""
        self.elsewhere = False
        self.kv = job.prompt
        self.todo = 0
        self.made = 0
        self.joined = 0
        self.end = 0
        self.placed = -1.0
        self.came = -1.0
        self.started = -1.0
        self.computed = -1.0
        self.reserved = -1.0
        self.landed = -1.0
        self.stopped = -1.0
        self.hit = 0
        self.kept = 0
        self.first = -1.0
        self.last = -1.0
        self.slow = 0
        self.slow_gaps = 0
        self.preempted = 0
        self.outcome = ""

    @property
    def private(self) -> int:
        """Tokens of its KV, at `joined`, that are in no block with a key."""
        return self.kv - BLOCK * len(self.keys)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.at

    @property
    def tbt(self) -> float:
        """Mean seconds between two tokens; 0 of an answer of one."""
        return (self.last - self.first) / (self.output - 1) if self.output > 1 else 0.0

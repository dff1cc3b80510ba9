"""How long engines may be silent before a request is given up there, and tried on others."""

import asyncio
from collections.abc import Callable
from types import TracebackType

import msgspec

from mooncake_connector.scheduler.engines.pool import Lease
from mooncake_connector.scheduler.policy.base import Placement

# Whatever was predicted may take so many times as long: predictions of the first requests are guesses.
FACTOR = 10.0
# Seconds a token that an answer in one piece is granted: a laptop's CPU takes 0.3.
SLOWEST = 1.0
# How often a stream is looked at, seconds.
LOOK = 5.0


class Silence(TimeoutError):
    """An engine said nothing for too long."""


class Deadlines(msgspec.Struct, frozen=True):
    """What is granted on each hop, seconds; what was predicted is granted in addition, `FACTOR` times.

    Attributes:
        prefill: until prefill has answered.
        first_byte: until decode's first bytes, once prefill is done.
        chunk: from one part of a stream to the next.
    """

    prefill: float
    first_byte: float
    chunk: float

    def of_prefill(self, placement: Placement) -> float:
        """Seconds for prefill's answer."""
        return self.prefill + FACTOR * placement.ttft

    def of_first_byte(self, placement: Placement, tokens: int) -> float:
        """Seconds for decode's first bytes, since it was asked.

        Args:
            tokens: the most that come before them: an answer in one piece has no bytes before its end.
        """
        waits = self.prefill if placement.prefill else 0.0
        writes = tokens * max(SLOWEST, FACTOR * placement.tbt)
        return self.first_byte + waits + FACTOR * placement.ttft + writes


class Within:
    """A context that grants what is awaited in it so many seconds, less if the engine is given up meanwhile.

    Leaving it raises `Silence` if they are over.
    """

    __slots__ = ("_lease", "_limit", "_said")

    def __init__(self, seconds: float, lease: Lease) -> None:
        self._lease = lease
        self._limit = asyncio.timeout(seconds)
        self._said = f"no answer within {seconds:.0f} s"

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._lease.give_up = self._give_up

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lease.give_up = None
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            raise Silence(self._said) from None

    def _give_up(self, down: float) -> None:
        self._said = f"no answer, and its health checks fail since {down:.0f} s"
        self._limit.reschedule(asyncio.get_running_loop().time())


class Stall:
    """Ends a wait of a stream that lasts too long; costs a stream little, and a chunk two assignments.

    Args:
        seconds: after which a wait is cut, up to `LOOK` later.
        cut: called then, once.
        left: what is still to be done before the wait ends; while it becomes less, the wait goes on.

    Attributes:
        waiting: set while it waits.
        turns: count it up after each wait.
        over: whether it was cut.
    """

    def __init__(self, seconds: float, cut: Callable[[], None], left: Callable[[], int] = int) -> None:
        self.waiting = False
        self.turns = 0
        self.over = False
        self._seconds = seconds
        self._cut = cut
        self._left = left
        self._pause = min(LOOK, seconds / 4)
        self._seen = (0, 0)
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look at it from now on, until `stop`."""
        self._since = asyncio.get_running_loop().time()
        self._arm()

    def stop(self) -> None:
        """Look no more; to be called whatever happens, again is no harm."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def give_up(self, seconds: float) -> None:
        """Cut the wait now, if it has lasted for so long."""
        now = asyncio.get_running_loop().time()
        seen = (self.turns, self._left() if self.waiting else 0)
        if not self.waiting or seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since >= seconds and not self.over:
            self.over = True
            self._cut()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._look)

    def _look(self) -> None:
        self.give_up(self._seconds)
        if not self.over:
            self._arm()

"""One placed request, from its placement to its end, as the conductor is told of it."""

from collections.abc import Callable, Collection

from mooncake_connector.scheduler.policy.base import Placement, Rejected
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.proxy.progress import PrefillTimes

# A stream of a thousand tokens a second must not cost a thousand reports.
REPORT_SECONDS = 0.25


class Journey:
    """Tells the conductor each thing once, and nothing after the end.

    Args:
        id: by which the conductor knows the request.
        avoided: engines that failed it before.
        patience: seconds that waiting for the placement's copy is worth.
        clock: the conductor's.
        moved: called after each thing that was told.
    """

    def __init__(
        self,
        id: str,
        placement: Placement,
        avoided: Collection[str],
        patience: float,
        conductor: Conductor,
        clock: Callable[[], float],
        moved: Callable[[], None],
    ) -> None:
        self.id = id
        self.placement = placement
        self.avoided = avoided
        self.patience = patience
        self._conductor = conductor
        self._clock = clock
        self._moved = moved
        self._prefilled = self._answered = self._over = False
        self._reported = 0.0

    def prefilled(self, times: PrefillTimes) -> Rejected | None:
        """Its prompt was computed; a rejection if the conductor decides about decode only now."""
        if self._prefilled or self._over:
            return None
        self._prefilled = True
        verdict = self._conductor.prefilled(
            self.id, self._clock(), queued=times.queued, computed=times.computed, cached=times.cached
        )
        self._moved()
        return verdict

    def first_token(self) -> None:
        """The answer's first token came."""
        if self._answered or self._over:
            return
        self._answered = True
        now = self._reported = self._clock()
        self._conductor.first_token(self.id, now)
        self._moved()

    def progressed(self, tokens: int) -> None:
        """So many tokens came up to now; passed on every now and then."""
        now = self._clock()
        if self._answered and not self._over and now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self._conductor.progressed(self.id, tokens, now)
            self._moved()

    def over(self, tokens: int | None, decoding: float | None = None) -> None:
        """It ended after so many tokens; None: it failed, or nobody wanted it any more.

        Args:
            decoding: seconds from its first token to its last, if the engine says so.
        """
        if not self._over:
            self._over = True
            self._conductor.ended(self.id, self._clock(), tokens, decoding=decoding)
            self._moved()

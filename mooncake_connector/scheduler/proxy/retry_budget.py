"""How many further attempts the proxy may make: an outage must not become a storm. Pure."""

# What may be tried again after a quiet hour: an engine that dies with many requests on it is no outage.
RESERVE = 500.0


class RetryBudget:
    """Every request earns a share of a further attempt, and every further attempt costs one.

    So beyond the reserve, which is full at the start and fills again by requests, engines get at most
    ``1 + share`` times the requests of the clients.

    Args:
        share: of a further attempt that a request earns; 0 allows none beyond the reserve.

    Attributes:
        left: further attempts that may be made now.
    """

    def __init__(self, share: float, reserve: float = RESERVE) -> None:
        self._share = share
        self._reserve = reserve
        self.left = reserve

    def earn(self) -> None:
        """A client's request came."""
        self.left = min(self._reserve, self.left + self._share)

    def spend(self) -> bool:
        """Whether there may be a further attempt; if so, it is paid for."""
        if self.left < 1:
            return False
        self.left -= 1
        return True

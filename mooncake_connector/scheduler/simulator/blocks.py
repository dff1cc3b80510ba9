"""An engine's KV memory: blocks of prompts that may be shared, least recently used out first."""

from collections.abc import Callable, Sequence

from mooncake_connector.scheduler.simulator.trace import BLOCK

Told = Callable[[list[int]], None]


class Blocks:
    """KV of one engine, in tokens.

    Whole blocks of prompts have keys and stay after their request until room is needed; other tokens (the
    rest of a prompt, the answer) belong to one request. As in vLLM, of one request the last blocks go first.

    Args:
        capacity: tokens of KV that running requests can have.
        more: tokens of former requests that are kept beyond it (host memory).
        stored, removed: told which keys can be found now, and no longer.

    Attributes:
        private: tokens of running requests that are in no block with a key.
    """

    def __init__(self, capacity: int, more: int, stored: Told, removed: Told) -> None:
        self.capacity = capacity
        self.private = 0
        self._more = more
        self._held: dict[int, int] = {}
        self._cached: dict[int, None] = {}
        self._computed: set[int] = set()
        self._stored = stored
        self._removed = removed

    @property
    def used(self) -> int:
        """Tokens that running requests need."""
        return self.private + BLOCK * len(self._held)

    @property
    def cached(self) -> int:
        """Tokens that stay from former requests."""
        return BLOCK * len(self._cached)

    def match(self, keys: Sequence[int]) -> int:
        """How many of the first `keys` are there and computed."""
        computed = self._computed
        for count, key in enumerate(keys):
            if key not in computed:
                return count
        return len(keys)

    def fits(self, keys: Sequence[int], private: int) -> bool:
        """Whether `hold` of the same would find room."""
        free = self.capacity - self.used
        need = private + BLOCK * len(keys)
        if need <= free:
            return True
        held = self._held
        return need - BLOCK * sum(key in held for key in keys) <= free

    def hold(self, keys: Sequence[int], private: int) -> None:
        """Room for a request; `fits` said that there is some. `computed` says when others can use it."""
        held, cached = self._held, self._cached
        for key in keys:
            count = held.get(key)
            if count is None:
                held[key] = 1
                cached.pop(key, None)
            else:
                held[key] = count + 1
        self.private += private
        self.trim()

    def computed(self, keys: Sequence[int]) -> None:
        """Held blocks have their KV now."""
        known = self._computed
        new = [key for key in keys if key not in known]
        if new:
            known.update(new)
            self._stored(new)

    def let_go(self, keys: Sequence[int], private: int) -> None:
        """A request needs these no longer; what was computed stays until room is needed."""
        held, cached, known = self._held, self._cached, self._computed
        self.private -= private
        for key in reversed(keys):
            count = held[key]
            if count > 1:
                held[key] = count - 1
            else:
                del held[key]
                if key in known:
                    cached[key] = None
        self.trim()

    def receive(self, keys: Sequence[int]) -> None:
        """Copied blocks have come; those that find no room are lost."""
        cached, known = self._cached, self._computed
        new = [key for key in keys if key not in known and key not in self._held]
        cached.update(dict.fromkeys(reversed(new)))
        known.update(new)
        if new:
            self._stored(new)
        self.trim()

    def trim(self) -> None:
        """Drop blocks of former requests until everything fits."""
        cached = self._cached
        over = self.used + BLOCK * len(cached) - self.capacity - self._more
        if over <= 0 or not cached:
            return
        gone = []
        for key in cached:
            gone.append(key)
            over -= BLOCK
            if over <= 0:
                break
        for key in gone:
            del cached[key]
        self._computed.difference_update(gone)
        self._removed(gone)

"""Which instance holds which prefix (Mooncake, FAST'25, section 4: what the Conductor chooses by)."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from mooncake_connector.scheduler.policy import block_keys
from mooncake_connector.scheduler.policy.block_keys import Tokens

# Blocks looked up at once, from few to many: a prompt that nobody knows costs no more than the first.
_STRIDE, _LONGEST_STRIDE = 16, 512
ESTIMATED_BLOCKS = 1 << 16
"""Of an instance of which nothing is known."""


class PrefixIndex:
    """KV blocks by key, and who holds each.

    Exact: as `store`, `remove` and `clear` tell it. What an instance holds may have holes; `match` stops at
    the first. Not thread-safe.

    Attributes:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int = 16) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self._holders: dict[int, int] = {}  # a bit for each instance
        self._names: dict[str, int] = {}
        self._held: dict[str, set[int]] = {}
        self._routed: dict[str, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        """Blocks that someone holds, each counted once."""
        return len(self._holders)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def held(self, name: str) -> int:
        """Blocks that an instance holds; 0 if it has not joined."""
        return len(self._held.get(name, ()))

    def keys(self, tokens: Tokens, salt: int = 0) -> list[int]:
        """Keys of a prompt's whole blocks; see `block_keys.keys`."""
        return block_keys.keys(tokens, self.block_size, salt)

    def join(self, name: str) -> None:
        """An instance comes; it holds nothing. Of one that is there already nothing changes."""
        if name not in self._names:
            taken = set(self._names.values())
            self._names[name] = next(1 << slot for slot in range(len(taken) + 1) if 1 << slot not in taken)
            self._held[name] = set()

    def leave(self, name: str) -> None:
        """An instance goes, and what it held with it."""
        if name in self._names:
            self.clear(name)
            del self._names[name], self._held[name]

    def store(self, name: str, keys: Iterable[int]) -> None:
        """An instance now holds these blocks; those it held already are no harm.

        Raises:
            KeyError: it has not joined.
        """
        bit, held, holders = self._names[name], self._held[name], self._holders
        fresh = [key for key in keys if key not in held]
        for key in fresh:
            mask = holders.get(key)
            # Most blocks have one holder: their mask is one object.
            holders[key] = mask | bit if mask else bit
        held.update(fresh)

    def remove(self, name: str, keys: Iterable[int]) -> None:
        """An instance no longer holds these blocks; those it did not hold are no harm.

        Raises:
            KeyError: it has not joined.
        """
        bit, held, holders = self._names[name], self._held[name], self._holders
        for key in keys:
            if key not in held:
                continue
            held.remove(key)
            if mask := holders[key] ^ bit:
                holders[key] = mask
            else:
                del holders[key]

    def clear(self, name: str) -> None:
        """An instance holds nothing any more.

        Raises:
            KeyError: it has not joined.
        """
        self.remove(name, list(self._held[name]))
        self._routed.pop(name, None)

    def match(self, keys: Sequence[int]) -> Mapping[str, int]:
        """How many of a prompt's first blocks each instance holds without a gap; who holds none is not named.

        Args:
            keys: of the prompt's blocks, one after the other.
        """
        if not keys:
            return {}
        alive = last = -1
        ended: list[tuple[int, int]] = []  # who fell out at which block
        start, stride = 0, _STRIDE
        while start < len(keys) and alive:
            masks = list(map(self._holders.get, keys[start : start + stride]))
            if masks.count(last) < len(masks):
                for at, mask in enumerate(masks, start):
                    if mask == last:
                        continue
                    last = mask or 0
                    if gone := alive & ~last:
                        ended.append((at, gone))
                        alive &= last
                        if not alive:
                            break
            start += stride
            stride = min(2 * stride, _LONGEST_STRIDE)
        ended.append((len(keys), alive))
        found = {}
        for name, bit in self._names.items():
            for at, mask in ended:
                if mask & bit:
                    if at:
                        found[name] = at
                    break
        return found

    def remember(self, name: str, keys: Sequence[int], *, limit: int = ESTIMATED_BLOCKS) -> None:
        """Take it that an instance of which nothing is known holds a prompt that was routed to it.

        It is taken to keep the `limit` blocks used last, a prompt's first blocks longer than its last, as
        engines do. Not to be mixed with `store` and `remove` for one instance.

        Args:
            limit: blocks that it can hold.

        Raises:
            KeyError: it has not joined.
        """
        routed = self._routed.setdefault(name, OrderedDict())
        keys = keys[:limit]
        self.store(name, keys)
        routed.update(dict.fromkeys(keys))
        for key in reversed(keys):
            routed.move_to_end(key)
        if len(routed) > limit:
            self.remove(name, [routed.popitem(last=False)[0] for _ in range(len(routed) - limit)])

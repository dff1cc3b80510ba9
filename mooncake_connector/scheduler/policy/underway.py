"""Prefixes that engines are going to hold: those of prompts which they were given and have not finished."""

from collections import Counter
from collections.abc import Sequence


class Underway:
    """Blocks of prompts in flight, by engine and key.

    An engine takes its prompts in the order of their coming, so one that begins like another before it finds
    that one's blocks in the cache. In a burst of turns that share a prefix, nothing else would tell.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Counter[int]] = {}

    def begin(self, name: str, keys: Sequence[int]) -> None:
        """An engine was given a prompt."""
        if keys:
            self._blocks.setdefault(name, Counter()).update(keys)

    def end(self, name: str, keys: Sequence[int]) -> None:
        """It is done with it, however that ended."""
        blocks = self._blocks.get(name)
        if blocks is None:
            return
        for key in keys:
            left = blocks[key] - 1
            if left > 0:
                blocks[key] = left
            else:
                blocks.pop(key, None)
        if not blocks:
            del self._blocks[name]

    def leave(self, name: str) -> None:
        """An engine went, and its prompts with it."""
        self._blocks.pop(name, None)

    def reach(self, name: str, keys: Sequence[int], held: int) -> int:
        """How many of a prompt's first blocks the engine will hold that holds `held` of them now."""
        blocks = self._blocks.get(name)
        if blocks:
            while held < len(keys) and keys[held] in blocks:
                held += 1
        return held

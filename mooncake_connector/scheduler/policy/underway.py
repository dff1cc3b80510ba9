"""Prefixes that engines are going to hold: those of prompts which they were given and have not finished."""

from bisect import bisect_left
from collections.abc import Sequence


class Underway:
    """Blocks of prompts in flight, by engine and key.

    An engine takes its prompts in the order of their coming, so one that begins like another before it finds
    that one's blocks in the cache. In a burst of turns that share a prefix, nothing else would tell.
    """

    def __init__(self) -> None:
        # By engine and first key: most prompts have nothing in common.
        self._prompts: dict[str, dict[int, dict[str, Sequence[int]]]] = {}

    def begin(self, name: str, id: str, keys: Sequence[int]) -> None:
        """An engine was given a request's prompt."""
        if keys:
            self._prompts.setdefault(name, {}).setdefault(keys[0], {})[id] = keys

    def end(self, name: str, id: str, keys: Sequence[int]) -> None:
        """It is done with it, however that ended."""
        prompts = self._prompts.get(name)
        if not prompts or not keys or keys[0] not in prompts:
            return
        alike = prompts[keys[0]]
        alike.pop(id, None)
        if not alike:
            del prompts[keys[0]]

    def leave(self, name: str) -> None:
        """An engine went, and its prompts with it."""
        self._prompts.pop(name, None)

    def reach(self, name: str, keys: Sequence[int], held: int) -> int:
        """How many of a prompt's first blocks the engine will hold that holds `held` of them now."""
        prompts = self._prompts.get(name)
        if not prompts or held >= len(keys):
            return held
        for other in prompts.get(keys[0], {}).values():
            if held < min(len(keys), len(other)) and keys[held] == other[held]:
                held = _shared(keys, other, held + 1)
        return held


def _shared(one: Sequence[int], other: Sequence[int], known: int) -> int:
    """How many first keys of two prompts are equal, `known` of them known to be: keys are chained."""
    most = min(len(one), len(other))
    return bisect_left(range(most), True, known, most, key=lambda at: one[at] != other[at])

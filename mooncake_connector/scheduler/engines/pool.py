"""The engines behind the proxy: their state, and what is in flight on each."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from mooncake_connector.scheduler.engines.base import EngineInfo

log = logging.getLogger(__name__)

Side = Literal["prefill", "decode"]
WRONG_ROLE = {"prefill": "kv_consumer", "decode": "kv_producer"}
RIGHT_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}


class InstanceReport(msgspec.Struct, frozen=True):
    """One engine as ``GET /health`` shows it."""

    url: str
    state: str
    reason: str
    engine_id: str | None
    requests: int


class Instance:
    """One engine: what it said of itself, whether it is up, and what is in flight on it.

    Attributes:
        changed: called when it came up, went down, or restarted.
    """

    def __init__(self, url: str, side: Side) -> None:
        self.url = url
        self.side: Side = side
        self.changed: Callable[[Instance], None] = _nobody_cares
        self.info: EngineInfo | None = None
        self.up = False
        self.reason = "not probed yet"
        self.restarts = 0
        self.requests = 0
        self.tokens = 0
        self.suspicion = asyncio.Event()

    def lease(self, tokens: int) -> Callable[[], None]:
        """Count a request of `tokens` prompt tokens; the returned function takes it back, once."""
        self.requests += 1
        self.tokens += tokens
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self.requests -= 1
                self.tokens -= tokens

        return release

    def mark_up(self, info: EngineInfo) -> None:
        """The engine answered a probe with `info`: usable, if it fits its pool."""
        before, self.info = self.info, info
        restarted = before is not None and before.identity != info.identity
        if before and restarted:
            self.restarts += 1
            log.warning(
                "%s %s restarted: engine %s, was %s", self.side, self.url, info.engine_id, before.engine_id
            )
        if info.role == WRONG_ROLE[self.side]:
            self.mark_down(
                f"it runs as {info.role} but is in the {self.side} pool: start it with kv_role "
                f"{RIGHT_ROLE[self.side]} or kv_both, or name it with the other option"
            )
            return
        was_up, self.up, self.reason = self.up, True, ""
        if not was_up:
            log.info("%s %s is up: engine %s, model %s", self.side, self.url, info.engine_id, info.model)
        if restarted or not was_up:
            self.changed(self)

    def mark_down(self, reason: str) -> None:
        """Not usable, and why; logged when either changes."""
        if self.up or reason != self.reason:
            log.warning("%s %s is not usable: %s", self.side, self.url, reason)
        was_up, self.up, self.reason = self.up, False, reason
        if was_up:
            self.changed(self)

    def suspect(self, reason: str, *, gone: bool = False) -> None:
        """A request failed there: probe it now; `gone`: leave it out of the choice until that succeeds."""
        if gone:
            self.mark_down(reason)
        self.suspicion.set()

    @property
    def group(self) -> str:
        """Equal for two engines exactly if they can exchange KV."""
        return self.info.group if self.info else ""

    def report(self) -> InstanceReport:
        state = "up" if self.up else "down" if self.info else "starting"
        return InstanceReport(
            self.url, state, self.reason, self.info.engine_id if self.info else None, self.requests
        )


class Pool:
    """Both pools, in the order the user named them."""

    def __init__(self, prefill: tuple[str, ...], decode: tuple[str, ...]) -> None:
        self.prefill = tuple(Instance(url, "prefill") for url in prefill)
        self.decode = tuple(Instance(url, "decode") for url in decode)
        self._by_url = {instance.url: instance for instance in self}
        self._mismatches: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Instance]:
        yield from self.prefill
        yield from self.decode

    def __getitem__(self, url: str) -> Instance:
        return self._by_url[url]

    def live(self, side: Side) -> list[Instance]:
        """Usable engines of one pool."""
        return [instance for instance in self if instance.side == side and instance.up]

    def paired(self) -> bool:
        """Whether some prefill and some decode engine are up and can exchange KV."""
        groups = {p.group for p in self.live("prefill")}
        return any(d.group in groups for d in self.live("decode"))

    def mismatches(self) -> list[str]:
        """Pairs that are up but can't exchange KV, with both sides' values; new ones are logged."""
        found = [
            f"prefill {p.url} and decode {d.url} can't exchange KV: {'; '.join(different)}"
            for p in self.live("prefill")
            for d in self.live("decode")
            if p.info and d.info and (different := p.info.differences(d.info))
        ]
        for line in found:
            if line not in self._mismatches:
                log.error("%s. Start both with the same model, dtype and connector version", line)
        self._mismatches = frozenset(found)
        return found


def _nobody_cares(_: Instance) -> None:
    pass

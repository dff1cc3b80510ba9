"""The engines behind the proxy: their state, and what is in flight on each."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import Literal, Self

import msgspec

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.engines.base import EngineInfo
from mooncake_connector.scheduler.engines.breaker import Breaker

log = logging.getLogger(__name__)

Side = Literal["prefill", "decode"]
WRONG_ROLE = {"prefill": "kv_consumer", "decode": "kv_producer"}
RIGHT_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}


class PoolError(MooncakeError):
    """The pools can't be changed as asked: the message says why."""


class InstanceReport(msgspec.Struct, frozen=True):
    """One engine as ``GET /health`` shows it.

    Attributes:
        state: ``starting``, ``up``, ``down``, or ``draining`` whether or not it is up.
        breaker: ``closed``, ``open`` (left out, as its requests failed) or ``half_open`` (on trial).
        transfers: prompts computed there whose KV decode has not got yet.
    """

    url: str
    state: str
    reason: str
    engine_id: str | None
    requests: int
    transfers: int
    breaker: str


class Lease:
    """A request on an engine, from before it is sent until it is over: a context manager.

    Args:
        tokens: of its prompt.

    Attributes:
        give_up: called while its engine fails its health checks, with the seconds since they fail; ends what
            waits for the engine. None: nothing waits.
    """

    def __init__(self, instance: "Instance", tokens: int) -> None:
        self.give_up: Callable[[float], None] | None = None
        self._instance = instance
        self._tokens = tokens
        self._held = True
        self._began = instance.clock()
        instance.requests += 1
        instance.tokens += tokens
        instance.leases.add(self)
        instance.breaker.begin(self._began)

    def served(self) -> None:
        """The engine answered, be it with a refusal."""
        self._instance.breaker.succeeded(self._began, self._instance.clock())

    @property
    def url(self) -> str:
        """The engine's."""
        return self._instance.url

    def failed(self, reason: str, *, gone: bool = False) -> None:
        """The engine failed it: probe it now; `gone`: leave it out of the choice until that succeeds."""
        self.blame()
        self._instance.suspect(reason, gone=gone)

    def doubt(self, reason: str) -> None:
        """The engine failed it, but may not be to `blame`: probe it now."""
        self._instance.suspect(reason)

    def blame(self) -> None:
        """Count a failure against the engine."""
        self._instance.breaker.failed(self._began, self._instance.clock())

    def release(self) -> None:
        """It is over; more than once is no harm."""
        if self._held:
            self._held = False
            self._instance.requests -= 1
            self._instance.tokens -= self._tokens
            self._instance.leases.discard(self)
            self._instance.ended_one()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Instance:
    """One engine: what it said of itself, whether it is up, and what is in flight on it.

    Attributes:
        changed: called when it came up, went down, restarted, is drained or not any more, or is removed.
        up: it answers, and fits its pool.
        draining: no request is to go there any more.
        removed: it is in no pool any more.
        requests: in flight there, of `tokens` prompt tokens in all; `leases` are theirs.
        transfers: prompts computed there whose KV decode may not have got yet.
    """

    def __init__(self, url: str, side: Side, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self.side: Side = side
        self.clock = clock
        self.changed: Callable[[Instance], None] = _nobody_cares
        self.info: EngineInfo | None = None
        self.up = False
        self.draining = self.removed = False
        self.reason = "not probed yet"
        self.restarts = 0
        self.requests = 0
        self.tokens = 0
        self.transfers = 0
        self.leases: set[Lease] = set()
        self.breaker = Breaker()
        self.suspicion = asyncio.Event()
        self._empty = asyncio.Event()

    @property
    def usable(self) -> bool:
        """Whether requests may go there."""
        return self.up and not self.draining

    def lease(self, tokens: int) -> Lease:
        """Count a request of `tokens` prompt tokens until the lease is released."""
        return Lease(self, tokens)

    def transfer(self) -> Callable[[], None]:
        """Count KV that decode is to get from here until the returned function is called."""
        self.transfers += 1
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self.transfers -= 1
                self.ended_one()

        return release

    async def emptied(self) -> None:
        """Wait until nothing is in flight there: it can be stopped and nobody misses it."""
        while self.requests or self.transfers:
            self._empty.clear()
            await self._empty.wait()

    def give_up(self, down: float) -> None:
        """It fails its health checks for so many seconds: whoever waits for it waits in vain."""
        for lease in tuple(self.leases):
            if lease.give_up:
                lease.give_up(down)

    def ended_one(self) -> None:
        """Something in flight ended."""
        if not self.requests and not self.transfers:
            self._empty.set()

    def drain(self, draining: bool) -> None:
        """No request goes there any more, or requests do again."""
        if draining != self.draining:
            self.draining = draining
            log.info("%s %s %s", self.side, self.url, "is drained" if draining else "takes requests again")
            self.changed(self)

    def mark_up(self, info: EngineInfo) -> None:
        """The engine answered a probe with `info`: usable, if it fits its pool."""
        before, self.info = self.info, info
        restarted = before is not None and before.identity != info.identity
        if before and restarted:
            self.restarts += 1
            self.breaker.reset()
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
        state = "draining" if self.draining else "up" if self.up else "down" if self.info else "starting"
        return InstanceReport(
            url=self.url,
            state=state,
            reason=self.reason,
            engine_id=self.info.engine_id if self.info else None,
            requests=self.requests,
            transfers=self.transfers,
            breaker=self.breaker.state(self.clock()),
        )


class Pool:
    """Both pools, each in the order of its engines' coming. They change at run time."""

    def __init__(self, prefill: tuple[str, ...], decode: tuple[str, ...]) -> None:
        self._by_url: dict[str, Instance] = {}
        self._followers: list[Callable[[Instance], None]] = []
        self._mismatches: frozenset[str] = frozenset()
        for url in prefill:
            self.add(url, "prefill")
        for url in decode:
            self.add(url, "decode")

    def __iter__(self) -> Iterator[Instance]:
        return iter(tuple(self._by_url.values()))

    def __contains__(self, url: str) -> bool:
        return url in self._by_url

    def __getitem__(self, url: str) -> Instance:
        return self._by_url[url]

    @property
    def prefill(self) -> tuple[Instance, ...]:
        return tuple(instance for instance in self if instance.side == "prefill")

    @property
    def decode(self) -> tuple[Instance, ...]:
        return tuple(instance for instance in self if instance.side == "decode")

    def subscribe(self, follower: Callable[[Instance], None]) -> Callable[[], None]:
        """Have `follower` called with every engine that was added or has `changed`; the result ends that."""
        self._followers.append(follower)
        return lambda: self._followers.remove(follower)

    def add(self, url: str, side: Side) -> Instance:
        """An engine comes into a pool; it gets requests once it is up.

        Args:
            url: its base URL, without a trailing slash.

        Raises:
            PoolError: it is in one already.
        """
        if found := self._by_url.get(url):
            more = "; it leaves when its last request ended" if found.draining else ""
            raise PoolError(f"{url} is in the {found.side} pool already{more}")
        instance = self._by_url[url] = Instance(url, side)
        instance.changed = self._tell
        self._tell(instance)
        return instance

    def drain(self, url: str) -> Instance:
        """Send an engine no further requests; `Instance.emptied` waits for those that it has.

        Raises:
            PoolError: there is no such engine.
        """
        instance = self._named(url)
        instance.drain(True)
        return instance

    def undrain(self, url: str) -> Instance:
        """Send an engine requests again.

        Raises:
            PoolError: there is no such engine.
        """
        instance = self._named(url)
        instance.drain(False)
        return instance

    async def remove(self, url: str) -> None:
        """Drain an engine, wait until it has no request, and take it out of its pool.

        Cancelled, it leaves the engine draining.

        Raises:
            PoolError: there is no such engine, or it was undrained meanwhile.
        """
        instance = self.drain(url)
        await instance.emptied()
        if not instance.draining:
            raise PoolError(f"{url} was undrained before its last request ended: it stays")
        if not instance.removed:
            del self._by_url[url]
            instance.up, instance.removed = False, True
            log.info("%s %s is removed", instance.side, url)
            self._tell(instance)

    def shunned(self) -> frozenset[str]:
        """Engines that are up and better left out, as requests failed there; never all that can stand in."""
        doubtful = [i for i in self._by_url.values() if not i.breaker.allows(i.clock()) and i.usable]
        if not doubtful:
            return frozenset()
        good = {(i.side, i.group) for i in self if i.usable and i not in doubtful}
        return frozenset(i.url for i in doubtful if (i.side, i.group) in good)

    def live(self, side: Side) -> list[Instance]:
        """Usable engines of one pool."""
        return [instance for instance in self if instance.side == side and instance.usable]

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

    def _named(self, url: str) -> Instance:
        try:
            return self._by_url[url]
        except KeyError:
            known = ", ".join(self._by_url) or "none"
            raise PoolError(f"{url} is in no pool; there are {known}") from None

    def _tell(self, instance: Instance) -> None:
        for follower in tuple(self._followers):
            follower(instance)


def _nobody_cares(_: Instance) -> None:
    pass

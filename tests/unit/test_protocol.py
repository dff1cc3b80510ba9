"""Stateful tests of the push protocol: every interleaving of loss, doubling, delay, abort, crash and expiry.

Asserted throughout: no write after free, no wrong KV reported as loaded, nothing reported or freed twice.
Asserted in the end, once the adversary rests: every request has ended and nothing is held.
"""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mooncake_connector.kv_transfer.receive_load import Load
from mooncake_connector.kv_transfer.send_transfer import SendTransfer
from mooncake_connector.kv_transfer.session import (
    RECEIVE_TABLE,
    SEND_TABLE,
    ReceiveAction,
    ReceiveEvent,
    ReceiveSession,
    ReceiveState,
    SendEvent,
    SendSession,
    SendState,
)
from tests.unit.protocol_world import (
    BLOCK,
    DecodeRequest,
    PrefillRequest,
    Ranks,
    World,
    WriteAfterFree,
    blocks_of,
)

Index = st.integers(0, 1_000)
RANKS = [
    Ranks(),
    Ranks(prefill=2, decode=1, heads=2),
    Ranks(prefill=1, decode=2, heads=2),
    Ranks(prefill=2, decode=2, heads=2),
    # Held alike by both prefill ranks: each sends one of the two layers, or both to one of two.
    Ranks(prefill=2, decode=1, heads=1),
    Ranks(prefill=2, decode=2, heads=1),
    # Two of the four have nothing to send, and must let go of their blocks all the same.
    Ranks(prefill=4, decode=1, heads=1),
]
Rare = st.integers(0, 5)


class Protocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.coming: list[tuple[str, int, int]] = []  # transfers whose decode request is yet to come

    # requests

    @initialize(
        ranks=st.sampled_from(RANKS),
        tokens=st.lists(st.integers(6, 4 * BLOCK + 1), min_size=1, max_size=2),
        linked=Rare,
    )
    def begin(self, ranks: Ranks, tokens: list[int], linked: int) -> None:
        """Most stories begin with two sides that know each other."""
        self.world = World(ranks)
        for n in tokens:
            self.request(n, 2, True)
        if linked:
            self.calm()

    @rule(tokens=st.integers(2, 4 * BLOCK + 1), lost=Rare, at_once=st.booleans())
    def request(self, tokens: int, lost: int, at_once: bool) -> None:
        """A proxy sends one request to both sides; now and then one of the two gets lost."""
        n = self.world.number()
        transfer = (f"t{n}", n, tokens)
        if lost != 0:
            self.coming.append(transfer)
            if at_once:
                self.decode_request(-1, 0, 1)
        if lost != 1:
            self.world.prefill.expect(PrefillRequest(f"p{n}", transfer[0], n, tokens))

    @precondition(lambda self: self.coming)
    @rule(i=Index, cached=st.integers(0, 3), released=Rare)
    def decode_request(self, i: int, cached: int, released: int) -> None:
        transfer, prompt, tokens = self.coming.pop(i % len(self.coming))
        world = self.world.decode
        needed = blocks_of(tokens - 1)
        if not released or needed > len(world.free):
            self.world.release(transfer, prompt)
            return
        blocks = [world.free.pop(0) for _ in range(needed)]
        cached = min(cached, needed - 1)
        r = DecodeRequest(f"d{self.world.number()}", transfer, prompt, tokens, cached, blocks)
        world.reserve(r, self.world.address)

    # prefill's scheduler

    def running(self) -> list[PrefillRequest]:
        return [r for r in self.world.prefill.requests.values() if not r.ended and r.computed < r.num_tokens]

    @precondition(lambda self: self.world.prefill.chunk is None and self.running())
    @rule(i=Index, tokens=st.integers(1, 2 * BLOCK), hits=st.integers(0, 1), whole=st.booleans())
    def begin_step(self, i: int, tokens: int, hits: int, whole: bool) -> None:
        requests = self.running()
        self.world.prefill.begin_step(requests[i % len(requests)], tokens, hits)
        while whole and self.world.prefill.chunk is not None:
            self.write_layer(pump=True)

    @precondition(lambda self: self.world.prefill.chunk is not None)
    @rule(pump=st.booleans())
    def write_layer(self, pump: bool) -> None:
        self.world.prefill.write_layer()
        if pump:
            self.world.prefill.pump()

    @precondition(lambda self: self.world.prefill.chunk is None and self.running())
    @rule(i=Index)
    def prefill_whole(self, i: int) -> None:
        requests = self.running()
        self.world.prefill.begin_step(requests[i % len(requests)], 5 * BLOCK, 0)
        while self.world.prefill.chunk is not None:
            self.write_layer(pump=True)

    @precondition(lambda self: self.world.prefill.chunk is None and any(r.blocks for r in self.running()))
    @rule(i=Index, again=st.booleans())
    def preempt(self, i: int, again: bool) -> None:
        requests = [r for r in self.running() if r.blocks]
        self.world.prefill.preempt(requests[i % len(requests)])
        if again:
            self.prefill_whole(self.running().index(requests[i % len(requests)]))

    def finishable(self, abort: bool) -> list[PrefillRequest]:
        requests = [r for r in self.world.prefill.requests.values() if not r.ended]
        return [r for r in requests if abort or r.computed == r.num_tokens]

    @precondition(lambda self: self.world.prefill.chunk is None and self.finishable(abort=False))
    @rule(i=Index)
    def finish_prefill(self, i: int) -> None:
        requests = self.finishable(abort=False)
        self.world.prefill.finish(requests[i % len(requests)], aborted=False)

    @precondition(lambda self: self.world.prefill.chunk is None and self.finishable(abort=True))
    @rule(i=Index, rare=Rare)
    def abort_prefill(self, i: int, rare: int) -> None:
        requests = self.finishable(abort=True)
        if not rare:
            self.world.prefill.finish(requests[i % len(requests)], aborted=True)

    # decode's scheduler

    @precondition(lambda self: any(not r.gone for r in self.world.decode.requests.values()))
    @rule(i=Index)
    def abort_or_finish(self, i: int) -> None:
        requests = [r for r in self.world.decode.requests.values() if not r.gone]
        self.world.decode.abort(requests[i % len(requests)])

    # the network

    @precondition(lambda self: any(c.to_prefill or c.to_decode for c in self.world.connections.values()))
    @rule()
    def calm(self) -> None:
        self.world.calm()

    @precondition(lambda self: any(c.to_prefill or c.to_decode for c in self.world.connections.values()))
    @rule(i=Index, fate=st.sampled_from(["deliver"] * 8 + ["lose", "double"]))
    def network(self, i: int, fate: str) -> None:
        lanes = [(c, True) for c in self.world.connections.values() if c.to_prefill]
        lanes += [(c, False) for c in self.world.connections.values() if c.to_decode]
        if lanes:
            connection, to_prefill = lanes[i % len(lanes)]
            self.world.deliver(connection, to_prefill, lose=fate == "lose", double=fate == "double")

    @precondition(lambda self: any(c.offer is not None for c in self.world.connections.values()))
    @rule(i=Index)
    def complete_link(self, i: int) -> None:
        offered = [c for c in self.world.connections.values() if c.offer is not None]
        if offered:
            self.world.complete_link(offered[i % len(offered)])

    @precondition(lambda self: self.world.flying)
    @rule(i=Index, pages=st.integers(1, 6))
    def land(self, i: int, pages: int) -> None:
        self.world.land(self.world.flying[i % len(self.world.flying)], pages)

    @precondition(lambda self: self.world.awaited)
    @rule()
    def see_marks(self) -> None:
        self.world.see_marks()

    @precondition(lambda self: self.world.fences)
    @rule()
    def complete_fence(self) -> None:
        self.world.complete_fence()

    @precondition(lambda self: self.world.decode.granted)
    @rule(i=Index, by_prefill=st.booleans(), rare=Rare)
    def notice_or_partition(self, i: int, by_prefill: bool, rare: int) -> None:
        if rare > 1:
            return
        known = [
            c
            for c in self.world.connections.values()
            if not (c.prefill_told if by_prefill else c.decode_told)
        ]
        if known:
            self.world.notice(known[i % len(known)], by_prefill)

    @precondition(lambda self: self.world.decode.granted or self.world.prefill.requests)
    @rule(rare=Rare, prefill=st.booleans())
    def crash(self, rare: int, prefill: bool) -> None:
        if rare > 1:
            return
        if prefill:
            self.world.crash_prefill()
        else:
            self.world.crash_decode()

    @rule(seconds=st.sampled_from([0.1] * 8 + [1.0, 4.0, 13.0, 31.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # what must hold

    @invariant()
    def blocks_have_one_owner(self) -> None:
        for world in (self.world.prefill, self.world.decode):
            assert len(set(world.free)) == len(world.free)
        held = [b for r in self.world.prefill.requests.values() for b in r.blocks]
        assert not set(held) & set(self.world.prefill.free)

    def teardown(self) -> None:
        """The adversary rests, schedulers go on, messages arrive, time passes: all must come to an end."""
        world = self.world
        for _ in range(400):
            if world.prefill.chunk is not None:
                world.prefill.write_layer()
            elif requests := self.running():
                before = requests[0].computed
                world.prefill.begin_step(requests[0], 4 * BLOCK, 0)
                if world.prefill.chunk is None and requests[0].computed == before:
                    world.prefill.finish(requests[0], aborted=True)  # its pool is too small for it
            for r in list(world.prefill.requests.values()):
                if not r.ended and r.computed == r.num_tokens and world.prefill.chunk is None:
                    world.prefill.finish(r, aborted=False)
            for c in list(world.connections.values()):
                dead_prefill, dead_decode = not c.prefill.alive, not c.decode.alive
                if not c.prefill_told and (dead_decode or c.hung_up):
                    world.notice(c, by_prefill=True)
                if not c.decode_told and (dead_prefill or c.prefill_told):
                    world.notice(c, by_prefill=False)
                while c.to_prefill:
                    world.deliver(c, True)
                while c.to_decode:
                    world.deliver(c, False)
                if c.offer is not None:
                    world.complete_link(c)
            for write in list(world.flying):
                world.land(write, 1_000)
            while world.fences:
                world.complete_fence()
            while world.awaited:
                world.see_marks()
            world.pass_time(1.0)
        for r in world.decode.requests.values():
            assert r.reported is not None, f"{r.id} never ended"
        assert world.decode.num_loads == 0
        assert not world.prefill.requests, f"held for ever: {list(world.prefill.requests)}"
        assert world.prefill.num_transfers == 0


SETTINGS = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


def test_protocol() -> None:
    run_state_machine_as_test(Protocol, settings=SETTINGS)


PLANTED = {
    "abort frees without a fence": (
        ReceiveSession,
        (ReceiveState.WAITING, ReceiveEvent.ABORT),
        (ReceiveState.CLOSED, (ReceiveAction.SEND_CANCEL, ReceiveAction.UNGRANT, ReceiveAction.REPORT)),
    ),
    "a lost peer frees without a fence": (
        ReceiveSession,
        (ReceiveState.WAITING, ReceiveEvent.PEER_LOST),
        (ReceiveState.CLOSED, (ReceiveAction.UNGRANT, ReceiveAction.REPORT)),
    ),
    "a cancel is acknowledged while writes are in flight": (
        SendSession,
        (SendState.PUSHING, SendEvent.CANCEL),
        (
            SendState.CLOSED,
            SEND_TABLE[SendState.CLOSED, SendEvent.CANCEL][1]
            + SEND_TABLE[SendState.HELD, SendEvent.RELEASE][1],
        ),
    ),
    "a lost decode side leaks": (
        SendSession,
        (SendState.PUSHING, SendEvent.PEER_LOST),
        (SendState.PUSHING, ()),
    ),
    "a deadline is forgotten": (
        ReceiveSession,
        (ReceiveState.WAITING, ReceiveEvent.GIVEN_UP),
        (ReceiveState.FENCING, ()),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_finds_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: each of these bugs, planted, is found."""
    session, row, wrong = PLANTED[bug]
    table = RECEIVE_TABLE if session is ReceiveSession else SEND_TABLE
    monkeypatch.setattr(session, "table", {**table, row: wrong})
    with pytest.raises((WriteAfterFree, AssertionError)):
        run_state_machine_as_test(Protocol, settings=settings(SETTINGS, phases=[Phase.generate]))


SPLIT = {
    "a load is over with its first part": (Load, "ended", lambda load: any(p.closed for p in load.parts)),
    "blocks are freed with the first reservation": (
        SendTransfer,
        "freed",
        lambda transfer: any(share.freed for share in transfer.shares),
    ),
    "blocks are freed before all have reserved": (
        SendTransfer,
        "freed",
        lambda transfer: all(share.freed for share in transfer.shares if share.key),
    ),
}


@pytest.mark.parametrize("bug", SPLIT)
def test_finds_bugs_of_several_ranks(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = SPLIT[bug]
    monkeypatch.setattr(owner, name, property(wrong))
    with pytest.raises((WriteAfterFree, AssertionError)):
        run_state_machine_as_test(Protocol, settings=settings(SETTINGS, phases=[Phase.generate]))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_without_an_adversary_all_is_loaded(ranks: Ranks, late: bool) -> None:
    world = World(ranks)
    for n in (1, 2):
        tokens = 2 * BLOCK + n
        prefill = PrefillRequest(f"p{n}", f"t{n}", n, tokens)
        world.prefill.expect(prefill)
        blocks = [world.decode.free.pop(0) for _ in range(blocks_of(tokens - 1))]
        decode = DecodeRequest(f"d{n}", prefill.transfer, n, tokens, 0, blocks)
        if not late:
            world.decode.reserve(decode, world.address)
        world.calm()
        world.prefill.begin_step(prefill, tokens, 0)
        while world.prefill.chunk is not None:
            world.prefill.write_layer()
            world.prefill.pump()
        world.prefill.finish(prefill, aborted=False)
        if late:
            assert world.prefill.requests, "freed before decode has reserved"
            world.decode.reserve(decode, world.address)
        for _ in range(3):
            world.calm()
            for write in list(world.flying):
                world.land(write, 1_000)
        world.calm()
        assert decode.reported == "loaded"
        assert not world.prefill.requests
    assert world.prefill.num_transfers == world.decode.num_loads == 0

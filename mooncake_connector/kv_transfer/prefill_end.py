"""Prefill's end of all transfers of one worker.

Sans-IO: calls come in with the time, effects go out through `PrefillPorts`.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.layout import WorkerInfo
from mooncake_connector.kv_transfer.messages import (
    Cancel,
    CancelAck,
    Failed,
    Find,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Message,
    OpenLink,
    Release,
    Reserve,
    unpack_want,
)
from mooncake_connector.kv_transfer.ports import PrefillPorts
from mooncake_connector.kv_transfer.prefill_peers import PeerId, PrefillPeers
from mooncake_connector.kv_transfer.push import Chunk, Clock, PushProgress, Want, check_want
from mooncake_connector.kv_transfer.routes import WorkerAt
from mooncake_connector.kv_transfer.send_transfer import SendShare, SendTransfer, TransferKey
from mooncake_connector.kv_transfer.session import SendAction, SendEvent, SendState
from mooncake_connector.kv_transfer.transport.base import SourceIdentity

logger = logging.getLogger(__name__)

REMEMBERED = 4096  # reservations and transfers that are over, kept to answer late messages


class PrefillEnd:
    """All transfers that this worker pushes.

    Args:
        info: what this worker tells decode workers.
        clock: how far the forward passes are.
        paths: ways that this worker can push by.
    """

    def __init__(
        self,
        info: WorkerInfo,
        identity: SourceIdentity,
        config: ConnectorConfig,
        ports: PrefillPorts,
        clock: Clock,
        paths: Sequence[str],
    ) -> None:
        self._info, self._config = info, config
        self._ports, self._clock = ports, clock
        self._layer_groups = [0] * info.layout.num_layers
        for plane in info.layout.planes:
            self._layer_groups[plane.layer] = plane.group
        self._peers = PrefillPeers(info, identity, config, ports, paths)
        self._transfers: dict[TransferKey, SendTransfer] = {}
        self._by_request: dict[str, SendTransfer] = {}
        self._by_key: dict[int, SendShare] = {}
        self._over: OrderedDict[TransferKey | int | str, str] = OrderedDict()

    # ------------------------------------------------------------------ the engine's side

    def directory(self, workers: Sequence[WorkerAt]) -> None:
        """All workers of this engine."""
        self._peers.directory(workers)

    def expect(self, request_id: str, transfer_id: str, prompt_hash: bytes, now: float) -> None:
        """The scheduler received a request whose KV others will want."""
        id = (transfer_id, prompt_hash)
        if request_id in self._by_request or request_id in self._over:
            return
        transfer = self._transfers.get(id) or self._add(id)
        if transfer.request_id is not None:
            return  # n > 1: one request's KV serves all samples of the prompt
        transfer.request_id = request_id
        self._by_request[request_id] = transfer
        self._handle_all(transfer, SendEvent.PREFILL, now)
        self._make_room(transfer, now)
        if id in self._over:
            self._handle_all(transfer, SendEvent.RELEASE, now, self._over[id])

    def step(self, step: int, chunks: Sequence[Chunk], now: float) -> None:
        """A forward pass is about to run."""
        for c in chunks:
            self.expect(c.request_id, c.transfer_id, c.prompt_hash, now)
            if (transfer := self._by_request.get(c.request_id)) is not None:
                transfer.computed.chunk(
                    step, c.start, c.end, c.blocks, replace=c.replace, hits_ready=c.hits_ready
                )

    def preempted(self, request_ids: Sequence[str]) -> None:
        """These requests' blocks were freed; they will be computed again."""
        for request_id in request_ids:
            if (transfer := self._by_request.get(request_id)) is not None:
                transfer.computed.preempted()

    def ended(self, request_id: str, held: bool, now: float) -> None:
        """The request left the scheduler; `held`: its blocks stay until `PrefillPorts.sent`."""
        transfer = self._by_request.get(request_id)
        if transfer is None:
            # Another request of the same prompt is the tracked one, or its reservation is long over.
            self._remember(request_id, "the request has ended")
            if held:
                self._ports.sent(request_id)
            return
        transfer.ended, transfer.held = True, held
        if held:
            for share in transfer.shares:
                if share.session.state is not SendState.DRAINING:
                    share.deadline = now + self._config.lease_s
            self._handle_all(transfer, SendEvent.PREFILL_FINISHED, now)
        else:
            self._handle_all(transfer, SendEvent.PREFILL_ABORTED, now, "the prefill request was aborted")
        self._settle(transfer)

    def drop(self, transfer_id: str, now: float) -> None:
        """Nobody will come for this transfer; one that decode has reserved already goes on."""
        for id in [id for id in self._transfers if id[0] == transfer_id]:
            self._release(Release(*id), now)

    def first_token(self, request_id: str, token: int, now: float) -> None:
        """The scheduler has the token that follows the request's prompt."""
        if (transfer := self._by_request.get(request_id)) is not None:
            transfer.first_token = token
            for share in list(transfer.shares):
                self._push(share, now)
            self._settle(transfer)

    def pump(self, now: float) -> None:
        """Submit every write that has become possible."""
        for share in list(self._by_key.values()):
            self._push(share, now)
            self._settle(share.transfer)

    # ------------------------------------------------------------------ decode's side

    def message(self, peer: PeerId, message: Message, now: float) -> None:
        match message:
            case Find():
                self._peers.find(peer)
            case Hello():
                self._peers.hello(peer, message, now)
            case OpenLink():
                self._peers.open_link(peer, message)
            case Reserve():
                self._reserve(peer, message, now)
            case Cancel():
                self._cancel(peer, message, now)
            case Release():
                self._release(message, now)
            case Heartbeat():
                self._heartbeat(peer, message, now)
            case _:
                logger.warning("ignored a %s from a decode worker", type(message).__name__)

    def link_up(self, peer: PeerId, now: float) -> None:
        if (known := self._peers.get(peer)) is not None:
            known.linked = True
            self.pump(now)

    def link_down(self, peer: PeerId, reason: str, now: float) -> None:
        """The peer died or its link failed; no write to it is in flight any more."""
        if self._peers.lost(peer, reason):
            for share in [s for s in self._by_key.values() if s.peer == peer]:
                self._handle(share, SendEvent.PEER_LOST, now, reason)
                self._settle(share.transfer)

    def write_ended(self, key: int, op: int, reason: str | None, now: float) -> None:
        """A write landed, or failed for `reason`."""
        share = self._by_key.get(key)
        if share is None or share.progress is None:
            return
        share.progress.ended(op)
        nbytes = share.op_bytes.pop(op, 0)
        if reason is not None:
            self._handle(share, SendEvent.WRITE_FAILED, now, reason)
        else:
            share.nbytes += nbytes
            share.landed = now
            last = self._info.layout.num_layers - 1
            if not share.transfer.computed.has(share.progress.num_tokens, last, self._clock):
                share.early_bytes += nbytes
        self._push(share, now)
        self._settle(share.transfer)

    def tick(self, now: float) -> None:
        """Let deadlines pass; call a few times a second."""
        for transfer in list(self._transfers.values()):
            for share in [s for s in transfer.shares if now >= s.deadline]:
                self._overdue(share, now)
            self._settle(transfer)
        for peer in self._peers.overdue(now):
            self._ports.close_link(peer)
            self.link_down(peer, "it opened no link", now)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    # ------------------------------------------------------------------ inside

    def _overdue(self, share: SendShare, now: float) -> None:
        transfer = share.transfer
        match share.session.state:
            case SendState.UNMATCHED:
                why = "prefill never received this request"
                if sum(id[0] == transfer.id[0] for id in self._transfers) > 1:
                    why = "prefill has this transfer id with another prompt: are the tokenizers the same?"
                self._handle(share, SendEvent.MATCH_EXPIRED, now, why)
            case SendState.HELD | SendState.PUSHING if transfer.held:
                logger.warning("lease of transfer %s expired: its KV is freed", transfer.id[0])
                self._handle(share, SendEvent.LEASE_EXPIRED, now, "the lease expired")
            case SendState.DRAINING if share.peer is not None:
                # Its writes do not end: closing the link ends them.
                self._ports.close_link(share.peer)
                self.link_down(share.peer, "writes do not end", now)

    def _reserve(self, peer: PeerId, message: Reserve, now: float) -> None:
        id = (message.transfer_id, message.prompt_hash)
        known = self._peers.get(peer)
        if message.key in self._by_key:
            return  # a doubled message
        transfer = self._transfers.get(id)
        try:
            want = unpack_want(message.want)
            refusal = self._refusal(peer, message, want, transfer)
        except ValueError as e:
            refusal = f"malformed reservation: {e}"
        if refusal is not None or known is None:
            self._remember(message.key, refusal or "")
            self._ports.send(peer, Failed(message.key, refusal or ""))
            return
        if transfer is None:
            transfer = self._add(id)
        share = transfer.open
        if share is None:
            share = SendShare(transfer, SendState.UNMATCHED, now + self._config.match_timeout_s)
            transfer.shares.append(share)
        transfer.expected = max(transfer.expected, message.shares)
        transfer.owner = known.info.engine_id
        share.peer, share.key, share.wants_token = peer, message.key, message.first_token
        self._by_key[message.key] = share
        share.progress = PushProgress(
            known.route,
            (self._info.layout.groups, known.info.layout.groups),
            self._layer_groups,
            transfer.computed,
            message.num_tokens,
            want,
            self._config.push_bytes,
        )
        share.first_write = share.landed = now
        if transfer.held:
            share.deadline = now + self._config.lease_s
        self._handle(share, SendEvent.RESERVE, now)
        self._make_room(transfer, now)
        self._push(share, now)
        self._settle(transfer)

    def _refusal(
        self, peer: PeerId, message: Reserve, want: Sequence[Want], transfer: SendTransfer | None
    ) -> str | None:
        if message.key in self._over:
            return self._over[message.key]
        if (known := self._peers.get(peer)) is None:
            return "say hello first"
        check_want(want, known.info.layout)
        if transfer is None:
            return self._over.get((message.transfer_id, message.prompt_hash))
        if transfer.owner not in ("", known.info.engine_id) or any(s.peer == peer for s in transfer.shares):
            return "another decode request has reserved this transfer"
        if transfer.request_id is not None and transfer.open is None:
            taken = sum(s.key > 0 for s in transfer.shares)
            return "all of it is reserved" if taken >= transfer.expected else transfer.reason
        return None

    def _make_room(self, transfer: SendTransfer, now: float) -> None:
        """Let the next reservation come, if one is to."""
        if len(transfer.shares) >= transfer.expected or transfer.request_id is None or transfer.open:
            return
        if transfer.held or not transfer.ended:
            state = SendState.HELD if transfer.held else SendState.QUEUED
            transfer.shares.append(SendShare(transfer, state, now + self._config.lease_s))

    def _cancel(self, peer: PeerId, message: Cancel, now: float) -> None:
        share = self._by_key.get(message.key)
        if share is None:
            # Remembered, so that a reservation that comes after its cancel is refused.
            self._remember(message.key, "cancelled")
            self._ports.send(peer, CancelAck(message.key))
            return
        self._handle(share, SendEvent.CANCEL, now, "decode cancelled")
        self._settle(share.transfer)

    def _release(self, message: Release, now: float) -> None:
        id = (message.transfer_id, message.prompt_hash)
        if (transfer := self._transfers.get(id)) is None:
            self._remember(id, "decode released it")
            return
        self._handle_all(transfer, SendEvent.RELEASE, now, "decode released it")
        self._settle(transfer)

    def _heartbeat(self, peer: PeerId, message: Heartbeat, now: float) -> None:
        unknown = []
        for key in message.keys:
            share = self._by_key.get(key)
            if share is None:
                unknown.append(key)
            elif share.session.state is SendState.PUSHING and share.transfer.held:
                share.deadline = now + self._config.lease_s
        self._ports.send(peer, HeartbeatAck(tuple(unknown)))

    def _add(self, id: TransferKey) -> SendTransfer:
        transfer = self._transfers[id] = SendTransfer(id, len(self._info.layout.groups))
        return transfer

    def _push(self, share: SendShare, now: float) -> None:
        session, progress = share.session, share.progress
        if session.state is SendState.PUSHING and progress is not None:
            assert share.peer is not None
            peer = self._peers.get(share.peer)
            while peer is not None and peer.linked:
                try:
                    write = progress.next(self._clock, peer.gather)
                except IndexError:
                    # The prompts hash alike, so this is a decode side that counts its blocks differently.
                    why = "decode wants blocks that this prompt does not have"
                    self._handle(share, SendEvent.WRITE_FAILED, now, why)
                    break
                if write is None:
                    break
                plan = peer.route.plan(write.source, write.target, self._clock.after(write.mark))
                if not share.op_bytes and not share.nbytes:
                    share.first_write = share.landed = now
                share.op_bytes[write.op] = plan.nbytes
                self._ports.write(share.peer, share.key, write.op, plan)
            if share.complete:
                self._handle(share, SendEvent.COMPLETE, now)
        if session.state is SendState.DRAINING and share.idle:
            self._handle(share, SendEvent.DRAINED, now)

    def _handle_all(self, transfer: SendTransfer, event: SendEvent, now: float, reason: str = "") -> None:
        for share in list(transfer.shares):
            self._handle(share, event, now, reason)

    def _handle(self, share: SendShare, event: SendEvent, now: float, reason: str = "") -> None:
        session = share.session
        before = session.state
        actions = session.handle(event, reason)
        if session.state is SendState.DRAINING and before is not SendState.DRAINING:
            share.deadline = now + self._config.peer_timeout_s
            self._ports.cancel(share.key)
        for action in actions:
            if action is SendAction.REPLY:
                action = SendAction.SEND_CANCEL_ACK if session.cancelled else SendAction.SEND_FAILED
            marks = self._ports.marks(share.peer) if share.peer is not None else ()
            match action:
                case SendAction.SEND_DONE:
                    message: Message = share.done(marks)
                case SendAction.SEND_FAILED:
                    message = Failed(share.key, session.reason, marks)
                case SendAction.SEND_CANCEL_ACK:
                    message = CancelAck(share.key, marks)
                case SendAction.FREE:
                    share.freed = True
                    continue
            if share.peer is not None:
                self._ports.send(share.peer, message)
        if session.state is SendState.DRAINING and share.idle:
            self._handle(share, SendEvent.DRAINED, now)

    def _settle(self, transfer: SendTransfer) -> None:
        """Free what may be freed and forget what is over."""
        if transfer.freed and transfer.held:
            assert transfer.request_id is not None
            transfer.held = False
            self._ports.sent(transfer.request_id)
        for share in transfer.shares:
            if share.session.state is SendState.CLOSED and self._by_key.pop(share.key, None) is not None:
                self._remember(share.key, share.session.reason or "it was delivered")
        if not transfer.over or not (transfer.request_id is None or transfer.ended):
            return
        if self._transfers.get(transfer.id) is transfer:
            del self._transfers[transfer.id]
            self._remember(transfer.id, f"prefill no longer holds it: {transfer.reason}")
        if transfer.request_id is not None and self._by_request.pop(transfer.request_id, None) is not None:
            self._remember(transfer.request_id, transfer.reason)

    def _remember(self, what: TransferKey | int | str, reason: str) -> None:
        self._over[what] = reason
        self._over.move_to_end(what)
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)

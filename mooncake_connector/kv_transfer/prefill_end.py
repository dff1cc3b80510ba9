"""Prefill's end of all transfers of one worker.

Sans-IO: calls come in with the time, effects go out through `PrefillPorts`.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.layout import WorkerInfo, check_compatible, copy_plan
from mooncake_connector.kv_transfer.messages import (
    Cancel,
    CancelAck,
    Failed,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Message,
    OpenLink,
    Redirect,
    Refused,
    Release,
    Reserve,
    Welcome,
    unpack_want,
)
from mooncake_connector.kv_transfer.ports import PrefillPorts
from mooncake_connector.kv_transfer.push import Chunk, Clock, PushProgress, Want, check_want
from mooncake_connector.kv_transfer.send_transfer import SendTransfer, TransferKey
from mooncake_connector.kv_transfer.session import SendAction, SendEvent, SendState
from mooncake_connector.kv_transfer.transport.base import SourceIdentity

logger = logging.getLogger(__name__)

PeerId = bytes

REMEMBERED = 4096  # reservations and transfers that are over, kept to answer late messages


class _Peer:
    def __init__(self, info: WorkerInfo, deadline: float) -> None:
        self.info = info
        self.linked = False
        self.deadline = deadline  # for the link


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
        self._info, self._identity, self._config = info, identity, config
        self._ports, self._clock, self._paths = ports, clock, tuple(paths)
        self._layer_groups = [0] * info.layout.num_layers
        self._block_bytes = [0] * info.layout.num_layers
        for plane in info.layout.planes:
            self._layer_groups[plane.layer] = plane.group
            self._block_bytes[plane.layer] += plane.nbytes
        self._directory: Sequence[str] = ()
        self._peers: dict[PeerId, _Peer] = {}
        self._transfers: dict[TransferKey, SendTransfer] = {}
        self._by_request: dict[str, SendTransfer] = {}
        self._by_key: dict[int, SendTransfer] = {}
        self._over: OrderedDict[TransferKey | int | str, str] = OrderedDict()

    # ------------------------------------------------------------------ the engine's side

    def directory(self, addresses: Sequence[str]) -> None:
        """Where each rank listens."""
        self._directory = addresses

    def expect(self, request_id: str, transfer_id: str, prompt_hash: bytes, now: float) -> None:
        """The scheduler received a request whose KV others will want."""
        id = (transfer_id, prompt_hash)
        if request_id in self._by_request or request_id in self._over:
            return
        transfer = self._transfers.get(id) or self._add(id, SendState.QUEUED, now)
        if transfer.request_id is not None:
            return  # n > 1: one request's KV serves all samples of the prompt
        transfer.request_id = request_id
        self._by_request[request_id] = transfer
        self._handle(transfer, SendEvent.PREFILL, now)
        if id in self._over:
            self._handle(transfer, SendEvent.RELEASE, now, self._over[id])

    def step(self, step: int, chunks: Sequence[Chunk], now: float) -> None:
        """A forward pass is about to run."""
        for c in chunks:
            self.expect(c.request_id, c.transfer_id, c.prompt_hash, now)
            if (transfer := self._by_request.get(c.request_id)) is not None:
                transfer.progress.chunk(
                    step, c.start, c.end, c.blocks, replace=c.replace, hits_ready=c.hits_ready
                )

    def preempted(self, request_ids: Sequence[str]) -> None:
        """These requests' blocks were freed; they will be computed again."""
        for request_id in request_ids:
            if (transfer := self._by_request.get(request_id)) is not None:
                transfer.progress.preempted()

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
            transfer.deadline = now + self._config.lease_s
            self._handle(transfer, SendEvent.PREFILL_FINISHED, now)
        else:
            self._handle(transfer, SendEvent.PREFILL_ABORTED, now, "the prefill request was aborted")
        self._settle(transfer)

    def drop(self, transfer_id: str, now: float) -> None:
        """Nobody will come for this transfer; one that decode has reserved already goes on."""
        for id in [id for id in self._transfers if id[0] == transfer_id]:
            self._release(Release(*id), now)

    def first_token(self, request_id: str, token: int, now: float) -> None:
        """The scheduler has the token that follows the request's prompt."""
        if (transfer := self._by_request.get(request_id)) is not None:
            transfer.first_token = token
            self._push(transfer, now)
            self._settle(transfer)

    def pump(self, now: float) -> None:
        """Submit every write that has become possible."""
        for transfer in list(self._by_key.values()):
            self._push(transfer, now)
            self._settle(transfer)

    # ------------------------------------------------------------------ decode's side

    def message(self, peer: PeerId, message: Message, now: float) -> None:
        match message:
            case Hello():
                self._hello(peer, message, now)
            case OpenLink() if peer in self._peers:
                self._ports.open_link(peer, self._peers[peer].info.name, message)
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
        known = self._peers.pop(peer, None)
        if known is None:
            return
        logger.warning("decode worker %s is gone: %s", known.info.name, reason)
        for transfer in [t for t in self._by_key.values() if t.peer == peer]:
            self._handle(transfer, SendEvent.PEER_LOST, now, reason)
            self._settle(transfer)

    def write_ended(self, key: int, op: int, reason: str | None, now: float) -> None:
        """A write landed, or failed for `reason`."""
        transfer = self._by_key.get(key)
        if transfer is None:
            return
        transfer.progress.ended(op)
        nbytes = transfer.op_bytes.pop(op, 0)
        if reason is not None:
            self._handle(transfer, SendEvent.WRITE_FAILED, now, reason)
        else:
            transfer.nbytes += nbytes
            transfer.landed = now
            if not transfer.progress.prefilled(self._clock):
                transfer.early_bytes += nbytes
        self._push(transfer, now)
        self._settle(transfer)

    def tick(self, now: float) -> None:
        """Let deadlines pass; call a few times a second."""
        for transfer in list(self._transfers.values()):
            if now < transfer.deadline:
                continue
            match transfer.session.state:
                case SendState.UNMATCHED:
                    why = "prefill never received this request"
                    if sum(id[0] == transfer.id[0] for id in self._transfers) > 1:
                        why = "prefill has this transfer id with another prompt: are the tokenizers the same?"
                    self._handle(transfer, SendEvent.MATCH_EXPIRED, now, why)
                case SendState.HELD | SendState.PUSHING if transfer.held:
                    logger.warning("lease of transfer %s expired: its KV is freed", transfer.id[0])
                    self._handle(transfer, SendEvent.LEASE_EXPIRED, now, "the lease expired")
                case SendState.DRAINING if transfer.peer is not None:
                    # Its writes do not end: closing the link ends them.
                    self._ports.close_link(transfer.peer)
                    self.link_down(transfer.peer, "writes do not end", now)
            self._settle(transfer)
        for peer in [p for p, known in self._peers.items() if not known.linked and now >= known.deadline]:
            self._ports.close_link(peer)
            self.link_down(peer, "it opened no link", now)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    # ------------------------------------------------------------------ inside

    def _hello(self, peer: PeerId, hello: Hello, now: float) -> None:
        rank = hello.info.rank
        try:
            check_compatible(self._info, hello.info)
        except IncompatibleError as e:
            logger.error("refused decode worker %s: %s", hello.info.name, e)
            self._ports.send(peer, Refused(str(e)))
            return
        if rank != self._info.rank:
            known = rank < len(self._directory)
            no_rank = Refused(f"no prefill rank {rank}: this engine is still starting")
            self._ports.send(peer, Redirect(self._directory[rank]) if known else no_rank)
            return
        self._peers[peer] = _Peer(hello.info, now + 2 * self._config.handshake_timeout_s)
        self._ports.allow_reader(hello.pid)
        self._ports.send(peer, Welcome(self._info, self._identity, self._paths))

    def _reserve(self, peer: PeerId, message: Reserve, now: float) -> None:
        id = (message.transfer_id, message.prompt_hash)
        if message.key in self._by_key:
            return  # a doubled message
        transfer = self._transfers.get(id)
        try:
            want = unpack_want(message.want)
            refusal = self._refusal(peer, message, want, transfer)
        except ValueError as e:
            refusal = f"malformed reservation: {e}"
        if refusal:
            self._remember(message.key, refusal)
            self._ports.send(peer, Failed(message.key, refusal))
            return
        if transfer is None:
            transfer = self._add(id, SendState.UNMATCHED, now)
            transfer.deadline = now + self._config.match_timeout_s
        transfer.peer, transfer.reservation = peer, message.key
        transfer.wants_token = message.first_token
        self._by_key[message.key] = transfer
        transfer.progress.reserve(message.num_tokens, want)
        if transfer.held:
            transfer.deadline = now + self._config.lease_s
        self._handle(transfer, SendEvent.RESERVE, now)
        self._push(transfer, now)
        self._settle(transfer)

    def _refusal(
        self, peer: PeerId, message: Reserve, want: Sequence[Want], transfer: SendTransfer | None
    ) -> str | None:
        if message.key in self._over:
            return self._over[message.key]
        if peer not in self._peers:
            return "say hello first"
        if transfer is None and (message.transfer_id, message.prompt_hash) in self._over:
            return self._over[message.transfer_id, message.prompt_hash]
        if transfer is not None and transfer.reservation:
            return "another decode request has reserved this transfer"
        check_want(want, self._peers[peer].info.layout)
        return None

    def _cancel(self, peer: PeerId, message: Cancel, now: float) -> None:
        transfer = self._by_key.get(message.key)
        if transfer is None:
            # Remembered, so that a reservation that comes after its cancel is refused.
            self._remember(message.key, "cancelled")
            self._ports.send(peer, CancelAck(message.key))
            return
        self._handle(transfer, SendEvent.CANCEL, now, "decode cancelled")
        self._settle(transfer)

    def _release(self, message: Release, now: float) -> None:
        id = (message.transfer_id, message.prompt_hash)
        if (transfer := self._transfers.get(id)) is None:
            self._remember(id, "decode released it")
            return
        self._handle(transfer, SendEvent.RELEASE, now, "decode released it")
        self._settle(transfer)

    def _heartbeat(self, peer: PeerId, message: Heartbeat, now: float) -> None:
        unknown = []
        for key in message.keys:
            transfer = self._by_key.get(key)
            if transfer is None:
                unknown.append(key)
            elif transfer.session.state is SendState.PUSHING and transfer.held:
                transfer.deadline = now + self._config.lease_s
        self._ports.send(peer, HeartbeatAck(tuple(unknown)))

    def _add(self, id: TransferKey, state: SendState, now: float) -> SendTransfer:
        progress = PushProgress(
            self._info.layout.groups, self._layer_groups, self._block_bytes, self._config.push_bytes
        )
        transfer = self._transfers[id] = SendTransfer(id, state, progress, now)
        return transfer

    def _push(self, transfer: SendTransfer, now: float) -> None:
        if transfer.session.state is SendState.PUSHING and transfer.request_id is not None:
            assert transfer.peer is not None
            peer = self._peers.get(transfer.peer)
            while peer is not None and peer.linked:
                try:
                    write = transfer.progress.next(self._clock)
                except IndexError:
                    # The prompts hash alike, so this is a decode side that counts its blocks differently.
                    self._handle(
                        transfer,
                        SendEvent.WRITE_FAILED,
                        now,
                        "decode wants blocks that this prompt does not have",
                    )
                    break
                if write is None:
                    break
                pairs = [
                    (i, write.source[plane.layer], write.target[plane.layer])
                    for i, plane in enumerate(self._info.layout.planes)
                    if plane.layer in write.source
                ]
                plan = copy_plan(self._info.layout, peer.info.layout, pairs)
                plan = msgspec.structs.replace(plan, after=self._clock.after(write.mark))
                if not transfer.op_bytes and not transfer.nbytes:
                    transfer.first_write = transfer.landed = now
                transfer.op_bytes[write.op] = plan.nbytes
                self._ports.write(transfer.peer, transfer.reservation, write.op, plan)
            if transfer.complete:
                self._handle(transfer, SendEvent.COMPLETE, now)
        if transfer.session.state is SendState.DRAINING and not transfer.progress.in_flight:
            self._handle(transfer, SendEvent.DRAINED, now)

    def _handle(self, transfer: SendTransfer, event: SendEvent, now: float, reason: str = "") -> None:
        session = transfer.session
        before = session.state
        actions = session.handle(event, reason)
        if session.state is SendState.DRAINING and before is not SendState.DRAINING:
            transfer.deadline = now + self._config.peer_timeout_s
            self._ports.cancel(transfer.reservation)
        for action in actions:
            if action is SendAction.REPLY:
                action = SendAction.SEND_CANCEL_ACK if session.cancelled else SendAction.SEND_FAILED
            key = transfer.reservation
            marks = self._ports.marks(transfer.peer) if transfer.peer is not None else ()
            match action:
                case SendAction.SEND_DONE:
                    message: Message = transfer.done(marks)
                case SendAction.SEND_FAILED:
                    message = Failed(key, session.reason, marks)
                case SendAction.SEND_CANCEL_ACK:
                    message = CancelAck(key, marks)
                case SendAction.FREE:
                    transfer.freed = True
                    continue
            if transfer.peer is not None:
                self._ports.send(transfer.peer, message)
        if session.state is SendState.DRAINING and not transfer.progress.in_flight:
            self._handle(transfer, SendEvent.DRAINED, now)

    def _settle(self, transfer: SendTransfer) -> None:
        """Free what may be freed and forget what is over."""
        if transfer.freed and transfer.held:
            assert transfer.request_id is not None
            transfer.held = False
            self._ports.sent(transfer.request_id)
        if transfer.session.state is not SendState.CLOSED:
            return
        reason = transfer.session.reason or "it was delivered"
        if transfer.reservation and self._by_key.pop(transfer.reservation, None) is not None:
            self._remember(transfer.reservation, reason)
        if transfer.request_id is None or transfer.ended:
            if self._transfers.get(transfer.id) is transfer:
                del self._transfers[transfer.id]
                self._remember(transfer.id, f"prefill no longer holds it: {reason}")
            if (
                transfer.request_id is not None
                and self._by_request.pop(transfer.request_id, None) is not None
            ):
                self._remember(transfer.request_id, reason)

    def _remember(self, what: TransferKey | int | str, reason: str) -> None:
        self._over[what] = reason
        self._over.move_to_end(what)
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)

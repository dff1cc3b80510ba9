"""The target's end of all links: admits peers, and lands their writes where a grant allows."""

import contextlib
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from functools import partial

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Endpoint, Landed
from mooncake_connector.kv_transfer.transport.grants import Grant, GrantTable
from mooncake_connector.kv_transfer.transport.inlet import Inlet
from mooncake_connector.kv_transfer.transport.outgoing import call
from mooncake_connector.kv_transfer.transport.process_vm import Source
from mooncake_connector.kv_transfer.transport.staging import Staging

RECEIVE_BUFFER_BYTES = 4 << 20

_MAX_STRANGERS = 64
_WILDCARDS = ("", "0.0.0.0", "::")

log = logging.getLogger(__name__)


class _Inlink:
    """What one admission became: a peer's link.

    Attributes:
        hello: the first that came.
        inlets: its connections that are alive, by index.
        fenced: the incarnation of each index up to which nothing may land any more.
        settled: indices that came up or were fenced.
    """

    def __init__(self, peer: str, token: bytes) -> None:
        self.peer = peer
        self.token = token
        self.hello: wire.Hello | None = None
        self.inlets: dict[int, Inlet] = {}
        self.fenced: dict[int, int] = {}
        self.settled: set[int] = set()
        self.up = False
        self.gone = False
        # Held while listeners are told, so that they never hear "down" before "up".
        self.telling = threading.RLock()


class Receiver:
    """A `Target` over TCP connections, for the tcp and the process_vm path.

    Args:
        host: address to listen on; IPv4 or IPv6.
        port: 0 for any free one.
        advertise: the host that peers connect to, if it isn't `host`.
        on_link_up: called with the peer once all connections of its link are in (or were given up by it).
        on_link_down: called with the peer and a reason, once per link, when the last of its connections
            ended: the peer died or hung up, or `admit` made way for a new link; nothing lands over it any
            more. Not called for what `drop` and `close` end.
        staging: knows the memory of GPUs; None: there is none.

    Listeners run on transport threads; `on_link_down` also inside `admit`.

    Raises:
        ConfigError: `host` is a wildcard and `advertise` is missing.
        TransportError: The address can't be listened on.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertise: str | None = None,
        on_link_up: Callable[[str], None] = lambda peer: None,
        on_link_down: Callable[[str, str], None] = lambda peer, reason: None,
        staging: Staging | None = None,
    ) -> None:
        if host in _WILDCARDS and not advertise:
            raise ConfigError(
                f"transfer host {host!r} is no address that peers could connect to: set advertise to one"
            )
        self._on_link_up, self._on_link_down = on_link_up, on_link_down
        self._grants, self._staging = GrantTable(), staging
        self._lock = threading.Lock()
        self._links: dict[str, _Inlink] = {}
        self._handlers: dict[str, Callable[[str, bytes], bytes]] = {}
        self._strangers: set[socket.socket] = set()
        self._mismatches = 0
        self._closed = False
        try:
            self._listener = _listen(host, port)
        except OSError as refused:
            raise TransportError(
                f"can't listen on {host}:{port}: {refused}; set another host, or port 0 for any free one"
            ) from refused
        self._host = advertise or host
        self._port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="mooncake-accept", daemon=True).start()

    def admit(self, peer: str) -> Endpoint:
        """A fresh endpoint for one link from `peer`; an earlier link or endpoint of this peer ends."""
        link = _Inlink(peer, secrets.token_bytes(32))
        with self._lock:
            if self._closed:
                raise TransportError("the receiver is closed: nothing can be admitted")
            earlier = self._links.get(peer)
            self._links[peer] = link
        if earlier is not None:
            self._end(earlier, "a new link was admitted in its place")
        return Endpoint(self._host, self._port, link.token)

    def grant(self, key: int, peer: str, ranges: Ranges) -> None:
        """Allow `peer` to write into `ranges` under `key` until revoked.

        Raises:
            TransportError: The key is granted already, or not of 64 bits.
        """
        self._grants.add(key, Grant(peer, ranges))

    def revoke(self, key: int) -> Landed:
        """Fence: when this returns, in milliseconds, no byte can land under `key` any more."""
        return self._grants.revoke(key)

    def serve(self, topic: str, handler: Callable[[str, bytes], bytes]) -> None:
        """Answer questions of a topic by ``handler(peer, body)``, on the thread of a connection.

        That connection lands nothing while the handler runs. `TransportError` is answered with its message.

        Raises:
            TransportError: The topic is taken.
        """
        with self._lock:
            if topic in self._handlers or topic in wire.OWN_TOPICS:
                raise TransportError(f"topic {topic!r} has a handler already")
            self._handlers[topic] = handler

    def drop(self, peer: str) -> None:
        """Close the peer's connections and forget its token. Its grants stay until revoked."""
        with self._lock:
            link = self._links.pop(peer, None)
        if link is not None:
            self._end(link, "dropped", tell=False)

    def close(self) -> None:
        """Stop listening and close every connection. Fences nothing: revoke the grants as well."""
        with self._lock:
            self._closed = True
            links, strangers = list(self._links.values()), list(self._strangers)
            self._links.clear()
        wire.hang_up(self._listener)
        for sock in strangers:
            wire.hang_up(sock)
        for link in links:
            self._end(link, "closed", tell=False)

    @property
    def mismatches(self) -> int:
        """Frames whose checksum was not that of what landed."""
        return self._mismatches

    def _mismatched(self) -> None:
        with self._lock:
            self._mismatches += 1

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                try:
                    sock, _ = self._listener.accept()
                except OSError as failed:
                    if not self._closed:
                        log.warning("accepting connections ended: %s", failed)
                    return
                with self._lock:
                    admitted = not self._closed and len(self._strangers) < _MAX_STRANGERS
                    if admitted:
                        self._strangers.add(sock)
                if not admitted:
                    sock.close()
                    continue
                threading.Thread(
                    target=self._serve, args=(sock,), name="mooncake-receive", daemon=True
                ).start()

    def _serve(self, sock: socket.socket) -> None:
        """One connection, from its hello to its end."""
        with sock, contextlib.ExitStack() as stack:
            stack.callback(self._strangers.discard, sock)
            reason = "a receiver thread failed"
            try:
                wire.tune(sock)
                sock.settimeout(wire.HANDSHAKE_S)
                hello = wire.get(sock, wire.Hello)
                link, inlet = self._join(sock, hello)
            except (OSError, EOFError, TransportError) as failed:
                log.warning("a connection was refused: %s", failed)
                with contextlib.suppress(OSError):
                    wire.put(sock, wire.Welcome(str(failed)))
                return
            threading.current_thread().name = f"mooncake-receive-{link.peer}-{hello.index}"
            stack.callback(inlet.release)
            try:
                wire.put(sock, self._verify(sock, hello, inlet, stack))
                sock.settimeout(None)
                self._settle(link, hello.index)
                inlet.serve()
            except (OSError, EOFError, TransportError) as ended:
                reason = str(ended)
            finally:
                self._left(link, inlet, reason)

    def _join(self, sock: socket.socket, hello: wire.Hello) -> tuple[_Inlink, Inlet]:
        """Admit a connection to the link that its token stands for."""
        if hello.version != wire.VERSION:
            raise TransportError(
                f"transport version {hello.version} meets {wire.VERSION}: use one version of both"
            )
        index = hello.index
        with self._lock:
            # Every token is compared, in constant time each: how long it takes tells nothing about any.
            known = [link for link in self._links.values() if hmac.compare_digest(link.token, hello.token)]
            if not known:
                raise TransportError(
                    "the token is unknown: it was used up or withdrawn; ask for a new endpoint"
                )
            link = known[0]
            first = link.hello or hello
            same = (hello.link, hello.connections) == (first.link, first.connections)
            earlier = link.inlets.get(index)
            latest = max(link.fenced.get(index, -1), earlier.incarnation if earlier is not None else -1)
            fits = 0 <= index < hello.connections <= wire.MAX_CONNECTIONS and hello.incarnation > latest
            if link.gone or not same or not fits:
                raise TransportError("the token is good for one link only: ask for a new endpoint")
            link.hello = first
            answer = partial(self._answer, link)
            inlet = link.inlets[index] = Inlet(
                sock, hello, link.peer, self._grants, answer, self._mismatched, self._staging
            )
            self._strangers.discard(sock)
        if earlier is not None:
            earlier.fence()
        return link, inlet

    def _verify(
        self, sock: socket.socket, hello: wire.Hello, inlet: Inlet, stack: contextlib.ExitStack
    ) -> wire.Welcome:
        """Find out whether the initiator's memory can be read, and is the initiator's."""
        if hello.source is None:
            return wire.Welcome()
        try:
            source = Source(hello.source, hello.challenge_address)
        except TransportError as elsewhere:
            return wire.Welcome(unreadable=str(elsewhere))
        stack.callback(source.close)
        inlet.source = source
        wire.put(sock, wire.Welcome(challenge=source.challenge))
        wire.get(sock, wire.Ready)
        unreadable = source.prove()
        inlet.visitor = source.visitor(hello.mailbox_address)
        return wire.Welcome(unreadable=unreadable)

    def _answer(self, link: _Inlink, inlet: Inlet, topic: str, body: bytes) -> bytes:
        if topic == wire.ECHO:
            return body
        if topic == wire.FENCE:
            self._fence(link, inlet, body)
            return b""
        if topic == wire.PROBE:
            reason = inlet.source.prove() if inlet.source is not None else "process_vm: no process was named"
            if reason is not None:
                raise TransportError(reason)
            return b""
        handler = self._handlers.get(topic)
        if handler is None:
            raise TransportError(f"nobody answers questions on {topic!r} here")
        try:
            return handler(link.peer, body)
        except TransportError:
            raise
        except Exception as failed:
            log.exception("the handler of %r failed; the receiver goes on", topic)
            raise TransportError(f"the handler of {topic!r} failed") from failed

    def _fence(self, link: _Inlink, asker: Inlet, body: bytes) -> None:
        """Make sure that nothing lands any more over one connection of a link."""
        if len(body) != wire.FENCED.size:
            raise TransportError("malformed question: a fence names a connection")
        index, incarnation = wire.FENCED.unpack(body)
        if link.hello is None or index >= link.hello.connections or index == asker.index:
            raise TransportError(f"connection {index} can't be fenced over this one")
        with self._lock:
            link.fenced[index] = max(incarnation, link.fenced.get(index, -1))
            inlet = link.inlets.get(index)
        if inlet is not None and inlet.incarnation <= incarnation:
            inlet.fence()
        self._settle(link, index)

    def _settle(self, link: _Inlink, index: int) -> None:
        """A connection is in, or was given up: the link may be complete."""
        with link.telling:
            link.settled.add(index)
            if link.gone or link.up or link.hello is None or len(link.settled) < link.hello.connections:
                return
            link.up = True
            call(self._on_link_up, link.peer)

    def _left(self, link: _Inlink, inlet: Inlet, reason: str) -> None:
        """A connection has ended; with the last one its link does."""
        with self._lock:
            if link.inlets.get(inlet.index) is inlet:
                del link.inlets[inlet.index]
            last = not link.inlets
        log.info("connection %d of %s ended: %s", inlet.index, link.peer, reason)
        if last:
            self._end(link, reason)

    def _end(self, link: _Inlink, reason: str, tell: bool = True) -> None:
        """Take a whole link down, once."""
        with self._lock:
            if link.gone:
                return
            link.gone = True
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            inlets = list(link.inlets.values())
        for inlet in inlets:
            inlet.fence()
        if tell and link.hello is not None:
            log.info("link of %s is down: %s", link.peer, reason)
            with link.telling:
                call(self._on_link_down, link.peer, reason)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it, and it must be known when they are made for TCP's window to scale to it.
        wire.widen(listener, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener

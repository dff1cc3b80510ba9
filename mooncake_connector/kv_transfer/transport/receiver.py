"""The target's end of all links: admits peers, and lands their writes where a grant allows."""

import contextlib
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Endpoint, Landed
from mooncake_connector.kv_transfer.transport.grants import Grant, GrantTable
from mooncake_connector.kv_transfer.transport.process_vm import Source
from mooncake_connector.kv_transfer.transport.tcp import Inbox

RECEIVE_BUFFER_BYTES = 4 << 20

_MAX_STRANGERS = 64
_WILDCARDS = ("", "0.0.0.0", "::")

log = logging.getLogger(__name__)


class _Inlink:
    """What one admission became: a peer's link."""

    def __init__(self, peer: str, token: bytes) -> None:
        self.peer = peer
        self.token = token
        self.hello: wire.Hello | None = None
        self.socks: dict[int, socket.socket] = {}
        self.ready = 0
        self.gone = False
        # Held while listeners are told, so that they never hear "down" before "up".
        self.telling = threading.RLock()


class Receiver:
    """A `Target` over TCP connections, for the tcp and the process_vm path.

    Args:
        host: address to listen on; IPv4 or IPv6.
        port: 0 for any free one.
        advertise: the host that peers connect to, if it isn't `host`.
        on_link_up: called with the peer once all connections of its link are in.
        on_link_down: called with the peer and a reason, once per link, when any of its connections ended: the
            peer died or hung up, or `admit` made way for a new link. Not called for what `drop` and `close`
            end.

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
    ) -> None:
        if host in _WILDCARDS and not advertise:
            raise ConfigError(
                f"transfer host {host!r} is no address that peers could connect to: set advertise to one"
            )
        self._on_link_up, self._on_link_down = on_link_up, on_link_down
        self._grants = GrantTable()
        self._lock = threading.Lock()
        self._links: dict[str, _Inlink] = {}
        self._strangers: set[socket.socket] = set()
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
            link = None
            try:
                wire.tune(sock)
                sock.settimeout(wire.HANDSHAKE_S)
                hello = wire.get(sock, wire.Hello)
                link = self._join(sock, hello)
                threading.current_thread().name = f"mooncake-receive-{link.peer}-{hello.index}"
                source = Source(hello.source) if hello.source is not None else None
                if source is not None:
                    stack.callback(source.close)
                wire.put(sock, wire.Welcome())
                sock.settimeout(None)
            except (OSError, EOFError, TransportError) as failed:
                log.warning("a connection was refused: %s", failed)
                with contextlib.suppress(OSError):
                    wire.put(sock, wire.Welcome(str(failed)))
                if link is not None:
                    self._end(link, str(failed))
                return
            reason = "a receiver thread failed"
            try:
                self._tell_up(link)
                self._receive(sock, link, hello.link, source)
            except (OSError, EOFError, TransportError) as ended:
                reason = str(ended)
            finally:
                self._end(link, reason)

    def _join(self, sock: socket.socket, hello: wire.Hello) -> _Inlink:
        """Admit a connection to the link that its token stands for."""
        if hello.version != wire.VERSION:
            raise TransportError(
                f"transport version {hello.version} meets {wire.VERSION}: use one version of both"
            )
        if hello.path not in ("tcp", "process_vm") or (hello.path == "process_vm") != (
            hello.source is not None
        ):
            raise TransportError(f"path {hello.path!r} is unknown here, or its source identity is amiss")
        with self._lock:
            # Every token is compared, in constant time each: how long it takes tells nothing about any.
            known = [link for link in self._links.values() if hmac.compare_digest(link.token, hello.token)]
            if not known:
                raise TransportError(
                    "the token is unknown: it was used up or withdrawn; ask for a new endpoint"
                )
            link = known[0]
            first = link.hello or hello
            same = (hello.link, hello.path, hello.connections) == (first.link, first.path, first.connections)
            fits = (
                0 <= hello.index < hello.connections <= wire.MAX_CONNECTIONS and hello.index not in link.socks
            )
            if link.gone or not same or not fits:
                raise TransportError("the token is good for one link only: ask for a new endpoint")
            link.hello = first
            link.socks[hello.index] = sock
            self._strangers.discard(sock)
            return link

    def _receive(self, sock: socket.socket, link: _Inlink, number: bytes, source: Source | None) -> None:
        inbox = Inbox(sock)
        while True:
            frame = wire.get_frame(sock, source is not None)
            grant = self._grants.find(frame.key, link.peer)
            if grant is not None and grant.covers(frame.dst, frame.length):
                reason = (source or inbox).land(frame, grant)
                if reason is None:
                    grant.part_landed(number, frame.write, frame.parts)
            else:
                reason = (
                    f"no grant {frame.key}: it was revoked, or isn't this peer's"
                    if grant is None
                    else f"the write goes outside what grant {frame.key} covers"
                )
                if source is None:
                    inbox.drain(frame.nbytes)
            wire.put_ack(sock, frame.write, reason)

    def _tell_up(self, link: _Inlink) -> None:
        with link.telling:
            link.ready += 1
            if not link.gone and link.hello is not None and link.ready == link.hello.connections:
                _call(self._on_link_up, link.peer)

    def _end(self, link: _Inlink, reason: str, tell: bool = True) -> None:
        """Take a whole link down, once."""
        with self._lock:
            if link.gone:
                return
            link.gone = True
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            socks = list(link.socks.values())
        for sock in socks:
            wire.hang_up(sock)
        if tell and socks:
            log.info("link of %s is down: %s", link.peer, reason)
            with link.telling:
                _call(self._on_link_down, link.peer, reason)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it, and it must be known when they are made for TCP's window to scale to it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _call(listener: Callable[..., None], *args: object) -> None:
    try:
        listener(*args)
    except Exception:
        log.exception("a listener failed; the receiver goes on")

"""ZeroMQ sockets that carry `messages`. Not thread-safe: each belongs to the thread that made it."""

import logging

import zmq
from zmq.utils.monitor import recv_monitor_message

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.messages import AnyMessage, Message, decode, encode

logger = logging.getLogger(__name__)

_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CLOSED


def address_of(host: str, port: int | str) -> str:
    """The ZeroMQ address of a TCP endpoint."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of a ZeroMQ TCP address."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


class Server:
    """Listens for decode workers and for this engine's scheduler.

    Raises:
        ConfigError: the address is taken or not of this host.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 200)
        self.socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self.socket.bind(address_of(host, port or "*"))
        except zmq.ZMQError as e:
            self.socket.close()
            raise ConfigError(
                f"can't listen on side_channel_host={host} side_channel_port={port}: {e}; "
                "choose an address of this host, and 0 or a free port (two are used per rank)"
            ) from e
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self) -> tuple[bytes, AnyMessage] | None:
        """The next message and its sender, or None."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) == 2 and (message := _decode(frames[1])) is not None:
                return frames[0], message

    def send(self, peer: bytes, message: Message) -> None:
        """Send, or drop if the peer is gone: its link tells us so."""
        try:
            self.socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as e:
            logger.debug("dropped a %s: %s", type(message).__name__, e)

    def close(self) -> None:
        self.socket.close()


class Client:
    """Talks to one worker's `Server`."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, monitor: bool = True
    ) -> None:
        self.address = address
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 200)
        self.socket.setsockopt(zmq.IPV6, int("[" in address))
        self.monitor = self.socket.get_monitor_socket(_LOST) if monitor else None
        self.socket.connect(address)

    def receive(self) -> AnyMessage | None:
        """The next message, or None."""
        while True:
            try:
                raw = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if (message := _decode(raw)) is not None:
                return message

    def lost(self) -> str | None:
        """Why the connection is lost, or None; call when `monitor` is readable."""
        if self.monitor is None or not self.monitor.poll(0):
            return None
        event = recv_monitor_message(self.monitor)["event"]
        return "it closed the connection" if event == zmq.EVENT_DISCONNECTED else "connection refused"

    def send(self, message: Message) -> bool:
        """False if the peer takes no messages any more."""
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        if self.monitor is not None:
            self.socket.disable_monitor()
        self.socket.close()


def _decode(raw: bytes) -> AnyMessage | None:
    try:
        message: AnyMessage = decode(raw)
    except Exception as e:  # whatever a stranger sends must not stop the thread
        logger.warning("ignored a malformed message of %d bytes: %s", len(raw), e)
        return None
    return message

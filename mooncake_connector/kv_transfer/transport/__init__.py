"""Transports: how bytes get from an initiator's memory into a target's. `base` has the contract."""

from mooncake_connector.kv_transfer.transport.base import (
    Endpoint,
    Failure,
    Landed,
    Link,
    LinkEvents,
    Mark,
    Rail,
    SourceIdentity,
    Target,
)
from mooncake_connector.kv_transfer.transport.connect import open_link
from mooncake_connector.kv_transfer.transport.link import StreamLink
from mooncake_connector.kv_transfer.transport.process_vm import allow_reader, identity, readable
from mooncake_connector.kv_transfer.transport.receiver import Receiver
from mooncake_connector.kv_transfer.transport.stream import PATHS

__all__ = [
    "PATHS",
    "Endpoint",
    "Failure",
    "Landed",
    "Link",
    "LinkEvents",
    "Mark",
    "Rail",
    "Receiver",
    "SourceIdentity",
    "StreamLink",
    "Target",
    "allow_reader",
    "identity",
    "open_link",
    "readable",
]

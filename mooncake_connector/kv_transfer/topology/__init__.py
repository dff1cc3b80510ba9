"""What the host is made of and which NICs a piece of memory uses.

``discover`` reads it, ``Matrix`` decides, ``Watcher`` tells what changes. See docs/topology.md.
"""

from mooncake_connector.kv_transfer.topology.discovery import discover, discover_nics, record
from mooncake_connector.kv_transfer.topology.gid import choose_gid
from mooncake_connector.kv_transfer.topology.matrix import Choice, Matrix, NicRules
from mooncake_connector.kv_transfer.topology.model import (
    Change,
    Distance,
    Gid,
    Gpu,
    Nic,
    Node,
    Topology,
    differences,
)
from mooncake_connector.kv_transfer.topology.watcher import Watcher

__all__ = [
    "Change",
    "Choice",
    "Distance",
    "Gid",
    "Gpu",
    "Matrix",
    "Nic",
    "NicRules",
    "Node",
    "Topology",
    "Watcher",
    "choose_gid",
    "differences",
    "discover",
    "discover_nics",
    "record",
]

"""The rdma path: RC queue pairs by pyverbs, one-sided WRITEs, each write's last one WITH IMM.

    RdmaDevices     this process's NICs and the memory registered on them
    RdmaRails       the initiator's rails of one link
    RdmaTarget      the target's end of all rails

Importing it needs neither pyverbs nor a device: `unavailable` says whether there is RDMA here.
"""

from mooncake_connector.kv_transfer.transport.rdma.devices import RdmaDevices
from mooncake_connector.kv_transfer.transport.rdma.initiator import RdmaRails
from mooncake_connector.kv_transfer.transport.rdma.target import RdmaTarget
from mooncake_connector.kv_transfer.transport.rdma.verbs import unavailable

__all__ = ["RdmaDevices", "RdmaRails", "RdmaTarget", "unavailable"]

"""This process's GPU memory as transfers see it: what others may open, and the rails into theirs."""

import logging

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.transport.base import Ask, LinkEvents, Serve
from mooncake_connector.kv_transfer.transport.cuda.driver import available
from mooncake_connector.kv_transfer.transport.cuda.initiator import CudaRails
from mooncake_connector.kv_transfer.transport.cuda.rail import CopyPolicy
from mooncake_connector.kv_transfer.transport.cuda.share import Exports
from mooncake_connector.kv_transfer.transport.cuda.target import CudaTarget

log = logging.getLogger(__name__)


class Gpu:
    """The cuda_ipc transport of one process. Touches no driver before GPU memory is registered.

    Attributes:
        target: for `Inbound`.
        lack: why cuda_ipc can't be used, of the first region that could not be shared.
    """

    def __init__(self, config: TransferConfig, serve: Serve) -> None:
        self._policy = CopyPolicy(config.cuda_copy, config.cuda_sms)
        self._exports = Exports()
        self.target = CudaTarget(self._exports, serve)
        self.lack: str | None = None

    @property
    def usable(self) -> bool:
        """Whether there is GPU memory, all of it shared."""
        return self._exports.context is not None and self.lack is None

    def register(self, region: Region) -> None:
        """Share a region of GPU memory; if that fails other paths have to carry it, and the log says why."""
        try:
            if (reason := available()) is not None:
                raise TransportError(reason)
            self._exports.add(region)
        except TransportError as failed:
            if self.lack is None:
                log.warning("no cuda_ipc: %s", failed)
                self.lack = str(failed)

    def deregister(self, region: Region) -> None:
        self._exports.remove(region)

    def rails(self, name: str, token: bytes, ask: Ask, events: LinkEvents) -> CudaRails:
        """The rail of one link."""
        return CudaRails(name, token, ask, events, self._exports, self._policy)

    def close(self) -> None:
        self._exports.close()

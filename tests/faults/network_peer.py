"""One end of a transfer, as a process in a network namespace: commands and answers are lines of JSON.

python -m tests.faults.network_peer HOST NBYTES
"""

import json
import sys
import time
from typing import Any

import numpy as np

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import TransferError
from mooncake_connector.kv_transfer.engine import Peer, TransferEngine
from mooncake_connector.kv_transfer.plan import CopyPlan

PAGE = 16 << 10


class End:
    """Initiator or target, according to what it is asked."""

    def __init__(self, host: str, nbytes: int) -> None:
        self._memory = np.zeros(nbytes, np.uint8)
        self._engine = TransferEngine(TransferConfig(path="tcp", connections=2), host=host)
        self._region = self._engine.register(self._memory)
        self._peer: Peer

    def offer(self) -> str:
        # Under one name: what an earlier link still has under way can't land any more.
        return self._engine.offer([self._region], peer="initiator")

    def connect(self, address: str) -> None:
        self._peer = self._engine.connect(address)

    def write(self, seed: int, deadline: float) -> dict[str, Any]:
        """Write scattered pages of random bytes: how it ended, and after how many seconds."""
        self._memory[:] = np.random.default_rng(seed).integers(0, 256, self._memory.size, np.uint8)
        at = (np.random.default_rng(seed).permutation(self._memory.size // PAGE) * PAGE).astype(np.uint64)
        there = np.uint64(self._peer.regions[0].address)
        here = np.uint64(self._memory.ctypes.data)
        plan = CopyPlan.of(here + at, there + at, np.full(at.size, PAGE))
        start = time.monotonic()
        try:
            self._engine.submit(plan, to=self._peer, deadline=deadline).wait()
            error = None
        except TransferError as failed:
            error = str(failed)
        return {"error": error, "seconds": time.monotonic() - start}

    def wrong_bytes(self, seed: int) -> int:
        """How many bytes are not those that were written."""
        expected = np.random.default_rng(seed).integers(0, 256, self._memory.size, np.uint8)
        return int(np.count_nonzero(self._memory != expected))


def main() -> None:
    end = End(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(end, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()

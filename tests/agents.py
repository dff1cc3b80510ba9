"""Two workers' halves of the connector with real KV tensors, engines left out: for where those can't run."""

import time
from collections.abc import Callable, Sequence

import torch

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.agent import WorkerAgent
from mooncake_connector.kv_transfer.clock import LayerClock
from mooncake_connector.kv_transfer.layout import Group, KVLayout, Plane, WorkerInfo
from mooncake_connector.kv_transfer.memory import region_of
from mooncake_connector.kv_transfer.messages import (
    PROTOCOL,
    LoadReport,
    LocalReserve,
    WantBlocks,
    pack_blocks,
)
from mooncake_connector.kv_transfer.push import Chunk

BLOCK = 16
"""Tokens."""

PROMPT = b"p" * 16


class Worker:
    """One worker with KV tensors, bf16 [layer, block, 2, token, head, head size]."""

    def __init__(
        self,
        engine_id: str,
        config: ConnectorConfig,
        layers: int,
        blocks: int,
        heads: int,
        device: str = "cpu",
        clock: LayerClock | None = None,
    ) -> None:
        self.kv = torch.zeros(layers, blocks, 2, BLOCK, heads, 64, dtype=torch.bfloat16, device=device)
        page = self.kv[0, 0].numel() * self.kv.element_size()
        # Of the device that the address belongs to: GPU memory takes other paths than host memory.
        location = {} if device == "cpu" else {"location": region_of(self.kv).location}
        planes = tuple(Plane(i, 0, self.kv[i].data_ptr(), page, page) for i in range(layers))
        self.info = WorkerInfo(
            protocol=PROTOCOL,
            plugin="0",
            engine="none",
            engine_id=engine_id,
            incarnation="1",
            model="m",
            model_hash="h",
            dtype="bfloat16",
            tp_size=1,
            pp_size=1,
            rank=0,
            layout=KVLayout(blocks, (Group(BLOCK, 0, "full"),), planes, ("page",) * layers, **location),
        )
        self.agent = WorkerAgent(self.info, config, clock)

    def reserve(self, request: str, blocks: Sequence[int], prefill: str) -> None:
        """This engine's scheduler has allocated blocks, to be filled by the one with that address."""
        want = WantBlocks(pack_blocks(range(len(blocks))), pack_blocks(blocks))
        tokens = len(blocks) * BLOCK
        message = LocalReserve(b"", request, "p", prefill, request, PROMPT, tokens, (want,))
        self.agent.post(lambda now: self.agent.decode.reserve(message, now))

    def compute(
        self,
        step: int,
        request: str,
        blocks: Sequence[int],
        begin: int,
        end: int,
        write: Callable[[int, list[int]], None],
    ) -> None:
        """Compute blocks ``[begin, end)`` of a prompt in one step, calling ``write(layer, blocks)``."""
        agent = self.agent
        new = list(blocks[begin:end])
        chunk = Chunk(request, request, PROMPT, begin * BLOCK, end * BLOCK, (new,), begin == 0, True)
        agent.clock.step_begins(step)
        agent.step(step, [chunk], [], [])
        for layer in range(self.kv.shape[0]):
            write(layer, new)
            agent.clock.layer_written(layer, step)
            agent.clock.mark(step)
            agent.wake()
        agent.clock.step_ended(step)
        agent.wake()

    def sent(self) -> dict[str, int]:
        """Bytes that went over each rail."""
        total: dict[str, int] = {}
        for outbound in self.agent.engine.outbounds:
            for rail, nbytes in outbound.sent.items():
                total[rail] = total.get(rail, 0) + nbytes
        return total


class Pair:
    """A prefill and a decode worker of the same shape."""

    def __init__(self, config: ConnectorConfig, *, layers: int = 4, blocks: int = 65, heads: int = 8) -> None:
        self.prefill = Worker("p", config, layers, blocks, heads)
        self.decode = Worker("d", config, layers, blocks, heads)
        self._step = 0

    def reserve(self, request: str, blocks: Sequence[int]) -> None:
        """Decode's scheduler has allocated these blocks."""
        self.decode.reserve(request, blocks, self.prefill.agent.address)

    def compute(self, request: str, blocks: Sequence[int], begin: int, end: int, seed: int) -> None:
        """Prefill computes blocks ``[begin, end)`` of a prompt in one step, layer by layer."""
        kv, random = self.prefill.kv, torch.Generator().manual_seed(seed)

        def write(layer: int, new: list[int]) -> None:
            for block in new:
                kv[layer, block] = torch.randn(kv[layer, block].shape, generator=random)

        step, self._step = self._step, self._step + 1
        self.prefill.compute(step, request, blocks, begin, end, write)

    def finish(self, request: str) -> None:
        """Prefill's scheduler is done with the request; its blocks wait for the push."""
        self.prefill.agent.step(self._step, [], [], [(request, True)])

    def report(self, timeout: float) -> LoadReport:
        """The next load's end on decode."""
        end = time.monotonic() + timeout
        while True:
            if reports := self.decode.agent.take_reports():
                assert len(reports) == 1
                return reports[0]
            assert time.monotonic() < end, f"no report within {timeout} s"
            time.sleep(0.005)

    def equal(self, there: Sequence[int], here: Sequence[int]) -> bool:
        """Whether decode's blocks `here` hold what prefill's blocks `there` hold."""
        return bool(torch.equal(self.prefill.kv[:, list(there)], self.decode.kv[:, list(here)]))

    def close(self) -> None:
        self.prefill.agent.close()
        self.decode.agent.close()

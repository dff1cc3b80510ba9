"""What the scheduler side and the worker side of one engine tell each other through vLLM."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from mooncake_connector.kv_transfer.layout import WorkerInfo
from mooncake_connector.kv_transfer.push import Chunk
from mooncake_connector.kv_transfer.vllm.compat import WorkerMetadata


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """Where a worker's agent listens, and the token that local messages carry.

    `first_token`: whether it can go on from a token that prefill sampled.
    """

    address: str
    token: bytes
    info: WorkerInfo
    first_token: bool = False


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler -> workers, each step: what happens to the requests that are prefilled for others.

    Attributes:
        idle: nothing is computed in this step, and requests wait for KV.
        ended: (request id, whether its blocks are held for us).
        first_tokens: what requests, by id, are to sample in this step.
    """

    step: int
    idle: bool
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    ended: list[tuple[str, bool]] = field(default_factory=list)
    first_tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class Listen(WorkerMetadata):
    """Workers -> scheduler, in steps that compute nothing and wait for KV: vLLM drops an empty output, and
    would not call our scheduler side.
    """

    def aggregate(self, other: "Listen") -> "Listen":
        return self

"""What the proxy asks of an engine: a probe, and the bodies that make it prefill or decode."""

from typing import Any, Protocol

import msgspec

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.proxy.openai import ClientRequest

# What the connector's own handshake compares: a pair that it would refuse is never tried.
MATCHING = ("protocol", "model_hash", "dtype", "layout")


class EngineUnready(MooncakeError):
    """An engine did not answer a check as it should.

    Attributes:
        gone: nobody listens there.
        late: it did not answer in time: it may just be busy. Neither: it answered what it should not.
    """

    def __init__(self, message: str, *, gone: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.gone = gone
        self.late = late


class KvEventSource(msgspec.Struct, frozen=True):
    """Where an engine publishes what its KV cache holds.

    Attributes:
        endpoint: ZeroMQ address to subscribe at.
        replay_endpoint: where to ask again for what was missed; empty: nowhere.
        topic: what to subscribe to.
    """

    endpoint: str
    replay_endpoint: str = ""
    topic: str = ""


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine's connector says of itself when probed.

    Attributes:
        engine_id: names the engine to its peers.
        incarnation: changes with every start of the engine.
        host, port: its side channel.
        tp_size, pp_size: ranks.
        block_size: tokens per KV block.
        max_model_len: tokens, prompt and answer together.
        layout: what its KV holds, opaque here.
        model, dtype: what it serves; `model_hash` decides, the name is for people.
        role: ``kv_producer``, ``kv_consumer`` or ``kv_both``.
        version: of mooncake_connector there.
        protocol: of the connector's messages.
        first_token: whether it can go on from a token that another engine sampled.
        kv_tokens: tokens of KV that it can hold; 0 if it does not say.
        prefix_caching: whether it keeps prompts' KV for others.
        adapters: names by which requests ask for a LoRA adapter.
        kv_events: where it publishes what its KV cache holds; None if nowhere.
    """

    engine_id: str
    incarnation: str | int
    host: str
    port: int
    block_size: int
    max_model_len: int
    layout: Any
    model: str
    dtype: str
    role: str
    version: str
    protocol: str | int
    tp_size: int = 1
    pp_size: int = 1
    model_hash: str = ""
    first_token: bool = False
    kv_tokens: int = 0
    prefix_caching: bool = True
    adapters: tuple[str, ...] = ()
    kv_events: KvEventSource | None = None

    @property
    def identity(self) -> tuple[str, str | int]:
        """Differs after every start of the engine."""
        return self.engine_id, self.incarnation

    @property
    def group(self) -> str:
        """Equal for two engines exactly if they can exchange KV."""
        return msgspec.json.encode([getattr(self, name) for name in MATCHING], order="sorted").decode()

    def differences(self, other: "EngineInfo") -> list[str]:
        """What keeps the two from exchanging KV, with both values; empty if nothing does."""
        found = [
            f"{name} {getattr(self, name)!r} and {getattr(other, name)!r}"
            for name in MATCHING
            if getattr(self, name) != getattr(other, name)
        ]
        if self.model_hash != other.model_hash and self.model != other.model:
            found.insert(0, f"model {self.model!r} and {other.model!r}")
        return found


def told(error: BaseException) -> str:
    """What went wrong on the way to an engine, in few words."""
    return str(error) or type(error).__name__


class Engine(Protocol):
    """How one kind of engine is driven. The proxy holds one driver for all its instances."""

    async def health(self, client: EngineClient, url: str) -> None:
        """Cheap sign of life.

        Raises:
            EngineUnready: it isn't there or isn't well.
        """

    async def probe(self, client: EngineClient, url: str) -> EngineInfo:
        """One-token request that its connector answers with its address and shape.

        Raises:
            EngineUnready: not up, or no connector loaded; the message says which and the mend.
        """

    def alone(self, request: ClientRequest) -> str:
        """Why this request must be served by decode alone; empty if prefill can help."""

    def prefill_body(self, request: ClientRequest, transfer_id: str, *, first_token: bool = False) -> bytes:
        """Body that makes the prefill engine compute the same prompt and push its KV.

        Args:
            first_token: sample and stream its token as decode would, and tell decode's connector.
        """

    def release_body(self, request: ClientRequest, transfer_id: str) -> bytes:
        """A completion that tells a prefill engine to let go of a transfer that nobody will come for."""

    def timeline_body(self, request: ClientRequest, transfer_id: str) -> bytes:
        """A completion that asks either engine when that transfer's request came by."""

    def decode_params(
        self, prefill: EngineInfo, transfer_id: str, *, first_token: bool = False
    ) -> dict[str, Any]:
        """What the decode engine needs to know to receive it; `first_token`: to go on from prefill's."""

    def decode_body(self, request: ClientRequest, params: dict[str, Any]) -> bytes:
        """The client's body plus `params`."""

    def prefill_params(self, answer: bytes) -> dict[str, Any] | None:
        """What a prefill answer hands to decode (serial order); None if nothing."""

    def preamble(self, first: bytes) -> bool:
        """Whether a stream's first bytes come before the engine has begun with the request."""

    def stream_failure(self, first: bytes) -> tuple[int, bytes] | None:
        """Status and JSON body of the error that a stream's first bytes carry; None if they carry none."""

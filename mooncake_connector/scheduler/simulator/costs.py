"""What a step of an engine costs, in closed form: sums over many steps are never added up one by one."""

import math

import msgspec


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's step costs and sizes; a step is affine in what it computes.

    A step of B decoding sequences that attend to C tokens in all, with q prompt tokens that attend to P
    (query, key) pairs, takes ``base + per_sequence B + per_context C + per_token q + per_pair P`` seconds,
    and at least `floor` if q > 0 (kernels launched one by one: the CPU is the limit).

    Attributes:
        source: where these figures come from.
        step_tokens: the most tokens of one step, prompt chunks and decoding sequences together.
        max_batch: the most sequences that run at once.
        kv_tokens: tokens of KV it holds.
        cache_tokens: tokens of former prompts kept beyond them in host memory; loading takes no time.
        kv_bytes: bytes of KV of one token, of all layers and ranks.
        bandwidth: bytes per second from one engine to another.
        handoff: seconds from the last layer's KV to decode's scheduler knowing of it.
        streaming: by how much, relatively, prefill is slowed by KV leaving meanwhile.
        ingress, ingress_per_token: seconds from the client to the scheduler (HTTP, tokens).
        egress, egress_per_token: seconds from a first token to the client.
    """

    source: str
    base: float
    per_sequence: float
    per_context: float
    per_token: float
    per_pair: float
    floor: float = 0.0
    step_tokens: int = 8192
    max_batch: int = 256
    kv_tokens: int
    cache_tokens: int = 0
    kv_bytes: int
    bandwidth: float
    handoff: float = 0.0
    streaming: float = 0.0
    ingress: float = 0.0
    ingress_per_token: float = 0.0
    egress: float = 0.0
    egress_per_token: float = 0.0

    def step(self, batch: int, context: int, tokens: int = 0, pairs: float = 0.0) -> float:
        """Seconds of one step."""
        seconds = self.base + self.per_sequence * batch + self.per_context * context
        if tokens:
            seconds = max(self.floor, seconds + self.per_token * tokens + self.per_pair * pairs)
        return seconds

    def decode_steps(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` decode steps of the same batch, whose context grows by `batch` at each."""
        growth = self.per_context * batch
        return steps * self.step(batch, context) + growth * steps * (steps - 1) / 2

    def steps_until(self, batch: int, context: int, seconds: float) -> int:
        """The fewest decode steps that take at least `seconds`; at least one."""
        first = self.step(batch, context)
        growth = self.per_context * batch
        if growth > 0:
            half = first - growth / 2
            root = (math.sqrt(half * half + 2 * growth * seconds) - half) / growth
        else:
            root = seconds / first
        steps = max(1, math.ceil(root))
        # The root is a float: a step too few or too many would show in every later time.
        while steps > 1 and self.decode_steps(batch, context, steps - 1) >= seconds:
            steps -= 1
        while self.decode_steps(batch, context, steps) < seconds:
            steps += 1
        return steps

    def slow_steps(self, batch: int, context: int, steps: int, limit: float) -> int:
        """How many of `steps` decode steps take longer than `limit` seconds."""
        first = self.step(batch, context)
        growth = self.per_context * batch
        if first > limit:
            return steps
        if first + growth * (steps - 1) <= limit:
            return 0
        return min(steps, max(0, steps - 1 - math.floor((limit - first) / growth)))

    def prefill(self, tokens: int, cached: int = 0) -> float:
        """Seconds of one prompt computed alone, chunk after chunk, of which `cached` tokens are there."""
        seconds = 0.0
        done = cached
        while done < tokens:
            chunk = min(self.step_tokens, tokens - done)
            seconds += self.step(0, 0, chunk, pairs(done, chunk))
            done += chunk
        return seconds


def pairs(done: int, chunk: int) -> float:
    """(query, key) pairs of a causal chunk that begins after `done` tokens."""
    return chunk * done + chunk * (chunk + 1) / 2

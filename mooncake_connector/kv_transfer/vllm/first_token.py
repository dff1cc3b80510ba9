"""Decode goes on from the token that prefill sampled: it takes the place of what this engine sampled itself.

The token is written over the sampler's output, on the device, without a synchronisation: so it holds for
greedy and random sampling, the request's random state advances as in one engine, and speculative decoding and
both of vLLM's model runners are served; custom logits processors exclude the first and 0.26's second runner.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

_tokens: dict[str, int] = {}  # a process has one worker


class Forced:
    """Scheduler's side: which requests must sample which token after their prompts, until they do."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[int, int]] = {}

    def add(self, request_id: str, token: int, num_prompt_tokens: int) -> None:
        self._tokens[request_id] = (token, num_prompt_tokens)

    def discard(self, request_id: str) -> None:
        self._tokens.pop(request_id, None)

    def due(self, output: Any) -> dict[str, int]:
        """Tokens, by request id, of the step that was just scheduled: those whose prompts end in it."""
        if not self._tokens:
            return {}
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        due = {}
        for request_id in self._tokens.keys() & starts.keys():
            token, num_prompt_tokens = self._tokens[request_id]
            if starts[request_id] + output.num_scheduled_tokens[request_id] >= num_prompt_tokens:
                due[request_id] = token
                del self._tokens[request_id]
        return due


def force(tokens: Mapping[str, int]) -> None:
    """In the step that begins now, these requests (by id) sample these tokens, and no others do."""
    _tokens.clear()
    _tokens.update(tokens)


def install(vllm_config: Any) -> bool:
    """Make `force` work in this process; False if this vLLM samples in a way that we don't know."""
    try:
        if getattr(vllm_config, "use_v2_model_runner", False):
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner2

            return _wrap(Runner2, "sample", ["hidden_states", "input_batch"], _after_sample)
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        return _wrap(GPUModelRunner, "_sample", ["logits"], _after_sample_v1)
    except (ImportError, AttributeError, ValueError) as e:
        logger.info("prefill's first token can't be handed to this vLLM: %s", e)
        return False


def _wrap(runner: type, name: str, parameters: list[str], after: Callable[..., None]) -> bool:
    original = getattr(runner, name)
    if getattr(original, "forces_first_token", False):
        return True
    found = list(inspect.signature(original).parameters)
    if found[1 : 1 + len(parameters)] != parameters:
        raise ValueError(f"{runner.__name__}.{name} takes {', '.join(found)}")

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        sampled = original(self, *args, **kwargs)
        if _tokens:
            after(self, sampled, *args, **kwargs)
        return sampled

    sample.forces_first_token = True  # type: ignore[attr-defined]
    setattr(runner, name, sample)
    return True


def _after_sample(
    runner: Any, sampled: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any
) -> None:
    overwrite(input_batch.req_ids, sampled[0].sampled_token_ids)


def _after_sample_v1(runner: Any, sampled: Any, *args: Any, **kwargs: Any) -> None:
    overwrite(runner.input_batch.req_ids, sampled.sampled_token_ids)


def overwrite(request_ids: Sequence[str], sampled: torch.Tensor) -> None:
    """Put the forced tokens into `sampled` (one row per request, its first token first)."""
    for request_id, token in _tokens.items():
        if request_id in request_ids:
            sampled[request_ids.index(request_id), 0].fill_(token)

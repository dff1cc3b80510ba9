"""Decode samples what prefill sampled, at the right step, in the shape of either of vLLM's model runners."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
first_token = pytest.importorskip("mooncake_connector.kv_transfer.vllm.first_token")


class Runner:
    """As vLLM's first: tokens in the order of its own batch."""

    def __init__(self, *ids: str) -> None:
        self.input_batch = SimpleNamespace(req_ids=list(ids))

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        return SimpleNamespace(sampled_token_ids=torch.arange(len(self.input_batch.req_ids))[:, None])


class Runner2:
    """As vLLM's second: the batch comes with the call."""

    def sample(self, hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        return SimpleNamespace(sampled_token_ids=torch.arange(len(input_batch.req_ids))[:, None]), 1, 0


def step(new: dict[str, tuple[int, int]], cached: dict[str, tuple[int, int]] | None = None) -> Any:
    """A scheduler's output: per request where it begins and how many tokens it computes."""
    cached = cached or {}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=at) for r, (at, _) in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[at for at, _ in cached.values()]
        ),
        num_scheduled_tokens={r: n for r, (_, n) in (new | cached).items()},
    )


@pytest.fixture(autouse=True)
def _nothing_forced() -> Any:
    yield
    first_token.force({})


def test_both_runners() -> None:
    for _ in range(2):  # doing it again changes nothing
        assert first_token._wrap(Runner, "_sample", ["logits"], first_token._after_sample_v1)
        assert first_token._wrap(
            Runner2, "sample", ["hidden_states", "input_batch"], first_token._after_sample
        )
    first_token.force({"b": 70, "elsewhere": 71})
    assert Runner("a", "b", "c")._sample(None, None).sampled_token_ids.tolist() == [[0], [70], [2]]
    assert Runner("c", "a")._sample(logits=None, spec_decode_metadata=None).sampled_token_ids.tolist() == [
        [0],
        [1],
    ]
    batch = SimpleNamespace(req_ids=["b", "a"])
    assert Runner2().sample(None, batch, None)[0].sampled_token_ids.tolist() == [[70], [1]]
    assert Runner2().sample(None, input_batch=batch, grammar_output=None)[0].sampled_token_ids[0, 0] == 70
    first_token.force({})
    assert Runner("a", "b")._sample(None, None).sampled_token_ids.tolist() == [[0], [1]]


def test_speculated_tokens_keep_their_columns() -> None:
    sampled = torch.tensor([[5, 6, 7], [8, -1, -1]])
    first_token.force({"b": 70})
    first_token.overwrite(["a", "b"], sampled)
    assert sampled.tolist() == [[5, 6, 7], [70, -1, -1]]


def test_an_unknown_sampler_is_left_alone() -> None:
    class Other:
        def sample(self, batch: Any) -> None: ...

    with pytest.raises(ValueError, match="takes self, batch"):
        first_token._wrap(Other, "sample", ["hidden_states"], first_token._after_sample)


def test_the_step_that_ends_the_prompt() -> None:
    forced = first_token.Forced()
    forced.add("r", 70, 100)
    assert forced.due(step({"other": (0, 100)})) == {}
    assert forced.due(step({"r": (0, 64)})) == {}
    assert forced.due(step({}, {"other": (5, 1), "r": (64, 35)})) == {}
    assert forced.due(step({}, {"r": (99, 1)})) == {"r": 70}
    assert forced.due(step({}, {"r": (99, 1)})) == {}


def test_a_request_that_ended() -> None:
    forced = first_token.Forced()
    forced.add("r", 70, 100)
    forced.discard("r")
    assert forced.due(step({"r": (99, 1)})) == {}

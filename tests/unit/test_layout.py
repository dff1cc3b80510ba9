import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.layout import Group, KVLayout, Plane, WorkerInfo, check_compatible
from mooncake_connector.kv_transfer.routes import Route

PAGE = 8
BLOCKS = 16


def layout(base: int = 0, stride: int = PAGE, groups: tuple[Group, ...] = (Group(4, 0, "full"),)) -> KVLayout:
    planes = tuple(
        Plane(layer, layer % len(groups), base + layer * BLOCKS * stride, stride, PAGE) for layer in range(4)
    )
    return KVLayout(BLOCKS, groups, planes, ("page",) * 4)


def worker(**changes: object) -> WorkerInfo:
    info = WorkerInfo(1, "0", "vllm", "e", "i", "m", "h", "float32", 1, 1, 0, layout())
    return msgspec.structs.replace(info, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": 2}, "protocol: prefill has 1, decode has 2"),
        ({"model_hash": "x", "model": "other"}, "model: prefill has m, decode has other"),
        ({"model_hash": "x"}, "model configuration: prefill has h, decode has x"),
        ({"dtype": "bfloat16"}, "dtype: prefill has float32, decode has bfloat16"),
        # Pages of which nobody says what they hold can only go to where they are alike.
        ({"tp_size": 2}, "tensor-parallel size: prefill has 1, decode has 2"),
        ({"layout": layout(groups=(Group(8, 0, "full"),))}, "page of the KV of layer 0"),
        ({"layout": layout(groups=(Group(4, 64, "sliding"),))}, "full, decode has sliding window 64"),
        ({"layout": msgspec.structs.replace(layout(), form=("page", "bf16", "page", "page"))}, "layer 1"),
    ],
)
def test_a_mismatch_names_both_values(changes: dict[str, object], says: str) -> None:
    check_compatible(worker(), worker(engine_id="other", incarnation="j"))
    with pytest.raises(IncompatibleError, match=says):
        check_compatible(worker(), worker(**changes))


def test_a_window_needs_its_own_blocks_only() -> None:
    group = Group(16, 64, "sliding")
    assert group.first_needed(64) == 0
    # The query at position 100 attends to 37..100, and position 37 is in block 2.
    assert group.first_needed(100) == 2
    assert Group(16, 0, "full").first_needed(100) == 0


blocks = st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1, max_size=BLOCKS)


@given(source=blocks, target=blocks, stride=st.sampled_from([PAGE, 24]))
def test_a_plan_copies_just_those_pages(source: list[int], target: list[int], stride: int) -> None:
    n = min(len(source), len(target))
    a, b = layout(), layout(stride=stride)
    memory_a = np.random.default_rng(0).integers(0, 255, 4 * BLOCKS * PAGE, np.uint8)
    memory_b = np.zeros(4 * BLOCKS * stride, np.uint8)
    prefill, decode = worker(layout=a), worker(layout=b)
    from_blocks, to_blocks = np.array(source[:n]), np.array(target[:n])
    plan = Route.of([prefill], 0, decode).plan({1: from_blocks, 3: from_blocks}, {1: to_blocks, 3: to_blocks})
    for src, dst, length in zip(plan.src.tolist(), plan.dst.tolist(), plan.length.tolist(), strict=True):
        memory_b[dst : dst + length] = memory_a[src : src + length]
    expected = np.zeros_like(memory_b)
    for layer in (1, 3):
        for s, t in zip(source[:n], target[:n], strict=True):
            at = (layer * BLOCKS + t) * stride
            expected[at : at + PAGE] = memory_a[(layer * BLOCKS + s) * PAGE :][:PAGE]
    assert (memory_b == expected).all()
    wanted = b.ranges([to_blocks])
    assert wanted.cover(plan.dst, plan.length)
    assert wanted.nbytes == 4 * n * PAGE
    assert b.ranges([to_blocks], {1, 3}).nbytes == plan.nbytes

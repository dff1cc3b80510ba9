"""What vLLM sees of the connector before an engine runs: its name, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.plugins import load_general_plugins
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
)

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.layout import Field, KVLayout
from mooncake_connector.kv_transfer.vllm.compat import params_of
from mooncake_connector.kv_transfer.vllm.connector import (
    MooncakePushConnector,
    _check_parallelism,
    _check_scales,
)
from mooncake_connector.kv_transfer.vllm.kv_layout import groups_of, layout_of

FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)


def config(spec: object = FULL, blocks: int = 8) -> KVCacheConfig:
    return KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layers.0"], spec)]
    )


def test_loads_by_name_alone() -> None:
    load_general_plugins()
    assert KVConnectorFactory.get_connector_class_by_name("MooncakePushConnector") is MooncakePushConnector


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("decode_context_parallel_size", "--decode-context-parallel-size 2"),
        ("data_parallel_size", "start one server per data-parallel rank"),
    ],
)
def test_parallelism_that_is_not_supported_is_refused(name: str, says: str) -> None:
    sizes = {"pipeline_parallel_size": 2, "data_parallel_size": 1}
    _check_parallelism(SimpleNamespace(**sizes))
    with pytest.raises(ConfigError, match=says):
        _check_parallelism(SimpleNamespace(**{**sizes, name: 2}))


def test_scales_of_each_engines_own_are_refused() -> None:
    _check_scales(SimpleNamespace(calculate_kv_scales=False))
    _check_scales(SimpleNamespace())  # gone in newer versions
    with pytest.raises(ConfigError, match="--calculate-kv-scales"):
        _check_scales(SimpleNamespace(calculate_kv_scales=True))


def test_state_space_layers_are_refused() -> None:
    mamba = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))
    with pytest.raises(ConfigError, match=r"can't move the KV of MambaSpec \(layer layers.0\)"):
        groups_of(config(mamba))


def read(tensor: torch.Tensor, backend: str = "CPU_MLA", spec: object = FULL, **more: Any) -> KVLayout:
    layout, layers = layout_of({"layers.0": tensor}, config(spec), {"layers.0": backend}, **more)
    assert layers == {"layers.0": 0}
    return layout


def test_layouts_are_read_off_the_tensors() -> None:
    heads_first = torch.zeros(8, 2, 16, 16)
    [plane] = read(heads_first).planes
    assert (plane.base, plane.stride, plane.nbytes) == (heads_first.data_ptr(), 2048, 2048)
    assert (plane.tokens, plane.heads, plane.head_stride) == (16, 2, 1024)
    assert plane.fields == (Field(0, 64, 64),)
    [plane] = read(torch.zeros(8, 16, 2, 16).transpose(1, 2)).planes
    assert (plane.stride, plane.nbytes, plane.head_stride) == (2048, 2048, 64)
    assert plane.fields == (Field(0, 64, 128),)
    # Two kernel blocks make up one block of the block table.
    layout = read(torch.zeros(16, 2, 8, 16))
    assert (layout.planes[0].stride, layout.planes[0].nbytes, layout.planes[0].tokens) == (1024, 1024, 8)
    assert layout.ranges([np.array([3])]).nbytes == 2048
    # K and V apart, as some backends keep them.
    key_value = torch.zeros(2, 8, 16, 2, 8)
    planes = read(key_value).planes
    assert [p.base - key_value.data_ptr() for p in planes] == [0, 8 * 1024]
    assert {(p.nbytes, p.heads, p.head_stride, p.fields) for p in planes} == {
        (1024, 2, 32, (Field(0, 32, 64),))
    }
    # Layers side by side in each block.
    [plane] = read(torch.zeros(8, 3, 2, 16, 16)[:, 1]).planes
    assert (plane.stride, plane.nbytes) == (3 * 2048, 2048)
    # A latent has no heads, and every rank has all of it.
    mla = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=24, dtype=torch.float32)
    layout = read(torch.zeros(8, 16, 24), spec=mla, kv_heads=4, tp_size=2)
    assert (layout.planes[0].heads, layout.planes[0].fields, layout.heads) == (1, (Field(0, 96, 96),), (1,))


def test_a_shape_that_is_unknown_moves_as_a_whole() -> None:
    layout = read(torch.zeros(8, 4, 16, 16))  # twice the heads
    assert (layout.planes[0].nbytes, layout.planes[0].fields) == (4096, ())


@pytest.mark.parametrize(
    ("own", "model", "tp_size", "total"),
    [(2, 4, 2, 4), (2, 0, 2, 4), (2, 2, 1, 2), (1, 2, 4, 2), (1, 8, 2, 2)],
)
def test_heads_that_ranks_share_are_counted_once(own: int, model: int, tp_size: int, total: int) -> None:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=own, head_size=8, dtype=torch.float32)
    layout = read(torch.zeros(8, own, 16, 16), spec=spec, kv_heads=model, tp_size=tp_size)
    assert layout.heads == (total,)


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kernels_keep_keys_in_columns(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fields name the very bytes where vLLM's kernel puts a token's numbers."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *args: isa)
    heads, tokens, size, blocks = 2, 32, 64, 3
    cache = torch.zeros(blocks, heads, tokens, 2 * size, dtype=dtype)
    keys, values = cache.view(blocks, heads, 2 * tokens, size).chunk(2, dim=2)
    numbers = torch.randn(2, blocks * tokens, heads, size).to(dtype)
    slots = torch.arange(blocks * tokens)
    scales: dict[str, Any] = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
    ops.cpu_attn_reshape_and_cache(numbers[0], numbers[1], keys, values, slots, isa, **scales)
    spec = FullAttentionSpec(block_size=tokens, num_kv_heads=heads, head_size=size, dtype=dtype)
    found = layout_of({"layers.0": cache}, config(spec, blocks), {"layers.0": "CPU_ATTN"})[0]
    [plane] = found.planes
    memory = cache.view(torch.uint8).numpy().reshape(-1)
    for block, token, head in ((0, 0, 0), (1, 5, 1), (2, 31, 0)):
        at = block * plane.stride + head * plane.head_stride
        for field, expected in zip(plane.fields, numbers, strict=True):
            rows = [
                memory[at + field.offset + row * field.row_stride + token * field.token_stride :][
                    : field.width
                ]
                for row in range(field.rows)
            ]
            wanted = expected[block * tokens + token, head].view(torch.uint8).numpy()
            assert (np.concatenate(rows) == wanted).all()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(8, 2, 16, 16, device="meta"), "host and NVIDIA memory"),
        (torch.zeros(16, 8, 2, 16).permute(1, 2, 0, 3), "not in one place"),
        (torch.zeros(7, 2, 16, 16), "no dimension counts 8 blocks"),
    ],
)
def test_layouts_that_can_not_be_moved_are_refused(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layout_of({"layers.0": tensor}, config(), {})


@pytest.mark.parametrize("given", [None, {}, "probe", ["release"], 7, 1.5])
def test_parameters_that_are_no_object_are_none(given: object) -> None:
    """A client can name them in vllm_xargs, whose values are strings, numbers and lists."""
    assert params_of(SimpleNamespace(kv_transfer_params=given)) == {}


def test_parameters_are_what_the_request_has() -> None:
    assert params_of(SimpleNamespace(kv_transfer_params={"probe": True})) == {"probe": True}

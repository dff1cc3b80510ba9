"""What vLLM sees of the connector before an engine runs: its name, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.plugins import load_general_plugins
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.vllm.connector import MooncakePushConnector, _check_parallelism
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
        ("pipeline_parallel_size", "--pipeline-parallel-size 2"),
        ("data_parallel_size", "start one server per data-parallel rank"),
    ],
)
def test_parallelism_that_is_not_supported_is_refused(name: str, says: str) -> None:
    sizes = {"pipeline_parallel_size": 1, "data_parallel_size": 1}
    _check_parallelism(SimpleNamespace(**sizes))
    with pytest.raises(ConfigError, match=says):
        _check_parallelism(SimpleNamespace(**{**sizes, name: 2}))


def test_state_space_layers_are_refused() -> None:
    mamba = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))
    with pytest.raises(ConfigError, match=r"can't move the KV of MambaSpec \(layer layers.0\)"):
        groups_of(config(mamba))


def test_layouts_are_read_off_the_tensors() -> None:
    heads_first = torch.zeros(8, 2, 16, 16)
    layout, layers = layout_of({"layers.0": heads_first}, config(), {"layers.0": "CPU_ATTN"})
    assert layers == {"layers.0": 0}
    [plane] = layout.planes
    assert (plane.base, plane.stride, plane.nbytes) == (heads_first.data_ptr(), 2048, 2048)
    # Two kernel blocks make up one block of the block table.
    [plane] = layout_of({"layers.0": torch.zeros(16, 2, 8, 16)}, config(), {})[0].planes
    assert (plane.stride, plane.nbytes) == (2048, 2048)
    # K and V apart, as older versions keep them.
    key_value = torch.zeros(2, 8, 16, 2, 8)
    planes = layout_of({"layers.0": key_value}, config(), {})[0].planes
    assert [p.base - key_value.data_ptr() for p in planes] == [0, 8 * 1024]
    assert {p.nbytes for p in planes} == {1024}


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(8, 2, 16, 16, device="meta"), "host memory only"),
        (torch.zeros(16, 8, 2, 16).permute(1, 2, 0, 3), "not in one piece"),
        (torch.zeros(7, 2, 16, 16), "no dimension counts 8 blocks"),
    ],
)
def test_layouts_that_can_not_be_moved_are_refused(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layout_of({"layers.0": tensor}, config(), {})

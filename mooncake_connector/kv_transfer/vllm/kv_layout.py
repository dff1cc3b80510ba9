"""Read a `KVLayout` off vLLM's KV cache tensors. Reads, never assumes: shapes differ by version, device and
backend.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.layout import Group, KVLayout, Plane
from mooncake_connector.kv_transfer.vllm.compat import transfer_group_ids

_KINDS = {"FullAttentionSpec": "full", "MLAAttentionSpec": "mla", "SlidingWindowSpec": "sliding"}


def groups_of(kv_cache_config: Any) -> tuple[Group, ...]:
    """The KV cache groups, checked to be of kinds whose pages can be moved.

    Raises:
        ConfigError: a kind of layer that has no block-wise KV (state-space layers, for one).
    """
    groups = []
    for index in transfer_group_ids(kv_cache_config):
        group = kv_cache_config.kv_cache_groups[index]
        spec = group.kv_cache_spec
        inner = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
        names = {type(s).__name__ for s in inner}
        if unknown := sorted(names - set(_KINDS)):
            raise ConfigError(
                f"MooncakePushConnector can't move the KV of {unknown[0]} (layer {group.layer_names[0]}); "
                f"it moves {', '.join(_KINDS)}: serve this model without --kv-transfer-config"
            )
        # One window for the group: a block is needed as long as one of its layers needs it.
        windows = [int(getattr(s, "sliding_window", None) or 0) for s in inner]
        kind = "+".join(sorted({_KINDS[n] for n in names}))
        window = 0 if kind != "sliding" or 0 in windows else max(windows)
        groups.append(Group(int(spec.block_size), window, kind))
    return tuple(groups)


def layout_of(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, backends: Mapping[str, str]
) -> tuple[KVLayout, dict[str, int]]:
    """The layout of one worker's KV caches, and the index of each layer.

    Args:
        kv_caches: layer name -> tensor, as vLLM registers them.
        backends: layer name -> attention backend.

    Raises:
        ConfigError: KV on a device or in an order that no transport here can reach.
    """
    num_blocks = int(kv_cache_config.num_blocks)
    group_of_layer = {
        name: position
        for position, index in enumerate(transfer_group_ids(kv_cache_config))
        for name in kv_cache_config.kv_cache_groups[index].layer_names
    }
    planes: list[Plane] = []
    forms: list[str] = []
    layers: dict[str, int] = {}
    for name, tensor in kv_caches.items():
        if name not in group_of_layer:
            continue
        if tensor.device.type != "cpu":
            raise ConfigError(
                f"the KV of {name} is on {tensor.device}: this version moves host memory only; "
                "serve with a CPU build of vLLM"
            )
        layer = layers[name] = len(layers)
        group = group_of_layer[name]
        for plane in _planes(name, tensor, num_blocks):
            base, stride, nbytes = plane
            planes.append(Plane(layer, group, base, stride, nbytes))
        forms.append(_form(tensor, backends.get(name, "unknown")))
    return KVLayout(num_blocks, groups_of(kv_cache_config), tuple(planes), tuple(forms)), layers


def _planes(name: str, tensor: torch.Tensor, num_blocks: int) -> Sequence[tuple[int, int, int]]:
    """(base, stride, bytes) of each page array in one layer's tensor."""
    if tensor.shape[0] == 2 and tensor.dim() > 1 and tensor.shape[1] % num_blocks == 0 and num_blocks > 2:
        return [p for half in tensor for p in _planes(name, half, num_blocks)]
    if tensor.shape[0] % num_blocks:
        raise ConfigError(
            f"the KV of {name} has shape {tuple(tensor.shape)}: no dimension counts {num_blocks} blocks"
        )
    size = tensor.element_size()
    inner = tensor[0].numel() * size
    if not _dense(tensor[0]):
        raise ConfigError(
            f"the KV of {name} has strides {tensor.stride()}: a block of one layer is not in one piece; "
            "set VLLM_KV_CACHE_LAYOUT to LBHNC or LBNHC"
        )
    ratio = tensor.shape[0] // num_blocks
    stride = tensor.stride(0) * size
    if ratio > 1 and stride != inner:
        raise ConfigError(
            f"the KV of {name} splits blocks into {ratio} pieces that are apart; give a smaller --block-size"
        )
    return [(tensor.data_ptr(), stride * ratio, inner * ratio)]


def _dense(block: torch.Tensor) -> bool:
    """Whether a tensor's elements fill one piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(block.stride(), block.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _form(tensor: torch.Tensor, backend: str) -> str:
    cpu = ""
    if tensor.device.type == "cpu":
        # CPU kernels may pack K by what the processor offers (AMX, AVX-512).
        cpu = f" on {torch.backends.cpu.get_cpu_capability()}"
    return f"{tuple(tensor.shape[1:])} strides {tuple(tensor.stride()[1:])} {tensor.dtype} {backend}{cpu}"


def model_hash(model_config: Any) -> str:
    """Equal for two engines that serve the same model configuration, wherever its files are."""
    config = model_config.hf_config.to_dict()
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    described = [json.dumps(config, sort_keys=True, default=str), str(model_config.quantization)]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]

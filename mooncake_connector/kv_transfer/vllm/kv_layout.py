"""Read a `KVLayout` off vLLM's KV cache tensors. Reads, never assumes: shapes differ by version, device and
backend.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.layout import Field, Group, KVLayout, Plane
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


def capacity_of(kv_cache_config: Any) -> int:
    """Tokens of KV that an engine holds: all its groups take their blocks from one store."""
    groups = kv_cache_config.kv_cache_groups
    per_block = min(int(group.kv_cache_spec.block_size) for group in groups)
    return int(kv_cache_config.num_blocks // len(groups) * per_block)


def layout_of(
    kv_caches: Mapping[str, torch.Tensor],
    kv_cache_config: Any,
    backends: Mapping[str, str],
    *,
    kv_heads: int = 0,
    tp_size: int = 1,
    cache_dtype: str = "auto",
) -> tuple[KVLayout, dict[str, int]]:
    """The layout of one worker's KV caches, and the index of each layer.

    Args:
        kv_caches: layer name -> tensor, as vLLM registers them.
        backends: layer name -> attention backend.
        kv_heads: of the model, on all ranks together; 0 if unknown.
        tp_size: tensor-parallel ranks.
        cache_dtype: vLLM's ``--kv-cache-dtype``.

    Raises:
        ConfigError: KV in a shape that is not known, or not all on one device.
    """
    num_blocks = int(kv_cache_config.num_blocks)
    groups = groups_of(kv_cache_config)
    group_of_layer, specs = {}, {}
    for position, index in enumerate(transfer_group_ids(kv_cache_config)):
        group = kv_cache_config.kv_cache_groups[index]
        for name in group.layer_names:
            group_of_layer[name] = position
            specs[name] = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
    planes: list[Plane] = []
    forms: list[str] = []
    names: list[str] = []
    heads: list[int] = []
    locations: set[str] = set()
    for name, tensor in kv_caches.items():
        if name not in group_of_layer:
            continue
        layer, group_index = len(names), group_of_layer[name]
        spec, backend = specs[name], backends.get(name, "unknown")
        parts, known = _pages(name, tensor, num_blocks, spec, groups[group_index])
        if known:
            packing = _packing(parts[0], backend, cache_dtype)
        else:
            packing = f"{tuple(tensor.shape[1:])} strides {tuple(tensor.stride()[1:])} {backend}"
        for part in parts:
            planes.append(_plane(name, part, layer, group_index, packing, known))
        names.append(name)
        heads.append(_total_heads(spec, kv_heads, tp_size) if known else 0)
        forms.append(" ".join(filter(None, (str(tensor.dtype), cache_dtype, packing))))
        device = tensor.device
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"the KV of {name} is on {device}: only host and NVIDIA memory can be moved")
        locations.add("cpu:0" if device.type == "cpu" else f"{device.type}:{device.index or 0}")
    if len(locations) > 1:
        raise ConfigError(f"KV lies on several devices ({', '.join(sorted(locations))}): give one per worker")
    layout = KVLayout(
        num_blocks,
        groups,
        tuple(planes),
        tuple(forms),
        tuple(names),
        tuple(heads),
        locations.pop() if locations else "cpu:0",
    )
    return layout, layout.layers


def _pages(
    name: str, tensor: torch.Tensor, num_blocks: int, spec: Any, group: Group
) -> tuple[Sequence[torch.Tensor], bool]:
    """Each page array in one layer's tensor, as [pages, heads, tokens, content] and True.

    Of a shape that is unknown, as [blocks, ...] and False: blocks as a whole can be moved still.
    """
    shape = tuple(tensor.shape)
    kv_heads = int(getattr(spec, "num_heads", spec.num_kv_heads))
    parts: Sequence[torch.Tensor] = [tensor]
    if len(shape) > 3 and shape[0] == 2 and shape[1] % num_blocks == 0 and num_blocks > 2:
        # K and V apart, [2, pages, tokens, heads, head size], as some backends keep them.
        parts = [half.transpose(1, 2) if half.dim() == 4 else half for half in tensor]
    elif len(shape) == 3 and kv_heads == 1:
        parts = [tensor.unsqueeze(1)]
    pages, rest = divmod(parts[0].shape[0], num_blocks)
    if rest:
        raise ConfigError(f"the KV of {name} has shape {shape}: no dimension counts {num_blocks} blocks")
    if parts[0].dim() == 4 and (parts[0].shape[1], parts[0].shape[2] * pages) == (kv_heads, group.block_size):
        return parts, True
    return [part.unflatten(0, (num_blocks, pages)) for part in parts], False


def _plane(name: str, page: torch.Tensor, layer: int, group: int, packing: str, known: bool) -> Plane:
    """The plane of pages [pages, heads, tokens, content] (if that is `known`), by their strides."""
    size = page.element_size()
    stride = page.stride(0) * size
    nbytes = (sum((n - 1) * s for n, s in zip(page.shape[1:], page.stride()[1:], strict=True)) + 1) * size
    if nbytes > stride or page.stride(-1) != 1:
        raise ConfigError(
            f"the KV of {name} has strides {page.stride()}: a block of one layer is not in one place; "
            "set VLLM_KV_CACHE_LAYOUT to LBHNC or LBNHC"
        )
    if not known:
        return Plane(layer, group, page.data_ptr(), stride, nbytes)
    _, heads, tokens, content = page.shape
    _, head_stride, token_stride, _ = (s * size for s in page.stride())
    width = content * size
    fields: tuple[Field, ...]
    if packing in _CPU_COLUMNS:
        # All of a head's K, a row of tokens per number, before all of its V, a row of numbers per token.
        half = tokens * width // 2
        fields = (
            Field(0, size, size, rows=content // 2, row_stride=tokens * size),
            Field(half, width // 2, width // 2),
        )
    elif packing:
        fields = (Field(0, tokens * width, 0),)
    else:
        fields = (Field(0, width, token_stride),)
    return Plane(layer, group, page.data_ptr(), stride, nbytes, tokens, heads, head_stride, fields)


def _packing(page: torch.Tensor, backend: str, cache_dtype: str) -> str:
    """How an attention backend orders the numbers in a head's page; empty: token by token."""
    if page.device.type != "cpu" or backend == "CPU_MLA":
        return ""
    if backend != "CPU_ATTN":
        return f"{backend} on {torch.backends.cpu.get_cpu_capability()}"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, _, tokens, content = page.shape
    isa = _get_attn_isa(page.dtype, tokens, content // 2, cache_dtype)
    return f"CPU_ATTN {isa}" + (f" {cache_dtype}" if page.element_size() == 1 else "")


_CPU_COLUMNS = ("CPU_ATTN vec", "CPU_ATTN vec16")
"""Kernels known to keep K in columns. Others pack blocks as their processor likes: these can't be cut."""


def _total_heads(spec: Any, kv_heads: int, tp_size: int) -> int:
    """KV heads of a layer on all ranks together; vLLM gives a rank one of them at least."""
    own = int(spec.num_kv_heads)
    if type(spec).__name__ == "MLAAttentionSpec":
        return 1
    return kv_heads if kv_heads and max(1, kv_heads // tp_size) == own else own * tp_size


def model_hash(model_config: Any) -> str:
    """Equal for two engines that serve the same model configuration, wherever its files are."""
    config = model_config.hf_config.to_dict()
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    described = [json.dumps(config, sort_keys=True, default=str), str(model_config.quantization)]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]

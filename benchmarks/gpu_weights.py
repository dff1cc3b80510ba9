"""Random weights that let answers depend on the KV: vLLM's ``--load-format random`` once this is imported.

vLLM's own dummy weights draw every parameter from one seed within 1e-3: embedding and output layer become
equal, attention adds nothing that survives rounding, and the next token is always the last one again,
whatever the KV holds. Comparing such answers compares nothing.
"""

import zlib
from typing import Any

import torch
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

FORMAT = "random"
QKV_GAIN = 2.0
"""Makes attention scores spread by about 4: few positions count, so a wrong one shows."""


class Imported:
    """For vLLM's ``--worker-extension-cls``, which has workers import this before they load a model."""


@register_model_loader(FORMAT)
class RandomLoader(BaseModelLoader):
    """Fills every parameter from a seed of its name. Engines of equal parallelism get equal weights."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        layers = sum(name.endswith("o_proj.weight") for name, _ in model.named_parameters())
        for name, parameter in model.named_parameters():
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, _std(name, layers, parameter.shape[1]), generator=generator)


def _std(name: str, layers: int, fan_in: int) -> float:
    if "embed_tokens" in name:
        return 1.0
    gain = 1.0
    if "qkv_proj" in name:
        gain = QKV_GAIN
    if "o_proj" in name or "down_proj" in name:
        gain /= (2 * max(1, layers)) ** 0.5  # what GPT-2 does, so that depth does not drown the input
    return gain / fan_in**0.5

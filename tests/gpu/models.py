"""Models for the GPU tests: small, their weights in real files (dummy ones differ between tensor-parallel
sizes), and calm.

Calm: half precision's rounding changes a log probability by about 0.03, while one wrong block of 16 tokens in
a prompt of 300 changes more than half of the tokens that follow (measured with transformers on a CPU). With
the weights that suit float32, rounding alone changes an answer.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooncake_connector.demo.models import make

MAX_TOKENS = 4096

_LLAMA = {
    "embed_tokens": 1.0,
    "q_proj": 0.07,
    "k_proj": 0.07,
    "v_proj": 0.044,
    "o_proj": 0.026,
    "gate_proj": 0.044,
    "up_proj": 0.044,
    "down_proj": 0.026,
    "lm_head": 0.15,
}
_DEEPSEEK = {
    "embed_tokens": 1.0,
    "q_proj": 0.1,
    "kv_a_proj_with_mqa": 0.1,
    "kv_b_proj": 0.07,
    "o_proj": 0.05,
    "gate_proj": 0.06,
    "up_proj": 0.06,
    "down_proj": 0.035,
    "lm_head": 0.2,
}


def llama(folder: Path) -> Path:
    """8 heads and 4 KV heads of 128, 8 layers: 16 KiB of KV per token in half precision."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = make("tiny-llama")
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return _save(folder, tokenizer, config, _LLAMA)


def deepseek(folder: Path) -> Path:
    """Multi-head latent attention, every layer dense: a latent of 512 + 64 per token and layer, 4 layers."""
    from transformers import AutoConfig

    tiny = make("tiny-deepseek")
    config = AutoConfig.from_pretrained(tiny)
    # vLLM's attention for prefill on GPUs knows DeepSeek's own dimensions only.
    config.qk_nope_head_dim = config.v_head_dim = 128
    config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return _save(folder, tiny, config, _DEEPSEEK)


def _save(folder: Path, tokenizer: Path, config: Any, deviation: Mapping[str, float]) -> Path:
    """Random weights of these standard deviations, the same at every call, beside a tokenizer's files."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tokenizer, folder)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(4321)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, deviation[name.split(".")[-2]])
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    return folder

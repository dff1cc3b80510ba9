"""Tiny models, made on the spot: random weights from a fixed seed, a local tokenizer, nothing downloaded.

Four shapes that matter to a KV connector: full attention with grouped heads (``tiny-llama``) and with one KV
head (``tiny-mqa``), sliding windows beside full attention (``tiny-gemma3``) and multi-head latent attention
(``tiny-deepseek``). Their answers are gibberish, and the same on every machine with the same libraries.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TOKENS = 4096
REVISION = "2"  # part of the cached folder's name: raise it whenever what is made here changes

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog. prefill decode cache block transfer. ",
    "hello world this is a small language model used in tests of key value cache transfer",
    "user: system: assistant: what is the answer to the question about the weather in the city today?",
)


def names() -> list[str]:
    """The models that `make` knows."""
    return list(_BUILDERS)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/mooncake_connector/models``, normally below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mooncake_connector" / "models"


def make(name: str, cache: Path | None = None) -> Path:
    """The folder of model `name`, made in `cache` (default `default_cache()`) unless it is there already.

    Two processes may ask at once: the folder appears in one piece or not at all.

    Raises:
        ValueError: no such model; the message lists those there are.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no tiny model {name!r}; there are: {', '.join(_BUILDERS)}")
    import torch
    import transformers

    cache = cache or default_cache()
    folder = cache / f"{name}-{REVISION}-{transformers.__version__}-{torch.__version__.partition('+')[0]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        vocab = _save_tokenizer(draft)
        torch.manual_seed(1234)
        model = _BUILDERS[name](vocab)
        model.to(torch.bfloat16).save_pretrained(draft, safe_serialization=True)
        draft.chmod(0o755)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def server_args(name: str) -> list[str]:
    """vLLM arguments that suit the tiny models on a CPU: exact arithmetic, blocks that short prompts span."""
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_TOKENS)]
    if name == "tiny-deepseek":
        # The kernel for CPUs with AMX has no float32, and this one no other block size.
        return [*args, "--attention-backend", "CPU_MLA", "--block-size", "16"]
    return [*args, "--block-size", "32"]


def _save_tokenizer(folder: Path) -> int:
    """Train and save a byte-level BPE tokenizer; returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([text * 4 for text in _CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _common(vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        # Large enough that greedy answers wander instead of repeating one token.
        "initializer_range": 0.2,
    }


def _llama(vocab: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_common(vocab), num_key_value_heads=2, head_dim=64))


def _mqa(vocab: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_common(vocab), num_key_value_heads=1, head_dim=64))


def _gemma3(vocab: int) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_common(vocab),
            num_key_value_heads=2,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=64,
            layer_types=layers,
        )
    )


def _deepseek(vocab: int) -> Any:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **_common(vocab),
            num_key_value_heads=4,
            # vLLM's CPU kernel for latent attention knows exactly this geometry: 512 + 64.
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
            # As DeepSeek's own models have it; and vLLM's CPU kernel for unscaled rotary embedding takes
            # [tokens, heads, 64] for [tokens x heads, 64], so that every token gets other tokens' positions.
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": MAX_TOKENS // 4,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
            # Every layer dense: the mixture of experts has nothing to do with KV.
            first_k_dense_replace=4,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
        )
    )


_BUILDERS: dict[str, Callable[[int], Any]] = {
    "tiny-llama": _llama,
    "tiny-mqa": _mqa,
    "tiny-gemma3": _gemma3,
    "tiny-deepseek": _deepseek,
}

"""A model's tokenizer and chat template, read as vLLM does, by transformers in a process of its own.

transformers is large and takes seconds to import. The proxy needs what comes of it, not the library.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from mooncake_connector.errors import MooncakeError

# vLLM renders chats of these without their template, if they have one.
_OTHER_RENDERERS = ("DeepseekV32", "DeepseekV4", "GptOss", "Inkling", "KimiK3", "MoonshotKimia")
_SAMPLES = ("a", " Hello,  world! 12345\n\n", "é 你好 🙂 ½", "the Quick\tbrown <s> fox")


class TokenizerUnreadable(MooncakeError):
    """There is no tokenizer, or none that can be used without vLLM."""


class TokenizerFiles(msgspec.Struct, frozen=True):
    """What a model's folder says of its prompts.

    Attributes:
        tokenizer: of the `tokenizers` library, JSON.
        special: names and texts of special tokens, for templates.
        templates: chat templates by name; empty if vLLM renders chats without one.
        processor_template: the one that vLLM prefers for chats without tools.
    """

    tokenizer: str
    special: dict[str, Any] = {}
    templates: dict[str, str] = {}
    processor_template: str | None = None


async def read(path: str) -> TokenizerFiles:
    """Read a model's folder in a child process, which ends with this call however it ends.

    Raises:
        TokenizerUnreadable: the message says why.
    """
    command = (sys.executable, "-m", __name__, path)
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        answer, errors = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise TokenizerUnreadable(lines[-1] if lines else f"the reader ended with {child.returncode}")
    return msgspec.json.decode(answer, type=TokenizerFiles)


def _read(folder: Path) -> TokenizerFiles:
    if (folder / "tekken.json").exists() or any(folder.glob("tokenizer.model.v*")):
        raise TokenizerUnreadable("vLLM reads it with Mistral's own tokenizer")
    tokenizer = _auto_tokenizer().from_pretrained(folder, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        raise TokenizerUnreadable("it does more than the tokenizers library")
    for sample in _SAMPLES:
        if tokenizer(sample)["input_ids"] != backend.encode(sample).ids:
            raise TokenizerUnreadable("it does more than the tokenizers library")
    return TokenizerFiles(
        backend.to_str(),
        msgspec.to_builtins(dict(tokenizer.special_tokens_map), enc_hook=str),
        _templates(tokenizer.chat_template, _json(folder / "config.json").get("architectures")),
        _json(folder / "chat_template.json").get("chat_template"),
    )


def _auto_tokenizer() -> Any:
    import transformers.utils

    # Without torch its import takes a second instead of six, and tokenizers do not need it.
    transformers.utils.is_torch_available = transformers.utils.import_utils.is_torch_available = lambda: False
    from transformers import AutoTokenizer

    return AutoTokenizer


def _templates(found: str | dict[str, str] | None, architectures: list[str] | None) -> dict[str, str]:
    if found is None or any(name.startswith(_OTHER_RENDERERS) for name in architectures or []):
        return {}
    return {"default": found} if isinstance(found, str) else found


def _json(path: Path) -> dict[str, Any]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}


def _main() -> None:
    # Whatever a library prints is not the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        found = _read(Path(sys.argv[1]))
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(found))


if __name__ == "__main__":
    _main()

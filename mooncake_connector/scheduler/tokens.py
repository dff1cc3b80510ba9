"""The prompt's token ids in the proxy, exactly as vLLM will compute them, off the event loop.

The tokenizer is `transformers.AutoTokenizer`, as in vLLM; it is imported when the first one is loaded, in a
thread. What can't be told exactly is not told: the proxy then estimates.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_connector.scheduler.openai import CHAT, ClientRequest

log = logging.getLogger(__name__)

_ids = msgspec.json.Decoder(list[int])


class Prompt(msgspec.Struct, frozen=True):
    """A prompt's token ids.

    Attributes:
        ids: uint32.
        exact: these are all; False: only its beginning, up to a picture, or the first prompt of several.
    """

    ids: npt.NDArray[np.uint32]
    exact: bool = True


class Tokens:
    """Token ids of clients' prompts.

    Args:
        path: folder of the tokenizer (a model's folder); empty: the first one offered that is readable here.
        threads: how many prompts are tokenised at once.
        waiting: prompts under way at most; more of them are not told.
        inline_bytes: request bodies shorter than this are tokenised on the spot: a thread would cost more.
    """

    def __init__(
        self, path: str = "", *, threads: int = 2, waiting: int = 64, inline_bytes: int = 2048
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokens")
        self._waiting = waiting
        self._inline_bytes = inline_bytes
        self._under_way = 0
        self._path = path
        self._tokenizer: Any = None
        self._loading: asyncio.Future[Any] | None = None

    def offer(self, path: str) -> None:
        """An engine's own model: its tokenizer is taken if none was named and it is readable here.

        Loading goes on in a thread; call it in the event loop, as often as you like.
        """
        if self._loading is None and (self._path or Path(path).is_dir()):
            loop = asyncio.get_running_loop()
            self._loading = loop.run_in_executor(self._pool, self._load, self._path or path)

    async def loaded(self) -> bool:
        """Whether there is a tokenizer, once the loading that `offer` began has ended."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        return self._tokenizer is not None

    async def ids(self, request: ClientRequest) -> Prompt | None:
        """The prompt's token ids; None if they can't be told: no tokenizer (yet), too busy, beyond its grasp."""
        if len(request.raw) < self._inline_bytes:
            return self._prompt(request)
        if self._under_way >= self._waiting:
            return None
        self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._prompt, request)
        finally:
            self._under_way -= 1

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            log.warning("prompts are not tokenised: no tokenizer from %s: %s", path, error)

    def _prompt(self, request: ClientRequest) -> Prompt | None:
        if request.path == CHAT or request.get("truncate_prompt_tokens") is not None:
            return None
        try:
            return Prompt(np.array(_ids.decode(request.fields["prompt"]), np.uint32))
        except (KeyError, msgspec.DecodeError, OverflowError):
            return None

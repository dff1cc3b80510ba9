"""The prompt's token ids in the proxy, exactly as vLLM will compute them, off the event loop.

What can't be told exactly is not told: the proxy then estimates.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from mooncake_connector.scheduler.prompts.chat import ChatTemplate, Given
from mooncake_connector.scheduler.prompts.messages import chat_of_messages
from mooncake_connector.scheduler.prompts.responses import chat_of_response
from mooncake_connector.scheduler.prompts.segments import Ids, Segments, ids_array
from mooncake_connector.scheduler.prompts.tokenizer_files import TokenizerFiles, read
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, MESSAGES, RESPONSES, ClientRequest

log = logging.getLogger(__name__)

# Of all but a completion: more would take too long to decode, in one go and with the interpreter lock held.
MOST_FIELDS = 40_000
_PIECE_BYTES = 1 << 19

_ids = msgspec.json.Decoder(list[int])
_batch = msgspec.json.Decoder(list[msgspec.Raw])


class Prompt(msgspec.Struct, frozen=True):
    """A prompt's token ids.

    Attributes:
        ids: uint32.
        exact: these are all; False: only its beginning, up to a picture, or the first prompt of several.
    """

    ids: Ids
    exact: bool = True


class Tokenizer:
    """What vLLM does with a prompt before its engine gets it.

    Args:
        files: what the model's folder says.
        chat_template: in place of its own, as vLLM's ``--chat-template`` (the template, not a file's name).
        cache_bytes: for texts tokenised before.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(
        self, files: TokenizerFiles, chat_template: str | None = None, cache_bytes: int = 64 << 20
    ) -> None:
        from tokenizers import Tokenizer as Backend

        self._segments = Segments(Backend.from_str(files.tokenizer), cache_bytes)
        self._chat = ChatTemplate(files, chat_template)

    def prompt(self, request: ClientRequest) -> Prompt | None:
        """The prompt's token ids.

        Raises:
            Exception: they can't be told, or vLLM would refuse the request; templates may raise anything.
        """
        if request.path == COMPLETIONS:
            return self._of_completion(request)
        if request.path == CHAT:
            return self._of_chat(request, request.get("add_special_tokens") is True)
        if request.path == RESPONSES:
            # vLLM adds special tokens to what the template has, as to a text.
            return self._of_chat(chat_of_response(request), True, sorted_calls=False)
        return self._of_chat(chat_of_messages(request), False) if request.path == MESSAGES else None

    def _of_chat(self, chat: Given, special: bool, *, sorted_calls: bool = True) -> Prompt | None:
        text, whole = self._chat.render(chat, sorted_calls=sorted_calls)
        if whole:
            return Prompt(self._segments.encode(text, special))
        text = self._segments.before_last_cut(text)
        return Prompt(self._segments.encode(text, special, ends=False), False) if text else None

    def _of_completion(self, request: ClientRequest) -> Prompt:
        raw, exact = _first_prompt(request.fields["prompt"])
        text = msgspec.json.decode(raw, type=str)
        return Prompt(self._segments.encode(text, request.get("add_special_tokens") is not False), exact)


class Tokens:
    """Token ids of clients' prompts.

    Args:
        path: folder of the tokenizer (a model's folder); empty: the first one offered that is readable here.
        chat_template: in place of its own, as vLLM's ``--chat-template`` (the template, not a file's name).
        threads: how many prompts are tokenised at once.
        waiting: prompts under way at most; more of them are not told.
        inline_bytes: request bodies shorter than this are tokenised on the spot: a thread would cost more.
        cache_bytes: for texts tokenised before.
    """

    def __init__(
        self,
        path: str = "",
        *,
        chat_template: str | None = None,
        threads: int = 2,
        waiting: int = 64,
        inline_bytes: int = 1024,
        cache_bytes: int = 64 << 20,
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokens")
        self._path = path
        self._chat_template = chat_template
        self._waiting = waiting
        self._inline_bytes = inline_bytes
        self._cache_bytes = cache_bytes
        self._under_way = 0
        self._tokenizer: Tokenizer | None = None
        self._loading: asyncio.Task[None] | None = None

    def offer(self, path: str) -> None:
        """An engine's own model: its tokenizer is taken if none was named and it is readable here.

        Loading goes on in a process and a thread; call it in the event loop, as often as you like.
        """
        if self._loading is None and (self._path or Path(path).is_dir()):
            self._loading = asyncio.create_task(self._load(self._path or path))

    async def loaded(self) -> bool:
        """Whether there is a tokenizer, once the loading that `offer` began has ended."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        return self._tokenizer is not None

    async def ids(self, request: ClientRequest) -> Prompt | None:
        """The prompt's token ids, for which a prompt that came as ids needs no tokenizer.

        None if they can't be told: there is no tokenizer (yet), too much to do, or a strange request.
        """
        if self._tokenizer is None and not _is_ids(request):
            return None
        if len(request.raw) < self._inline_bytes:
            return self._prompt(request)
        if self._under_way >= self._waiting:
            return None
        self._under_way += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, self._prompt, request)
        future.add_done_callback(self._done)
        # A client that hangs up does not end the work of the thread: it counts until it does.
        return await asyncio.shield(future)

    def close(self) -> None:
        """Let go of the threads, and of a tokenizer that is being loaded."""
        if self._loading is not None:
            self._loading.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: asyncio.Future[Prompt | None]) -> None:
        self._under_way -= 1

    def _prompt(self, request: ClientRequest) -> Prompt | None:
        try:
            if any(request.get(name) is not None for name in ("truncate_prompt_tokens", "prompt_embeds")):
                return None
            if request.path != COMPLETIONS and _fields(request.raw) > MOST_FIELDS:
                return None
            given = _given(request)
            return given or (self._tokenizer.prompt(request) if self._tokenizer else None)
        except Exception as error:
            # Its text may repeat the prompt.
            log.debug("a prompt's tokens can't be told: %s", type(error).__name__)
            return None

    async def _load(self, path: str) -> None:
        try:
            files = await read(path)
            loop = asyncio.get_running_loop()
            self._tokenizer = await loop.run_in_executor(
                self._pool, Tokenizer, files, self._chat_template, self._cache_bytes
            )
        except Exception as error:
            log.warning(
                "prompts are not tokenised, their lengths are estimated and their prefixes not known: "
                "no tokenizer from %s: %s",
                path,
                error,
            )


def _fields(raw: bytes) -> int:
    """How many fields a JSON text's objects have, about; in no time."""
    return raw.count(b'":') - raw.count(b'\\":')


def _is_ids(request: ClientRequest) -> bool:
    """Whether the prompt came as a list: of ids, or of several prompts that may be ids."""
    return request.path == COMPLETIONS and bytes(memoryview(request.fields.get("prompt", b""))[:1]) == b"["


def _given(request: ClientRequest) -> Prompt | None:
    """The prompt, if it came as token ids."""
    if request.path != COMPLETIONS:
        return None
    raw, exact = _first_prompt(request.fields["prompt"])
    text = bytes(raw)
    return Prompt(_decoded(text), exact) if text.startswith(b"[") else None


def _decoded(text: bytes) -> Ids:
    """A JSON list of ids; piece by piece, as the interpreter lock is held for each."""
    found: list[Ids] = []
    start, end = 1, len(text) - 1
    while start < end or not found:
        cut = text.find(b",", start + _PIECE_BYTES, end)
        cut = end if cut < 0 else cut
        found.append(ids_array(_ids.decode(b"[%b]" % text[start:cut])))
        start = cut + 1
    return np.concatenate(found)


def _first_prompt(raw: msgspec.Raw) -> tuple[msgspec.Raw, bool]:
    """A completion's first prompt, a string or a list of ids, and whether there is no other."""
    text = bytes(raw)
    if not text.startswith(b"[") or text[1:64].lstrip()[:1] not in (b'"', b"["):
        return raw, True
    several = _batch.decode(raw)
    return several[0], len(several) == 1

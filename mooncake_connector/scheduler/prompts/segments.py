"""Exact token ids of long texts, of which only what is new is tokenised."""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]

# Shorter than this, a piece costs more to keep than to tokenise with its neighbour.
SHORTEST_PIECE = 256
_ENTRY_BYTES = 320
_SLICE = 1 << 16
_SAMPLES = ("", " ", "a", " a ", "\n\n", "Hello, world! 12345", "é 你好 🙂", "  x\ty  ", "<", "<|")


class Segments:
    """A fast tokenizer with a memory.

    A tokenizer cuts a text at its added tokens (``<|im_start|>`` and the like) before it does anything
    else, so that pieces that begin with one are tokenised independently: a conversation's next turn shares
    all pieces but the last with the turn before. Whether that holds is tried on samples; where it does not,
    texts are tokenised whole. May be used by several threads.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its truncation and padding are switched off.
        cache_bytes: for the pieces that were last used.
    """

    def __init__(self, tokenizer: Any, cache_bytes: int = 64 << 20) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._limit = cache_bytes
        self._cache: OrderedDict[str, Ids] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._before, self._after = self._added()
        self._cuts, self._may_cut = _cuts(tokenizer)
        if self._may_cut and not self._independent():
            self._may_cut = frozenset()

    @property
    def independent(self) -> bool:
        """Whether texts are tokenised in pieces."""
        return bool(self._may_cut)

    @property
    def cached_bytes(self) -> int:
        """What is kept, about; never more than allowed."""
        return self._size

    def encode(self, text: str, special: bool, *, ends: bool = True) -> Ids:
        """The token ids of a text.

        Args:
            special: add what the tokenizer adds to a text, such as a begin token.
            ends: whether the text ends here; False leaves out what the tokenizer adds at the end.

        Raises:
            UnicodeEncodeError: the text is not Unicode (lone surrogates).
        """
        pieces = self._pieces(text, SHORTEST_PIECE)
        found = self._known(pieces)
        new = list({piece for piece, ids in zip(pieces, found, strict=True) if ids is None})
        if new:
            encoded = dict(zip(new, self._encode(new), strict=True))
            self._keep(encoded.items())
            found = [encoded[piece] if ids is None else ids for piece, ids in zip(pieces, found, strict=True)]
        parts = [ids for ids in found if ids is not None]
        if special:
            parts = [self._before, *parts, *([self._after] if ends else [])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def before_last_cut(self, text: str) -> str:
        """The part of an unfinished text whose tokens will stay, whatever comes after it."""
        last = 0
        for match in self._cuts.finditer(text) if self._may_cut else ():
            if match[0] in self._may_cut:
                last = match.start()
        return text[:last]

    def _pieces(self, text: str, shortest: int) -> list[str]:
        if not self._may_cut:
            return [text]
        pieces: list[str] = []
        start = 0
        for match in self._cuts.finditer(text):
            if match.start() - start >= shortest and match[0] in self._may_cut:
                pieces.append(text[start : match.start()])
                start = match.start()
        pieces.append(text[start:])
        return pieces

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        # Unlike encode(), this one lets go of the interpreter lock while it works.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [ids_array(encoding.ids) for encoding in encodings]

    def _known(self, pieces: list[str]) -> list[Ids | None]:
        with self._lock:
            found = [self._cache.get(piece) for piece in pieces]
            for piece, ids in zip(pieces, found, strict=True):
                if ids is not None:
                    self._cache.move_to_end(piece)
        return found

    def _keep(self, encoded: Iterable[tuple[str, Ids]]) -> None:
        with self._lock:
            for piece, ids in encoded:
                if piece not in self._cache and _bytes(piece, ids) <= self._limit:
                    self._cache[piece] = ids
                    self._size += _bytes(piece, ids)
            while self._size > self._limit:
                self._size -= _bytes(*self._cache.popitem(last=False))

    def _added(self) -> tuple[Ids, Ids]:
        alone, framed = (
            self._tokenizer.encode_batch_fast(["a"], add_special_tokens=special)[0].ids
            for special in (False, True)
        )
        spare = len(framed) - len(alone)
        at = next((i for i in range(spare + 1) if framed[i : i + len(alone)] == alone), None)
        if at is None:
            raise ValueError("what the tokenizer adds to a text is not before and after it")
        return np.array(framed[:at], np.uint32), np.array(framed[at + len(alone) :], np.uint32)

    def _independent(self) -> bool:
        texts = [
            f"{left}{token}{middle}{other}{right}"
            for token, other in zip(
                sorted(self._may_cut)[:8], sorted(self._may_cut, reverse=True), strict=False
            )
            for left, middle, right in zip(
                _SAMPLES, _SAMPLES[3:] + _SAMPLES[:3], _SAMPLES[7:] + _SAMPLES[:7], strict=True
            )
        ]
        for text, whole in zip(texts, self._encode(texts), strict=True):
            pieces = np.concatenate(self._encode(self._pieces(text, 0)))
            if not np.array_equal(pieces, whole):
                return False
        return True


def ids_array(ids: list[int]) -> Ids:
    """Token ids as an array, in slices: numpy holds the interpreter lock while it goes through a list."""
    found = np.empty(len(ids), np.uint32)
    for start in range(0, len(ids), _SLICE):
        found[start : start + _SLICE] = ids[start : start + _SLICE]
    return found


def _bytes(piece: str, ids: Ids) -> int:
    return 4 * len(piece) + ids.nbytes + _ENTRY_BYTES


def _cuts(tokenizer: Any) -> tuple[re.Pattern[str], frozenset[str]]:
    """How the tokenizer finds its added tokens in a text, and which of them begin a piece of their own."""
    # Those marked `normalized` are looked for later, inside of what is left between these.
    tokens = [t for t in tokenizer.get_added_tokens_decoder().values() if not t.normalized and t.content]
    if not tokens or tokenizer.encode_special_tokens or any(t.single_word for t in tokens):
        return re.compile("(?!)"), frozenset()
    # One that takes white space on its left belongs to the piece before it.
    return re.compile(_any_of([t.content for t in tokens])), frozenset(
        t.content for t in tokens if not t.lstrip
    )


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words; as a tree, as some tokenizers add thousands."""
    branches: dict[str, list[str]] = {}
    ends = False
    for word in words:
        if word:
            branches.setdefault(word[0], []).append(word[1:])
        else:
            ends = True
    if not branches:
        return ""
    inner = "|".join(re.escape(first) + _any_of(rest) for first, rest in branches.items())
    return f"(?:{inner}){'?' if ends else ''}"

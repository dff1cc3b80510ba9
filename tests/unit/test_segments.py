"""Texts tokenised in remembered pieces have the tokens of texts tokenised whole, whatever the tokenizer."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.prompts import segments
from mooncake_connector.scheduler.prompts.segments import Segments
from tests.unit.tiny_tokenizers import CORPUS, KINDS, MARKS, make

FRAGMENTS = st.one_of(
    st.sampled_from([*MARKS, "<s>", "<left>", "<right>"]),
    st.sampled_from([" ", "  ", "\n", "\t"]),
    st.sampled_from(["x", "fox", *" ".join(CORPUS).split()]),
    st.text(max_size=8),
)
texts = st.lists(FRAGMENTS, max_size=40).map("".join)


@functools.cache
def made(kind: str) -> tuple[Segments, Segments]:
    """Of a usual size, and one that must forget nearly everything."""
    return Segments(make(kind)), Segments(make(kind), cache_bytes=2000)


def whole(kind: str, text: str, special: bool) -> list[int]:
    return list(reference(kind).encode(text, add_special_tokens=special).ids)


@functools.cache
def reference(kind: str):
    return make(kind)


@pytest.fixture(params=[1, segments.SHORTEST_PIECE])
def shortest(request, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST_PIECE", request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_exact(kind, shortest):
    @given(turns=st.lists(texts, min_size=1, max_size=4), special=st.booleans())
    def exact(turns, special):
        large, small = made(kind)
        told = ""
        for turn in turns:
            told += turn
            expected = whole(kind, told, special)
            assert large.encode(told, special).tolist() == expected
            assert small.encode(told, special).tolist() == expected
            assert small.cached_bytes <= 2000

    exact()


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_before_the_last_cut_stays(kind):
    @given(begin=texts, rest=texts)
    def stays(begin, rest):
        kept = made(kind)[0].before_last_cut(begin)
        ids = made(kind)[0].encode(kept, True, ends=False).tolist()
        assert whole(kind, begin + rest, True)[: len(ids)] == ids

    stays()


def test_which_tokenizers_may_be_cut():
    assert {kind: made(kind)[0].independent for kind in KINDS} == {
        **dict.fromkeys(KINDS, True),
        "whole_words": False,
    }


def test_only_what_is_new_is_tokenised(monkeypatch):
    found = Segments(make("byte_level"))
    seen: list[str] = []
    encode = found._encode
    monkeypatch.setattr(found, "_encode", lambda texts: seen.extend(texts) or encode(texts))
    turn = "<|im_start|>" + CORPUS[0] * 10 + "<|im_end|>"
    found.encode(turn * 2, True)
    seen.clear()
    found.encode(turn * 2 + "<|im_start|>hello", True)
    assert sum(map(len, seen)) < len(turn) / 2


def test_a_tokenizer_whose_pieces_are_not_independent_is_found_out(monkeypatch):
    # Nothing of the kind is known; so one is made to look as if its tokens could be cut at any word.
    monkeypatch.setattr(
        segments, "_cuts", lambda tokenizer: (segments.re.compile("quick|[a-z]"), frozenset({"quick", "l"}))
    )
    found = Segments(make("metaspace_first"))
    assert not found.independent
    text = "the quick brown fox"
    assert np.array_equal(found.encode(text, False), whole("metaspace_first", text, False))

"""What a request's body is taken for: how long its prompt may be, and which conversation it belongs to."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.prompts.conversation import conversation_key
from mooncake_connector.scheduler.proxy.openai import (
    CHARS_PER_TOKEN,
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    ClientRequest,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
ODD = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | TEXT
PARTS = st.lists(ODD | st.dictionaries(st.sampled_from(["type", "text", "image"]), ODD | TEXT), max_size=4)
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "text", "name"]), ODD | TEXT | PARTS)
LISTS = st.lists(MESSAGE | ODD | st.lists(ODD, max_size=2), max_size=5)


def characters(messages: list[Any]) -> int:
    """Of the texts in messages, all of them decoded."""
    found = 0
    for message in messages:
        if isinstance(message, dict):
            content = message.get("content")
            parts = content if isinstance(content, list) else []
            texts = [message.get("text"), content, *(p.get("text") for p in parts if isinstance(p, dict))]
            found += sum(len(text) for text in texts if isinstance(text, str))
    return found


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (MESSAGES, "system"), (RESPONSES, "input")])
@given(said=LISTS, ascii=st.booleans())
def test_messages_are_as_long_as_their_texts(path: str, field: str, said: list[Any], ascii: bool):
    raw = json.dumps({field: said}, ensure_ascii=ascii).encode()
    assert ClientRequest.parse(path, raw).prompt_tokens == max(1, characters(said) // CHARS_PER_TOKEN)


@pytest.mark.parametrize("said", [b"5", b'{"a": 1}', b"null", b'"text"', b"[1e999]"])
def test_what_are_no_messages_counts_as_one_token(said: bytes):
    assert ClientRequest.parse(CHAT, b'{"messages": %b}' % said).prompt_tokens == 1


@given(st.lists(st.integers(0, 1 << 20), min_size=1), st.sampled_from(["", " ", "\n"]))
def test_ids_are_counted_and_texts_measured(ids: list[int], space: str):
    raw = json.dumps({"prompt": ids}).replace("[", f"[{space}").encode()
    assert ClientRequest.parse(COMPLETIONS, raw).prompt_tokens == len(ids)
    text = json.dumps("a" * len(ids))
    raw = b'{"prompt": %b}' % text.encode()
    assert ClientRequest.parse(COMPLETIONS, raw).prompt_tokens == max(1, len(text) // CHARS_PER_TOKEN)


def test_of_two_equal_fields_the_last_one_counts():
    def key(message: bytes) -> str:
        return conversation_key(ClientRequest.parse(CHAT, b'{"messages": [%b]}' % message))

    twice = b'{"role": "system", "content": "a", "content": "b", "role": "user"}'
    assert key(twice) == key(b'{"role": "user", "content": "b"}') != key(b'{"role": "user", "content": "a"}')
    assert key(b'5, {"role": "user", "content": "b"}') == ""


@pytest.mark.parametrize("said", [b"true", b" true ", b"false", b"null", b"1", b'"true"', b"[true]"])
def test_only_true_asks_for_a_stream(said: bytes):
    request = ClientRequest.parse(COMPLETIONS, b'{"stream":%b}' % said)
    assert request.stream is (json.loads(said) is True)
    assert not ClientRequest.parse(COMPLETIONS, b"{}").stream

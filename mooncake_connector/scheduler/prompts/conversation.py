"""What ties requests together: turns of one conversation, and KV that they may share. No I/O here."""

from collections.abc import Container
from typing import Any

import xxhash

from mooncake_connector.scheduler.policy.block_keys import salt_of
from mooncake_connector.scheduler.proxy.openai import ClientRequest, Message


def conversation_key(request: ClientRequest) -> str:
    """Equal for the turns of one conversation, empty if that can't be told.

    The client's ``session_id`` (vLLM's field) if there is one, else what a chat began with: all up to the
    first user message. Two conversations that began alike share a key.
    """
    session = request.get("session_id")
    if isinstance(session, str) and session:
        return _hash(b"session", session.encode(errors="surrogatepass"))
    start: list[bytes] = []
    for message in request.messages:
        if not isinstance(message, Message):
            return ""
        role = bytes(message.role)
        start += (role, bytes(message.content))
        if role == b'"user"':
            break
    return _hash(b"chat", *start) if start else ""


def salt(request: ClientRequest, adapters: Container[Any] = ()) -> int:
    """What the keys of the prompt's blocks begin with: 0, unless its KV is not everybody's.

    vLLM keeps KV apart by ``cache_salt`` and by LoRA adapter, and so does this: equal for equal pairs.

    Args:
        adapters: names that clients may give as ``model`` to get a LoRA adapter.
    """
    own = request.get("cache_salt")
    model = request.get("model")
    adapter = model if isinstance(model, str) and model in adapters else ""
    return salt_of(adapter, own if isinstance(own, str) else "")


def _hash(*parts: bytes) -> str:
    # Lengths go in, too: otherwise two ways to cut the same bytes would be one.
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()

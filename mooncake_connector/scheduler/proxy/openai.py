"""A client's request as the proxy needs it, and errors in OpenAI's form. Nothing here does I/O."""

from typing import Any

import msgspec

from mooncake_connector.errors import MooncakeError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
CHARS_PER_TOKEN = 4

TRANSFER = "kv_transfer_params"
XARGS = "vllm_xargs"
_NULL = msgspec.Raw(b"null")

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BadRequest(MooncakeError):
    """The client's request can't be served as it is; `param` names the field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ClientRequest(msgspec.Struct, frozen=True):
    """One completion or chat request.

    Attributes:
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        raw: the body exactly as the client sent it, a JSON object.
        fields: its top-level fields, each still encoded.
        stream: whether the client asked for server-sent events.
        prompt_tokens: estimate; exact only for prompts given as token ids.
    """

    path: str
    raw: bytes
    fields: dict[str, msgspec.Raw]
    stream: bool
    prompt_tokens: int

    @classmethod
    def parse(cls, path: str, raw: bytes) -> "ClientRequest":
        """Read a body.

        Raises:
            BadRequest: not a JSON object, or it sets ``kv_transfer_params``.
        """
        fields = read_fields(raw)
        request = cls(path, raw, fields, False, 0)
        prompt = fields.get("messages" if path == CHAT else "prompt", msgspec.Raw(b"null"))
        tokens = _chat_tokens(prompt) if path == CHAT else _prompt_tokens(prompt)
        return cls(path, raw, fields, request.get("stream") is True, tokens)

    def get(self, name: str) -> Any:
        """The decoded value of a field, None if absent (or beyond what JSON allows)."""
        try:
            return msgspec.json.decode(self.fields[name]) if name in self.fields else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None


def read_fields(raw: bytes) -> dict[str, msgspec.Raw]:
    """A body's top-level fields, each still encoded.

    Raises:
        BadRequest: not a JSON object, or it sets ``kv_transfer_params``: its ids could name another request's
            transfer.
    """
    try:
        if not raw.isascii():
            raw.decode()  # strings that stay encoded are not looked into otherwise
        fields = _fields.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request body is not a JSON object: {error}") from None
    # Looked at encoded: what the proxy's decoder refuses, a number too large, the engine's may take.
    if bytes(fields.get(TRANSFER, _NULL)) != b"null":
        raise BadRequest(f"{TRANSFER} is set by the proxy for each request; leave it out", TRANSFER)
    if XARGS in fields:
        # vLLM merges these into the very dictionary that it puts the transfer's parameters in.
        try:
            inner = _fields.decode(fields[XARGS])
        except msgspec.DecodeError:
            inner = {}  # no object: the engine refuses it
        if TRANSFER in inner:
            raise BadRequest(f"{TRANSFER} is set by the proxy for each request; leave it out", XARGS)
    return fields


def error_body(message: str, kind: str, code: int, param: str | None = None) -> bytes:
    """An error as OpenAI's API spells it, JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _prompt_tokens(prompt: msgspec.Raw) -> int:
    text = bytes(prompt)
    # Token ids are counted by their commas: a million-token prompt needs no million Python integers.
    if text.startswith(b"[") and text[1:].lstrip(b" \t\r\n[")[:1].isdigit():
        return text.count(b",") + 1
    return max(1, len(text) // CHARS_PER_TOKEN)


def _chat_tokens(messages: msgspec.Raw) -> int:
    try:
        found: Any = msgspec.json.decode(messages)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 1
    return max(1, _text_length(found) // CHARS_PER_TOKEN)


def _text_length(messages: Any) -> int:
    # Only text counts: an image sent inline as base64 would look like a prompt of a million tokens.
    total = 0
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            total += len(content)
        for part in content if isinstance(content, list) else []:
            text = part.get("text") if isinstance(part, dict) else None
            total += len(text) if isinstance(text, str) else 0
    return total

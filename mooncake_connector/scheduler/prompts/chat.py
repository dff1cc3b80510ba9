"""A chat request's prompt as text, rendered as vLLM renders it (vllm/renderers/hf.py and chat_utils.py)."""

import json
import uuid
from typing import Any, Protocol

from mooncake_connector.scheduler.prompts.chat_format import Format, content_format, variables
from mooncake_connector.scheduler.prompts.tokenizer_files import TokenizerFiles

Json = dict[str, Any]

# Keys of content parts that are no template's business.
_PART_FIELDS = {"type", "text", "refusal", "thinking", "closed", "name", "data", "uuid", "file"}
_PART_FIELDS |= {"image_url", "image_pil", "image_embeds", "audio_url", "audio_embeds", "video_url"}
_PART_FIELDS |= {"video_embeds", "input_audio", "prompt_embeds"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_TEXTS |= {"thinking": "thinking"}
_TEXT_LIKE = ("text", "tool_reference")
_FUNCTION = ("name", "description", "parameters", "strict")
_MEDIA = {"image_url": "image", "input_image": "image", "image_pil": "image", "image_embeds": "image"}
_MEDIA |= {"audio_url": "audio", "input_audio": "audio", "audio_embeds": "audio"}
_MEDIA |= {"video_url": "video", "video_embeds": "video", "prompt_embeds": "embeds"}
# What transformers' apply_chat_template takes whether or not the template knows it, and what vLLM sets.
_ALWAYS = frozenset({"documents", "add_generation_prompt", "continue_final_message"})
_NOT_THE_CLIENTS = {
    "conversation",
    "conversations",
    "tools",
    "chat_template",
    "tokenize",
    "padding",
    "truncation",
}
_NOT_THE_CLIENTS |= {"max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
_NOT_THE_CLIENTS |= {"tokenizer_kwargs"}
# Where what is not text begins; no client can know it.
_CUT = f"mooncake-{uuid.uuid4().hex}"
_BILLING = "x-anthropic-billing-header"


class Unknown(Exception):
    """vLLM's prompt for this request can't be told."""


def text_of(fields: Json, name: str) -> str:
    """A field that has to be a text.

    Raises:
        Unknown: it is none.
    """
    text = fields.get(name)
    if not isinstance(text, str):
        raise Unknown
    return text


class Given(Protocol):
    """A request's fields."""

    def get(self, name: str, /) -> Any:
        """The decoded value of one, None if absent."""


class ChatTemplate:
    """Turns chat requests into text.

    Args:
        files: the model's own templates and special tokens.
        template: in place of them, as vLLM's ``--chat-template``.

    Raises:
        ImportError: transformers or jinja2 is not installed.
    """

    def __init__(self, files: TokenizerFiles, template: str | None = None) -> None:
        from transformers.utils import chat_template_utils

        self._render = chat_template_utils.render_jinja_template
        self._files = files
        self._template = template

    def render(self, request: Given, *, sorted_calls: bool = True) -> tuple[str, bool]:
        """The prompt's text, and whether it is all: False if it ends where a picture or the like would come.

        Args:
            sorted_calls: the fields of tool calls are to come in the order of vLLM's protocol; else as given.

        Raises:
            Unknown: it can't be told, or vLLM would refuse the request.
            Exception: whatever the template raises for messages it doesn't like.
        """
        messages, tools = request.get("messages"), request.get("tools")
        if not isinstance(messages, list) or not messages or request.get("chat_template") is not None:
            raise Unknown
        tools = None if tools is None else [_tool(tool) for tool in tools]
        template = self._choose(tools)
        conversation, whole = _conversation(messages, content_format(template), sorted_calls)
        if any(message["role"] == "developer" for message in conversation) and not (
            '"developer"' in template or "'developer'" in template
        ):
            conversation = _one_system_message(conversation)
        arguments = self._arguments(request, template)
        if arguments["add_generation_prompt"] and arguments["continue_final_message"]:
            raise Unknown
        ((text,), _) = self._render(
            conversations=[conversation],
            tools=tools,
            chat_template=template,
            **self._files.special | arguments,
        )
        if whole:
            return text, True
        known, cut, _ = text.partition(_CUT)
        if not cut:
            raise Unknown
        return known, False

    def _choose(self, tools: list[Json] | None) -> str:
        named = self._files.templates
        found = self._template
        if found is None and tools is None:
            found = self._files.processor_template
        elif found is None:
            found = named.get("tool_use")
        found = found or named.get("default")
        if found is None:
            raise Unknown
        return found

    def _arguments(self, request: Given, template: str) -> Json:
        own: Json = request.get("chat_template_kwargs") or {}
        if own.keys() & _NOT_THE_CLIENTS:
            raise Unknown
        effort = request.get("reasoning_effort")
        more: Json = {
            "add_generation_prompt": _or(request.get("add_generation_prompt"), True),
            "continue_final_message": _or(request.get("continue_final_message"), False),
            "documents": request.get("documents"),
            "reasoning_effort": effort,
        }
        if effort is not None and "enable_thinking" not in own:
            more["enable_thinking"] = effort != "none"
        known = _ALWAYS | variables(template)
        # "auto" and null count as not given, wherever they stand.
        given = {name: value for name, value in (own | _given(more)).items() if name in known}
        return _given(given)


def _given(values: Json) -> Json:
    return {name: value for name, value in values.items() if value is not None and value != "auto"}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _conversation(messages: list[Json], form: Format, sorted_calls: bool) -> tuple[list[Json], bool]:
    """The messages as templates get them, and whether all of them is text."""
    found: list[Json] = []
    whole = True
    for message in messages:
        parts = [part for part in map(_part, _content(message)) if part is not None]
        if whole and any(part["type"] not in _TEXT_LIKE for part in parts):
            # vLLM puts placeholders before a message's text, templates put them where the client has them.
            whole = False
            parts.insert(0, {"type": "text", "text": _CUT})
        plain = message["role"] == "tool" and all(part["type"] == "text" for part in parts)
        if form == "string" or plain:
            texts = [part["text" if part["type"] == "text" else "name"] for part in parts if _textual(part)]
            found.append(_message(message, "\n".join(texts), sorted_calls))
        else:
            found.append(_message(message, parts, sorted_calls))
    return found, whole


def _textual(part: Json) -> bool:
    return part["type"] in _TEXT_LIKE


def _content(message: Json) -> list[Any]:
    content = message.get("content")
    parts: list[Any] = [content] if isinstance(content, str) else content or []
    if message["role"] != "system":
        return parts
    # vLLM drops this line of Claude Code's: it is another one in every request.
    return [rest for part in parts if (rest := _without_billing(part)) is not None]


def _without_billing(part: Any) -> Any:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not (isinstance(text, str) and text.startswith(_BILLING)):
        return part
    rest = text.partition("\n")[2]
    if not rest:
        return None
    return rest if isinstance(part, str) else {**part, "text": rest}


def _part(part: Any) -> Json | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        kind = next((name for name in _MEDIA if name in part), kind)
    extras = {name: value for name, value in part.items() if name not in _PART_FIELDS}
    if kind in _TEXTS:
        text = part.get(_TEXTS[kind])
        if text is None and kind in ("text", "refusal"):
            return None
        if not isinstance(text, str):
            raise Unknown
        return {"type": "text", "text": text, **extras}
    if kind == "tool_reference":
        return {"type": "tool_reference", "name": part["name"]}
    if kind not in _MEDIA:
        raise Unknown
    return {"type": _MEDIA[kind], **extras}


def _message(message: Json, content: str | list[Json], sorted_calls: bool) -> Json:
    role = message["role"]
    found: Json = {"role": role, "content": content}
    if role == "assistant":
        calls = message.get("tool_calls")
        if calls:
            found["tool_calls"] = [_call(call, sorted_calls) for call in calls]
        reasoning = _or(message.get("reasoning"), message.get("reasoning_content"))
        if reasoning is not None:
            found["reasoning"] = found["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        found["tool_call_id"] = message["tool_call_id"]
    for name in ("name", "task"):
        if isinstance(message.get(name), str):
            found[name] = message[name]
    if role == "developer":
        tools = message.get("tools")
        found["tools"] = tools and [
            _ordered(tool, ("function", "type"), function=_ordered(tool["function"], _FUNCTION))
            for tool in tools
        ]
    return found


def _call(call: Json, sorted_calls: bool) -> Json:
    function = call["function"]
    if call.get("type") != "function" or not isinstance(function["arguments"], str):
        raise Unknown
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        arguments = {}
    arguments = arguments if isinstance(arguments, dict) else {}
    if not sorted_calls:
        return {**call, "function": {**function, "arguments": arguments}}
    function = _ordered(function, ("arguments", "name"), arguments=arguments)
    return _ordered(call, ("id", "function", "type"), function=function)


def _tool(tool: Json) -> Json:
    """As pydantic writes vLLM's ChatCompletionToolsParam: templates print it, so the order counts."""
    function = tool["function"]
    late = _or(function.get("defer_loading"), tool.get("defer_loading"))
    described = {"name": function["name"], "description": None, "parameters": None}
    described |= {name: function[name] for name in ("description", "parameters") if name in function}
    if function.get("strict") is not None:
        described["strict"] = function["strict"]
    if late is not None:
        described["defer_loading"] = late
    found = {"type": "function", "function": described}
    if tool.get("defer_loading") is not None:
        found["defer_loading"] = tool["defer_loading"]
    return found


def _ordered(values: Json, first: tuple[str, ...], **instead: Any) -> Json:
    """In the order in which pydantic validates a typed dictionary: its own keys, then the others."""
    found = {name: values[name] for name in first if name in values}
    return {**found, **{name: value for name, value in values.items() if name not in first}, **instead}


def _one_system_message(conversation: list[Json]) -> list[Json]:
    """For templates that know no developers: their messages join the system's, at the front if they must."""
    found: list[Json] = []
    for message in conversation:
        if message["role"] == "developer":
            message = {**message, "role": "system"}
            message.pop("tools", None)
        found.append(message)
    if not any(message["role"] == "system" for message in found[1:]):
        return found
    texts = [_joined(message["content"]) for message in found if message["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in found if message["role"] != "system")]


def _joined(content: str | list[Json]) -> str:
    return (
        content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)
    )

"""A ``/v1/messages`` request (Anthropic's) as the chat that vLLM makes of it (its anthropic/serving.py).

Only what is plain: texts, thinking, tools and their results. The rest is not told.
"""

import json
from typing import Any

from mooncake_connector.scheduler.prompts.chat import Given, Json, Unknown, text_of

# Claude Code's; it is another one in every request.
_BILLING = "x-anthropic-billing-header"


def chat_of_messages(request: Given) -> Json:
    """The fields of the chat request that has the same prompt.

    Raises:
        Unknown: it can't be told.
    """
    messages: list[Json] = []
    if system := _system(request.get("system")):
        messages.append({"role": "system", "content": system})
    for message in request.get("messages"):
        # What becomes of a later system message depends on what vLLM finds out of the template.
        if message["role"] not in ("user", "assistant"):
            raise Unknown
        _add(messages, message["role"], message["content"])
    thinking, output = request.get("thinking") or {}, request.get("output_config") or {}
    # How little "disabled" is, vLLM tries out; formats are for templates of its own.
    if thinking.get("type") not in (None, "enabled", "adaptive") or output.get("format") is not None:
        raise Unknown
    tools = request.get("tools")
    return {
        "messages": messages,
        "tools": None if tools is None else [_tool(tool) for tool in tools],
        "reasoning_effort": output.get("effort"),
        "chat_template_kwargs": request.get("chat_template_kwargs"),
    }


def _system(system: Any) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    texts = [text_of(block, "text") for block in system if _kind(block, "text")]
    return "".join(text for text in texts if not text.startswith(_BILLING))


def _add(messages: list[Json], role: str, content: Any) -> None:
    """One message; the results of tools in it are messages of their own, before it."""
    if isinstance(content, str):
        messages.append({"role": role, "content": content})
        return
    found: Json = {"role": role}
    parts: list[Json] = []
    calls: list[Json] = []
    thoughts: list[str] = []
    for block in content:
        kind = block["type"]
        if kind == "text":
            if text := text_of(block, "text"):
                parts.append({"type": "text", "text": text})
        elif kind == "thinking":
            thoughts.append(text_of(block, "thinking"))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result" and role == "user":
            result, id = _result(block.get("content")), text_of(block, "tool_use_id")
            messages.append({"role": "tool", "tool_call_id": id, "content": result})
        elif kind != "redacted_thinking":
            raise Unknown
    if thoughts:
        found["reasoning"] = "".join(thoughts)
    if calls:
        found["tool_calls"] = calls
    if parts:
        found["content"] = parts[0]["text"] if len(parts) == 1 else parts
    if role == "assistant" and len(found) == 1:
        raise Unknown
    if role == "assistant" or "content" in found:
        messages.append(found)


def _call(block: Json) -> Json:
    given = block.get("input") or {}
    if not isinstance(given, dict) or not text_of(block, "id"):
        raise Unknown
    function = {"name": text_of(block, "name"), "arguments": json.dumps(given)}
    return {"id": block["id"], "type": "function", "function": function}


def _result(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(text_of(item, "text") for item in content if _kind(item, "text"))


def _tool(tool: Json) -> Json:
    schema: Json = tool["input_schema"]
    described = {
        "name": text_of(tool, "name"),
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        "strict": tool.get("strict"),
        "defer_loading": tool.get("defer_loading"),
    }
    return {"type": "function", "function": described}


def _kind(block: Json, kind: str) -> bool:
    """True; whatever is of another kind is not plain."""
    if block["type"] != kind:
        raise Unknown
    return True

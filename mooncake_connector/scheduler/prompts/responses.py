"""A ``/v1/responses`` request as the chat that vLLM makes of it (its openai/responses/utils.py).

Only what is plain: texts, function tools, and what a conversation has of them. The rest is not told.
"""

from typing import Any

from mooncake_connector.scheduler.prompts.chat import Given, Json, Unknown, text_of

_SAYS = frozenset({"user", "system", "developer"})
_UNFINISHED = ("in_progress", "incomplete")
_STATES = ("completed", *_UNFINISHED)
_TOOL = frozenset({"type", "name", "description", "parameters", "strict"})


def chat_of_response(request: Given) -> Json:
    """The fields of the chat request that has the same prompt, but for special tokens, which vLLM adds here.

    Raises:
        Unknown: it can't be told.
    """
    # What it goes on from is in an engine's memory; a template of the API's own vLLM refuses.
    if any(
        request.get(name) is not None
        for name in ("previous_response_id", "previous_input_messages", "prompt")
    ):
        raise Unknown
    # What of it fits, if it is to be truncated, only vLLM knows.
    if request.get("truncation") not in (None, "disabled"):
        raise Unknown
    messages: list[Json] = []
    instructions, said = request.get("instructions"), request.get("input")
    if instructions is not None and not isinstance(instructions, str):
        raise Unknown
    if instructions:
        messages.append({"role": "system", "content": instructions})
    unfinished = False
    if isinstance(said, str):
        messages.append({"role": "user", "content": said})
    elif isinstance(said, list) and said:
        for item in said:
            _add(messages, item)
        last = said[-1]
        unfinished = last.get("type", "message") == "message" and last.get("status") in _UNFINISHED
    else:
        raise Unknown
    tools = request.get("tools")
    return {
        "messages": messages,
        "tools": [_tool(tool) for tool in tools] if tools else None,
        "reasoning_effort": _effort(request.get("reasoning")),
        "chat_template_kwargs": request.get("chat_template_kwargs"),
        "add_generation_prompt": not unfinished,
        "continue_final_message": unfinished,
    }


def _add(messages: list[Json], item: Any) -> None:
    """What vLLM makes of one item: a message of its own, or a field of the assistant's message before it."""
    if not isinstance(item, dict):
        raise Unknown
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "function_call":
        _only(item, "type", "id", "status", "call_id", "name", "arguments")
        function = {"name": text_of(item, "name"), "arguments": text_of(item, "arguments")}
        call = {"id": text_of(item, "call_id"), "function": function, "type": "function"}
        before = messages[-1] if messages else {}
        if before.get("role") == "assistant":
            before.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "function_call_output":
        _only(item, "type", "id", "status", "call_id", "output")
        content, call_id = text_of(item, "output"), text_of(item, "call_id")
        messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
    elif kind == "reasoning":
        _of_assistant(messages, "reasoning", _reasoning(item))
    elif kind == "message" and role == "assistant":
        _of_assistant(messages, "content", _answer(item))
    elif kind == "message" and role in _SAYS:
        _only(item, "type", "role", "content")
        messages.append({"role": role, "content": _parts(item.get("content"))})
    else:
        raise Unknown


def _of_assistant(messages: list[Json], name: str, text: str) -> None:
    before = messages[-1] if messages else {}
    if before.get("role") == "assistant" and before.get(name) is None:
        before[name] = text
    else:
        messages.append({"role": "assistant", name: text})


def _answer(item: Json) -> str:
    content = item.get("content")
    if isinstance(content, str):
        _only(item, "type", "role", "content")
        return content
    # Without its type it is no answer of vLLM's to vLLM.
    if "type" not in item or not isinstance(content, list) or not content:
        raise Unknown
    _only(item, "type", "role", "content", "id", "status")
    if not isinstance(item.get("id", ""), str) or item.get("status", "completed") not in _STATES:
        raise Unknown
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "output_text" or part.get("annotations"):
            raise Unknown
        _only(part, "type", "text", "annotations", "logprobs")
        text_of(part, "text")
        if part.get("logprobs"):
            raise Unknown
    # vLLM leaves out those that follow.
    return text_of(content[0], "text")


def _reasoning(item: Json) -> str:
    _only(item, "type", "id", "summary", "content")
    content = item.get("content")
    if not isinstance(item.get("summary"), list) or not isinstance(content, list) or not content:
        raise Unknown
    if item["summary"] or any(part.get("type") != "reasoning_text" for part in content):
        raise Unknown
    return text_of(content[0], "text")


def _parts(content: Any) -> str | list[Json]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Unknown
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "input_text":
            raise Unknown
        _only(part, "type", "text")
        text_of(part, "text")
    return content


def _tool(tool: Any) -> Json:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise Unknown
    _only(tool, *_TOOL)
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


def _effort(reasoning: Any) -> str | None:
    if reasoning is None:
        return None
    effort = reasoning.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise Unknown
    return effort


def _only(item: Json, *known: str) -> None:
    """Other fields might mean something, or make it something else to pydantic."""
    if not item.keys() <= set(known):
        raise Unknown

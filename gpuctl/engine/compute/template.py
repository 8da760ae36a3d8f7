"""Renders a conversation into a prompt by the model's own chat template, tools included.

Owns: the sandboxed Jinja environment and the fallback for templates that know no tools, which asks for calls in the
form tool_calls.py reads. Must not: tokenize or hold conversations. Rendering is a pure function of the messages, so a
longer conversation renders to a text that begins with the shorter one's: that is what lets the engine reuse KV.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ModelError, RequestError

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TOOL_PREAMBLE = """You may call one or more functions. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
To call one, answer with a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": "function-name", "arguments": {{}}}}
</tool_call>"""

Message = Mapping[str, Any]


class ChatTemplate:
    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        """`source`: the GGUF's tokenizer.chat_template; None falls back to ChatML."""
        source = source or CHATML
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from None
        self._special = {"bos_token": bos, "eos_token": eos}
        self._knows_tools = "tools" in source

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt, ending with the assistant's header. Raises RequestError where the template refuses."""
        plain = [_plain(message, keep_calls=self._knows_tools) for message in messages]
        if tools and not self._knows_tools:
            plain = _with_tool_preamble(plain, tools)
        try:
            return self._template.render(
                messages=plain,
                tools=list(tools) or None,
                add_generation_prompt=True,
                **self._special,
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"messages: the model's chat template refuses them: {error}", param="messages") from None


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _plain(message: Message, *, keep_calls: bool) -> dict[str, Any]:
    """One message as a template expects it: content as a string, tool calls as text where the template knows none."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    plain: dict[str, Any] = {"role": message["role"], "content": content or ""}
    for key in ("name", "tool_call_id"):
        if key in message:
            plain[key] = message[key]
    if calls := message.get("tool_calls"):
        if keep_calls:
            plain["tool_calls"] = calls
        else:
            functions = [call["function"] for call in calls if "function" in call]
            plain["content"] += "".join(
                f'<tool_call>\n{{"name": {json.dumps(f["name"])}, "arguments": {f["arguments"]}}}\n</tool_call>'
                for f in functions
            )
    return plain


def _with_tool_preamble(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    preamble = _TOOL_PREAMBLE.format(tools="\n".join(json.dumps(tool) for tool in tools))
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{preamble}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": preamble}, *messages]

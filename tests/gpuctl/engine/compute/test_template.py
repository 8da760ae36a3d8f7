"""Chat templates: conversations and tools as text, and templates that refuse or are broken."""

from __future__ import annotations

import pytest
from equipoise.gpuctl.engine.compute.template import ChatTemplate
from equipoise.gpuctl.engine.errors import ModelError, RequestError


def test_a_longer_conversation_renders_to_a_text_that_begins_with_the_shorter():
    template = ChatTemplate(None)
    messages = [{"role": "user", "content": "hi"}]
    first = template.render(messages)
    answer = "hello<|im_end|>"
    messages += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    assert template.render(messages).startswith(first + answer)


def test_a_template_that_knows_no_tools_gets_them_as_a_system_message():
    tools = [{"type": "function", "function": {"name": "run", "parameters": {}}}]
    text = ChatTemplate(None).render([{"role": "user", "content": "hi"}], tools)
    assert '"name": "run"' in text
    assert text.startswith("<|im_start|>system")


def test_a_template_that_refuses_names_the_messages():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render([{"role": "user", "content": "hi"}])


def test_a_template_cannot_reach_into_python():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError):
        template.render([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_a_model_error():
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate("{% for %}")

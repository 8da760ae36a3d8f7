"""The OpenAI wire format: JSON bodies in, TurnRequests out; turn events in, JSON objects out.

Owns: which fields are understood, their ranges, and the error each bad one gets. Must not: do I/O (http.py does).
Unknown fields are ignored, as clients send new ones all the time; a known field with a bad value is an error, and so is
one that asks for what this engine does not do.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....policies.accounting import SessionCost, TurnCost
from ..compute.language_model import LanguageModel
from ..compute.tool_calls import ToolCall, call_id
from ..errors import RequestError
from ..schedule.sequence import (
    FinishReason,
    SamplingParams,
    SessionId,
    Slo,
    TenantId,
    TokenLogprob,
    TurnFinished,
    TurnRequest,
)
from .output_format import OutputFormat, output_format

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
_LARGEST_INT32 = 2**31 - 1
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, from the headers."""

    tenant_id: TenantId
    session_id: SessionId | None
    """None: the client names no conversation; the engine finds the one its prompt continues."""
    peer_port: int | None
    peer_address: str | None
    awaits_tool: bool
    slo: Slo


@dataclass(frozen=True, slots=True)
class Ask:
    """A parsed request."""

    turn: TurnRequest
    stream: bool
    stream_usage: bool
    chat: bool
    one_call: bool
    """Of several tool calls only the first is handed on: `parallel_tool_calls` is false."""


def parse_chat(body: Json, caller: Caller, model: LanguageModel) -> Ask:
    """A /v1/chat/completions body. Raises RequestError naming the field."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: give a list of at least one message", param="messages")
    for index, message in enumerate(messages):
        _check_message(index, message)
    for key in ("functions", "function_call"):
        if body.get(key) is not None:
            raise RequestError(f"{key}: no longer OpenAI's way: give tools and tool_choice", param=key)
    if body.get("modalities") not in (None, ["text"]) or body.get("audio") is not None:
        raise RequestError("modalities: this model writes text only", param="modalities")
    form = output_format(body, model)
    prompt = model.chat_template.render(messages, form.tools)
    top = _integer(body, "top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    wanted = _flag(body, "logprobs")
    if top is not None and not wanted:
        raise RequestError("top_logprobs: give logprobs: true, too", param="top_logprobs")
    return _ask(body, caller, prompt, form, chat=True, logprobs=(top or 0) if wanted else None)


def parse_completion(body: Json, caller: Caller, model: LanguageModel) -> Ask:
    """A /v1/completions body. Raises RequestError naming the field."""
    if _flag(body, "echo"):
        raise RequestError("echo: the prompt is not given back", param="echo")
    if body.get("suffix"):
        raise RequestError("suffix: this engine does not fill in the middle", param="suffix")
    if _integer(body, "best_of", 1, 1, None) != 1:
        raise RequestError("best_of: this engine gives one choice a request", param="best_of")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt: give one non-empty string", param="prompt")
    logprobs = _integer(body, "logprobs", None, 0, MAX_TOP_LOGPROBS)
    form = output_format({**body, "tools": None, "tool_choice": None}, model)
    return _ask(body, caller, prompt, form, chat=False, logprobs=logprobs)


def _ask(body: Json, caller: Caller, prompt: str, form: OutputFormat, *, chat: bool, logprobs: int | None) -> Ask:
    if _integer(body, "n", 1, 1, None) != 1:
        raise RequestError("n: this engine gives one choice a request", param="n")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    options = body.get("stream_options")
    turn = TurnRequest(
        session_id=caller.session_id or SessionId(f"anonymous-{uuid.uuid4().hex}"),
        tenant_id=caller.tenant_id,
        prompt=prompt,
        max_tokens=_integer(body, limit, None, 1, None),
        stop=_stop(body),
        sampling=SamplingParams(
            temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
            top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
            top_k=_integer(body, "top_k", 0, 0, _LARGEST_INT32) or 0,
            min_p=_number(body, "min_p", 0.0, 0.0, 1.0),
            seed=_integer(body, "seed", None, None, None),
            logit_bias=_logit_bias(body),
            frequency_penalty=_number(body, "frequency_penalty", 0.0, -2.0, 2.0),
            presence_penalty=_number(body, "presence_penalty", 0.0, -2.0, 2.0),
            constraint=form.constraint,
            logprobs=logprobs,
        ),
        slo=caller.slo,
        anonymous=caller.session_id is None,
        peer_port=caller.peer_port,
        peer_address=caller.peer_address,
        may_call_tools=bool(form.tools),
        awaits_tool=caller.awaits_tool,
        ignore_end_of_text=body.get("ignore_eos") is True,
    )
    return Ask(
        turn=turn,
        stream=_flag(body, "stream"),
        stream_usage=isinstance(options, Mapping) and options.get("include_usage") is True,
        chat=chat,
        one_call=body.get("parallel_tool_calls") is False,
    )


def _check_message(index: int, message: object) -> None:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where}: give an object with a role", param=where)
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise RequestError(f"{where}.content: give a string or a list of text parts", param=where)
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f"{where}.content: this model reads text parts only", param=where)
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
        raise RequestError(
            f"{where}.tool_calls: give a list of {{id, type, function: {{name, arguments}}}}, arguments as text",
            param=where,
        )


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return False
    return isinstance(function.get("name"), str) and isinstance(function.get("arguments"), str)


def _flag(body: Json, key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{key}: {value!r}: give true or false", param=key)
    return value is True


def _number(body: Json, key: str, default: float, low: float, high: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{key}: {value!r}: give a number from {low:g} to {high:g}", param=key)
    return float(value)


def _integer(body: Json, key: str, default: int | None, low: int | None, high: int | None) -> int | None:
    value = body.get(key)
    if value is None or (key == "logprobs" and value is False):
        return default
    outside = isinstance(value, bool) or not isinstance(value, int)
    if outside or (low is not None and value < low) or (high is not None and value > high):
        span = f"{'' if low is None else low} to {'' if high is None else high}".strip()
        raise RequestError(f"{key}: {value!r}: give an integer, {span}", param=key)
    return int(value)


def _stop(body: Json) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings) or len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: give a string or up to {MAX_STOP_STRINGS} of them", param="stop")
    return tuple(strings)


def _logit_bias(body: Json) -> tuple[tuple[int, float], ...]:
    bias = body.get("logit_bias")
    if bias is None:
        return ()
    try:
        biases = tuple((int(token), float(value)) for token, value in bias.items())
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise RequestError("logit_bias: give an object of token id to number", param="logit_bias") from None
    if not all(0 <= token <= _LARGEST_INT32 and -100 <= value <= 100 for token, value in biases):
        raise RequestError("logit_bias: give token ids from 0 and numbers from -100 to 100", param="logit_bias")
    return biases


# Answers


class Answer:
    """Builds the objects of one answer; all of them carry its id, time and model."""

    def __init__(self, model_name: str, ask: Ask, session_id: SessionId, turn_id: str) -> None:
        """`session_id`: where the turn goes on, which for one that names none the engine finds."""
        self._turn_id = turn_id
        self._chat = chat = ask.chat
        self._one_call = ask.one_call
        self._called_count = 0
        self._offset_characters = 0
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": model_name,
        }
        self._session_id = session_id

    def whole(self, text: str, calls: Sequence[ToolCall], logprobs: Json | None, end: TurnFinished) -> Json:
        reason = _finish(end.reason)
        if self._chat:
            message: Json = {"role": "assistant", "content": text}
            if calls:
                message["content"] = text or None
                message["tool_calls"] = [
                    self._call(call, number) for number, call in enumerate(calls[: 1 if self._one_call else None])
                ]
            choice: Json = {"index": 0, "message": message, "finish_reason": reason, "logprobs": logprobs}
            kind = "chat.completion"
        else:
            choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}
            kind = "text_completion"
        return {**self._base, "object": kind, "choices": [choice], "usage": usage(end), "equipoise": self._own(end)}

    def opening(self) -> Json:
        return self._chunk({"role": "assistant", "content": ""} if self._chat else None, None, "")

    def piece(self, text: str, logprobs: Json | None) -> Json:
        return self._chunk({"content": text}, None, text, logprobs)

    def calls(self, calls: Sequence[ToolCall]) -> list[Json]:
        """A chunk for each call to be handed on."""
        chunks = []
        for call in calls:
            if not (self._one_call and self._called_count):
                chunks.append(
                    self._chunk(
                        {"tool_calls": [{"index": self._called_count, **self._call(call, self._called_count)}]},
                        None,
                        "",
                    )
                )
                self._called_count += 1
        return chunks

    def _call(self, call: ToolCall, number: int) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": call_id(self._turn_id, number), "type": "function", "function": function}

    def closing(self, end: TurnFinished) -> Json:
        chunk = self._chunk({}, _finish(end.reason), "")
        chunk["equipoise"] = self._own(end)
        return chunk

    def usage_chunk(self, end: TurnFinished) -> Json:
        return {**self._chunk({}, None, ""), "choices": [], "usage": usage(end)}

    def _chunk(self, delta: Json | None, reason: str | None, text: str, logprobs: Json | None = None) -> Json:
        choice: Json = {"index": 0, "finish_reason": reason, "logprobs": logprobs}
        if self._chat:
            choice["delta"] = delta or {}
        else:
            choice["text"] = text
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice]}

    def logprobs(self, model: LanguageModel, tokens: Sequence[TokenLogprob]) -> Json | None:
        """Of the next tokens of the answer; None where there are none."""
        if not tokens:
            return None

        def entry(token: int, logprob: float) -> Json:
            piece = model.piece(token, special=True)
            return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}

        if self._chat:
            content = [{**entry(t.token, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens]
            return {"content": content, "refusal": None}
        texts = [entry(t.token, t.logprob)["token"] for t in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset_characters)
            self._offset_characters += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{entry(*pair)["token"]: pair[1] for pair in t.top} for t in tokens],
            "text_offset": offsets,
        }

    def _own(self, end: TurnFinished) -> Json:
        return {
            "session": self._session_id,
            "recomputed_tokens": end.recomputed_tokens,
            "queued_ms": round(end.queued_ns / 1e6, 3),
            "engine": end.engine_id,
            "ttft_ms": None if end.ttft_ns is None else round(end.ttft_ns / 1e6, 3),
            **_cost(end.cost),
            "session_cost": {"turns": end.session_cost.turn_count, **_cost(end.session_cost)},
        }


def _cost(cost: TurnCost | SessionCost) -> Json:
    """null: not known, or not measured."""
    return {
        "pte": _rounded(cost.pte),
        "pte_wasted": _rounded(cost.wasted_pte),
        "energy_joules": _rounded(cost.energy_joules),
        "slowdown_ratio": _rounded(cost.slowdown_ratio),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def usage(end: TurnFinished) -> Json:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.output_tokens,
        "total_tokens": end.prompt_tokens + end.output_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def error_json(error: RequestError) -> Json:
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}


def models_json(model: LanguageModel, loaded_at: int, context_tokens: int) -> Json:
    entry = {
        "id": model.name,
        "object": "model",
        "created": loaded_at,
        "owned_by": "equipoise",
        "context_length": context_tokens,
    }
    return {"object": "list", "data": [entry]}


def sse(data: Json | str) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _finish(reason: FinishReason) -> str:
    return {
        FinishReason.STOP: "stop",
        FinishReason.LENGTH: "length",
        FinishReason.TOOL_CALLS: "tool_calls",
        FinishReason.CANCELLED: "stop",
        FinishReason.ERROR: "error",
    }[reason]

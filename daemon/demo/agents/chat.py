"""One turn with the engine over HTTP, streamed, timed from the outside.

Owns the client's half of `/v1/chat/completions`. Standard library only: an agent must start fast and stay small.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

_BUSY = (429, 503)


class ChatError(Exception):
    """The engine could not be asked, or refused: one line with its address and the reason."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What came back. Token counts are the engine's; None where it does not say."""

    answer: str
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    ttft_ns: int
    """From sending the request to the first piece of text."""
    duration_ns: int


def ask(
    engine_url: str,
    *,
    session: str,
    tenant: str,
    messages: Sequence[Message],
    max_tokens: int,
    awaits_tool: bool = False,
    timeout_s: float = 120.0,
) -> Turn:
    """Ask for the next message of a conversation. `awaits_tool`: a tool call will follow, so the KV is wanted again.

    Waits and asks again while the engine is busy (429, 503), within `timeout_s`; raises ChatError for everything else.
    """
    give_up = time.monotonic() + timeout_s
    body = json.dumps(
        {
            "model": "default",
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    headers = {"Content-Type": "application/json", "X-Equipoise-Session": session, "X-Equipoise-Tenant": tenant}
    if awaits_tool:
        headers["X-Equipoise-Awaits-Tool"] = "1"
    address = urlsplit(engine_url)
    while True:
        begin = time.monotonic_ns()
        connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=timeout_s)
        try:
            connection.request("POST", f"{address.path.rstrip('/')}/v1/chat/completions", body, headers)
            response = connection.getresponse()
            if response.status == 200:
                return _read_stream(response, begin)
            reason = response.read(2000).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"{engine_url}: the engine does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()
        wait_s = _seconds(response.headers.get("Retry-After"))
        if response.status not in _BUSY or time.monotonic() + wait_s > give_up:
            raise ChatError(f"{engine_url}: HTTP {response.status}: {reason}")
        time.sleep(wait_s)


def _seconds(retry_after: str | None) -> float:
    try:
        return min(10.0, max(0.2, float(retry_after or 1)))
    except ValueError:
        return 1.0


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, object]]:
    """The JSON of each server-sent event, until [DONE] or the end of the stream."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)


def _read_stream(response: http.client.HTTPResponse, begin_ns: int) -> Turn:
    pieces: list[str] = []
    first_ns: int | None = None
    usage: dict[str, object] = {}
    for event in _events(response):
        if error := event.get("error"):
            raise ChatError(f"the engine broke off: {error}")
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if text := (choice.get("delta") or {}).get("content"):
                first_ns = first_ns or time.monotonic_ns()
                pieces.append(text)
        if isinstance(told := event.get("usage"), dict):
            usage = told
    end_ns = time.monotonic_ns()
    details = usage.get("prompt_tokens_details")
    return Turn(
        answer="".join(pieces),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        output_tokens=_count(usage.get("completion_tokens")),
        ttft_ns=(first_ns or end_ns) - begin_ns,
        duration_ns=end_ns - begin_ns,
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None

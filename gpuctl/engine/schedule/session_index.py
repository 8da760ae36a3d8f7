"""Finds the conversation that an unnamed prompt continues, so that plain OpenAI clients keep their KV across turns.

Owns: the index of idle anonymous sessions by their text. Pure. Must not: keep sessions alive, or touch KV.

A session matches where its whole text, at its last turn's end, begins the prompt (the rule of conversation.py, which
then lets its own tokens stand). The longest wins; among equal texts the one used last. A prompt that departs earlier
continues nobody and so destroys nothing: what it has in common it gets by prefix sharing. Only sessions that no client
has named are found: a named one is its client's to continue. A turn under way takes its session out of the index, so
two clients with the same conversation get two sessions.

Cost: texts are cut into blocks and each session is filed under the chained hash of its full blocks, then under the rest
of its text. A look-up hashes the prompt once and goes through its blocks from the last on, whatever number of sessions
there is: about 40 us for 10,000 characters. Where a session's text is None (its output was no clean UTF-8), its tokens
cannot be a prefix of any prompt's, as a prompt is clean UTF-8.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from .sequence import Session, SessionId, TenantId, TurnRequest

_BLOCK_CHARACTERS = 64
_Key = tuple[TenantId, int]


class SessionIndex:
    def __init__(self) -> None:
        # Filed under the hash of the full blocks, then the rest; the sessions in order of use, the last used last.
        self._files: dict[_Key, dict[str, dict[SessionId, None]]] = {}
        self._filed: dict[SessionId, tuple[_Key, str]] = {}

    def __contains__(self, session_id: SessionId) -> bool:
        return session_id in self._filed

    def __len__(self) -> int:
        return len(self._filed)

    def add(self, session: Session) -> None:
        """File the session under its text as of now, as the one used last. A no-op without a text."""
        self.remove(session.id)
        text = session.text
        if not text:
            return
        key = (session.tenant_id, _chain(text)[-1])
        self._files.setdefault(key, {}).setdefault(_rest(text), {})[session.id] = None
        self._filed[session.id] = (key, text)

    def remove(self, session_id: SessionId) -> None:
        """Safe where it is not filed."""
        if (filed := self._filed.pop(session_id, None)) is None:
            return
        key, text = filed
        rests = self._files[key]
        del rests[_rest(text)][session_id]
        if not rests[_rest(text)]:
            del rests[_rest(text)]
        if not rests:
            del self._files[key]

    def named(self, request: TurnRequest, known: Container[SessionId], *, keep: bool) -> TurnRequest:
        """The request with the session it goes on with. Where it names none and none is found, one begins under the
        name it brings: `keep`, to be found again; else for this turn only. `known`: those not forgotten meanwhile."""
        if not request.anonymous:
            return request
        if not keep:
            return replace(request, anonymous=False, ephemeral=True)
        found = self.find(request.tenant_id, request.prompt)
        return request if found is None or found not in known else replace(request, session_id=found)

    def find(self, tenant_id: TenantId, prompt: str) -> SessionId | None:
        """The tenant's session with the longest text that begins `prompt`."""
        chain = _chain(prompt)
        for full_blocks in range(len(chain) - 1, -1, -1):
            rests = self._files.get((tenant_id, chain[full_blocks]))
            if rests is None:
                continue
            start = full_blocks * _BLOCK_CHARACTERS
            window = prompt[start : start + _BLOCK_CHARACTERS - 1]
            for length in range(len(window), -1, -1):
                for session_id in reversed(rests.get(window[:length], {})):
                    # Hashes can collide; a wrong match would cost another conversation its KV.
                    if prompt.startswith(self._filed[session_id][1]):
                        return session_id
        return None


def _chain(text: str) -> list[int]:
    """Entry n: a hash of the first n full blocks."""
    keys = [0]
    for start in range(0, len(text) - _BLOCK_CHARACTERS + 1, _BLOCK_CHARACTERS):
        keys.append(hash((keys[-1], text[start : start + _BLOCK_CHARACTERS])))
    return keys


def _rest(text: str) -> str:
    return text[len(text) - len(text) % _BLOCK_CHARACTERS :]

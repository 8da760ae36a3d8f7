"""A scripted model: an HTTP endpoint on loopback that asks for shell commands, and remembers what it asked for.

Owns the conversations and their truth: which tool call was asked for when, when its result came back, which ids went
over the wire, which process was at the other end. Stateless towards the client (what comes next follows from the
results in its history), so a request that is sent again gets the same answer.

usage: python -m equipoise.tests.agents.model [--port N] [--script NAME] [--log FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from equipoise.tests.agents.dialects import (
    Answer,
    Asking,
    Dialect,
    Json,
    Request,
    Result,
    ShellTool,
    dialect_of,
    token_count,
)
from equipoise.tests.agents.script import SCRIPTS, TEN, Command, Script

_TELLING = re.compile(r"session|thread|conversation|turn|window|request-id|prompt-id|affinity|x-client", re.IGNORECASE)
"""Headers that may name a conversation."""
_BODY_KEYS = ("metadata", "prompt_cache_key", "previous_response_id", "user", "client_metadata", "session_id", "labels")
_SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "x-session-id", "session_id", "conversation_id")
_PREFIX = re.compile(r"call_eq(\d+)_")


@dataclass(slots=True)
class AskedCall:
    """A tool call that the model asked for. Times: CLOCK_MONOTONIC, ns, as in our daemon."""

    call_id: str
    number: int
    turn: int
    command: Command
    asked_ns: int
    answered_ns: int | None = None
    """None: no result came back."""
    result: str = ""
    peer_port: int = 0
    peer_pids: tuple[int, ...] = ()
    """Who held the other end of the connection, then its ancestors; () where it was not found out."""

    def as_json(self) -> Json:
        return {
            "call_id": self.call_id,
            "number": self.number,
            "turn": self.turn,
            "name": self.command.name,
            "command": self.command.text,
            "asked_ns": self.asked_ns,
            "answered_ns": self.answered_ns,
            "peer_port": self.peer_port,
            "peer_pids": self.peer_pids,
            "result": self.result,
        }


@dataclass(slots=True)
class Conversation:
    """One conversation of one agent."""

    number: int
    opening: str
    script: Script
    dialect: str
    session: str
    """What its client calls it on the wire; "" where it does not."""
    wire: dict[str, set[str]] = field(default_factory=dict)
    """Every id-like header and field, with the values it had."""
    calls: list[AskedCall] = field(default_factory=list)
    begun_ns: int = 0
    ended_ns: int | None = None
    """When the last word was said."""
    side_requests: int = 0

    @property
    def complete(self) -> bool:
        """Every call of the script was asked for, and all that can have a result have one."""
        return len(self.calls) == len(self.script.commands) and all(
            call.answered_ns or call.command.ends_agent for call in self.calls
        )


@dataclass(frozen=True, slots=True)
class _Peer:
    port: int
    pids: tuple[int, ...]


class Book:
    """All conversations. Safe to be used from several threads."""

    def __init__(self, script: Script, note: Callable[[Json], None]) -> None:
        self.script = script
        self.conversations: list[Conversation] = []
        self.on_turn: Callable[[Conversation, Answer, int], None] = lambda conversation, answer, peer_port: None
        """Told of each turn of a client that has tools, before its answer leaves."""
        self._note = note
        self._lock = threading.Lock()
        self._scripts: dict[str, Script] = {}
        self._in_words: set[str] = set()

    def expect(self, label: str, script: Script, *, in_words: bool = False) -> None:
        """The conversation whose opening contains `label` follows this script.

        With `in_words` its client has no tools: a command is a fenced block in the text, and its result a message of
        the user that begins "Output from" (aider).
        """
        self._scripts[label] = script
        if in_words:
            self._in_words.add(label)

    def answer(self, request: Request, dialect: str, wire: dict[str, str], peer: _Peer) -> Answer:
        label = next((label for label in self._in_words if any(label in text for text in request.said)), None)
        if label is not None:
            results = tuple(Result("", text) for text in request.said if text.startswith("Output from "))
            request = replace(request, opening=label, shell=ShellTool("words", {}), results=results)
        answer = self._answer(request, dialect, wire, peer)
        if label is not None and answer.asks:
            return Answer("\n".join(f"```bash\n{asking.command}\n```" for asking in answer.asks))
        return answer

    def _answer(self, request: Request, dialect: str, wire: dict[str, str], peer: _Peer) -> Answer:
        with self._lock:
            session = next((wire[name] for name in _SESSION_HEADERS if name in wire), "")
            conversation = self._find(request, session)
            if request.shell is None:
                if conversation is not None:
                    conversation.side_requests += 1
                return Answer("A short title")
            if conversation is None:
                conversation = self._open(request, dialect, session)
            for name, value in wire.items():
                conversation.wire.setdefault(name, set()).add(value)
            answer = self._next(conversation, request, peer)
            if not any(label in conversation.opening for label in self._in_words):
                self.on_turn(conversation, answer, peer.port)
            return answer

    def _find(self, request: Request, session: str) -> Conversation | None:
        for result in request.results:
            if match := _PREFIX.match(result.call_id):
                return self.conversations[int(match[1])]
        for conversation in self.conversations:
            if conversation.session == session and conversation.opening == request.opening:
                return conversation
        return None

    def _open(self, request: Request, dialect: str, session: str) -> Conversation:
        script = next((s for label, s in self._scripts.items() if label in request.opening), self.script)
        conversation = Conversation(len(self.conversations), request.opening, script, dialect, session)
        conversation.begun_ns = time.monotonic_ns()
        self.conversations.append(conversation)
        self._note({"event": "conversation", "number": conversation.number, "session": session, "dialect": dialect})
        return conversation

    def _next(self, conversation: Conversation, request: Request, peer: _Peer) -> Answer:
        now = time.monotonic_ns()
        by_id = {call.call_id: call for call in conversation.calls}
        named = [r for r in request.results if r.call_id in by_id]
        # A client that makes ids of its own reports in the order in which it was asked.
        pairs = [(by_id[r.call_id], r) for r in named] or list(zip(conversation.calls, request.results, strict=False))
        for call, result in pairs:
            if call.answered_ns is None:
                call.answered_ns, call.result = now, result.text[:2000]
                self._note({"event": "answered", "conversation": conversation.number, **call.as_json()})
        waiting = [call for call in conversation.calls if call.answered_ns is None]
        if waiting:  # it was sent again, or one by one
            return Answer("", tuple(Asking(call.call_id, call.command.text) for call in waiting))
        turn = max((call.turn for call in conversation.calls), default=-1) + 1
        if turn >= len(conversation.script.turns):
            if conversation.ended_ns is None:
                conversation.ended_ns = now
                self._note({"event": "ended", "conversation": conversation.number, "at_ns": now})
            return Answer(conversation.script.last_word)
        for command in conversation.script.turns[turn]:
            number = len(conversation.calls)
            call = AskedCall(f"call_eq{conversation.number}_{number}", number, turn, command, now)
            call.peer_port, call.peer_pids = peer.port, peer.pids
            conversation.calls.append(call)
            self._note({"event": "asked", "conversation": conversation.number, **call.as_json()})
        new = [call for call in conversation.calls if call.turn == turn]
        return Answer("", tuple(Asking(call.call_id, call.command.text) for call in new))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.peer = _Peer(self.client_address[1], _owner(self.client_address[1]))

    def do_HEAD(self) -> None:
        self._seen(None)
        self._send({}, body=False)

    def do_GET(self) -> None:
        self._seen(None)
        if "/models" in self.path:
            models = [{"id": "m", "object": "model", "created": 1, "owned_by": "script"}]
            self._send({"object": "list", "data": models, "models": []})
        else:
            self._send({"error": {"message": "not found", "type": "not_found"}}, 404)

    def do_POST(self) -> None:
        body = self._body()
        self._seen(body)
        counted, dialect = token_count(self.path), dialect_of(self.path)
        if counted is not None:
            self._send(counted)
        elif dialect is None or not isinstance(body, dict):
            self._send({"error": {"message": "not found", "type": "not_found"}}, 404)
        else:
            request = dialect.read(body, self.path)
            answer = self.server.book.answer(request, dialect.name, self._wire(body), self.peer)
            self._answer(dialect, request, answer)

    def _answer(self, dialect: Dialect, request: Request, answer: Answer) -> None:
        if not request.stream:
            self._send(dialect.whole(request, answer))
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for name, data in dialect.events(request, answer):
            text = data if isinstance(data, str) else json.dumps(data)
            chunk = (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
            raw = chunk.encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(raw), raw))
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, answer: Json, status: int = 200, *, body: bool = True) -> None:
        raw = json.dumps(answer).encode() if body else b""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _body(self) -> Any:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            raw = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                raw += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            return None

    def _wire(self, body: Json) -> dict[str, str]:
        found = {name.lower(): value for name, value in self.headers.items() if _TELLING.search(name)}
        for key in _BODY_KEYS:
            if key in body:
                value = body[key]
                found[f"body.{key}"] = value if isinstance(value, str) else json.dumps(value)
        return found

    def _seen(self, body: Any) -> None:
        self.server.note({
            "event": "request",
            "method": self.command,
            "path": self.path,
            "peer_port": self.peer.port,
            "peer_pids": self.peer.pids,
            "headers": dict(self.headers),
            "keys": sorted(body) if isinstance(body, dict) else None,
        })  # fmt: skip
        if self.server.bodies is not None and body is not None:
            self.server.bodies.append(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, book: Book, note: Callable[[Json], None]) -> None:
        self.book = book
        self.note = note
        self.bodies: list[Any] | None = None
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.note({"event": "error", "text": traceback.format_exc()})


class ScriptedModel:
    """The endpoint, in threads of this process. `close()` it; also a context manager."""

    def __init__(self, script: Script = TEN, log: Path | None = None, port: int = 0) -> None:
        self._log = log.open("a") if log is not None else None
        self._lock = threading.Lock()
        self.events: list[Json] = []
        """All that was noted, as in the log."""
        self.book = Book(script, self._note)
        self._server = _Server(port, self.book, self._note)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="model", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def conversations(self) -> list[Conversation]:
        return self.book.conversations

    def keep_bodies(self) -> list[Any]:
        """From now on keep every request's body in this list."""
        self._server.bodies = []
        return self._server.bodies

    def conversation(self, label: str) -> Conversation:
        """The one whose opening contains `label`."""
        found = [c for c in self.book.conversations if label in c.opening]
        assert len(found) == 1, f"{len(found)} conversations say {label!r}: {[c.opening[-80:] for c in found]}"
        return found[0]

    def all_said(self) -> bool:
        """Whether there was a conversation, and every one has heard its last word."""
        return bool(self.conversations) and all(conversation.ended_ns for conversation in self.conversations)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> ScriptedModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _note(self, what: Json) -> None:
        what = {"at_ns": time.monotonic_ns(), "at_s": time.time(), **what}
        with self._lock:
            self.events.append(what)
            if self._log is not None and not self._log.closed:
                self._log.write(json.dumps(what) + "\n")
                self._log.flush()


def _owner(port: int) -> tuple[int, ...]:
    """The process that holds the local port `port` of an established connection, then its ancestors."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp4"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return (connection.pid, *(parent.pid for parent in psutil.Process(connection.pid).parents()))
    return ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", choices=SCRIPTS, default="ten")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    with ScriptedModel(SCRIPTS[options.script], options.log, options.port) as model:
        print(model.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()

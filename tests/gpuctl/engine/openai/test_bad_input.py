"""What clients and disks do wrong, each beside a session that streams: it gets an error, or its work done another way,
and the other session's text comes out as if nothing had happened."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from equipoise.tests.gpuctl.engine.processes import EngineProcess, running

pytestmark = pytest.mark.engine

CLIENT_TIMEOUT_S = 2.0
# Split: what a session computes does not depend on its neighbours. No host tier: what idles goes to disk at once.
OPTIONS = (
    *("--ctx-mode", "split", "--slots", "8", "--slot-tokens", "512", "--kv-tokens", "4096", "--max-queued", "32"),
    *("--client-timeout-s", str(CLIENT_TIMEOUT_S), "--default-policy", "swap", "--host-bytes", "0"),
)
CHAT = "/v1/chat/completions"
FOX = [{"role": "user", "content": "Tell me of a fox."}]
ASK: dict[str, Any] = {"messages": FOX, "max_tokens": 8, "temperature": 0}
STEADY: dict[str, Any] = {**ASK, "max_tokens": 100, "stream": True, "ignore_eos": True}


def serving(folder: Path) -> contextlib.AbstractContextManager[EngineProcess]:
    return running(*OPTIONS, "--disk-bytes", "1GiB", "--disk-folder", str(folder))


@pytest.fixture(scope="module")
def swap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap")


@pytest.fixture(scope="module")
def engine(model: object, swap_folder: Path) -> Iterator[EngineProcess]:
    with serving(swap_folder) as process:
        yield process


class Steady(threading.Thread):
    """The session that must not notice."""

    def __init__(self, engine: EngineProcess) -> None:
        super().__init__()
        self._url = engine.url + CHAT
        self.began = threading.Event()
        self.text = ""
        self.reason: str | None = None
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=STEADY, timeout=120) as answer:
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                choice = json.loads(data)["choices"][0]
                self.text += choice["delta"].get("content") or ""
                self.reason = choice["finish_reason"]
                if self.text:
                    self.began.set()


@pytest.fixture(scope="module")
def undisturbed(engine: EngineProcess) -> str:
    steady = Steady(engine)
    steady.join()
    assert steady.reason == "length"
    return steady.text


@pytest.fixture
def beside(engine: EngineProcess, undisturbed: str) -> Iterator[None]:
    """The test's body runs while the steady session streams."""
    with beside_a_stream(engine, undisturbed):
        yield


@contextlib.contextmanager
def beside_a_stream(engine: EngineProcess, undisturbed: str) -> Iterator[Steady]:
    steady = Steady(engine)
    assert steady.began.wait(60)
    yield steady
    steady.join()
    assert (steady.text, steady.reason) == (undisturbed, "length")


class SharedStream:
    """A steady session for several short tests, and a new one where less than half of it is left."""

    def __init__(self, engine: EngineProcess, undisturbed: str) -> None:
        self._new = lambda: beside_a_stream(engine, undisturbed)
        self._half = len(undisturbed) // 2
        self._open = contextlib.ExitStack()
        self._steady: Steady | None = None

    def stream(self) -> None:
        if self._steady is None or len(self._steady.text) > self._half:
            self.close()
            self._steady = self._open.enter_context(self._new())

    def close(self) -> None:
        self._steady = None
        self._open.close()


@pytest.fixture(scope="class")
def shared_stream(engine: EngineProcess, undisturbed: str) -> Iterator[SharedStream]:
    shared = SharedStream(engine, undisturbed)
    yield shared
    shared.close()


def post(engine: EngineProcess, body: Any, session: str | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"X-Equipoise-Session": session} if session else {}
    return httpx.post(engine.url + CHAT, content=content, headers=headers, timeout=60)


def connect(engine: EngineProcess, receive_bytes: int | None = None) -> socket.socket:
    host, _, port = engine.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    return connection


def head(length: int) -> bytes:
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def everything_from(connection: socket.socket) -> bytes:
    """What comes until the other end closes, orderly or not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65536):
            received += more
    return received


def reset(connection: socket.socket) -> None:
    """Go away without a word: the other end sees a reset, not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def metric(engine: EngineProcess, name: str) -> float:
    page = httpx.get(f"{engine.url}/metrics", timeout=30).text
    found = re.search(rf"^equipoise_engine_{name} (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])


def until(met: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


# Requests

LONG = {"messages": [{"role": "user", "content": "a b c d " * 500}]}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}


class TestABadRequest:
    @pytest.mark.parametrize(
        ("body", "status", "word"),
        [
            ({**ASK, **LONG}, 400, "512"),
            (b'{"messages": [', 400, "not JSON"),
            (b"[" * 1_000_000, 400, "not JSON"),
            (b'{"messages": "\xff\xfe"}', 400, "UTF-8"),
            (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
            ({**ASK, "messages": [{"role": "user", "content": "\0 \U0001f98a \u202e <|im_end|>"}]}, 200, ""),
            (b"x" * (9 << 20), 413, "larger"),
            ({**ASK, "model": "gpt-9"}, 404, "gpt-9"),
            ({**ASK, "messages": [{"role": "tool", "tool_calls": [{}]}]}, 400, "tool_calls"),
            ({**ASK, "seed": 10**300}, 200, ""),
            ({**ASK, "max_tokens": 10**300, "stop": ["a", "e", "i"]}, 200, ""),
            ({**ASK, "logit_bias": {"99999999": 100}}, 200, ""),
            ({**ASK, "response_format": NO_SCHEMA}, 400, "not"),
            ({**ASK, "grammar": "%llguidance {}\nstart: start"}, 500, "grammar"),
            ({**ASK, "grammar": "%llguidance {}\nstart: " + '("a"|"") ' * 5000}, 500, "grammar"),
        ],
        ids=lambda value: repr(value)[:30] if isinstance(value, dict | bytes) else None,
    )
    def test_it_gets_its_answer(self, engine, shared_stream, body, status, word):
        shared_stream.stream()
        answer = post(engine, body)
        assert answer.status_code == status, answer.text[:300]
        if status != 200:
            assert word in answer.json()["error"]["message"]


# Clients that stall or vanish


@pytest.mark.parametrize("sent", [b"POST /v1/chat", head(500)[:-2], head(500), head(500) + b'{"messages": '])
def test_half_a_request_is_given_up_after_a_while(engine, beside, sent):
    with connect(engine) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        answer = everything_from(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"request_timeout" in answer
        assert CLIENT_TIMEOUT_S * 0.8 < time.monotonic() - began < CLIENT_TIMEOUT_S + 5


def test_a_connection_that_says_nothing_is_closed(engine, beside):
    with connect(engine) as connection:
        assert connection.recv(1) == b""


def test_the_next_request_on_a_connection_has_its_own_time(engine, beside):
    with connect(engine) as connection:
        for _ in range(4):
            time.sleep(CLIENT_TIMEOUT_S * 0.3)  # more than the time of one in all, far less each
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok\n"):
                answer += connection.recv(65536)
        connection.sendall(b"GET /heal")
        assert everything_from(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("close", [socket.socket.close, reset])
def test_a_client_that_vanishes_leaves_no_turn_behind(engine, beside, stream, close):
    body = json.dumps({**ASK, "max_tokens": 400, "stream": stream, "ignore_eos": True}).encode()
    connection = connect(engine)
    connection.sendall(head(len(body)) + body)
    until(lambda: metric(engine, "running_turns") == 2)
    close(connection)
    until(lambda: metric(engine, "running_turns") <= 1, 5)


def test_a_client_that_vanishes_while_it_sends_leaves_nothing(engine, beside):
    for sent in (b"POST", head(500), head(500) + b"{"):
        connection = connect(engine)
        connection.sendall(sent)
        reset(connection)


def test_a_client_that_reads_nothing_of_its_stream_is_cut_off(engine, beside):
    # Twenty alternatives a token: 3 KB each, so that the buffers between us are soon full.
    body = json.dumps({**ASK, "max_tokens": 450, "stream": True, "ignore_eos": True, "logprobs": True,
                       "top_logprobs": 20}).encode()  # fmt: skip
    with connect(engine, receive_bytes=4096) as connection:
        connection.sendall(head(len(body)) + body)
        until(lambda: metric(engine, "running_turns") == 2)
        until(lambda: metric(engine, "running_turns") == 0, 60)
        assert b"[DONE]" not in everything_from(connection)


# Many


def test_five_hundred_silent_connections_keep_nobody_out(engine, beside):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(engine)) for _ in range(500)]
        assert post(engine, ASK).status_code == 200
        for connection in silent:
            assert connection.recv(1) == b""


async def test_five_hundred_requests_at_once_are_answered_or_told_when_to_come_back(engine, beside):
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(base_url=engine.url, limits=limits, timeout=120) as many:
        body = {**ASK, "max_tokens": 2}
        same = {"X-Equipoise-Session": "all-of-one-session"}
        answers = await asyncio.gather(
            *(many.post(CHAT, json=body, headers=same if number % 2 else {}) for number in range(500))
        )
    statuses = collections.Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)


# Disks


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_foreign(path: Path) -> None:
    path.write_bytes(b"GGUF" + bytes(path.stat().st_size))


def damage_lengths(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40:48] = b"\xff" * 8  # the first record's size
    path.write_bytes(data)


def damage_replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_foreign, damage_lengths, Path.unlink, damage_replace]
)
def test_a_spoilt_swap_file_costs_its_session_a_recompute(engine, swap_folder, beside, damage, request):
    first, second = swapped_turn(engine, swap_folder, request.node.name, damage)
    assert first.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second.json()["equipoise"]["recomputed_tokens"] > 0


def test_a_whole_swap_file_is_read_back(engine, swap_folder, beside):
    _, second = swapped_turn(engine, swap_folder, "whole", lambda path: None)
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def swapped_turn(
    engine: EngineProcess, folder: Path, session: str, damage: Callable[[Path], None]
) -> tuple[httpx.Response, httpx.Response]:
    """Two turns of a session whose KV goes to disk between them; the second must say what it would say anyway."""
    before = set(folder.rglob("*.kv"))
    first = post(engine, ASK, session)
    until(lambda: bool(set(folder.rglob("*.kv")) - before))
    (path,) = set(folder.rglob("*.kv")) - before
    until(lambda: settled(path))
    damage(path)
    more = {
        "messages": [
            *FOX,
            {"role": "assistant", "content": first.json()["choices"][0]["message"]["content"]},
            {"role": "user", "content": "Go on."},
        ]
    }
    second = post(engine, {**ASK, **more}, session)
    anew = post(engine, {**ASK, **more})
    assert second.status_code == 200
    assert second.json()["choices"][0]["message"] == anew.json()["choices"][0]["message"]
    return first, second


def settled(path: Path) -> bool:
    """Written behind: wait until it no longer grows."""
    size = path.stat().st_size
    time.sleep(0.2)
    return size > 0 and path.stat().st_size == size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: less than the KV of a turn."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "equipoise-test", str(tmp_path)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_costs_a_session_a_recompute(small_disk, undisturbed):
    with serving(small_disk) as engine:
        steady = Steady(engine)
        assert steady.began.wait(30)
        first = post(engine, ASK, "s")
        assert first.status_code == 200
        until(lambda: metric(engine, "swap_failures_total") > 0)
        assert metric(engine, "disk_used_bytes") == 0
        assert not list(small_disk.rglob("*.kv")), "what was written of it is removed"
        second = post(engine, ASK, "s")
        assert second.json()["choices"][0]["message"] == first.json()["choices"][0]["message"]
        assert second.json()["equipoise"]["recomputed_tokens"] > 0
        steady.join()
        assert steady.text == undisturbed

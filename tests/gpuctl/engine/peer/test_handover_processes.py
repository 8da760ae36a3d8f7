"""Two engine processes on the real model: a streamed answer begun at one and finished at the other, or not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.api.v1 import peer_pb2_grpc
from equipoise.tests.gpuctl.engine.processes import EngineProcess, failing, running

pytestmark = pytest.mark.engine

ASK = [{"role": "user", "content": "Tell me a long story about a fox and a crow."}]
# What it answers is never a close call: computed again in larger batches, sums round differently, the text is the same.
COUNT = [{"role": "user", "content": "Count from 1 to 50, with commas."}]
GRAMMAR = '%llguidance {}\nstart: (/[a-z]+/ " ")+'


@dataclass
class Engine:
    process: EngineProcess
    peer: str


@dataclass
class Pair:
    """Engines `a` and `b`, made alike."""

    a: Engine
    b: Engine
    made: int = field(default=0)

    def session(self) -> str:
        self.made += 1
        return f"session-{self.made}"


def start_pair(stack: ExitStack, folder: Path, mode: str) -> Pair:
    engines = []
    for name in "ab":
        peer = f"unix:{folder}/{name}.sock"
        options = ("--ctx-mode", mode, "--kv-tokens", "2048", "--slots", "4", "--slot-tokens", "512", "--peer", peer)
        engines.append(Engine(stack.enter_context(running(*options)), peer))
    a, b = engines
    return Pair(a, b)


@pytest.fixture(scope="module", params=["unified", "split"])
def pair(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield start_pair(stack, tmp_path_factory.mktemp("peers"), request.param)


def hand_over(giver: Engine, session: str, taker: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "equipoise.gpuctl.engine", "hand-over", "--peer", giver.peer]
    command += ["--session", session, "--to", taker, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def hand_over_at_once(giver: Engine, session: str, taker: str) -> pb.HandOverResponse:
    """What the command asks for, without the second it takes to start: the answer must not end meanwhile."""
    with grpc.insecure_channel(giver.peer) as channel:
        request = pb.HandOverRequest(session_id=session, to=taker, timeout_ms=30_000)
        answer = peer_pb2_grpc.EnginePeerServiceStub(channel).HandOver(request, timeout=60)
    assert isinstance(answer, pb.HandOverResponse)
    return answer


@dataclass
class Answer:
    text: str = ""
    chunks: int = 0
    own: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None


class Stream(threading.Thread):
    """One streamed answer, read on a thread of its own."""

    def __init__(self, engine: Engine, session: str, messages: list[dict[str, str]] = ASK, **body: Any) -> None:
        super().__init__()
        self.answer = Answer()
        self.begun = threading.Event()
        self._url = engine.process.url
        self._session = session
        self._body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **body}
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self.error = error
        finally:
            self.begun.set()

    def _read(self) -> None:
        headers = {"X-Equipoise-Session": self._session}
        url = f"{self._url}/v1/chat/completions"
        with httpx.stream("POST", url, json=self._body, headers=headers, timeout=120) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if not line or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                self.answer.own.update(chunk.get("equipoise", {}))
                self.answer.usage.update(chunk.get("usage") or {})
                for choice in chunk["choices"]:
                    self.answer.text += choice["delta"].get("content") or ""
                    self.answer.chunks += bool(choice["delta"].get("content"))
                    self.answer.finish_reason = choice["finish_reason"] or self.answer.finish_reason
                    if self.answer.chunks == 15:
                        self.begun.set()

    def wait(self) -> Answer:
        self.join(timeout=120)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.answer


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "top_p": 0.95, "seed": 11},
    "grammar": {"temperature": 0.8, "seed": 12, "grammar": GRAMMAR},
}


# With one pool of cells, where a sequence lies can change how sums round: what is random is compared in split mode.
@pytest.mark.parametrize(
    ("pair", "sampling"),
    [("unified", "greedy"), ("split", "greedy"), ("split", "seeded"), ("split", "grammar")],
    indirect=["pair"],
)
def test_an_answer_handed_over_in_its_midst_is_the_undisturbed_one_in_one_stream(pair, sampling):
    body = {"max_tokens": 200, "ignore_eos": sampling != "grammar", **SAMPLINGS[sampling]}
    undisturbed = Stream(pair.a, pair.session(), **body).wait()
    session = pair.session()
    moved = Stream(pair.a, session, **body)
    assert moved.begun.wait(60)
    told = hand_over_at_once(pair.a, session, pair.b.peer)
    answer = moved.wait()
    assert told.has_turn, "the answer had ended before: hand over earlier"
    assert answer.text == undisturbed.text
    assert answer.usage["completion_tokens"] == undisturbed.usage["completion_tokens"]
    assert answer.finish_reason == undisturbed.finish_reason
    assert answer.own["engine"] == told.engine_id != undisturbed.own["engine"]
    assert answer.own["recomputed_tokens"] == 0

    messages = [*ASK, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]
    following = Stream(pair.b, session, messages, max_tokens=4).wait()
    assert following.usage["prompt_tokens_details"]["cached_tokens"] > 15


def test_an_idle_session_goes_over_and_one_line_says_so(pair):
    session = pair.session()
    first = Stream(pair.a, session, max_tokens=8, temperature=0).wait()
    done = hand_over(pair.a, session, pair.b.peer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert session in done.stdout
    assert "idle" in done.stdout
    messages = [*ASK, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
    following = Stream(pair.b, session, messages, max_tokens=4).wait()
    assert following.usage["prompt_tokens_details"]["cached_tokens"] == first.usage["total_tokens"] - 1


def test_what_does_not_work_is_one_line_and_exit_code_1(pair, tmp_path):
    for session, giver, taker, word in (
        ("nobody", pair.a, pair.b.peer, "nobody"),
        ("nobody", pair.a, pair.a.peer, "itself"),
        ("nobody", pair.a, "there", "unix:"),
        ("nobody", Engine(pair.a.process, f"unix:{tmp_path}/none"), pair.b.peer, "--peer"),
    ):
        done = hand_over(giver, session, taker)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1, done.stderr
        assert word in done.stderr


def test_a_client_that_leaves_after_the_hand_over_frees_the_other_engine(pair):
    session = pair.session()
    body = {"messages": ASK, "stream": True, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    headers = {"X-Equipoise-Session": session}
    url = f"{pair.a.process.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        assert hand_over(pair.a, session, pair.b.peer).returncode == 0
        next(lines)
    # Its 400 tokens would still run for seconds; a session whose turn has ended can be handed back at once, and idle.
    done = hand_over(pair.b, session, pair.a.peer, "--json")
    for _ in range(20):
        if done.returncode == 0:
            break
        done = hand_over(pair.b, session, pair.a.peer, "--json")
    assert json.loads(done.stdout)["has_turn"] is False, done
    assert json.loads(done.stdout)["context_tokens"] < 300


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_the_answer_goes_on_here_when_the_other_engine_is_killed_or_stopped(model, tmp_path, how):
    body = {"max_tokens": 110, "ignore_eos": True, "temperature": 0}
    with ExitStack() as stack:
        pair = start_pair(stack, tmp_path, "split")
        undisturbed = Stream(pair.a, "calm", COUNT, **body).wait()
        moved = Stream(pair.a, "moved", COUNT, **body)
        assert moved.begun.wait(60)
        assert hand_over_at_once(pair.a, "moved", pair.b.peer).has_turn
        relayed_from = moved.answer.chunks
        while moved.answer.chunks < relayed_from + 10 and moved.is_alive():
            time.sleep(0.001)
        getattr(pair.b.process.process, how)()
        answer = moved.wait()
        assert answer.text == undisturbed.text
        assert answer.own["engine"] == undisturbed.own["engine"]
        assert answer.usage["completion_tokens"] == 110
        assert answer.own["recomputed_tokens"] > 15, "it was computed again here"


def test_a_socket_that_cannot_be_had_is_one_line_and_an_exit_code(model, tmp_path):
    (tmp_path / "taken").write_text("")
    code, errors = failing("--listen", "127.0.0.1:0", "--kv-tokens", "512", "--peer", f"unix:{tmp_path}/taken")
    assert (code, errors.count("\n")) == (1, 1)
    assert "no socket" in errors


def test_the_command_is_part_of_equipoise_engine(tmp_path):
    command = [sys.executable, "-c", "from equipoise.daemon.cli.main import main; raise SystemExit(main())", "engine"]
    command += ["hand-over", "--peer", f"unix:{tmp_path}/none", "--session", "s", "--to", "unix:b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no engine answers there" in done.stderr

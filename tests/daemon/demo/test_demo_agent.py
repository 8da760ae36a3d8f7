"""The demo's agent: real HTTP, real processes, a daemon that answers from literals."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from equipoise.daemon.api.v1 import policy_pb2, sandbox_pb2
from equipoise.daemon.demo.agents import agent as agent_module
from equipoise.daemon.demo.agents.agent import AgentLog, Conversation, observation, run_plan
from equipoise.daemon.demo.agents.chat import ChatError, Message, ask
from equipoise.daemon.demo.agents.hearsay import Identity
from equipoise.daemon.demo.agents.plan import PLANS, Plan, Step, plan_named
from equipoise.daemon.demo.agents.toolcall import ToolResult, ToolRunner
from equipoise.policies.model import ToolCallSource
from equipoise.tests.fixtures.daemon_server import DaemonServer

SUICIDE = "import os, signal, time; os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)"


class Engine(http.server.ThreadingHTTPServer):
    """An HTTP server that streams chat completions as an OpenAI-compatible engine does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), EngineHandler)
        self.requests = []
        self.headers_seen = []
        self.busy_count = 0
        self.refusal = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class EngineHandler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.busy_count:
            self.server.busy_count -= 1
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if self.server.refusal:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(self.server.refusal.encode())
            return
        self.server.requests.append(body)
        self.server.headers_seen.append(self.headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text in ("I go", " on."):
            self._event({"choices": [{"delta": {"content": text}}]})
        usage = {"prompt_tokens": 120, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 80}}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value):
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def log_message(self, *arguments):
        return None


@pytest.fixture
def engine():
    server = Engine()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def daemon(tmp_path):
    with DaemonServer(tmp_path / "d.sock") as server:
        yield server


def identity(socket=None):
    return Identity("bronze", "fox", "bronze/fox", str(socket) if socket else None)


def perform(plan, engine, tmp_path, socket=None, deadline_s=30.0):
    """Run a plan; (accepted, log entries)."""
    workdir = tmp_path / "work"
    workdir.mkdir()
    log_file = tmp_path / "agent.jsonl"
    who = identity(socket)
    with log_file.open("w") as file:
        log = AgentLog(file)
        accepted = run_plan(plan, Conversation(who, engine.url, log), ToolRunner(who, workdir), log, deadline_s)
    return accepted, [json.loads(line) for line in log_file.read_text().splitlines()]


def gone_within(pid, seconds):
    """Whether the process has ended (a zombie that init has yet to collect counts) within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def python(code):
    return ("python", "-c", code)


def test_a_turn_carries_session_and_tenant_and_reads_the_usage(engine):
    turn = ask(engine.url, session="gold/ada", tenant="gold", messages=[Message("user", "hello")], max_tokens=8)
    assert turn.answer == "I go on."
    assert (turn.prompt_tokens, turn.cached_tokens, turn.output_tokens) == (120, 80, 3)
    assert 0 < turn.ttft_ns <= turn.duration_ns
    assert engine.headers_seen[0]["X-Equipoise-Session"] == "gold/ada"
    assert engine.headers_seen[0]["X-Equipoise-Tenant"] == "gold"
    assert engine.requests[0]["max_tokens"] == 8


def test_a_busy_engine_is_asked_again(engine):
    engine.busy_count = 2
    turn = ask(engine.url, session="s", tenant="t", messages=[Message("user", "hello")], max_tokens=8)
    assert turn.answer == "I go on."


def test_a_refusal_is_one_line_with_status_and_reason(engine):
    engine.refusal = "the prompt is longer than the context"
    with pytest.raises(ChatError, match=r"HTTP 400: the prompt is longer than the context"):
        ask(engine.url, session="s", tenant="t", messages=[Message("user", "hello")], max_tokens=8)


def test_no_engine_is_one_line_with_its_address():
    with pytest.raises(ChatError, match=r"http://127.0.0.1:1: the engine does not answer"):
        ask("http://127.0.0.1:1", session="s", tenant="t", messages=[Message("user", "hello")], max_tokens=8)


def test_tool_output_is_fed_into_the_next_turn(engine, tmp_path):
    plan = Plan("p", "Count.", (Step("I count.", python("print(6 * 7)")), Step("I stop.", python("pass"))))
    accepted, entries = perform(plan, engine, tmp_path)
    assert accepted
    assert [e["kind"] for e in entries] == ["turn", "tool", "turn", "tool", "turn", "end"]
    assert [headers["X-Equipoise-Awaits-Tool"] for headers in engine.headers_seen] == ["1", "1", None]
    second = engine.requests[1]["messages"]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert "exit code 0\n42" in second[-1]["content"]
    assert len(engine.requests[2]["messages"]) == len(second) + 2


def test_an_agent_whose_tool_was_killed_is_told_why_and_goes_on(engine, daemon, tmp_path):
    daemon.tool_calls = [
        policy_pb2.ToolCallView(
            tool_call_id="2a", tenant_id="bronze", sandbox="fox", command="python", signal=9, start_ns=5, phase="ended"
        )
    ]
    daemon.decisions = [
        policy_pb2.DecisionView(
            tool_call_id="2a",
            rule="tool call at its largest budget",
            evidence="it stood at 512 MiB of 512 MiB",
            action="kill the tool call",
        )
    ]
    plan = Plan("p", "Join.", (Step("I join.", python(SUICIDE)), Step("I do it in pieces.", python("print('ok')"))))
    accepted, entries = perform(plan, engine, tmp_path, daemon.socket)
    assert accepted, "a call that somebody else killed is not the agent's failure"
    told = engine.requests[1]["messages"][-1]["content"]
    assert told.startswith("Your last tool call was killed: tool call at its largest budget: it stood at 512 MiB")
    assert [e["signal"] for e in entries if e["kind"] == "tool"] == [9, None]
    assert entries[-1]["reason"] == "plan done"


def test_a_killed_tool_without_a_daemon_is_reported_as_unexplained(engine, tmp_path):
    plan = Plan("p", "Join.", (Step("I join.", python(SUICIDE)),))
    perform(plan, engine, tmp_path)
    assert "killed: nobody says why" in engine.requests[1]["messages"][-1]["content"]


def test_hooked_calls_are_announced_and_their_notice_is_heard(engine, daemon, tmp_path):
    daemon.notice = "held back 2.1 s at 256 MiB"
    plan = Plan("p", "Test.", (Step("I test.", python("raise SystemExit(1)"), ToolCallSource.HOOK, accepts=(1,)),))
    accepted, entries = perform(plan, engine, tmp_path, daemon.socket)
    assert accepted
    (begun,) = daemon.requests(sandbox_pb2.BeginToolCallRequest)
    assert (begun.tenant_id, begun.name, begun.session_id) == ("bronze", "fox", "bronze/fox")
    assert begun.command.startswith("python -c")
    (ended,) = daemon.requests(sandbox_pb2.EndToolCallRequest)
    assert ended.tool_call_id == "00000000000000aa"
    assert ended.exit_code == 1
    assert entries[1]["notice"] == "held back 2.1 s at 256 MiB"


def test_unannounced_calls_that_end_well_ask_the_daemon_nothing(engine, daemon, tmp_path):
    perform(Plan("p", "Look.", (Step("I look.", python("pass")),)), engine, tmp_path, daemon.socket)
    assert daemon.asked == []


def test_no_step_begins_after_the_deadline(engine, tmp_path):
    steps = tuple(Step(f"Step {n}.", python("import time; time.sleep(0.3)")) for n in range(6))
    accepted, entries = perform(Plan("p", "Work.", steps), engine, tmp_path, deadline_s=0.1)
    assert accepted
    assert [e["kind"] for e in entries] == ["turn", "tool", "end"]
    assert entries[-1]["reason"] == "deadline"


def test_an_unexpected_exit_code_is_the_agents_failure_but_not_its_end(engine, tmp_path):
    plan = Plan("p", "Work.", (Step("One.", python("raise SystemExit(7)")), Step("Two.", python("pass"))))
    accepted, entries = perform(plan, engine, tmp_path)
    assert not accepted
    assert [e["accepted"] for e in entries if e["kind"] == "tool"] == [False, True]
    assert entries[-1]["failed"]


def test_a_missing_program_is_exit_code_127(tmp_path):
    result = ToolRunner(identity(), tmp_path / ".").run(Step("x", ("no-such-program-here",)))
    assert result.exit_code == 127
    assert "No such file" in result.output


def test_a_background_process_does_not_hold_up_its_call(tmp_path):
    result = ToolRunner(identity(), tmp_path).run(Step("x", ("bash", "-c", "setsid sleep 60 & echo $!")))
    background = psutil.Process(int(result.output))
    assert background.status() != psutil.STATUS_ZOMBIE, "it is still there"
    background.kill()


def test_a_call_that_hangs_is_killed_with_its_group(tmp_path):
    pid_file = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid_file}; wait"
    result = ToolRunner(identity(), tmp_path, timeout_s=0.5).run(Step("x", ("bash", "-c", script)))
    assert result.signal == signal.SIGKILL
    assert gone_within(int(pid_file.read_text()), 20)


def test_long_output_is_cut_to_both_ends():
    result = ToolResult(0, None, 0, 1, "BEGIN " + "x" * 5000 + " END", "")
    text = observation(Step("x", ("cat", "log")), result)
    assert "BEGIN" in text and "END" in text and len(text) < 400


def test_an_unknown_plan_names_those_that_exist():
    with pytest.raises(ValueError, match="no such plan: choose one of tests, build, data"):
        plan_named("nothing")


def test_every_plan_is_found_by_its_name():
    assert [plan_named(plan.name) for plan in PLANS] == list(PLANS)


def test_the_command_fails_with_one_line_when_the_engine_is_gone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_TENANT", "gold")
    previous = signal.getsignal(signal.SIGTERM)
    arguments = ["--plan", "tests", "--engine-url", "http://127.0.0.1:1", "--workdir", str(tmp_path)]
    code = agent_module.main([*arguments, "--deadline", "5", "--log", str(tmp_path / "a.jsonl")])
    signal.signal(signal.SIGTERM, previous)
    assert code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: http://127.0.0.1:1: the engine does not answer") and "\n" not in error
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["failed"]


def test_an_agent_that_is_ended_takes_its_tool_call_with_it(engine, tmp_path):
    workdir = tmp_path / "work"
    (workdir / "jobs").mkdir(parents=True)
    pid_file = tmp_path / "pid"
    (workdir / "jobs" / "burst.py").write_text(
        f"import os,time; open({str(pid_file)!r},'w').write(str(os.getpid())); time.sleep(60)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "EQUIPOISE_SOCKET"}
    argv = [sys.executable, "-m", "equipoise.daemon.demo.agents.agent", "--plan", "runaway", "--engine-url", engine.url]
    argv += ["--workdir", str(workdir), "--deadline", "60", "--log", str(tmp_path / "log")]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    tool = int(pid_file.read_text())
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert gone_within(tool, 20)

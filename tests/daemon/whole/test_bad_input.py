"""What goes wrong is one clear line that says what to do, an exit code, and nothing half done."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from equipoise.daemon.api.v1 import policy_pb2, sandbox_pb2
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon, end, eventually

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[RunningDaemon]:
    """Not started yet."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    daemon = RunningDaemon(tmp_path)
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    running = RunningDaemon(tmp_path_factory.mktemp("daemon"))
    try:
        yield running.start()
    finally:
        running.close()


def refused(daemon: RunningDaemon, *arguments: str) -> str:
    """Start a daemon that must not come up; its one line. Nothing of it is left."""
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    existed = daemon.socket.exists()
    process = daemon.spawn(*arguments)
    assert process.wait(30) == 1
    said = daemon.said().removesuffix("\n")
    assert re.fullmatch(r"equipoise: [^\n]+", said), said
    assert daemon.socket.exists() == existed
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}"))
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    return said.removeprefix("equipoise: ")


def the_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert re.fullmatch(r"equipoise: [^\n]+\n", done.stderr), done.stderr
    return done.stderr.removeprefix("equipoise: ").removesuffix("\n")


# -- starting the daemon


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("spec: {memory: [", ":1:17: not YAML: "),
        ("apiVersion: equipoise/v1\nkind: Policy\nmetadata: {name: x}\nspec: {memroy: {}}", "did you mean `memory`?"),
        (
            "apiVersion: equipoise/v1\nkind: Policy\nmetadata: {name: x}\nspec: {memory: {budget: {hard: 512}}}",
            "spec.memory.budget.hard: a bare number has no unit; write it as `512MiB`",
        ),
        ("kind: Policy\nmetadata: {name: x}", ":1:1: apiVersion: is missing: `equipoise/v1`"),
        ("- a\n- b\n", "document: expected a mapping"),
        ("\x00", "not YAML"),
    ],
)
def test_a_broken_policy_is_refused_with_its_place(stopped, document, says):
    stopped.policy.write_text(document)
    line = refused(stopped)
    assert line.startswith(str(stopped.policy)) and says in line
    assert not stopped.state.exists(), "nothing was begun"
    assert the_line(stopped.cli("policy", "check", str(stopped.policy))) == line


def test_a_policy_file_that_is_not_there_or_not_text_is_refused(stopped):
    stopped.policy.unlink()
    assert "No such file or directory: give a policy document, or none for the built-in one" in refused(stopped)
    stopped.log.write_text("")
    stopped.policy.write_bytes(b"\xff\xfe\x00spec")
    assert "not UTF-8 text" in refused(stopped)


def test_a_second_daemon_in_the_same_state_folder_is_refused_and_the_first_lives(daemon, tmp_path):
    second = RunningDaemon(tmp_path)
    second.state, second.socket = daemon.state, daemon.socket
    line = refused(second)
    assert line == (
        f"state folder {daemon.state}: in use by another daemon (pid {daemon.process.pid}, cgroup base {daemon.base}): "
        "stop it, or give another with --state-dir"
    )
    assert daemon.status().version


def test_a_second_daemon_on_the_same_cgroup_base_is_refused_and_the_first_lives(daemon, tmp_path):
    """Nothing of the first is released, swept or stopped; doctor and release work beside it."""
    agent = daemon.agent("gold", "first")
    agent.begin("sleep", "30")
    eventually(lambda: daemon.tool_calls("sleep 30"))
    second = RunningDaemon(tmp_path)
    second.base = daemon.base
    process = second.spawn()
    assert process.wait(30) == 1
    assert second.said() == (
        f"equipoise: cgroup base {daemon.base}: in use by another daemon (pid {daemon.process.pid}): stop it, or give "
        "another with --cgroup-base\n"
    )
    assert not second.socket.exists() and not (second.state / "journal.sqlite").exists()
    assert daemon.cli("release").returncode == 0 and daemon.cli("doctor").returncode in (0, 1)
    assert [c.phase for c in daemon.tool_calls("sleep 30")] == ["running"]
    end(daemon.tool_calls("sleep 30")[0].pid)
    agent.leave()
    eventually(lambda: not daemon.watch().sandboxes)


def test_no_lock_outlives_a_daemon_that_was_killed(stopped):
    """Its guardian may still be at work: it holds neither."""
    stopped.start()
    guardian = stopped.guardian()
    guardian.suspend()
    stopped.kill()
    assert guardian.is_running()
    assert stopped.start().status().version
    guardian.kill()


def test_a_second_daemon_on_the_same_socket_is_refused(daemon, tmp_path):
    second = RunningDaemon(tmp_path)
    second.socket = daemon.socket
    line = refused(second, "--socket", str(daemon.socket))
    assert line == f"{daemon.socket}: another daemon listens there: stop it, or give --socket another path"
    assert daemon.status().version


def test_a_second_daemon_on_the_same_journal_is_refused(daemon, tmp_path):
    second = RunningDaemon(tmp_path)
    line = refused(second, "--journal", str(daemon.state / "journal.sqlite"))
    assert f"in use by another daemon (pid {daemon.process.pid}, " in line


def test_a_stale_socket_is_taken_over(stopped):
    stopped.state.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stopped.socket))
    assert stopped.start().status().version


def test_a_file_that_is_no_socket_is_not_removed(stopped):
    stopped.state.mkdir()
    stopped.socket.write_text("precious")
    assert "is there and is no socket: remove it" in refused(stopped)
    assert stopped.socket.read_text() == "precious"


def test_a_socket_path_that_is_too_long_is_refused(stopped):
    line = refused(stopped, "--socket", f"{stopped.folder}/{'x' * 120}.sock")
    assert "too long" in line and "--socket" in line


def test_a_metrics_port_that_is_taken_is_refused(stopped):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert refused(stopped, "--metrics-listen", address).startswith(f"{address}: Address already in use: ")
    stopped.log.write_text("")
    assert "write it as 127.0.0.1:9464" in refused(stopped, "--metrics-listen", "nowhere")


def test_a_journal_that_is_none_is_refused_and_kept(stopped):
    stopped.state.mkdir()
    journal = stopped.state / "journal.sqlite"
    journal.write_bytes(b"anything but a database" * 300)
    line = refused(stopped)
    assert line.startswith(f"{journal}: damaged or not a journal") and "move it away" in line
    assert journal.read_bytes().startswith(b"anything")


def test_a_base_that_cannot_be_made_is_refused_where_it_was_asked_for(stopped):
    stopped.base = "../outside"
    process = stopped.spawn()
    assert process.wait(30) == 1
    assert "'../outside': give a path below the root" in stopped.said() and stopped.said().count("\n") == 1
    stopped.base = f"eqtest-d-{os.getpid()}-none"


@pytest.mark.engine
def test_a_model_that_is_none_leaves_the_daemon_running_and_says_so(stopped):
    model = stopped.folder / "poem.gguf"
    model.write_text("roses are red\n" * 100)
    stopped.start("--engine", "embedded", "--model", str(model), "--engine-listen", "127.0.0.1:0")
    lacks = eventually(lambda: [line for line in stopped.status().lacks if line.startswith("engine: ")])
    assert lacks == [f"engine: {model}: not a GGUF (begins with b'rose'): convert the model to GGUF first"]
    assert not stopped.status().engine_url
    assert str(model) in stopped.cli("doctor", "--json").stdout
    assert stopped.agent().call("echo", "still").stdout == "still\n"


@pytest.mark.engine
def test_an_engine_port_that_is_taken_leaves_the_daemon_running_and_is_tried_again(stopped):
    taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    stopped.start("--engine", "embedded", "--engine-listen", address)
    lacks = eventually(lambda: [line for line in stopped.status().lacks if line.startswith("engine: ")])
    assert lacks == [
        f"engine: --listen {address}: Address already in use: stop what listens there or give another port"
    ]
    eventually(lambda: stopped.said().count("engine_died") >= 2)
    taken.close()
    assert stopped.stop() == 0


# -- commands


@pytest.mark.parametrize(
    "arguments",
    [("run", "--", "true"), ("ps",), ("explain",), ("top",), ("ps", "--json")],
    ids=" ".join,
)
def test_every_command_says_where_it_looked_for_a_daemon(stopped, arguments):
    line = the_line(stopped.cli(*arguments))
    assert line == f"no daemon at {stopped.socket}: start one with `equipoise daemon`, or give --socket"


def test_a_dead_daemon_is_told_from_none(stopped):
    stopped.start().kill()
    line = the_line(stopped.cli("ps"))
    assert line.startswith(f"the daemon at {stopped.socket} does not answer: ") and "equipoise release" in line


def test_a_tool_call_runs_unmeasured_where_no_daemon_answers(stopped):
    done = stopped.cli("tool", "--", "sh", "-c", "echo out; exit 4")
    assert (done.returncode, done.stdout) == (4, "out\n")
    assert done.stderr.startswith("equipoise: this tool call is not measured: no daemon at ")


def test_release_without_anything_to_release_is_no_failure(stopped):
    done = stopped.cli("release", "--cgroup-base", stopped.base)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing was held back\n", "")


def test_release_says_when_the_journal_could_not_be_read(stopped):
    stopped.state.mkdir()
    (stopped.state / "journal.sqlite").write_bytes(b"nonsense" * 1000)
    line = the_line(stopped.cli("release", "--cgroup-base", stopped.base, "--state-dir", str(stopped.state)))
    assert "damaged or not a journal" in line and "our cgroup was walked all the same" in line


def test_an_unknown_tenant_is_refused_with_those_there_are(daemon):
    line = the_line(daemon.cli("run", "--tenant", "platinum", "--name", "x", "--", "true"))
    assert line == "unknown tenant 'platinum': policy test knows gold, silver; add it under spec.tenants"
    assert not daemon.watch().sandboxes


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "x" * 65, "with blank"])
def test_a_name_that_cannot_be_a_cgroup_is_refused(daemon, name):
    line = the_line(daemon.cli("run", "--tenant", "gold", f"--name={name}", "--", "true"))
    assert "use up to 64 letters, digits" in line
    assert not daemon.watch().sandboxes


def test_an_agent_that_does_not_exist_is_refused_and_its_sandbox_goes(daemon):
    line = the_line(daemon.cli("run", "--tenant", "gold", "--name", "ghost", "--", "/no/such/agent"))
    assert line == "/no/such/agent: No such file or directory"
    eventually(lambda: not daemon.watch().sandboxes)
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}/gold/ghost"))


def test_nothing_to_run_is_refused(daemon):
    assert the_line(daemon.cli("run", "--tenant", "gold")) == "nothing to run: equipoise run [options] -- CMD [ARG ...]"
    assert the_line(daemon.cli("tool", "--")).startswith("nothing to run: equipoise tool")


def test_a_tool_call_outside_of_any_sandbox_runs_unmeasured(daemon):
    done = daemon.cli("tool", "--", "sh", "-c", "exit 5")
    assert done.returncode == 5
    assert "not measured: no sandbox with process" in done.stderr and "equipoise run --tenant T" in done.stderr


def test_unknown_tool_calls_are_refused(daemon):
    assert "`equipoise ps --all` lists them" in the_line(daemon.cli("explain", "00000000000000aa"))
    assert "`equipoise ps --all` lists them" in the_line(daemon.cli("explain", "not-hex"))


# -- requests


def code_and_details(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code(), raised.value.details() or ""


def gone_pid() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def test_a_pid_that_is_gone_is_refused_and_leaves_no_sandbox(daemon):
    request = sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="late", pid=gone_pid())
    code, details = code_and_details(lambda: daemon.sandboxes.RegisterSandbox(request))
    assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
    assert str(request.pid) in details and "\n" not in details
    assert not daemon.watch().sandboxes
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}/gold/late"))


def test_a_tool_call_of_a_pid_that_is_gone_is_refused(daemon):
    agent = daemon.agent("gold", "living")
    request = sandbox_pb2.BeginToolCallRequest(tenant_id="gold", name="living", command="x", pid=gone_pid())
    code, details = code_and_details(lambda: daemon.sandboxes.BeginToolCall(request))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, f"no process {request.pid}")
    assert not daemon.tool_calls("x")
    agent.leave()


@pytest.mark.parametrize(
    ("method", "request_", "code", "says"),
    [
        ("EndToolCall", sandbox_pb2.EndToolCallRequest(), "NOT_FOUND", "no tool call was begun"),
        ("EndToolCall", sandbox_pb2.EndToolCallRequest(external_id="x"), "NOT_FOUND", "was begun as 'x'"),
        ("EndToolCall", sandbox_pb2.EndToolCallRequest(tool_call_id="zz"), "INVALID_ARGUMENT", "not 16 hex digits"),
        ("EndToolCall", sandbox_pb2.EndToolCallRequest(tool_call_id="aa"), "NOT_FOUND", "unknown tool call"),
        ("BeginToolCall", sandbox_pb2.BeginToolCallRequest(), "NOT_FOUND", "equipoise run"),
        ("RemoveSandbox", sandbox_pb2.RemoveSandboxRequest(tenant_id="gold", name="no"), "NOT_FOUND", "no sandbox"),
        ("DeclareIntent", sandbox_pb2.DeclareIntentRequest(tenant_id="gold", name="no"), "NOT_FOUND", "no sandbox"),
        (
            "RegisterSandbox",
            sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="n", cgroup_path="no/such/cgroup"),
            "NOT_FOUND",
            "no such cgroup",
        ),
        (
            "RegisterSandbox",
            sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="n", cgroup_path="../../etc"),
            "INVALID_ARGUMENT",
            "without '..'",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused_by_their_reason(daemon, method, request_, code, says):
    answered, details = code_and_details(lambda: getattr(daemon.sandboxes, method)(request_))
    assert answered.name == code and says in details and "\n" not in details


def test_an_intent_without_a_kind_or_with_negative_bytes_is_refused(daemon):
    agent = daemon.agent("gold", "vague")
    for kind, expected_bytes in (("", 0), ("pytest", -1)):
        request = sandbox_pb2.DeclareIntentRequest(
            tenant_id="gold", name="vague", kind=kind, expected_bytes=expected_bytes
        )
        code, _ = code_and_details(lambda r=request: daemon.sandboxes.DeclareIntent(r))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    agent.leave()


def test_watching_too_often_is_refused(daemon):
    request = policy_pb2.WatchRequest(interval_ms=5)
    code, details = code_and_details(lambda: next(daemon.policies.Watch(request)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "use 100 to 60000" in details


def test_the_daemon_outlived_all_of_this(daemon):
    assert daemon.process.poll() is None
    assert "Traceback" not in daemon.said() and "turn_failed" not in daemon.said()
    assert daemon.agent("gold", "last").call(*CLI, "tool", "--", "sh", "-c", "exit 3").returncode == 3

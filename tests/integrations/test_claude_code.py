"""Claude Code's hooks: the real process with JSON on its standard input, against a real gRPC server."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.integrations.claude_code import daemon_call, settings
from equipoise.tests.fixtures.daemon_server import DaemonServer

BEGIN = sandbox_pb2.BeginToolCallRequest
END = sandbox_pb2.EndToolCallRequest
REGISTER = sandbox_pb2.RegisterSandboxRequest
REMOVE = sandbox_pb2.RemoveSandboxRequest


@pytest.fixture
def server(tmp_path):
    with DaemonServer(tmp_path / "d.sock") as running:
        yield running


def event(name, **changes):
    fields = {
        "session_id": "9ecf22fa-edf8-4332-ae85-b6d5456eda64",
        "transcript_path": "/nowhere",
        "cwd": "/",
        "hook_event_name": name,
        "tool_name": "Bash",
        "tool_use_id": "toolu_01ABC",
        "tool_input": {"command": "pytest -q", "description": "Run the tests"},
    }
    return {**fields, **changes}


def run_hook(given, socket, *options, sandbox="ada", tmp=None, timeout=10):
    """(exit code, standard output, seconds)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EQUIPOISE_")}
    if sandbox:
        environment |= {"EQUIPOISE_TENANT": "gold", "EQUIPOISE_SANDBOX": sandbox}
    if tmp is not None:
        environment["TMPDIR"] = str(tmp)
    argv = (sys.executable, "-m", "equipoise.integrations.claude_code.hook", "--socket", str(socket), *options)
    text = given if isinstance(given, str) else json.dumps(given)
    begin = time.monotonic()
    done = subprocess.run(
        argv, input=text, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout, time.monotonic() - begin


def bare_seconds(server):
    """What a hook takes that has nothing to do: the interpreter, and whatever else the machine does."""
    return max(run_hook("not json", server.socket)[2] for _ in range(2))


def told_in_time(given, server, tmp):
    """What the first hook says that says anything: beside other load an answer may be late, and comes with the next."""
    until = time.monotonic() + 60
    while True:
        code, out, _ = run_hook(given, server.socket, tmp=tmp)
        assert code == 0
        if out:
            return out
        assert time.monotonic() < until, "no hook was told of it"
        time.sleep(0.3)


def heard(server, kind, seconds=20.0):
    """The requests of a kind: the child that makes them may outlive the hook."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not server.requests(kind):
        time.sleep(0.02)
    return server.requests(kind)


def test_a_tool_call_is_announced_with_its_own_id(server):
    assert run_hook(event("PreToolUse"), server.socket)[:2] == (0, "")
    (begun,) = heard(server, BEGIN)
    assert (begun.tenant_id, begun.name, begun.command) == ("gold", "ada", "pytest -q")
    assert begun.external_id == "toolu_01ABC"


def test_its_end_is_told_with_the_exit_code(server):
    run_hook(event("PostToolUse", tool_response={"stdout": "ok"}), server.socket)
    (ended,) = heard(server, END)
    assert ended.external_id == "toolu_01ABC" and ended.HasField("exit_code") and ended.exit_code == 0
    assert (ended.tenant_id, ended.name) == ("gold", "ada")


def test_a_failure_carries_the_exit_code_its_text_names(server):
    run_hook(event("PostToolUseFailure", error="Exit code 137\nKilled"), server.socket)
    (ended,) = heard(server, END)
    assert ended.exit_code == 137


def test_a_failure_that_names_none_leaves_it_unknown(server):
    run_hook(event("PostToolUseFailure", error="interrupted"), server.socket)
    (ended,) = heard(server, END)
    assert not ended.HasField("exit_code")


@pytest.mark.parametrize("name", ["PostToolUse", "PostToolUseFailure"])
def test_what_was_done_to_the_call_is_told_to_the_agent(server, tmp_path, name):
    server.notice = "killed at 512 MiB: give pytest -n0, or declare more"
    out = told_in_time(event(name), server, tmp_path)
    told = json.loads(out)["hookSpecificOutput"]
    assert told["hookEventName"] == name
    assert "killed at 512 MiB: give pytest -n0" in told["additionalContext"]


def test_nothing_done_is_nothing_said(server):
    assert run_hook(event("PostToolUse"), server.socket)[:2] == (0, "")


def test_a_slow_daemon_does_not_hold_the_agent_up_and_hears_it_all_the_same(server):
    server.delay_s = 3.0
    code, out, _ = run_hook(event("PreToolUse"), server.socket)
    assert (code, out) == (0, "")
    assert not server.requests(BEGIN), "it did not wait for the answer"
    assert len(heard(server, BEGIN)) == 1


def test_a_notice_that_comes_too_late_is_told_at_the_next_hook(server, tmp_path):
    server.delay_s = 0.8
    server.notice = "held back 2.1 s"
    assert run_hook(event("PostToolUse"), server.socket, tmp=tmp_path)[1] == ""
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("equipoise-hooks-*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.delay_s, server.notice = 0.0, ""
    out = told_in_time(event("PostToolUse", tool_use_id="toolu_02"), server, tmp_path)
    assert json.loads(out)["hookSpecificOutput"]["additionalContext"] == "held back 2.1 s"
    assert not list(tmp_path.glob("equipoise-hooks-*/*"))


def test_late_notices_are_kept_where_no_one_else_reads(server, tmp_path):
    server.delay_s, server.notice = 0.8, "secret"
    run_hook(event("PostToolUse"), server.socket, tmp=tmp_path)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("equipoise-hooks-*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder,) = tmp_path.glob("equipoise-hooks-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "given", ["", "not json", "[1, 2]", "null", '{"hook_event_name": "Stop"}', '{"hook_event_name": {"x": 1}}']
)
def test_anything_else_on_standard_input_is_let_go(server, given):
    assert run_hook(given, server.socket)[:2] == (0, "")
    assert server.asked == []


def test_without_a_daemon_nothing_happens(server, tmp_path):
    code, out, seconds = run_hook(event("PreToolUse"), tmp_path / "none.sock")
    assert (code, out) == (0, "") and seconds < 1.0 + 4 * bare_seconds(server)


def test_a_socket_nobody_listens_on_is_no_failure(tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert run_hook(event("PostToolUse"), tmp_path / "dead.sock")[:2] == (0, "")


def test_an_input_that_never_ends_is_not_waited_for(server):
    argv = (sys.executable, "-m", "equipoise.integrations.claude_code.hook", "--socket", str(server.socket))
    process = subprocess.Popen(argv, stdin=subprocess.PIPE)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_outside_of_a_sandbox_and_without_a_tenant_nothing_is_announced(server):
    run_hook(event("PreToolUse"), server.socket, sandbox="")
    time.sleep(0.5)
    assert server.asked == []


def test_with_a_tenant_a_session_gets_a_sandbox_of_its_own_and_leaves_it(server):
    run_hook(event("SessionStart"), server.socket, "--tenant", "silver", sandbox="")
    (registered,) = heard(server, REGISTER)
    assert (registered.tenant_id, registered.name) == ("silver", "claude-9ecf22fa")
    assert registered.pid == os.getpid(), "the nearest ancestor of the hook that is no shell"
    run_hook(event("PreToolUse"), server.socket, "--tenant", "silver", sandbox="")
    (begun,) = heard(server, BEGIN)
    assert (begun.tenant_id, begun.name) == ("silver", "claude-9ecf22fa")
    run_hook(event("SessionEnd"), server.socket, "--tenant", "silver", sandbox="")
    (removed,) = heard(server, REMOVE)
    assert removed.name == "claude-9ecf22fa"


def test_a_session_in_a_sandbox_gets_no_second_one(server):
    run_hook(event("SessionStart"), server.socket, "--tenant", "silver")
    run_hook(event("SessionEnd"), server.socket, "--tenant", "silver")
    time.sleep(0.5)
    assert server.asked == []


def test_versions_without_a_tool_use_id_are_paired_by_session_and_input():
    before, after = event("PreToolUse"), event("PostToolUse")
    del before["tool_use_id"], after["tool_use_id"]
    assert daemon_call.external_id(before) == daemon_call.external_id(after)
    other = event("PreToolUse", tool_input={"command": "make"})
    del other["tool_use_id"]
    assert daemon_call.external_id(other) != daemon_call.external_id(before)


def test_a_tool_without_a_command_is_called_by_its_name():
    assert daemon_call.command_of(event("PreToolUse", tool_name="WebFetch", tool_input={"url": "x"})) == "WebFetch"


def cli(*arguments):
    argv = (sys.executable, "-m", "equipoise.daemon.cli", "hooks", "claude-code", *arguments)
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_the_printed_settings_run_this_hook_around_bash():
    printed = json.loads(cli("--print").stdout)
    assert set(printed["hooks"]) == {"PreToolUse", "PostToolUse", "PostToolUseFailure"}
    (entry,) = printed["hooks"]["PreToolUse"]
    assert entry["matcher"] == "Bash"
    assert entry["hooks"][0]["type"] == "command"


def test_the_installed_command_works_as_a_shell_runs_it(server):
    printed = json.loads(cli("--print", "--socket", str(server.socket)).stdout)
    command = printed["hooks"]["PreToolUse"][0]["hooks"][0]["command"]
    environment = {**os.environ, "EQUIPOISE_TENANT": "gold", "EQUIPOISE_SANDBOX": "ada"}
    given = json.dumps(event("PreToolUse"))
    done = subprocess.run(("sh", "-c", command), input=given, env=environment, text=True, check=False)
    assert done.returncode == 0
    assert len(heard(server, BEGIN)) == 1


def test_the_hook_can_be_run_as_a_command_of_ours(server):
    argv = (sys.executable, "-m", "equipoise.daemon.cli", "hooks", "claude-code", "run", "--socket", str(server.socket))
    environment = {**os.environ, "EQUIPOISE_TENANT": "gold", "EQUIPOISE_SANDBOX": "ada"}
    given = json.dumps(event("PreToolUse"))
    assert subprocess.run(argv, input=given, env=environment, text=True, check=False).returncode == 0
    assert len(heard(server, BEGIN)) == 1


def test_with_a_tenant_the_session_events_are_hooked_too():
    assert {"SessionStart", "SessionEnd"} <= set(settings.hooks(tenant="gold")["hooks"])


def test_installing_keeps_everything_that_is_there_and_is_idempotent(tmp_path):
    path = tmp_path / "settings.json"
    theirs = {"matcher": "Write", "hooks": [{"type": "command", "command": "lint"}]}
    before = {"model": "opus", "hooks": {"PostToolUse": [theirs], "Stop": [{"hooks": []}]}}
    path.write_text(json.dumps(before))
    path.chmod(0o640)
    assert settings.install(path, settings.hooks())
    after = json.loads(path.read_text())
    assert after["model"] == "opus" and after["hooks"]["Stop"] == [{"hooks": []}]
    assert after["hooks"]["PostToolUse"][0] == theirs and len(after["hooks"]["PostToolUse"]) == 2
    assert not settings.install(path, settings.hooks())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert settings.remove(path)
    assert json.loads(path.read_text()) == before
    assert not settings.remove(path)


def test_installing_again_with_other_options_replaces_ours(tmp_path):
    path = tmp_path / "new" / "settings.json"
    assert settings.install(path, settings.hooks(tenant="gold"))
    assert settings.install(path, settings.hooks(matcher="Bash|Task"))
    hooks = json.loads(path.read_text())["hooks"]
    assert "SessionStart" not in hooks
    assert [entry["matcher"] for entry in hooks["PreToolUse"]] == ["Bash|Task"]


@pytest.mark.parametrize("text", ["{broken", "[]", '{"hooks": []}', '{"hooks": {"PreToolUse": "x"}}'])
def test_a_settings_file_that_is_none_is_one_line_and_stays_as_it_was(tmp_path, text):
    path = tmp_path / "settings.json"
    path.write_text(text)
    done = cli("--install", str(path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "nothing was changed" in done.stderr
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]

"""The daemon without root, eBPF and cgroups: it runs on /proc, says what it lacks, and stops nobody for good."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equipoise
import grpc
import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.tests.fixtures.running_daemon import MIB, POLICY, RunningDaemon, eventually, grow, process_state

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
NOBODY = 65534
_CHECK = "import equipoise.daemon.cli.main, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"


class Unprivileged:
    """Runs commands as nobody, with an interpreter that nobody may run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        build = Path(equipoise.__file__).parent / "build/types"
        packages = Path(grpc.__file__).parent.parent
        candidates = [(sys.executable, {}), (f"/usr/bin/python3.{sys.version_info.minor}",
                                             {"PYTHONPATH": f"{build}:{packages}"})]  # fmt: skip
        for self.python, extra in candidates:
            self.environment = {**os.environ, "HOME": str(folder), **extra}
            self.environment.pop("XDG_RUNTIME_DIR", None)
            try:
                if self.run(self.python, "-c", _CHECK).returncode == 0:
                    return
            except OSError:
                continue  # not there, or not ours to run
        pytest.skip("no Python here that the user nobody can run Equipoise with")

    @property
    def options(self) -> dict[str, Any]:
        return {"user": NOBODY, "group": NOBODY, "extra_groups": [], "env": self.environment, "cwd": "/"}

    def run(self, *command: str, socket: Path | None = None) -> subprocess.CompletedProcess[str]:
        if socket is not None:
            self.environment["EQUIPOISE_SOCKET"] = str(socket)
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **self.options)

    def cli(self, socket: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.python, "-m", "equipoise.daemon.cli", *arguments, socket=socket)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """pytest's own folders are not open to nobody."""
    made = Path(tempfile.mkdtemp(prefix="eqtest-"))
    made.chmod(0o777)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def nobody(folder: Path) -> Unprivileged:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    return Unprivileged(folder)


@pytest.fixture(scope="module")
def daemon(nobody: Unprivileged, folder: Path) -> Iterator[RunningDaemon]:
    running = RunningDaemon(folder, POLICY)
    running.python = nobody.python
    try:
        yield running.start(cgroups=False, **nobody.options)
    finally:
        running.close()


def test_it_says_what_it_lacks_and_what_to_do_about_it(daemon):
    status = daemon.status()
    assert status.probe_backend.startswith("none: ") and status.cgroup_layout.startswith("none: ")
    lacks = {line.split(" (")[0]: line for line in status.lacks}
    assert "as root" in lacks["no eBPF"] and "as root" in lacks["no cgroups"]


def test_a_wrapped_call_is_measured_by_its_processes(daemon, nobody):
    code = nobody.folder / "by-proc.py"
    code.write_text(grow(40, "time.sleep(0.3); raise SystemExit(3)")[3])
    script = f"{nobody.python} -m equipoise.daemon.cli tool -- sh -c '{nobody.python} -S {code}; exit $?'"
    done = nobody.cli(daemon.socket, "run", "--tenant", "gold", "--name", "ada", "--", "sh", "-c", script)
    assert done.returncode == 3, done.stderr
    [call] = daemon.tool_calls("by-proc")
    assert (call.source, call.exit_code, call.sandbox, call.phase) == ("wrapper", 3, "ada", "ended")
    assert 40 * MIB < call.peak_bytes < 62 * MIB
    eventually(lambda: not daemon.watch().sandboxes)


def test_a_runaway_is_stopped_and_ended_and_its_agent_told(daemon, nobody):
    code = nobody.folder / "runaway.py"
    code.write_text(grow(2000, pause_s=0.03)[3])
    script = f"{nobody.python} -m equipoise.daemon.cli tool -- {nobody.python} -S {code}; echo agent lives $?"
    done = nobody.cli(daemon.socket, "run", "--tenant", "gold", "--name", "bob", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "agent lives 137\n")
    assert "ended this tool call" in done.stderr
    [call] = daemon.tool_calls("runaway.py")
    assert call.signal == signal.SIGKILL and call.peak_bytes < 300 * MIB
    assert daemon.decisions(call.tool_call_id)[0].tier == "signal"


def test_hooks_tell_of_calls_though_nobody_can_measure_them(daemon):
    registered = sandbox_pb2.RegisterSandboxRequest(tenant_id="silver", name="hooked")
    daemon.sandboxes.RegisterSandbox(registered)
    daemon.sandboxes.BeginToolCall(
        sandbox_pb2.BeginToolCallRequest(tenant_id="silver", name="hooked", command="Bash: ls", external_id="t1")
    )
    ended = daemon.sandboxes.EndToolCall(sandbox_pb2.EndToolCallRequest(external_id="t1", exit_code=2))
    [call] = daemon.tool_calls("Bash: ls")
    assert (call.source, call.exit_code, call.peak_bytes) == ("hook", 2, 0) and ended.duration_ns > 0
    daemon.sandboxes.RemoveSandbox(sandbox_pb2.RemoveSandboxRequest(tenant_id="silver", name="hooked"))
    assert not daemon.watch().sandboxes


def test_a_cgroup_cannot_be_adopted_and_the_answer_says_why(daemon):
    request = sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="x", cgroup_path="some/container")
    with pytest.raises(grpc.RpcError, match="no cgroups can be used here") as raised:
        daemon.sandboxes.RegisterSandbox(request)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_the_guardian_continues_what_was_stopped_when_the_daemon_is_killed(nobody, folder):
    narrow = folder / "narrow"
    narrow.mkdir()
    narrow.chmod(0o777)
    daemon = RunningDaemon(narrow, POLICY.replace("toolPool: 1GiB", "toolPool: 70MiB"))
    daemon.python = nobody.python
    agent = None
    try:
        daemon.start(cgroups=False, **nobody.options)
        wait, code = narrow / "sits.py", narrow / "grows.py"
        wait.write_text(grow(40, "time.sleep(60)")[3])
        code.write_text(grow(100, "time.sleep(1)", pause_s=0.03)[3])
        tool = f"{nobody.python} -m equipoise.daemon.cli tool -- {nobody.python} -S"
        nobody.environment["EQUIPOISE_SOCKET"] = str(daemon.socket)
        agent = subprocess.Popen(
            [nobody.python, "-m", "equipoise.daemon.cli", "run", "--tenant", "gold", "--name", "cy", "--", "sh", "-c",
             f"{tool} {wait} & {tool} {code}; kill $!"],
            start_new_session=True, **nobody.options,
        )  # fmt: skip
        call = eventually(lambda: next((c for c in daemon.tool_calls("grows.py") if c.phase == "stopped"), None))
        eventually(lambda: process_state(call.pid) == "T")
        daemon.kill()
        eventually(lambda: process_state(call.pid) not in ("T",))
        assert agent.wait(20) == 0
    finally:
        if agent is not None and agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
        daemon.close()
        time.sleep(0.1)


# -- what nobody may not do


def test_a_state_folder_of_somebody_else_is_refused(nobody, tmp_path_factory):
    closed = tmp_path_factory.mktemp("closed")
    done = nobody.run(nobody.python, "-m", "equipoise.daemon.cli", "daemon", "--state-dir", str(closed / "state"))
    assert done.returncode == 1
    assert done.stderr == (
        f"equipoise: {closed / 'state'}: Permission denied: give --state-dir a folder that is yours\n"
    )


def test_a_base_of_somebody_else_that_was_asked_for_is_refused(nobody, folder):
    done = nobody.run(nobody.python, "-m", "equipoise.daemon.cli", "daemon", "--state-dir", str(folder / "other"),
                      "--cgroup-base", "eqtest-not-mine", "--metrics-listen", "")  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "run as root, or as the owner of a delegated cgroup" in done.stderr


def test_a_socket_of_somebody_else_is_refused_to_every_command(nobody, folder):
    root = folder / "root"
    root.mkdir()
    daemon = RunningDaemon(root)
    try:
        daemon.start()
        for command in ("ps", "explain", "release"):
            done = nobody.cli(daemon.socket, command)
            assert done.returncode == 1
            assert done.stderr == (
                f"equipoise: {daemon.socket}: permission denied: run as root, or as a member of the socket's group\n"
            )
        done = nobody.cli(Path("/root/hidden/equipoise.sock"), "ps")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
    finally:
        daemon.close()

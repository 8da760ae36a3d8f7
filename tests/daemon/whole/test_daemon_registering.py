"""Registrations that a real daemon refuses: nothing of the host, the daemon or another tenant is moved or charged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon, eventually

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    running = RunningDaemon(tmp_path_factory.mktemp("daemon"))
    try:
        yield running.start()
    finally:
        running.close()


def refused(call) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    details = raised.value.details() or ""
    assert "\n" not in details
    return raised.value.code().name, details


def register(daemon: RunningDaemon, tenant: str, name: str, **fields):
    return daemon.sandboxes.RegisterSandbox(
        sandbox_pb2.RegisterSandboxRequest(tenant_id=tenant, name=name, **fields), timeout=5
    )


def cgroups_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


def of_tenants(daemon: RunningDaemon) -> list[Path]:
    return [p for p in Path("/sys/fs/cgroup").glob(f"*/{daemon.base}/*") if p.is_dir()]


@pytest.mark.parametrize("method", ["RegisterSandbox", "BeginToolCall"])
def test_nobody_of_the_host_or_the_daemon_is_taken_in(daemon, method):
    agent = daemon.agent("silver", f"beside-{method.lower()}") if method == "BeginToolCall" else None
    pids = {"init": 1, "daemon": daemon.process.pid, "guardian": daemon.guardian().pid, "who started it": os.getpid()}
    if Path("/proc/2/comm").read_text() == "kthreadd\n":
        pids["kthreadd"] = 2
    before = {pid: cgroups_of(pid) for pid in pids.values()}
    there = of_tenants(daemon)
    for what, pid in pids.items():
        if agent is not None:
            request = sandbox_pb2.BeginToolCallRequest(tenant_id="silver", name=agent.name, command="x", pid=pid)
            code, details = refused(lambda r=request: daemon.sandboxes.BeginToolCall(r, timeout=5))
        else:
            code, details = refused(lambda p=pid: register(daemon, "gold", "thief", pid=p))
        assert (code, str(pid) in details) == ("PERMISSION_DENIED", True), what
    assert {pid: cgroups_of(pid) for pid in pids.values()} == before
    assert of_tenants(daemon) == there
    if agent is None:
        assert refused(lambda: register(daemon, "gold", "thief", pid=-4))[0] == "INVALID_ARGUMENT"
        assert refused(lambda: register(daemon, "gold", "../../..", pid=0))[0] == "INVALID_ARGUMENT"
        assert not daemon.watch().sandboxes
    else:
        code, details = refused(
            lambda: daemon.sandboxes.BeginToolCall(
                sandbox_pb2.BeginToolCallRequest(tenant_id="silver", name=agent.name, command="x", pid=agent.pid)
            )
        )
        assert code == "PERMISSION_DENIED" and f"is the agent of silver/{agent.name}" in details
        assert not daemon.tool_calls("x")
        agent.leave()
        eventually(lambda: not daemon.watch().sandboxes)


def test_a_second_agent_of_the_same_name_is_refused_and_the_first_is_watched_on(daemon):
    first = daemon.agent("gold", "ada")
    second = daemon.cli("run", "--tenant", "gold", "--name", "ada", "--", "true")
    assert second.returncode == 1 and second.stdout == ""
    assert second.stderr.startswith(f"equipoise: sandbox gold/ada is held by pid {first.pid} since ")
    assert second.stderr.count("\n") == 1 and "give another --name" in second.stderr
    assert first.call("sh", "-c", "exit 5 # watched-on").returncode == 5
    eventually(lambda: [c.exit_code for c in daemon.tool_calls("watched-on")] == [5])
    [found] = daemon.watch().sandboxes
    again = register(daemon, "gold", "ada", pid=first.pid)
    assert again.cgroup_id == found.cgroup_id and list(daemon.watch().sandboxes) == [found]
    first.leave()
    eventually(lambda: not daemon.watch().sandboxes)
    daemon.agent("gold", "ada").leave()


def test_another_tenant_gets_neither_the_process_nor_the_calls(daemon):
    agent = daemon.agent("gold", "mine")
    code, details = refused(lambda: register(daemon, "silver", "yours", pid=agent.pid))
    assert code == "ALREADY_EXISTS" and f"pid {agent.pid} is in sandbox gold/mine already" in details
    agent.begin("sleep", "30")
    call = eventually(lambda: next(iter(daemon.tool_calls("sleep 30")), None))
    assert refused(lambda: register(daemon, "silver", "yours", pid=call.pid))[0] == "ALREADY_EXISTS"
    other = daemon.agent("silver", "other")
    request = sandbox_pb2.BeginToolCallRequest(tenant_id="silver", name="other", command="x", pid=call.pid)
    assert refused(lambda: daemon.sandboxes.BeginToolCall(request))[0] == "ALREADY_EXISTS"
    os.kill(call.pid, 9)
    assert agent.result().returncode == -9
    nested = agent.call(*CLI, "run", "--tenant", "silver", "--name", "nested", "--", "true")
    assert nested.returncode == 1 and "is in sandbox gold/mine already" in nested.stderr
    assert {c.tenant_id for c in daemon.tool_calls("sleep 30")} == {"gold"}
    assert not Path("/sys/fs/cgroup/unified", daemon.base, "silver/nested").exists()
    agent.leave()
    other.leave()
    eventually(lambda: not daemon.watch().sandboxes)


def test_a_cgroup_is_registered_once_and_never_our_own(daemon):
    driver = CgroupDriver.open(base=f"{daemon.base}-foreign")
    path = f"{driver.base}/box"
    for hierarchy in driver.layout.hierarchies:
        (hierarchy.mount / path / "inner").mkdir(parents=True)
    try:
        first = register(daemon, "gold", "box", cgroup_path=f"//{path}/")
        assert first.cgroup_path == path and register(daemon, "gold", "box", cgroup_path=path) == first
        for taken in (path, f"{path}/inner", driver.base):
            code, details = refused(lambda p=taken: register(daemon, "silver", "thief", cgroup_path=p))
            assert code == "ALREADY_EXISTS" and f"gold/box is registered at {path}" in details
        assert refused(lambda: register(daemon, "gold", "box", cgroup_path=f"{path}/inner"))[0] == "ALREADY_EXISTS"
        for name in ("../../..", "", "a/b"):
            assert refused(lambda n=name: register(daemon, "gold", n, cgroup_path=path))[0] == "INVALID_ARGUMENT"
        for ours in (daemon.base, f"{daemon.base}/"):
            assert refused(lambda p=ours: register(daemon, "gold", "base", cgroup_path=p))[0] == "PERMISSION_DENIED"
        assert [(s.tenant_id, s.name) for s in daemon.watch().sandboxes] == [("gold", "box")]
        daemon.sandboxes.RemoveSandbox(sandbox_pb2.RemoveSandboxRequest(tenant_id="gold", name="box"))
    finally:
        driver.remove(driver.base)
        driver.close()


def test_a_name_whose_agent_has_gone_is_taken_over_with_what_it_left(daemon):
    agent = daemon.agent("gold", "heir")
    agent.call("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & : left-behind")
    agent.leave()
    eventually(lambda: "agent_gone" in daemon.said())
    [before] = [s for s in daemon.watch().sandboxes if s.name == "heir"]
    heir = daemon.agent("gold", "heir")
    [after] = [s for s in daemon.watch().sandboxes if s.name == "heir"]
    assert (after.cgroup_id, after.session_id) == (before.cgroup_id, before.session_id)
    assert after.agent_pid == heir.pid
    assert heir.call("sh", "-c", "exit 4 # the-heirs").returncode == 4
    eventually(lambda: [c.exit_code for c in daemon.tool_calls("the-heirs")] == [4])
    [left] = daemon.tool_calls("left-behind")
    assert left.escaped_count == 1
    driver = CgroupDriver.open(base=daemon.base)
    for pid in driver.processes(f"{daemon.base}/gold/heir/tools"):
        os.kill(pid, 9)
    driver.close()
    heir.leave()
    eventually(lambda: not daemon.watch().sandboxes)


def test_a_pid_that_ends_meanwhile_is_refused(daemon):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    assert refused(lambda: register(daemon, "gold", "late", pid=gone.pid))[0] == "NOT_FOUND"
    assert not of_tenants(daemon)

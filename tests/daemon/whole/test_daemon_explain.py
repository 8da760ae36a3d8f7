"""`equipoise explain` and `why-not` against a daemon that has decided, and one that was started since."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.tests.fixtures.running_daemon import RunningDaemon, eventually, grow, with_probes

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path) as running:
        yield running


def said(daemon: RunningDaemon, *command: str) -> str:
    done = daemon.cli(*command, "--socket", str(daemon.socket))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_call_is_explained_in_five_lines_a_decision_by_call_decision_and_session(daemon: RunningDaemon) -> None:
    assert daemon.agent().call(*grow(100, "'granted'")).returncode == 0
    call = daemon.tool_calls("'granted'")[0].tool_call_id
    lines = said(daemon, "explain", call[-8:]).splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r"grant 128 MiB  gold/ada python\S*  at \d\d:\d\d:\d\d, \d+\.\d s ago", lines[0])
    assert [line.split()[0] for line in lines[1:]] == ["because", "measured", "weighed", "outcome"]
    assert "completed after" in lines[4] and "kernel budget" in lines[4]
    (decision,) = json.loads(said(daemon, "explain", "--json", call))
    assert decision["at_unix_ns"] > decision["at_ns"] and decision["unit"] == "MiB"
    assert said(daemon, "explain", decision["decision_id"]).splitlines()[1:] == lines[1:]
    assert said(daemon, "explain", "gold/nobody").startswith("nothing was decided: `equipoise why-not`")


def test_who_ended_a_call_and_what_its_agent_calls_it_is_said_of_the_call(daemon: RunningDaemon) -> None:
    agent = daemon.agent()
    request = sandbox_pb2.BeginToolCallRequest(
        tenant_id="gold", name="ada", command="Bash: sleep", external_id="toolu_7"
    )
    daemon.sandboxes.BeginToolCall(request)
    agent.begin("sleep", "30")
    (call,) = eventually(lambda: [c for c in daemon.tool_calls("Bash: sleep") if c.pid])
    os.kill(call.pid, signal.SIGTERM)
    agent.result()
    eventually(lambda: daemon.tool_calls("Bash: sleep")[0].facts)
    ended, named = said(daemon, "explain", call.tool_call_id).splitlines()[:2]
    assert f"SIGTERM to pid {call.pid} from " in ended and f"(pid {os.getpid()})" in ended
    assert named.endswith(": its agent knows it as toolu_7")


def test_what_was_decided_before_a_reboot_is_read_from_the_journal(daemon: RunningDaemon) -> None:
    assert daemon.agent().call(*grow(100, "'long ago'")).returncode == 0
    call = daemon.tool_calls("'long ago'")[0].tool_call_id
    before = said(daemon, "explain", call).splitlines()
    assert daemon.stop() == 0
    with closing(sqlite3.connect(daemon.state / "journal.sqlite")) as journal:
        journal.execute("UPDATE runs SET boot_id = 'another'")
        journal.commit()
    daemon.start()
    assert not daemon.tool_calls("'long ago'"), "the daemon itself remembers nothing of another boot"
    after = said(daemon, "explain", call[-8:]).splitlines()
    assert after[1:] == before[1:]
    assert after[0].rpartition(", ")[0] == before[0].rpartition(", ")[0], "by the wall clock of then"
    subject, budget = said(daemon, "why-not", call).splitlines()
    assert subject.endswith("of 128 MiB, of an earlier run")
    assert "tool call at its budget" in budget and "against 128 MiB" in budget


def test_a_call_that_was_left_alone_says_what_stopped_each_rule(daemon: RunningDaemon) -> None:
    agent = daemon.agent()
    agent.begin(*grow(20, "time.sleep(60)  # left alone"))
    eventually(lambda: any(c.used_bytes > 20 << 20 for c in daemon.tool_calls("# left alone")))
    call = daemon.tool_calls("# left alone")[0].tool_call_id
    subject, budget, ladder = said(daemon, "why-not", call[-8:]).splitlines()
    assert re.fullmatch(r"gold/ada python\S*, running, peak \d+ MiB of 64 MiB", subject)
    assert re.search(r"tool call at its budget +\d+\S* against 64 MiB: its peak is below: it never had to ask", budget)
    assert re.search(
        r"tool pool above 0.90 for 2s: throttle +0\.\d+ against 0.9 of the pool: it does not press", ladder
    )
    answered = json.loads(said(daemon, "why-not", "--json", call))
    assert [look["threshold"] for look in answered["looks"]] == [64, 0.9]
    missing = daemon.cli("why-not", "nobody", "--socket", str(daemon.socket))
    assert missing.returncode == 1 and "no tool call nobody" in missing.stderr

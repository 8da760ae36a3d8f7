"""The demo as a person runs it: the real daemon, engine, agents and kernel."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.engine, pytest.mark.slow]


def start(out, seconds, *options):
    argv = (
        sys.executable,
        "-m",
        "equipoise.daemon.cli",
        "demo",
        "--seconds",
        str(seconds),
        "--out",
        str(out),
        *options,
    )
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_behind(process, out):
    """Processes and cgroups of the demo that was `process` and wrote into `out`."""
    found = []
    for other in psutil.process_iter():
        try:
            words = [other.cwd(), *other.cmdline()]
        except psutil.Error:
            continue
        if other.pid != os.getpid() and any(str(out) in word for word in words):
            found.append(" ".join(words))
    # Two levels down at most: what lies deeper comes and goes under a glob's feet.
    cgroups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/equipoise-demo-{process.pid}")]
    cgroups += [str(path) for path in Path("/sys/fs/cgroup").glob(f"equipoise-demo-{process.pid}")]
    return found + cgroups


@pytest.fixture(autouse=True)
def _possible_here():
    if os.geteuid() != 0:
        pytest.skip("not root")


def remove_cgroups(process):
    """What a killed demo could not remove itself; its daemon may be doing the same just now."""
    for directory in Path("/sys/fs/cgroup").glob(f"**/equipoise-demo-{process.pid}"):
        for folder in (*sorted((d for d in directory.rglob("*") if d.is_dir()), reverse=True), directory):
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()


def test_the_demo_ends_well_and_reports_what_really_happened(tmp_path):
    process = start(tmp_path, 45)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())

    calls = report["tool_calls"]
    assert {call["source"] for call in calls} == {"hook", "wrapper", "lineage"}
    assert len(calls) >= 15
    assert all(call["end_ns"] is None or call["end_ns"] >= call["start_ns"] for call in calls)
    correlated = [call for call in calls if call["kv_held_bytes"] > 0]
    assert len(correlated) > len(calls) / 2
    assert any(call["escaped_count"] for call in calls)

    (runaway,) = [call for call in calls if "runaway.py" in call["command"]]
    assert runaway["signal"] == signal.SIGKILL
    assert runaway["peak_bytes"] < 520 << 20, "it was stopped at its budget, long before its own end at 3 GiB"
    if report["probe_backend"] == "libbpf":
        assert 0 <= runaway["overshoot_bytes"] < 1 << 20

    assert [agent["exit_code"] for agent in report["agents"]] == [0] * 6
    fox = next(agent for agent in report["agents"] if agent["name"] == "fox")
    assert fox["killed_count"] >= 1 and fox["notices"], "its agent was told why"
    assert "`python jobs/runaway.py` was stopped" in " ".join(printed.split())

    assert report["decisions"] and all(decision["rule"] for decision in report["decisions"])
    assert report["engine"]["decode_tokens"] > 100
    assert {row["tenant"] for row in report["fairness"]} == {"gold", "silver", "bronze"}
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "state" / "journal.sqlite").stat().st_size > 0
    assert left_behind(process, tmp_path) == []


def test_interrupted_the_demo_leaves_no_process_and_no_cgroup(tmp_path):
    process = start(tmp_path, 60)
    deadline = time.monotonic() + 90
    logs = tmp_path / "agents"
    while time.monotonic() < deadline and process.poll() is None:
        if any('"kind": "tool"' in path.read_text() for path in logs.glob("*.jsonl")):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed[-4000:]
    assert "interrupted: everything was stopped" in printed
    assert left_behind(process, tmp_path) == []


def test_a_demo_that_is_killed_takes_its_processes_with_it(tmp_path):
    process = start(tmp_path, 60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "agents").glob("*.jsonl")):
        time.sleep(0.2)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any("python" in line for line in left_behind(process, tmp_path)):
        time.sleep(0.5)
    left = left_behind(process, tmp_path)
    remove_cgroups(process)
    assert not [line for line in left if "/sys/fs/cgroup" not in line], "the empty cgroups are all that may stay"


def test_a_folder_that_cannot_be_written_is_one_line():
    process = start("/proc/nowhere", 10)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert printed.startswith("error: ") and "/proc/nowhere" in printed and len(printed.splitlines()) == 1


def test_a_model_that_is_none_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "model.gguf").write_text("not a model")
    process = start(tmp_path / "out", 10, "--model", str(tmp_path / "model.gguf"))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not a GGUF" in printed
    assert left_behind(process, tmp_path / "out") == []

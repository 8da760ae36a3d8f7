"""`equipoise doctor` on this kernel: what it says is held against what the kernel itself shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def rows():
    command = [sys.executable, "-m", "equipoise.daemon.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fit"] is (done.returncode == 0)
    return {row["name"]: row for row in answer["rows"]}


def test_it_finds_cgroup_v2_with_every_controller_and_nothing_missing(rows):
    row = rows["cgroups"]
    assert row["status"] == "ok", row
    assert "v2 (memory: v2, cpu: v2, pids: v2)" in row["detail"]


def test_it_finds_pressure_with_triggers(rows):
    assert rows["pressure (PSI)"]["status"] == "ok"
    assert "triggers work" in rows["pressure (PSI)"]["detail"]


def test_it_says_that_there_is_no_swap(rows):
    assert Path("/proc/swaps").read_text().count("\n") == 1
    assert rows["swap"]["status"] == "absent"


def test_it_finds_all_our_programs_at_work(rows):
    assert rows["probes"]["status"] == "ok", rows["probes"]


@pytest.mark.parametrize("kind", ["fentry", "fmod_ret", "kprobe"])
def test_it_finds_the_program_kinds_that_the_development_kernel_refuses(rows, kind):
    assert rows[f"eBPF {kind}"]["status"] == "ok", rows[f"eBPF {kind}"]


def test_it_does_not_pretend_what_no_kernel_has(rows):
    assert rows["eBPF memcg_bpf_ops"]["status"] == "absent"
    assert rows["GPU (NVML)"]["status"] == "absent"


def test_it_sees_that_systemd_runs_the_machine(rows):
    assert rows["systemd"]["status"] == "ok"

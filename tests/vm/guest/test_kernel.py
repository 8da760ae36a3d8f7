"""What kind of kernel this is: the one that most users have and the development machines have not."""

import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm


def test_the_guest_runs_another_kernel_with_systemd_as_pid_1():
    assert tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12)
    assert Path("/proc/1/comm").read_text().strip() == "systemd"
    assert Path("/proc/1/cmdline").read_bytes().startswith(b"/lib/systemd/systemd")


def test_the_tests_run_under_the_interpreter_of_the_project():
    assert "pyenv/shims" not in str(Path("/proc/self/exe").readlink())
    assert Path(sys.prefix, "pyvenv.cfg").exists()


def test_all_controllers_are_on_one_cgroup2_mount():
    assert {"cpu", "io", "memory", "pids"} <= set(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    assert [line.split()[1] for line in mounts if line.split()[2].startswith("cgroup")] == ["/sys/fs/cgroup"]


def test_sched_ext_is_there_and_idle():
    assert Path("/sys/kernel/sched_ext/state").read_text().strip() == "disabled"

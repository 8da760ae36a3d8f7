"""Fixtures for the daemon's parts: fake cgroup trees under tmp_path, and cgroups of this machine's kernel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from equipoise.daemon.errors import CgroupError
from equipoise.daemon.observe.journal import Journal
from equipoise.daemon.sandboxes.cgroups import CgroupDriver, Layout, detect
from equipoise.daemon.sandboxes.processes import boot_id

_NUMBER = count(1)
V2_FILES = {
    "cgroup.controllers": "cpu memory pids",
    "cgroup.subtree_control": "cpu memory pids",
    "cgroup.procs": "",
    "cgroup.freeze": "0",
    "cgroup.kill": "",
    "cgroup.events": "populated 1\nfrozen 0\n",
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.high": "max\n",
    "memory.max": "max\n",
    "memory.stat": "anon 1024\nactive_file 1000\ninactive_file 96\n",
    "memory.events": "low 0\nhigh 7\nmax 2\noom 1\noom_kill 1\n",
    "memory.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.50 avg60=0 avg300=0 total=3\n",
    "memory.reclaim": "",
    "cpu.max": "max 100000\n",
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
}


class FakeTree:
    """A cgroup file system of plain files: what the kernel would show, and what was written to it."""

    def __init__(self, root: Path, mounts: dict[str, str]) -> None:
        """`mounts`: folder to controllers; "cgroup2" is the type of the one that is called `unified` or `""`."""
        self.root = root / "cgroup"
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        lines = []
        for number, (folder, controllers) in enumerate(mounts.items()):
            mount = self.root / folder
            mount.mkdir(parents=True, exist_ok=True)
            if folder in ("", "unified"):
                (mount / "cgroup.controllers").write_text(controllers)
                lines.append(f"{30 + number} 1 0:{number} / {mount} rw - cgroup2 cgroup2 rw")
            else:
                lines.append(f"{30 + number} 1 0:{number} / {mount} rw - cgroup cgroup rw,{controllers}")
        (self.proc / "self/mountinfo").write_text("\n".join(["1 0 0:1 / / rw - ext4 /dev/vda rw", *lines]) + "\n")
        (self.proc / "self/cgroup").write_text("0::/\n")

    def layout(self) -> Layout:
        return detect(self.root, self.proc)

    def driver(self, base: str = "equipoise") -> CgroupDriver:
        return CgroupDriver.open(self.root, self.proc, base)

    def populate(self, path: str, files: dict[str, str]) -> Path:
        directory = self.root / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)
        return directory

    def read(self, path: str) -> str:
        return (self.root / path).read_text().strip()


@pytest.fixture
def v2_tree(tmp_path: Path) -> FakeTree:
    return FakeTree(tmp_path, {"": "cpu memory pids"})


@pytest.fixture
def hybrid_tree(tmp_path: Path) -> FakeTree:
    return FakeTree(tmp_path, {"memory": "memory", "cpu,cpuacct": "cpu,cpuacct", "pids": "pids", "unified": ""})


@pytest.fixture
def driver() -> Iterator[CgroupDriver]:
    """The kernel's cgroups, under a base of this test's own that is removed after it, whatever is left in it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    try:
        found = CgroupDriver.open(base=f"eqtest-{os.getpid()}-{next(_NUMBER)}")
        found.prepare()
    except CgroupError as error:
        pytest.skip(f"no cgroups here: {error}")
    yield found
    found.thaw(found.base)
    found.kill(found.base)
    removed = found.remove(found.base, patience_s=3.0)
    found.close()
    assert found.cgroup_id(found.base) is None, removed.detail


Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a Python child; it is killed and waited for after the test."""
    children: list[subprocess.Popen[bytes]] = []

    def start(code: str = "import time; time.sleep(600)", *arguments: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        children.append(child)
        return child

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            # Not communicate(): a grandchild may hold the other end and outlive this.
            if stream is not None:
                stream.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path / "journal.sqlite", boot_id=boot_id(), started_ns=time.monotonic_ns())
    yield opened
    opened.close()


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether the claim comes true in time; what the kernel does takes some milliseconds."""
    deadline = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True

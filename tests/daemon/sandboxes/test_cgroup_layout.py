"""Detecting the cgroup layout, from mount tables written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from equipoise.daemon.errors import CgroupError, LayoutError
from equipoise.daemon.sandboxes.cgroups import LayoutKind, detect
from equipoise.daemon.sandboxes.cgroups.layout import current_path
from equipoise.daemon.sandboxes.cgroups.tree import checked_path

from ..conftest import FakeTree


def test_one_cgroup2_mount_with_memory_is_v2(v2_tree: FakeTree) -> None:
    layout = v2_tree.layout()
    assert layout.kind is LayoutKind.V2
    assert layout.memory == layout.cpu == layout.pids == layout.unified
    assert layout.hierarchies == (layout.unified,)


def test_v1_memory_beside_a_bare_cgroup2_mount_is_hybrid(hybrid_tree: FakeTree) -> None:
    layout = hybrid_tree.layout()
    assert layout.kind is LayoutKind.HYBRID
    assert layout.memory.mount == hybrid_tree.root / "memory"
    assert layout.cpu is not None and layout.cpu.mount.name == "cpu,cpuacct"
    assert layout.hierarchies[-1] == layout.unified and len(layout.hierarchies) == 4


def test_controllers_mounted_together_are_one_hierarchy(tmp_path: Path) -> None:
    layout = FakeTree(tmp_path, {"all": "memory,cpu,pids", "unified": ""}).layout()
    assert [h.mount.name for h in layout.hierarchies] == ["all", "unified"]


def test_a_missing_cpu_controller_is_no_obstacle(tmp_path: Path) -> None:
    layout = FakeTree(tmp_path, {"": "memory"}).layout()
    assert layout.kind is LayoutKind.V2 and layout.cpu is None


def test_without_a_cgroup2_mount_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as caught:
        FakeTree(tmp_path, {"memory": "memory"}).layout()
    assert "no cgroup2 file system" in caught.value.reason
    assert "mount -t cgroup2" in caught.value.remedy


def test_without_a_memory_controller_the_error_names_the_boot_option(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="cgroup_enable=memory"):
        FakeTree(tmp_path, {"cpu": "cpu", "unified": ""}).layout()


def test_mounts_outside_of_the_root_are_not_ours(v2_tree: FakeTree, tmp_path: Path) -> None:
    with pytest.raises(LayoutError):
        detect(tmp_path / "elsewhere", v2_tree.proc)


def test_a_mount_point_with_a_blank_is_unescaped(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, {"": "memory"})
    spaced = tree.root / "a b"
    spaced.mkdir()
    (spaced / "cgroup.controllers").write_text("memory")
    escaped = str(spaced).replace(" ", "\\040")
    (tree.proc / "self/mountinfo").write_text(f"30 1 0:3 / {escaped} rw - cgroup2 none rw\n")
    assert tree.layout().unified.mount == spaced


def test_the_path_of_a_process_is_relative_to_what_is_mounted(hybrid_tree: FakeTree) -> None:
    layout = hybrid_tree.layout()
    (hybrid_tree.proc / "7").mkdir()
    (hybrid_tree.proc / "7/cgroup").write_text("4:memory:/jobs/a\n3:cpu,cpuacct:/\n0::/user/b (deleted)\n")
    assert current_path(layout.unified, 7, hybrid_tree.proc) == "user/b"
    assert current_path(layout.memory, 7, hybrid_tree.proc) == "jobs/a"
    assert layout.cpu is not None and current_path(layout.cpu, 7, hybrid_tree.proc) == ""
    assert current_path(layout.unified, 8, hybrid_tree.proc) is None


@pytest.mark.parametrize("path", ["", "/", "..", "a/../b", "a//b", "a/./b", "a\0b"])
def test_a_path_that_could_leave_the_hierarchy_is_refused(path: str) -> None:
    with pytest.raises(CgroupError, match=r"without '\.\.'"):
        checked_path(path)

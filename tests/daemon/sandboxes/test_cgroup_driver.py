"""The driver against fake trees of both layouts: which file is read and written for what."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from equipoise.daemon.errors import CgroupError
from equipoise.daemon.sandboxes.cgroups import CgroupDriver, Effect, Limit
from equipoise.policies.model import TenantId, ToolCallId

from ..conftest import V2_FILES, FakeTree, Spawn

LEAF = "equipoise/gold/ada/tools/000000000000002a"
V1_UNLIMITED = "9223372036854771712\n"


@pytest.fixture
def v2(v2_tree: FakeTree) -> CgroupDriver:
    v2_tree.populate(LEAF, V2_FILES)
    return v2_tree.driver()


@pytest.fixture
def hybrid(hybrid_tree: FakeTree) -> CgroupDriver:
    v1_memory = {
        "memory.usage_in_bytes": "4096\n",
        "memory.max_usage_in_bytes": "8192\n",
        "memory.limit_in_bytes": V1_UNLIMITED,
        "memory.stat": "active_file 1\ntotal_active_file 1000\ntotal_inactive_file 96\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "memory.failcnt": "2\n",
    }
    hybrid_tree.populate(f"memory/{LEAF}", v1_memory)
    hybrid_tree.populate(f"cpu,cpuacct/{LEAF}", {"cpu.cfs_quota_us": "-1\n"})
    hybrid_tree.populate(f"unified/{LEAF}", {k: v for k, v in V2_FILES.items() if not k.startswith("memory.m")})
    return hybrid_tree.driver()


@pytest.mark.parametrize("layout", ["v2", "hybrid"])
def test_usage_reads_the_same_on_either_layout(layout: str, request: pytest.FixtureRequest) -> None:
    driver: CgroupDriver = request.getfixturevalue(layout)
    assert driver.memory_usage(LEAF) == 4096
    assert driver.memory_peak(LEAF) == 8192
    assert driver.memory_resident(LEAF) == 4096 - 1096
    assert driver.cpu_ns(LEAF) == 1_500_000
    events = driver.events(LEAF)
    assert events is not None and (events.max_count, events.oom_kill_count) == (2, 1)
    stall = driver.pressure(LEAF)
    assert stall is not None and (stall.some_ratio, stall.full_ratio, stall.full_total_us) == (0.015, 0.005, 3)
    driver.close()


def test_limits_on_v2_go_to_the_unified_files(v2: CgroupDriver, v2_tree: FakeTree) -> None:
    assert v2.limit(LEAF, Limit.MEMORY_HIGH) == "max"
    assert v2.set_memory_high(LEAF, 1048576).tier == "cgroup-v2 memory.high"
    assert v2.set_cpu_quota(LEAF, 0.25).done
    assert v2_tree.read(f"{LEAF}/memory.high") == "1048576"
    assert v2_tree.read(f"{LEAF}/cpu.max").startswith("25000 100000")


def test_limits_on_hybrid_go_to_the_v1_files(hybrid: CgroupDriver, hybrid_tree: FakeTree) -> None:
    assert hybrid.set_memory_high(LEAF, 1048576).effect is Effect.UNAVAILABLE
    assert hybrid.set_cpu_quota(LEAF, 0.25).tier == "cgroup-v1 cpu quota"
    assert hybrid_tree.read(f"cpu,cpuacct/{LEAF}/cpu.cfs_quota_us") == "25000"
    assert hybrid.restricted(LEAF) == 1


def test_a_quota_is_never_below_what_the_kernel_takes(hybrid: CgroupDriver, hybrid_tree: FakeTree) -> None:
    hybrid.set_cpu_quota(LEAF, 0.0001)
    assert hybrid_tree.read(f"cpu,cpuacct/{LEAF}/cpu.cfs_quota_us") == "1000"


@pytest.mark.parametrize("layout", ["v2", "hybrid"])
def test_lifting_leaves_nothing_that_holds_it_back(layout: str, request: pytest.FixtureRequest) -> None:
    driver: CgroupDriver = request.getfixturevalue(layout)
    assert driver.restricted(LEAF) == 0
    driver.freeze(LEAF)
    driver.set_cpu_quota(LEAF, 0.5)
    driver.set_memory_max(LEAF, 1 << 20)
    assert driver.restricted(LEAF) == 3
    # Plain files keep the tail of a longer text, as kernel files do not: start from empty ones.
    for limit in Limit:
        file = driver._limit_file(LEAF, limit)
        if file is not None:
            file.write_text("")
    assert all(result.done for result in driver.lift(LEAF))
    assert driver.restricted(LEAF) == 0


@pytest.mark.parametrize("layout", ["v2", "hybrid"])
def test_a_vanished_cgroup_is_an_outcome_everywhere(layout: str, request: pytest.FixtureRequest) -> None:
    driver: CgroupDriver = request.getfixturevalue(layout)
    gone = "equipoise/gold/nobody"
    for result in (
        driver.freeze(gone),
        driver.thaw(gone),
        driver.kill(gone),
        driver.set_memory_max(gone, 1),
        driver.set_cpu_quota(gone, 1),
        driver.attach(1, gone),
        driver.remove(gone),
    ):
        assert result.effect is Effect.GONE, result
    for ask in (
        driver.memory_usage,
        driver.memory_peak,
        driver.memory_resident,
        driver.cpu_ns,
        driver.events,
        driver.pressure,
        driver.frozen,
        driver.populated,
        driver.cgroup_id,
    ):
        assert ask(gone) is None, ask
    assert not driver.processes(gone) and not driver.below(gone)


def test_a_cgroup_made_anew_under_the_same_path_is_measured(v2: CgroupDriver, v2_tree: FakeTree) -> None:
    assert v2.memory_usage(LEAF) == 4096
    current = v2_tree.root / LEAF / "memory.current"
    current.unlink()
    current.write_text("1\n")
    v2.forget("equipoise/gold/ada")
    assert v2.memory_usage(LEAF) == 1


def test_kernels_without_memory_peak_get_the_highest_that_was_seen(v2: CgroupDriver, v2_tree: FakeTree) -> None:
    (v2_tree.root / LEAF / "memory.peak").unlink()
    for text in ("100\n", "700\n", "300\n"):
        (v2_tree.root / LEAF / "memory.current").write_text(text)
        v2.memory_peak(LEAF)
    assert v2.memory_peak(LEAF) == 700


def test_a_sandbox_has_a_runtime_and_a_place_for_tools_in_every_hierarchy(hybrid_tree: FakeTree) -> None:
    driver = hybrid_tree.driver()
    driver.prepare()
    sandbox = driver.create_sandbox(TenantId("silver"), "bob")
    leaf = driver.create_tool_leaf(sandbox.path, ToolCallId(2**64 - 1))
    assert leaf == "equipoise/silver/bob/tools/ffffffffffffffff"
    for hierarchy in ("memory", "cpu,cpuacct", "pids", "unified"):
        assert (hybrid_tree.root / hierarchy / sandbox.runtime).is_dir()
        assert (hybrid_tree.root / hierarchy / leaf).is_dir()
    assert driver.create_sandbox(TenantId("silver"), "bob") == sandbox, "making it twice finds it"
    assert driver.remove(sandbox.path).effect is Effect.DONE
    assert not list(hybrid_tree.root.glob("*/equipoise/silver/bob"))


def test_v2_hands_the_memory_controller_down(v2_tree: FakeTree) -> None:
    files = {"cgroup.controllers": "memory", "cgroup.subtree_control": "", "cgroup.procs": ""}
    for path in ("", "equipoise", "equipoise/gold", "equipoise/gold/ada", "equipoise/gold/ada/tools"):
        v2_tree.populate(path, files)
    driver = v2_tree.driver()
    driver.prepare()
    driver.create_sandbox(TenantId("gold"), "ada")
    for path in ("equipoise", "equipoise/gold", "equipoise/gold/ada", "equipoise/gold/ada/tools"):
        assert v2_tree.read(f"{path}/cgroup.subtree_control") == "+memory"


def test_v2_without_a_delegated_memory_controller_is_one_clear_line(v2_tree: FakeTree) -> None:
    v2_tree.populate("equipoise", {"cgroup.controllers": "pids", "cgroup.subtree_control": "pids"})
    with pytest.raises(CgroupError, match="no memory controller here: use Delegate=yes"):
        v2_tree.driver().prepare()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 65, "a b", "naïve"])
def test_names_that_are_no_directories_of_ours_are_refused(name: str, hybrid_tree: FakeTree) -> None:
    driver = hybrid_tree.driver()
    with pytest.raises(CgroupError, match="letters, digits"):
        driver.create_sandbox(TenantId("gold"), name)
    with pytest.raises(CgroupError, match="letters, digits"):
        driver.create_sandbox(TenantId(name), "ada")
    assert not list(hybrid_tree.root.glob("*/equipoise"))


def test_only_cgroups_below_the_base_are_removed_or_given_leaves(hybrid_tree: FakeTree) -> None:
    hybrid_tree.populate("unified/docker/abc", {})
    driver = hybrid_tree.driver()
    adopted = driver.adopt("/docker/abc/")
    assert (adopted.path, adopted.runtime, adopted.own) == ("docker/abc", "docker/abc", False)
    with pytest.raises(CgroupError, match="not below equipoise"):
        driver.remove("docker/abc")
    with pytest.raises(CgroupError, match="not made by us"):
        driver.create_tool_leaf("docker/abc", ToolCallId(1))
    with pytest.raises(CgroupError, match="no such cgroup"):
        driver.adopt("docker/xyz")


def test_without_permission_the_error_names_the_path_and_the_remedy(hybrid_tree: FakeTree) -> None:
    (hybrid_tree.root / "memory").rmdir()
    (hybrid_tree.root / "memory").write_text("a file where the hierarchy was")
    driver = hybrid_tree.driver()
    with pytest.raises(CgroupError, match=r"memory/equipoise: cannot be made: Not a directory"):
        driver.prepare()


def test_without_cgroup_kill_everything_is_frozen_and_signalled(v2_tree: FakeTree, spawn: Spawn) -> None:
    victims: list[subprocess.Popen[bytes]] = [spawn(), spawn()]
    files = {k: v for k, v in V2_FILES.items() if k != "cgroup.kill"}
    files["cgroup.procs"] = "".join(f"{v.pid}\n" for v in victims)
    v2_tree.populate(LEAF, files)
    result = v2_tree.driver().kill(LEAF)
    assert result.done and result.count == 2 and result.tier == "cgroup.freeze + SIGKILL"
    assert [v.wait(5) for v in victims] == [-9, -9]
    assert v2_tree.read(f"{LEAF}/cgroup.freeze") == "0"


def test_a_write_the_kernel_refuses_is_a_failure_with_the_path(tmp_path: Path, v2: CgroupDriver) -> None:
    # /dev/full answers ENOSPC to every write: the one refusal that a plain file can give.
    high = v2.unified_directory(LEAF) / "memory.high"
    high.unlink()
    high.symlink_to("/dev/full")
    result = v2.set_memory_high(LEAF, 1)
    assert result.effect is Effect.FAILED and str(high) in result.detail and "No space left" in result.detail

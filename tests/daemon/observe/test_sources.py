"""Samplers: what they read, and that a failing one is retried while the rest goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from equipoise.daemon.observe import sources
from equipoise.daemon.observe.sources import HostSampler, PressureTrigger, SandboxSampler, Source, read_meminfo
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.policies.events import Event, HostSampled, SandboxSampled
from equipoise.policies.model import CgroupId, Sandbox, SessionId, TenantId, ToolCall, ToolCallId, ToolCallSource
from equipoise.policies.snapshot import Snapshot

from ..conftest import V2_FILES, FakeTree

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\n"
PSI = "some avg10=12.50 avg60=0 avg300=0 total=5\nfull avg10=2.50 avg60=0 avg300=0 total=1\n"


def proc(root: Path, *, psi: bool = True) -> Path:
    (root / "pressure").mkdir()
    (root / "meminfo").write_text(MEMINFO)
    if psi:
        (root / "pressure/memory").write_text(PSI)
    return root


def test_the_host_is_sampled_in_bytes_and_ratios(tmp_path: Path) -> None:
    events: list[Event] = []
    HostSampler(events.append, lambda: 7, gpu=lambda: (80, 20), proc_root=proc(tmp_path)).sample()
    assert events == [HostSampled(7, 1000 * 1024, 400 * 1024, 0.125, 0.025, 80, 20)]


def test_without_psi_or_gpu_their_facts_are_none(tmp_path: Path) -> None:
    events: list[Event] = []
    HostSampler(events.append, lambda: 7, gpu=lambda: None, proc_root=proc(tmp_path, psi=False)).sample()
    assert events == [HostSampled(7, 1000 * 1024, 400 * 1024, None, None, None, None)]


def test_a_host_without_meminfo_is_measured_by_psutil(tmp_path: Path) -> None:
    assert read_meminfo(tmp_path).total_bytes == psutil.virtual_memory().total


def test_sandboxes_are_sampled_and_one_that_vanished_is_passed_over(v2_tree: FakeTree) -> None:
    v2_tree.populate("equipoise/gold/ada", V2_FILES)
    driver = v2_tree.driver()
    paths = {CgroupId(1): "equipoise/gold/ada", CgroupId(2): "equipoise/gold/vanished"}
    boxes = tuple(Sandbox(i, TenantId("gold"), "x", path, SessionId("s"), None, 0) for i, path in paths.items())
    snapshot = Snapshot(now_ns=1, sandboxes=boxes)
    events: list[Event] = []
    sampler = SandboxSampler(driver, lambda: snapshot, events.append, lambda: 7)
    sampler.sample()
    assert events == [SandboxSampled(7, CgroupId(1), 4096, 8192, 1_500_000)]
    assert driver._meter.kept_count > 0
    snapshot = Snapshot(now_ns=2)
    sampler.sample()
    assert driver._meter.kept_count == 0, "descriptors of removed sandboxes are given back"


def test_a_sandbox_that_stands_still_is_read_seldom_and_one_that_grows_or_works_at_once(v2_tree: FakeTree) -> None:
    usage = v2_tree.populate("equipoise/gold/ada", V2_FILES) / "memory.current"
    box = Sandbox(CgroupId(1), TenantId("gold"), "x", "equipoise/gold/ada", SessionId("s"), None, 0)
    snapshot = Snapshot(now_ns=1, sandboxes=(box,))
    events: list[Event] = []
    sampler = SandboxSampler(v2_tree.driver(), lambda: snapshot, events.append, lambda: 7)

    def samples_until_seen(used_bytes: int) -> int:
        usage.write_text(f"{used_bytes}\n")
        for count in range(1, 50):
            sampler.sample()
            if isinstance(events[-1], SandboxSampled) and events[-1].memory_bytes == used_bytes:
                return count
        raise AssertionError("never seen")

    sampler.sample()
    for _ in range(3 * sources.QUIET_READS):
        sampler.sample()
    assert len(events) == 1, "nothing has changed"
    assert 1 < samples_until_seen(64 << 20) <= sources.QUIET_READS
    assert samples_until_seen(96 << 20) == samples_until_seen(128 << 20) == 1, "it grows"
    for _ in range(2 * sources.QUIET_READS + 1):
        sampler.sample()
    wrapper = ToolCallSource.WRAPPER
    call = ToolCall(ToolCallId(5), box.tenant, box.cgroup_id, box.session, "make", "make", wrapper, 1.0, start_ns=1)
    snapshot = Snapshot(now_ns=2, sandboxes=(box,), tool_calls=(call,))
    assert samples_until_seen((128 << 20) + 4096) == 1, "a call runs in it"


class Flaky(Source):
    name = "flaky"

    def __init__(self, failing: int) -> None:
        super().__init__(interval_s=0.001)
        self.failing = failing
        self.good_count = 0

    def sample(self) -> None:
        if self.failing > 0:
            self.failing -= 1
            raise OSError(5, "Input/output error")
        self.good_count += 1


async def test_a_failing_source_is_counted_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RETRY_S", 0.001)
    source = Flaky(failing=3)
    task = asyncio.create_task(source.run())
    async with asyncio.timeout(5):
        while source.good_count < 2:
            await asyncio.sleep(0.001)
    task.cancel()
    assert source.failure_count == 3


async def test_a_source_that_meets_a_vanished_proc_keeps_running(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("nothing of use\n")
    events: list[Event] = []
    sampler = HostSampler(events.append, lambda: 1, proc_root=tmp_path, interval_s=0.001)
    task = asyncio.create_task(sampler.run())
    async with asyncio.timeout(5):
        while not sampler.failure_count:
            await asyncio.sleep(0.001)
    assert sampler.failure_count == 1 and not task.done() and not events
    task.cancel()


def test_without_pressure_files_there_is_no_trigger_and_no_error(tmp_path: Path) -> None:
    assert PressureTrigger.open(tmp_path) is None
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/memory").write_text(PSI)
    assert PressureTrigger.open(tmp_path) is None, "a plain file cannot be waited for"


@pytest.mark.kernel
async def test_the_kernel_takes_the_trigger_and_it_can_be_closed() -> None:
    if not Path("/proc/pressure/memory").exists():
        pytest.skip("this kernel has no PSI: boot with psi=1")
    trigger = PressureTrigger.open()
    assert trigger is not None
    trigger.watch(lambda: None)
    await asyncio.sleep(0.05)
    trigger.close()
    with pytest.raises(ValueError, match="closed epoll"):
        trigger.watch(lambda: None)


@pytest.mark.kernel
def test_real_sandboxes_are_sampled(driver: CgroupDriver) -> None:
    made = driver.create_sandbox(TenantId("gold"), "ada")
    box = Sandbox(made.cgroup_id, TenantId("gold"), "ada", made.path, SessionId("s"), None, 0)
    events: list[Event] = []
    SandboxSampler(driver, lambda: Snapshot(now_ns=1, sandboxes=(box,)), events.append, lambda: 7).sample()
    (event,) = events
    assert isinstance(event, SandboxSampled) and event.cgroup_id == made.cgroup_id and event.cpu_ns == 0

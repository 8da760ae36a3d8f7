"""A smoke test of sched_ext: a scheduler of ours takes over, keeps weights and hands back."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from equipoise.tests.vm.guest.loads import share_of_one_cpu, wait_until, write
from equipoise.tests.vm.machine import settings_from_environment
from equipoise.tests.vm.packages import PackageStore
from equipoise.tests.vm.scheduler_build import scheduler_build

pytestmark = pytest.mark.vm

STATE = Path("/sys/kernel/sched_ext/state")


@pytest.fixture(scope="module")
def packages() -> PackageStore:
    settings = settings_from_environment()
    return PackageStore(settings.cache, settings.kernel)


@pytest.fixture(scope="module")
def bpftool(packages):
    tree = packages.bpf()

    def run(*arguments: str) -> str:
        command = [tree.program("usr/sbin/bpftool"), *arguments]
        done = subprocess.run(command, env=tree.environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"bpftool {' '.join(arguments)}: {done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.fixture
def scheduler(packages, bpftool, tmp_path) -> Iterator[Path]:
    """Our scheduler in charge of the machine; ends it by its link. Yields the link's path."""
    compiled = scheduler_build(settings_from_environment().cache, packages.kernel_key)
    assert compiled.error is None, compiled.error
    links = Path("/sys/fs/bpf") / tmp_path.name
    links.mkdir()
    bpftool("struct_ops", "register", str(compiled.object), str(links))
    (link,) = links.iterdir()
    yield link
    link.unlink(missing_ok=True)
    links.rmdir()


def test_a_scheduler_of_ours_keeps_300_to_100_on_one_cpu(driver, make_sandbox, scheduler):
    assert STATE.read_text() == "enabled\n"
    assert Path("/sys/kernel/sched_ext/root/ops").read_text().startswith("weighted_vtime")
    heavy, light = make_sandbox().runtime, make_sandbox().runtime
    write(driver, heavy, "cpu.weight", "300")
    ratio = share_of_one_cpu(driver, heavy, light)
    assert STATE.read_text() == "enabled\n", "the kernel threw it out meanwhile"
    print(f"CPU time {ratio:.2f} to 1")
    assert 2.2 < ratio < 3.8


def test_it_hands_back_to_the_kernels_scheduler_when_it_is_unloaded(driver, make_sandbox, scheduler):
    scheduler.unlink()
    wait_until(lambda: STATE.read_text() == "disabled\n", "the end of our scheduler")
    heavy, light = make_sandbox().runtime, make_sandbox().runtime
    assert 0.6 < share_of_one_cpu(driver, heavy, light) < 1.6, "equal weights, by the kernel's own scheduler"

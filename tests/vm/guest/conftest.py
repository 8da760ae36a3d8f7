"""Joins the two sides of the guest suite (see tests/vm/plugin.py), and gives its tests cgroups to work in."""

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from equipoise.daemon.sandboxes.cgroups import CgroupDriver, Effect, SandboxCgroup
from equipoise.policies.model import TenantId, ToolCallId
from equipoise.tests.vm.plugin import GuestReporter, HostReplay, in_guest

_numbers = count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GuestReporter(config) if in_guest() else HostReplay(config), "equipoise-vm")


@pytest.fixture(scope="session")
def driver() -> Iterator[CgroupDriver]:
    """The project's driver, in the subtree that systemd delegated to the tests."""
    opened = CgroupDriver.open()
    opened.prepare()
    yield opened
    opened.close()


@pytest.fixture
def make_sandbox(driver: CgroupDriver) -> Iterator[Callable[[], SandboxCgroup]]:
    made: list[SandboxCgroup] = []

    def make() -> SandboxCgroup:
        made.append(driver.create_sandbox(TenantId("vm"), f"box{next(_numbers)}"))
        return made[-1]

    yield make
    for sandbox in made:
        driver.kill(sandbox.path)
        removed = driver.remove(sandbox.path, patience_s=30)
        assert removed.effect in (Effect.DONE, Effect.GONE), removed


@pytest.fixture
def sandbox(make_sandbox: Callable[[], SandboxCgroup]) -> SandboxCgroup:
    return make_sandbox()


@pytest.fixture
def leaf(driver: CgroupDriver, sandbox: SandboxCgroup) -> str:
    """The cgroup of a tool call, in a sandbox of its own."""
    return driver.create_tool_leaf(sandbox.path, ToolCallId(next(_numbers)))

"""Joins the two sides of the guest suite (see tests/vm/plugin.py)."""

import pytest
from equipoise.tests.vm.plugin import GuestReporter, HostReplay, in_guest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GuestReporter(config) if in_guest() else HostReplay(config), "equipoise-vm")

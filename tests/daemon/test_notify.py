"""sd_notify against a real datagram socket, path and abstract."""

import asyncio
import os
import socket

import pytest
from equipoise.daemon import notify


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def heard(listening):
    return listening.recv(4096).decode()


def pending(listening):
    listening.setblocking(False)
    try:
        return heard(listening)
    except BlockingIOError:
        return None


def test_ready_carries_pid_and_status(systemd):
    assert notify.ready("policy default; 2 sandboxes")
    assert heard(systemd) == f"READY=1\nMAINPID={os.getpid()}\nSTATUS=policy default; 2 sandboxes\n"


def test_a_status_is_one_line_whatever_it_holds(systemd):
    assert notify.status("all\nREADY=0\nfine")
    assert heard(systemd) == "STATUS=all READY=0 fine\n"


def test_stopping_is_announced(systemd):
    assert notify.stopping("bye")
    assert heard(systemd) == "STOPPING=1\nSTATUS=bye\n"


def test_reloading_carries_the_monotonic_time(systemd):
    assert notify.reloading()
    first, second = heard(systemd).splitlines()
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_the_abstract_namespace_is_reached(monkeypatch):
    name = f"equipoise-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name)
        listening.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        assert notify.status("hello")
        assert heard(listening) == "STATUS=hello\n"


@pytest.mark.parametrize("address", [None, "", "relative/path", "/nowhere/at/all"])
def test_without_systemd_every_call_is_a_safe_no_op(monkeypatch, address):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify.ready() and not notify.status("x") and not notify.stopping()


def test_the_watchdog_is_pinged_at_half_its_timeout():
    assert notify.watchdog_interval_s({"WATCHDOG_USEC": "30000000"}) == 15.0
    assert notify.watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}) == 15.0


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}],
)
def test_no_watchdog_is_asked_for(environment):
    assert notify.watchdog_interval_s(environment) is None


async def run_watchdog(progress, seconds):
    task = asyncio.create_task(notify.watchdog(progress, lambda: "turning"))
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_watchdog_is_fed_while_the_loop_turns(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    turns = iter(range(10_000))
    await run_watchdog(lambda: next(turns), 0.3)
    count = 0
    while (message := pending(systemd)) is not None:
        assert message == "WATCHDOG=1\nSTATUS=turning\n"
        count += 1
    assert count >= 5


async def test_a_loop_that_no_longer_turns_is_not_vouched_for(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    await run_watchdog(lambda: 7, 0.3)
    assert pending(systemd) is not None  # the first: it has just been started
    assert pending(systemd) is None

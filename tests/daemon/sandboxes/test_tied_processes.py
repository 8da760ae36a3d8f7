"""A child that is tied to us ends with us, however we end."""

import shutil
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from equipoise.daemon.sandboxes.processes import tied_to_us
child = subprocess.Popen(tied_to_us(("sleep", "60")), stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(60)
"""


def within(seconds, claim):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if claim():
            return True
        time.sleep(0.02)
    return False


def test_a_tied_child_ends_with_its_parent_even_by_sigkill():
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed: apt install util-linux")
    parent = subprocess.Popen((sys.executable, "-c", PARENT), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert within(5, lambda: child.name() == "sleep"), "setpriv has done its part and become the command"
    parent.kill()
    parent.communicate()
    assert within(5, lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)

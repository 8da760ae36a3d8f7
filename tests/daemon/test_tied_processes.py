"""A child that is tied to us ends with us, however we end."""

import shutil
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from equipoise.daemon.processes import tied_to_us
child = subprocess.Popen(tied_to_us(("sleep", "60")))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_tied_child_ends_with_its_parent_even_by_sigkill():
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed: apt install util-linux")
    parent = subprocess.Popen((sys.executable, "-c", PARENT), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

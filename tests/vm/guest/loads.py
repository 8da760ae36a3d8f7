"""Processes for cgroups of the guest to hold, and waiting for what the kernel says of them.

Counters and events are waited for, never a time: the guest runs some 15 times slower than its host.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from equipoise.daemon.sandboxes.cgroups import CgroupDriver

MIB = 1 << 20
PATIENCE_S = 150.0

# One page of each 4096 bytes is written, since untouched memory is charged to nobody; then waits to be ended.
_GROW = "x = bytearray(int(sys.argv[1]) << 20); print('grown', flush=True); sys.stdin.read()"
_SPIN = "while True: pass"


def start_in(driver: CgroupDriver, path: str, code: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts Python with `code`, in the cgroup `path` before its first line."""
    gate = f"import sys; sys.stdin.read(1); {code}" if code != _SPIN else f"import sys\nsys.stdin.read(1)\n{code}"
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", gate, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    applied = driver.attach(child.pid, path)
    assert applied.done, applied
    child.stdin.write(b"x")
    child.stdin.flush()
    return child


def grow(driver: CgroupDriver, path: str, mebibytes: int) -> "subprocess.Popen[bytes]":
    """A process that takes so much memory, says so on its stdout, and holds it."""
    return start_in(driver, path, _GROW, str(mebibytes))


def spin(driver: CgroupDriver, path: str) -> "subprocess.Popen[bytes]":
    """A process that uses all the CPU it gets."""
    return start_in(driver, path, _SPIN)


def has_grown(child: "subprocess.Popen[bytes]") -> bool:
    """Waits until `grow` has all of its memory; False where it ended before."""
    assert child.stdout is not None
    return child.stdout.readline() == b"grown\n"


def wait_until(
    condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S, pause_s: float = 0.05
) -> None:
    """Polls until `condition` holds; fails naming `what` did not come. `pause_s`: longer where asking is work."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience_s:.0f} s: {what}"
        time.sleep(pause_s)


def share_of_one_cpu(driver: CgroupDriver, heavy: str, light: str) -> float:
    """CPU time of a spinner in `heavy` for each second of one in `light`, both bound to the same CPU."""
    for path in (heavy, light):
        os.sched_setaffinity(spin(driver, path).pid, {0})
    wait_until(lambda: _cpu_ns(driver, light) > 100_000_000, "both spinners at work")
    heavy_before_ns, light_before_ns = _cpu_ns(driver, heavy), _cpu_ns(driver, light)
    wait_until(lambda: _cpu_ns(driver, light) - light_before_ns > 3_000_000_000, "three seconds of CPU time")
    return (_cpu_ns(driver, heavy) - heavy_before_ns) / (_cpu_ns(driver, light) - light_before_ns)


def _cpu_ns(driver: CgroupDriver, path: str) -> int:
    used_ns = driver.cpu_ns(path)
    assert used_ns is not None, f"{path} is gone"
    return used_ns


def read(driver: CgroupDriver, path: str, file: str) -> str:
    """A file of a cgroup that the driver has no name for."""
    return (driver.unified_directory(path) / file).read_text()


def write(driver: CgroupDriver, path: str, file: str, value: str) -> None:
    """Raises OSError with what the kernel says."""
    descriptor = os.open(driver.unified_directory(path) / file, os.O_WRONLY)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def field(text: str, key: str) -> int:
    """One number of a file of `key value` lines."""
    return int(dict(line.split(" ", 1) for line in text.splitlines())[key])

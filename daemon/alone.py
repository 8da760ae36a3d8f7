"""One daemon per state folder and per cgroup base: two locks, taken before anything else is touched.

Owns the locks. Each is a flock(2) on an open file, so the kernel gives it back however the daemon ends, and no file
that is left behind means anything. The state folder is locked at a file of ours in it; the base, where no file can be
made, at its own `cgroup.kill` (which only its owner can open, so that no other user can keep the daemon out), before
Linux 5.14 at the directory. A cgroup has the same inode in every mount and namespace that shows it: a daemon in a
container is met as well. Rejected: an abstract unix socket named after the base, which each network namespace has for
itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from pathlib import Path

from .errors import CgroupError, DaemonError
from .sandboxes.cgroups import CgroupDriver

LOCK_NAME = "daemon.lock"
_PATIENCE_S = 0.5
"""A daemon that is ending has answered its last call before its locks are free."""
_ATTEMPTS = 100


def claim_folder(folder: Path, base: str, parts: contextlib.AsyncExitStack) -> None:
    """Until `parts` is left. `base` is for whoever comes second. Raises DaemonError."""
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DaemonError(f"{folder}: {error.strerror}: give --state-dir a folder that is yours") from error
    if not _lock(descriptor):
        said = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise DaemonError(
            f"state folder {folder}: in use by another daemon ({said or 'pid not known'}): stop it, or give another "
            "with --state-dir"
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()}, cgroup base {base}\n".encode(), 0)
    parts.callback(os.close, descriptor)


def claim_base(driver: CgroupDriver, parts: contextlib.AsyncExitStack) -> None:
    """Until `parts` is left, when the base goes too, where nothing is left in it. Raises DaemonError.

    A base that cannot be made, or is not ours to write, is not claimed: `CgroupDriver.prepare` says what is wrong.
    """
    directory = driver.unified_directory(driver.base)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK, effective_ids=True):
            return
        descriptor = _open(directory)
        if descriptor is None:
            continue  # removed since: a daemon that ends takes its empty base along
        if not _lock(descriptor):
            holder = _holder(descriptor)
            os.close(descriptor)
            raise DaemonError(
                f"cgroup base {driver.base}: in use by another daemon ({holder}): stop it, or give another with "
                "--cgroup-base"
            )
        if _is(descriptor, directory):
            parts.callback(os.close, descriptor)
            parts.callback(_remove, driver)
            return
        os.close(descriptor)
    raise DaemonError(f"cgroup base {driver.base}: comes and goes: give another with --cgroup-base")


def _remove(driver: CgroupDriver) -> None:
    with contextlib.suppress(CgroupError):  # not ours to look into: not ours to remove
        driver.remove(driver.base, patience_s=0.0)


def _open(directory: Path) -> int | None:
    for path, flags in ((directory / "cgroup.kill", os.O_WRONLY), (directory, os.O_RDONLY)):
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM):
                raise DaemonError(f"{path}: {error.strerror}: see dmesg") from error
    return None


def _is(descriptor: int, directory: Path) -> bool:
    """Whether what is open is still what is there: a base of this name may have been removed and made again."""
    ours = os.fstat(descriptor)
    for path in (directory / "cgroup.kill", directory):
        with contextlib.suppress(OSError):
            there = path.stat()
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return True
    return False


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PATIENCE_S / 10)
            continue
        return True


def _holder(descriptor: int) -> str:
    """Who holds the lock, by /proc/locks (proc(5)), which does not show processes of other PID namespaces."""
    there = os.fstat(descriptor)
    which = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    with contextlib.suppress(OSError):
        found = re.search(rf"FLOCK +\S+ +WRITE +(\d+) {which} ", Path("/proc/locks").read_text())
        if found is not None and found[1] != "0":
            return f"pid {found[1]}"
    return "in another container: its pid cannot be seen from here"

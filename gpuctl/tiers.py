"""Facts about the memory below the device: how much host RAM and disk there is, and how fast the disk takes KV.

Owns: reading and timing. Must not: decide how much of it an engine may have (that is configuration and policy).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

_PROBE_BYTES = 8 << 20


def host_available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """RAM that can be had without swapping (MemAvailable); None where the kernel does not say."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def disk_free_bytes(folder: Path) -> int | None:
    """Bytes an unprivileged writer can still put into the folder's file system; None where it cannot be asked."""
    try:
        facts = os.statvfs(folder)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


def disk_bytes_per_second(folder: Path) -> float | None:
    """Speed of writing and reading back 8 MiB, the slower of the two; None where the folder cannot be written.

    The page cache is part of it, as it is part of every swap to disk of this size; fdatasync is not, since swapped KV
    needs not survive the machine.
    """
    data = os.urandom(_PROBE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            written = time.perf_counter()
            file.seek(0)
            file.read()
            read = time.perf_counter()
    except OSError:
        return None
    return _PROBE_BYTES / max(written - began, read - written)

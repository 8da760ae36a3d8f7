"""Reading and writing cgroup files by descriptor, and what came of it.

Owns the translation of errno into outcomes. Files are opened and written with os.open and os.write: a buffered
`open(path, "w").write(v)` reports the kernel's EINVAL only at an implicit close, where it is easily lost.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

GONE_ERRNOS = frozenset({errno.ENOENT, errno.ENODEV, errno.ESRCH, errno.ENOTDIR})
"""The cgroup or the process went away between our look and our write. ENODEV: read on a kept descriptor."""

_READ_BYTES = 1 << 16


class Effect(Enum):
    """What a change to a cgroup or process came to."""

    DONE = "done"
    PARTIAL = "partial"
    """The kernel did what it could (memory.reclaim answered EAGAIN)."""
    GONE = "gone"
    """The cgroup or process vanished first; not a failure."""
    UNAVAILABLE = "unavailable"
    """This layout or kernel has no such file."""
    FAILED = "failed"
    """The kernel refused; `detail` says with what."""


@dataclass(frozen=True, slots=True)
class Applied:
    """One change, the file or mechanism that made it, and what came of it."""

    effect: Effect
    tier: str
    """"cgroup-v2 memory.high", "cgroup.freeze", "signal", ..."""
    detail: str = ""
    count: int = 0
    """Processes reached, where the mechanism counts them."""

    @property
    def done(self) -> bool:
        return self.effect is Effect.DONE


def read_text(path: Path) -> str | None:
    """The whole file, or None where it, its cgroup or its controller is gone or was never there.

    Raises OSError for anything else (permission, I/O).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in GONE_ERRNOS:
            return None
        raise
    try:
        chunks = []
        while chunk := os.read(descriptor, _READ_BYTES):
            chunks.append(chunk)
    except OSError as error:
        # EOPNOTSUPP: cgroup.procs of a threaded cgroup; a pressure file of a kernel booted with psi=0.
        if error.errno in GONE_ERRNOS or error.errno == errno.EOPNOTSUPP:
            return None
        raise
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode("ascii", "replace")


def read_int(path: Path) -> int | None:
    """A file that holds one number; None where it is gone, or holds `max` or anything else that is no number."""
    text = read_text(path)
    return parse_int(text) if text is not None else None


def parse_int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def write_text(path: Path, value: str, tier: str) -> Applied:
    """Write `value` in one write(2). Never raises OSError: what the kernel said is in the result."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in GONE_ERRNOS:
            # Without its directory the cgroup is gone; without the file alone the kernel lacks the feature.
            effect = Effect.UNAVAILABLE if error.errno == errno.ENOENT and path.parent.is_dir() else Effect.GONE
            return Applied(effect, tier, f"{path}: {os.strerror(error.errno or 0)}")
        return Applied(Effect.FAILED, tier, refusal(path, value, error))
    try:
        os.write(descriptor, value.encode("ascii"))
    except OSError as error:
        if error.errno in GONE_ERRNOS:
            return Applied(Effect.GONE, tier, f"{path}: {os.strerror(error.errno or 0)}")
        if error.errno == errno.EAGAIN:
            return Applied(Effect.PARTIAL, tier, f"{path}: less than {value} could be had")
        return Applied(Effect.FAILED, tier, refusal(path, value, error))
    finally:
        os.close(descriptor)
    return Applied(Effect.DONE, tier)


def refusal(path: Path, value: str, error: OSError) -> str:
    """One line: path, value, what the kernel said, and the remedy where one is known."""
    remedy = {
        errno.EACCES: "run as root, or as the owner of a delegated cgroup",
        errno.EPERM: "run as root, or as the owner of a delegated cgroup",
        errno.EROFS: "mount the cgroup file system writable",
        errno.EBUSY: "a cgroup with controllers for its children holds no processes, and one in use is not removed",
        errno.EOPNOTSUPP: "the cgroup is threaded",
        errno.ENOSPC: "raise cgroup.max.descendants or cgroup.max.depth above it",
    }.get(error.errno or 0)
    said = f"{path}: writing {value!r}: {os.strerror(error.errno or 0)}"
    return f"{said}: {remedy}" if remedy else said

"""Which cgroup layout this host has, and where each controller lives.

Owns detection only, from `<proc_root>/self/mountinfo` restricted to mounts under `cgroup_root`. Both roots are
injectable, so a fake tree tests it. Changes nothing.

v2      one cgroup2 mount that has the memory controller.
hybrid  v1 hierarchies for memory (and usually cpu, pids) beside a cgroup2 mount without them. That mount still gives
        ids, cgroup.freeze, cgroup.kill, cgroup.procs and the pressure files; limits and usage are in the v1
        directories of the same relative path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ...errors import LayoutError
from .files import read_text

CONTROLLERS = ("memory", "cpu", "pids")
"""The controllers we use; memory is required, the others are used where they are."""


class LayoutKind(Enum):
    V2 = "v2"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted cgroup hierarchy."""

    mount: Path
    mounted_root: str
    """The part of the hierarchy that is visible at `mount`: "/" outside of containers."""
    controllers: frozenset[str]
    version: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Invariants: `unified.version == 2`; `memory` is `unified` exactly when the kind is V2."""

    kind: LayoutKind
    unified: Hierarchy
    memory: Hierarchy
    cpu: Hierarchy | None
    pids: Hierarchy | None

    @property
    def hierarchies(self) -> tuple[Hierarchy, ...]:
        """Each once, the unified one last: a process is in a sandbox when it has arrived there."""
        legacy = dict.fromkeys(h for h in (self.memory, self.cpu, self.pids) if h is not None and h != self.unified)
        return (*legacy, self.unified)


def detect(cgroup_root: Path = Path("/sys/fs/cgroup"), proc_root: Path = Path("/proc")) -> Layout:
    """Find the layout. Raises LayoutError with the reason and the remedy where there is none to use."""
    mounts = _mounts(cgroup_root, proc_root)
    unified = next((m for m in mounts if m.version == 2), None)
    if unified is None:
        raise LayoutError(
            f"no cgroup2 file system under {cgroup_root}",
            f"mount one: mkdir -p {cgroup_root}/unified && mount -t cgroup2 none {cgroup_root}/unified",
        )
    homes = {c: next((m for m in (unified, *mounts) if c in m.controllers), None) for c in CONTROLLERS}
    memory = homes["memory"]
    if memory is None:
        raise LayoutError(
            f"no memory controller under {cgroup_root}",
            "boot with cgroup_enable=memory; in a container, ask for a delegated cgroup (Delegate=yes)",
        )
    kind = LayoutKind.V2 if memory == unified else LayoutKind.HYBRID
    return Layout(kind, unified, memory, homes["cpu"], homes["pids"])


def _mounts(cgroup_root: Path, proc_root: Path) -> list[Hierarchy]:
    text = read_text(proc_root / "self" / "mountinfo")
    if text is None:
        raise LayoutError(f"{proc_root}/self/mountinfo is missing", "mount proc there, or give another proc root")
    found = []
    for line in text.splitlines():
        # proc(5): id parent major:minor root mount-point options [optional fields] - type source super-options
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 6 or len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        mount = Path(_unescape(fields[4]))
        if not mount.is_relative_to(cgroup_root):
            continue
        if tail[0] == "cgroup2":
            controllers = frozenset((read_text(mount / "cgroup.controllers") or "").split())
            found.append(Hierarchy(mount, _unescape(fields[3]), controllers, 2))
        else:
            found.append(Hierarchy(mount, _unescape(fields[3]), frozenset(tail[2].split(",")), 1))
    return found


def _unescape(field: str) -> str:
    """mountinfo writes blank, tab, newline and backslash as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def current_path(hierarchy: Hierarchy, pid: int | None = None, proc_root: Path = Path("/proc")) -> str | None:
    """The cgroup of a process (None: our own), relative to the mount and without a leading slash.

    None where the process is gone, or stands outside of what is mounted.
    """
    text = read_text(proc_root / ("self" if pid is None else str(pid)) / "cgroup")
    for line in (text or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (number == "0" and not names) if hierarchy.version == 2 else (set(names.split(",")) & hierarchy.controllers):
            path = path.removesuffix(" (deleted)")
            root = hierarchy.mounted_root.rstrip("/")
            if root and path != root and not path.startswith(root + "/"):
                # With a cgroup namespace /proc already speaks relative to the mount.
                return path.lstrip("/") if (hierarchy.mount / path.lstrip("/")).is_dir() else None
            return path[len(root) :].strip("/")
    return None

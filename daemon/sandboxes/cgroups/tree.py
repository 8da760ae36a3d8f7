"""The directories of sandboxes in every hierarchy: making, joining, listing and removing them.

Owns structure only; limits, freezing and measuring are in `driver.py`. A sandbox is

    <base>/<tenant>/<name>/           limits and usage of the whole
        runtime/                      the agent
        tools/<16 hex digits>/        one tool call each

because a v2 cgroup with controllers for its children holds no processes itself. On a hybrid host the same relative
directories exist in the v1 memory, cpu and pids hierarchies, and a process is put into all of them.

On v1 a move takes the process, not the memory it was charged for: what it touched before stays charged to where it
came from. So put a process in before it grows (before exec). A v1 memory directory counts its children too
(use_hierarchy is always 1 since Linux 5.11): a sandbox's usage is that of its runtime and its tools together.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ....policies.document import NAME
from ....policies.model import CgroupId, TenantId, ToolCallId
from ...errors import CgroupError
from .files import GONE_ERRNOS, Applied, Effect, read_text, write_text
from .layout import CONTROLLERS, Hierarchy, Layout, LayoutKind, current_path, detect

DEFAULT_BASE = "equipoise"
RUNTIME = "runtime"
TOOLS = "tools"
OWN_LEAF = ".daemon"
"""Where the daemon's own processes go when the base is the service's own cgroup. No tenant can be called so."""

_BUSY_PAUSE_S = 0.005


Whereabouts: TypeAlias = "tuple[tuple[Hierarchy, str | None], ...]"
"""Where a process is: each hierarchy with the path of its cgroup there."""


@dataclass(frozen=True, slots=True)
class SandboxCgroup:
    """A sandbox's directories, relative to the root of the hierarchy."""

    path: str
    cgroup_id: CgroupId
    runtime: str
    """Where the agent goes; the sandbox itself where the cgroup is somebody else's."""
    own: bool
    """We made it: tool calls can have leaves, and we remove it."""


class CgroupTree:
    """Sandboxes under one base directory. `prepare()` comes before the first sandbox."""

    def __init__(self, layout: Layout, base: str = DEFAULT_BASE, *, proc_root: Path = Path("/proc")) -> None:
        self.layout = layout
        self.base = checked_path(base)
        self.proc_root = proc_root

    # -- names

    def owns(self, path: str) -> bool:
        """Whether the cgroup lies below our base."""
        return path.startswith(self.base + "/")

    def sandbox_path(self, tenant: TenantId, name: str) -> str:
        """Raises CgroupError where one of the names cannot be a directory of ours."""
        for what, value in (("tenant", str(tenant)), ("sandbox name", name)):
            if not NAME.fullmatch(value):
                raise CgroupError(
                    f"{what} {value!r}: use up to 64 letters, digits, '.', '_' and '-', first a letter or digit"
                )
        return f"{self.base}/{tenant}/{name}"

    @staticmethod
    def leaf_path(sandbox: str, tool_call: ToolCallId) -> str:
        return f"{sandbox}/{TOOLS}/{tool_call:016x}"

    def unified_directory(self, path: str) -> Path:
        return self.layout.unified.mount / checked_path(path)

    def cgroup_id(self, path: str) -> CgroupId | None:
        """The inode of its v2 directory, which is what bpf_get_current_cgroup_id() answers; None: gone."""
        try:
            return CgroupId(self.unified_directory(path).stat().st_ino)
        except OSError as error:
            if error.errno in GONE_ERRNOS:
                return None
            raise CgroupError(f"{path}: {os.strerror(error.errno or 0)}") from error

    # -- making

    def prepare(self) -> None:
        """Make the base, and on v2 hand controllers down to it. Idempotent. Raises CgroupError.

        Where the base is the service's own cgroup (systemd's Delegate=yes) its processes, ours among them, move to
        a leaf first: otherwise the kernel answers EBUSY to any controller for its children.
        """
        if self.layout.kind is LayoutKind.V2:
            parent = ""
            for part in self.base.split("/"):
                self._hand_down(parent, required=False)
                parent = f"{parent}/{part}".lstrip("/")
                self._make_one(self.layout.unified, parent)
        self._make(self.base)
        if self.layout.kind is LayoutKind.V2:
            if self._has_processes(self.base):
                self._make_one(self.layout.unified, f"{self.base}/{OWN_LEAF}")
                for pid in self._processes_of(self.unified_directory(self.base)):
                    self._join(self.layout.unified, f"{self.base}/{OWN_LEAF}", pid)
            self._hand_down(self.base)
        for hierarchy in self.layout.hierarchies:
            # It may be there already, made by another user's daemon.
            if not os.access(hierarchy.mount / self.base, os.W_OK, effective_ids=True):
                raise CgroupError(
                    f"{hierarchy.mount / self.base}: not ours to write: run as root, or as the owner of a delegated "
                    "cgroup (--cgroup-base)"
                )

    def create_sandbox(self, tenant: TenantId, name: str) -> SandboxCgroup:
        """Make a sandbox, or find it where it exists already. Raises CgroupError; then nothing of it is left."""
        path = self.sandbox_path(tenant, name)
        existed = self.unified_directory(path).is_dir()
        try:
            self._make(f"{self.base}/{tenant}", hand_down=True)
            self._make(path, hand_down=True)
            self._make(f"{path}/{RUNTIME}")
            self._make(f"{path}/{TOOLS}", hand_down=True)
        except CgroupError:
            if not existed:
                self.remove(path, patience_s=0)
            raise
        cgroup_id = self.cgroup_id(path)
        if cgroup_id is None:
            raise CgroupError(f"{self.unified_directory(path)}: removed while it was being made: try again")
        return SandboxCgroup(path, cgroup_id, f"{path}/{RUNTIME}", own=True)

    def create_tool_leaf(self, sandbox: str, tool_call: ToolCallId) -> str:
        """A leaf for one tool call in a sandbox of ours; answers its path. Raises CgroupError."""
        if not self.owns(sandbox):
            raise CgroupError(f"{sandbox}: not made by us: its tool calls have no cgroups of their own")
        path = self.leaf_path(sandbox, tool_call)
        self._make(path)
        return path

    def adopt(self, path: str) -> SandboxCgroup:
        """Take an existing cgroup (of a container, say) as a sandbox, unchanged. Raises CgroupError."""
        path = checked_path(path)
        cgroup_id = self.cgroup_id(path)
        if cgroup_id is None:
            raise CgroupError(
                f"{self.unified_directory(path)}: no such cgroup: give its path relative to {self.layout.unified.mount}"
            )
        return SandboxCgroup(path, cgroup_id, path, own=False)

    # -- processes

    def attach(self, pid: int, path: str) -> Applied:
        """Put a process, all its threads included, into a leaf, in every hierarchy. GONE: the process or leaf is.

        Memory it holds already stays charged to where it was (v1). Where a hierarchy refuses, the process is put
        back, so that it is never in one half of a sandbox.
        """
        came_from = self.whereabouts(pid)
        for count, hierarchy in enumerate(self.layout.hierarchies):
            result = self._join(hierarchy, path, pid)
            if not result.done:
                self.put_back(pid, came_from[:count])
                return result
        return Applied(Effect.DONE, "cgroup.procs", count=1)

    def whereabouts(self, pid: int) -> Whereabouts:
        """Its cgroup in every hierarchy, for `put_back`; None where it is gone or stands outside of what is mounted."""
        return tuple((h, current_path(h, pid, self.proc_root)) for h in self.layout.hierarchies)

    def put_back(self, pid: int, came_from: Whereabouts) -> None:
        """Move a process to where it was. Safe where it, or its cgroup, has gone meanwhile."""
        for hierarchy, home in came_from:
            if home is not None:
                self._join(hierarchy, home, pid)

    def processes(self, path: str) -> tuple[int, ...]:
        """Every process in the cgroup and below it, zombies excluded; empty where it is gone."""
        found: list[int] = []
        for directory in self._walk(self.unified_directory(path)):
            found.extend(self._processes_of(directory))
        return tuple(sorted(set(found)))

    def cgroup_of(self, pid: int) -> str | None:
        """The process's cgroup in the unified hierarchy; None where the process is gone."""
        return current_path(self.layout.unified, pid, self.proc_root)

    def below(self, path: str) -> tuple[str, ...]:
        """The cgroup and every cgroup below it, parents first; empty where it is gone."""
        mount = self.layout.unified.mount
        return tuple(str(d.relative_to(mount)) for d in self._walk(self.unified_directory(path)))

    def children(self, path: str) -> tuple[str, ...]:
        """The cgroups right below it, by name; of any hierarchy, since one may have been removed in part."""
        names: set[str] = set()
        for hierarchy in self.layout.hierarchies:
            try:
                with os.scandir(hierarchy.mount / checked_path(path)) as entries:
                    names |= {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
            except OSError as error:
                if error.errno not in GONE_ERRNOS:
                    raise CgroupError(f"{hierarchy.mount / path}: {os.strerror(error.errno or 0)}") from error
        return tuple(f"{path}/{name}" for name in sorted(names))

    # -- removing

    def remove(self, path: str, *, patience_s: float = 0.25) -> Applied:
        """Remove a cgroup of ours with everything below it, children first, in every hierarchy.

        Blocks for up to `patience_s` while killed processes are still on their way out. Processes are not killed
        here: FAILED where some stay. Raises CgroupError for a path outside of our base.
        """
        path = checked_path(path)
        if path != self.base and not self.owns(path):
            raise CgroupError(f"{path}: not below {self.base}: only cgroups that we made are removed")
        deadline = time.monotonic() + patience_s
        existed = False
        while alive := self.processes(path):
            # Looked at first, so that a sandbox in use keeps all of its parts.
            if time.monotonic() >= deadline:
                return Applied(Effect.FAILED, "rmdir", f"{path}: holds {len(alive)} processes, pid {alive[0]} first")
            time.sleep(_BUSY_PAUSE_S)
        for hierarchy in reversed(self.layout.hierarchies):
            top = hierarchy.mount / path
            while True:
                existed = existed or top.is_dir()
                refused = [problem for d in reversed(list(self._walk(top))) if (problem := _rmdir(d)) is not None]
                if not refused:
                    break
                if time.monotonic() >= deadline:
                    return Applied(Effect.FAILED, "rmdir", refused[0])
                time.sleep(_BUSY_PAUSE_S)
        return Applied(Effect.DONE if existed else Effect.GONE, "rmdir")

    def remove_where_empty(self, path: str) -> None:
        """Remove a cgroup of ours without children, in every hierarchy; leave one that has any, or a process."""
        if not self.owns(path):
            raise CgroupError(f"{path}: not below {self.base}: only cgroups that we made are removed")
        for hierarchy in reversed(self.layout.hierarchies):
            _rmdir(hierarchy.mount / path)

    # -- inside

    def _make(self, path: str, *, hand_down: bool = False) -> None:
        for hierarchy in self.layout.hierarchies:
            self._make_one(hierarchy, path)
        if hand_down and self.layout.kind is LayoutKind.V2:
            self._hand_down(path)

    def _make_one(self, hierarchy: Hierarchy, path: str) -> None:
        directory = hierarchy.mount / path
        try:
            directory.mkdir(parents=hierarchy.version == 1, exist_ok=True)
        except OSError as error:
            remedy = {
                errno.EACCES: "run as root, or as the owner of a delegated cgroup (--cgroup-base)",
                errno.EPERM: "run as root, or as the owner of a delegated cgroup (--cgroup-base)",
                errno.EROFS: "mount the cgroup file system writable",
                errno.EEXIST: "the name is taken by a control file: choose another",
                errno.ENOSPC: "raise cgroup.max.descendants or cgroup.max.depth above it",
                errno.EAGAIN: "raise cgroup.max.descendants or cgroup.max.depth above it",
            }.get(error.errno or 0, "see dmesg")
            raise CgroupError(f"{directory}: cannot be made: {os.strerror(error.errno or 0)}: {remedy}") from error

    def _hand_down(self, path: str, *, required: bool = True) -> None:
        """Enable our controllers for the children of a v2 cgroup; those that are enabled already are left alone."""
        directory = self.layout.unified.mount / path
        offered = (read_text(directory / "cgroup.controllers") or "").split()
        enabled = (read_text(directory / "cgroup.subtree_control") or "").split()
        for controller in CONTROLLERS:
            if controller in enabled:
                continue
            if controller not in offered:
                if controller == "memory" and required:
                    raise CgroupError(f"{directory}: no memory controller here: use Delegate=yes, or another base")
                continue
            result = write_text(directory / "cgroup.subtree_control", f"+{controller}", "cgroup.subtree_control")
            if not result.done and controller == "memory" and required:
                raise CgroupError(result.detail)

    def _join(self, hierarchy: Hierarchy, path: str, pid: int) -> Applied:
        return write_text(hierarchy.mount / path / "cgroup.procs", str(pid), "cgroup.procs")

    def _has_processes(self, path: str) -> bool:
        return bool(self._processes_of(self.unified_directory(path)))

    @staticmethod
    def _processes_of(directory: Path) -> tuple[int, ...]:
        # A pid of 0 is a process of another PID namespace: it cannot be named from here.
        return tuple(pid for line in (read_text(directory / "cgroup.procs") or "").split() if (pid := int(line)) > 0)

    @staticmethod
    def _walk(top: Path) -> Iterator[Path]:
        """`top` and every directory below it that still exists, parents first."""
        pending = [top]
        while pending:
            directory = pending.pop()
            try:
                with os.scandir(directory) as entries:
                    children = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
            except OSError as error:
                if error.errno in GONE_ERRNOS:
                    continue
                raise CgroupError(f"{directory}: {os.strerror(error.errno or 0)}") from error
            yield directory
            pending.extend(directory / child for child in reversed(children))


def checked_path(path: str) -> str:
    """A relative cgroup path without empty or dotted parts. Raises CgroupError."""
    stripped = path.strip("/")
    if not stripped or any(part in ("", ".", "..") for part in stripped.split("/")) or "\0" in stripped:
        raise CgroupError(f"cgroup path {path!r}: give a path below the root of the hierarchy, without '..'")
    return stripped


def delegated_base(layout: Layout, proc_root: Path = Path("/proc")) -> str | None:
    """Our own cgroup where systemd delegated it to us (Delegate=yes), else None.

    systemd marks a delegated cgroup with an extended attribute: trusted.delegate, user.delegate for a user manager.
    """
    own = current_path(layout.unified, proc_root=proc_root)
    if not own:
        return None
    # After our own move to the leaf the delegated cgroup is one up.
    own = own.removesuffix(f"/{OWN_LEAF}")
    for name in ("trusted.delegate", "user.delegate"):
        try:
            if os.getxattr(layout.unified.mount / own, name) == b"1":
                return own
        except OSError:
            continue  # absent, or not ours to read: not delegated as far as we can know
    return None


def open_tree_layout(cgroup_root: Path, proc_root: Path, base: str | None) -> tuple[Layout, str]:
    """The layout and the base that applies: the given one, else the delegated one, else `equipoise`."""
    layout = detect(cgroup_root, proc_root)
    return layout, base or delegated_base(layout, proc_root) or DEFAULT_BASE


def _rmdir(directory: Path) -> str | None:
    """None when it is gone afterwards, else why not."""
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno in GONE_ERRNOS:
            return None
        return f"{directory}: not removed: {os.strerror(error.errno or 0)}: end the processes in it first"
    return None

"""What must be true before a process or a cgroup becomes part of a sandbox. Everything here looks; nothing is touched.

Owns the rules and the lines that say which was broken, raised as RegistrationRefused. A registration that passes cannot
stop or charge what is nobody's agent: init, the kernel's threads, the daemon and its children, whoever started it,
another sandbox's processes, our own part of the cgroup tree.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from ...policies.document import NAME
from ...policies.model import NS_PER_S, Sandbox
from ..errors import CgroupError, Refusal, RegistrationRefused
from . import processes
from .cgroups import CgroupDriver, checked_path, current_path
from .processes import PROC, ProcessRef


def check_name(name: str) -> None:
    """The one rule, whether a cgroup of that name is made or not."""
    if not NAME.fullmatch(name):
        raise RegistrationRefused(
            Refusal.INVALID,
            f"sandbox name {name!r}: use up to 64 letters, digits, '.', '_' and '-', first a letter or digit",
        )


def check_process(pid: int, *, daemon_pid: int | None = None, proc_root: Path = PROC) -> ProcessRef:
    """A process that may be watched, moved and stopped; answers it by identity."""
    daemon_pid = os.getpid() if daemon_pid is None else daemon_pid
    if pid < 0:
        raise RegistrationRefused(Refusal.INVALID, f"pid {pid}: give the pid of a process, or 0 for none")
    found = processes.stat(pid, proc_root)
    if found is None or not found.alive:
        raise RegistrationRefused(Refusal.NOT_FOUND, f"no process {pid}")
    if (whose := processes.leader(pid, proc_root)) not in (None, pid):
        raise RegistrationRefused(Refusal.INVALID, f"pid {pid} is a thread: give its process, {whose}")
    if pid == 1:
        raise _forbidden(pid, "init")
    if found.kernel_thread:
        raise _forbidden(pid, "a thread of the kernel")
    if pid == daemon_pid:
        raise _forbidden(pid, "the daemon")
    # Where the daemon is init itself, whatever was orphaned is its child, agents too.
    if daemon_pid != 1 and daemon_pid in processes.ancestors(pid, proc_root):
        raise _forbidden(pid, f"a child of the daemon (pid {daemon_pid}): its guardian, its engine, or of theirs")
    if pid in processes.ancestors(daemon_pid, proc_root):
        raise _forbidden(pid, f"what the daemon (pid {daemon_pid}) was started by")
    return ProcessRef(pid, found.start_ticks)


def check_free(pid: int, found: Sandbox | None, wanted: str) -> None:
    """`found` is the sandbox that the process is in, `wanted` the label of the one it shall be in."""
    if found is not None and found.label != wanted:
        raise RegistrationRefused(
            Refusal.TAKEN,
            f"pid {pid} is in sandbox {found.label} already: start it outside of that one, or run it as a tool call: "
            "`equipoise tool -- CMD`",
        )


def check_cgroup(path: str, driver: CgroupDriver, known: Iterable[Sandbox]) -> str:
    """A cgroup of somebody else's that may become a sandbox; answers its path in the one way it is written."""
    try:
        path = checked_path("/".join(part for part in path.split("/") if part))
    except CgroupError as error:
        raise RegistrationRefused(Refusal.INVALID, str(error)) from error
    if _meet(path, driver.base):
        raise RegistrationRefused(
            Refusal.FORBIDDEN, f"cgroup {path}: part of our own tree ({driver.base}), or above it: give a container's"
        )
    for hierarchy in driver.layout.hierarchies:
        own = current_path(hierarchy, proc_root=driver.proc_root)
        if own is not None and _below(own, path):
            raise RegistrationRefused(Refusal.FORBIDDEN, f"cgroup {path}: the daemon is in it: give a container's")
    for sandbox in known:
        if _meet(path, sandbox.path):
            raise RegistrationRefused(
                Refusal.TAKEN, f"cgroup {path}: {sandbox.label} is registered at {sandbox.path}: remove that one first"
            )
    if driver.cgroup_id(path) is None:
        raise RegistrationRefused(
            Refusal.NOT_FOUND,
            f"{driver.unified_directory(path)}: no such cgroup: give its path relative to "
            f"{driver.layout.unified.mount}",
        )
    return path


def held(sandbox: Sandbox, now_ns: int) -> RegistrationRefused:
    """The name has an agent that lives."""
    age_s = (now_ns - sandbox.registered_ns) / NS_PER_S
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - age_s))
    return RegistrationRefused(
        Refusal.TAKEN,
        f"sandbox {sandbox.label} is held by pid {sandbox.agent_pid} since {since} ({age_s:.0f} s ago): give another "
        "--name, or end that agent first",
    )


def elsewhere(sandbox: Sandbox, path: str) -> RegistrationRefused:
    """The name is registered for another cgroup."""
    where = f"cgroup {sandbox.path}" if sandbox.path else "no cgroup"
    return RegistrationRefused(
        Refusal.TAKEN, f"sandbox {sandbox.label} is registered with {where}, not {path}: give another name"
    )


def _forbidden(pid: int, what: str) -> RegistrationRefused:
    return RegistrationRefused(Refusal.FORBIDDEN, f"pid {pid} is {what}: give the pid of an agent")


def _below(path: str, top: str) -> bool:
    """At it, or below it."""
    return path == top or path.startswith(f"{top}/")


def _meet(one: str, other: str) -> bool:
    return bool(other) and (_below(one, other) or _below(other, one))

"""What /proc says of a process that was just exec'd, as far as the rules of roles want to know it.

Reading is racy by nature: a process may have exec'd again or gone. What cannot be read is left out, never guessed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...policies.events import ToolCallStarted
from ...policies.roles import ENVIRONMENT_KEYS, Exec
from .cgroups.files import read_text
from .processes import PROC, stat

_LONGEST = 64 << 10
"""Bytes read of a command line or an environment."""
_ESTABLISHED, _LISTEN = "01", "0A"
"""States in /proc/net/tcp (include/net/tcp_states.h)."""

_READ = {"x86_64": 0, "aarch64": 63}
_SELECTS = {"x86_64": (7, 23, 232, 270, 271, 281), "aarch64": (22, 72, 73)}
"""Numbers of the system calls in which a program waits for input: read; poll, select, epoll_wait and their like."""


def command_line(pid: int, proc_root: Path = PROC) -> str:
    """argv joined by blanks, as the kernel's events tell it; "" where it cannot be read."""
    return " ".join(_words(proc_root / str(pid) / "cmdline")).strip()


def environment(pid: int, proc_root: Path = PROC) -> dict[str, str]:
    """Of ENVIRONMENT_KEYS only."""
    entries = (word.partition("=") for word in _words(proc_root / str(pid) / "environ"))
    return {key: value for key, _, value in entries if key in ENVIRONMENT_KEYS}


def input_of(pid: int, proc_root: Path = PROC) -> str:
    """What its standard input is ("pipe:[123]", "/dev/pts/0"); "" where it cannot be read."""
    return _descriptor(pid, 0, proc_root)


def output_of(pid: int, proc_root: Path = PROC) -> str:
    """Likewise its standard output."""
    return _descriptor(pid, 1, proc_root)


def can_be_fed(pid: int, proc_root: Path = PROC) -> bool:
    """Whether its standard input is a pipe, a socket or a terminal. True where that cannot be read."""
    held = input_of(pid, proc_root)
    return not held or held.startswith(("pipe:", "socket:", "/dev/pts/", "/dev/tty"))


def waits_for_input(pid: int, proc_root: Path = PROC) -> bool | None:
    """Whether it sleeps in a read of its standard input, or in a poll. None: cannot be told here, or it is gone."""
    machine = os.uname().machine
    text = read_text(proc_root / str(pid) / "syscall")
    if not text or machine not in _READ:
        return None
    words = text.split()
    if not words[0].isdigit():
        return False  # "running", or -1: in no system call
    if int(words[0]) in _SELECTS[machine]:
        return True
    if int(words[0]) != _READ[machine]:
        return False
    number = int(words[1], 16)
    return number == 0 or _descriptor(pid, number, proc_root) == input_of(pid, proc_root)


def _descriptor(pid: int, number: int, proc_root: Path) -> str:
    try:
        return str((proc_root / str(pid) / "fd" / str(number)).readlink())
    except OSError:
        return ""


def has_connection(pid: int, proc_root: Path = PROC) -> bool:
    """Whether it holds an established TCP connection that it did not inherit from its parent."""
    held = _sockets(pid, _ESTABLISHED, proc_root) & _inodes(pid, proc_root)
    found = stat(pid, proc_root) if held else None
    return bool(held - _inodes(found.parent_pid, proc_root)) if found is not None else False


def listens(pid: int, proc_root: Path = PROC) -> bool:
    return bool(_sockets(pid, _LISTEN, proc_root) & _inodes(pid, proc_root))


def _words(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            data = file.read(_LONGEST)
    except OSError:
        return []
    return [word.decode(errors="replace") for word in data.rstrip(b"\0").split(b"\0")] if data else []


def _inodes(pid: int, proc_root: Path) -> set[str]:
    return {target[8:-1] for target in _descriptors(pid, proc_root) if target.startswith("socket:[")}


def _descriptors(pid: int, proc_root: Path) -> Iterator[str]:
    folder = proc_root / str(pid) / "fd"
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        try:
            yield str(entry.readlink())
        except OSError:
            continue  # closed meanwhile


def _sockets(pid: int, state: str, proc_root: Path) -> set[str]:
    """Inodes of the TCP sockets in this state, in the process's network namespace."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (read_text(proc_root / str(pid) / "net" / table) or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == state:
                found.add(fields[9])
    return found


def of_exec(event: ToolCallStarted, pid: int, first: int | None, *, below_runtime: bool, in_shell: bool) -> Exec:
    """What an exec of the kernel's looks like. `first`: the sandbox's first program."""
    full = command_line(pid)
    return Exec(
        command=full if len(full) > len(event.command) and full.startswith(event.command[:64]) else event.command,
        session_leader=event.session_leader,
        below_runtime=below_runtime or in_shell,
        environment=environment(pid),
        fed=can_be_fed(pid),
        in_shell=in_shell,
        shares_output=bool(first) and _same(output_of(pid), output_of(first or 0)),
    )


def _same(one: str, other: str) -> bool:
    return bool(one) and one == other and one != "/dev/null"

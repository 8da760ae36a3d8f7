"""What /proc says of a process that was just exec'd, as far as the rules of roles want to know it.

Reading is racy by nature: a process may have exec'd again or gone. What cannot be read is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...policies.roles import ENVIRONMENT_KEYS
from .cgroups.files import read_text
from .processes import PROC, stat

_LONGEST = 64 << 10
"""Bytes read of a command line or an environment."""
_ESTABLISHED, _LISTEN = "01", "0A"
"""States in /proc/net/tcp (include/net/tcp_states.h)."""


def command_line(pid: int, proc_root: Path = PROC) -> str:
    """argv joined by blanks, as the kernel's events tell it; "" where it cannot be read."""
    return " ".join(_words(proc_root / str(pid) / "cmdline"))


def environment(pid: int, proc_root: Path = PROC) -> dict[str, str]:
    """Of ENVIRONMENT_KEYS only."""
    entries = (word.partition("=") for word in _words(proc_root / str(pid) / "environ"))
    return {key: value for key, _, value in entries if key in ENVIRONMENT_KEYS}


def output_of(pid: int, proc_root: Path = PROC) -> str:
    """What its standard output is ("pipe:[123]", "/dev/pts/0"); "" where it cannot be read."""
    try:
        return str((proc_root / str(pid) / "fd" / "1").readlink())
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

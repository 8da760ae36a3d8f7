"""`equipoise release`: undo everything that holds something back, with the daemon or without it."""

from __future__ import annotations

import os
from pathlib import Path

from ..enforce.guardian import Release
from ..enforce.guardian import release as undo_all
from ..errors import CgroupError, CommandError
from ..rpc import client
from ..sandboxes.cgroups import CgroupDriver

JOURNAL_NAME = "journal.sqlite"


def release(socket: str, state_dir: Path | None, cgroup_base: str | None) -> list[str]:
    """What was undone, one line each. A daemon that lives is asked; after a dead one its journal is read.

    Raises CommandError where something could not be undone.
    """
    path = Path(socket.removeprefix("unix:"))
    if state_dir is None and path.exists():
        if not os.access(path, os.R_OK | os.W_OK):
            raise CommandError(f"{path}: permission denied: run as root, or as a member of the socket's group")
        try:
            with client.channel(socket) as opened:
                return client.release(opened) or ["nothing was held back"]
        except CommandError:
            pass  # it is dead or deaf: what it left is in its journal
    return words(without_daemon((state_dir or path.parent) / JOURNAL_NAME, cgroup_base))


def without_daemon(journal: Path, cgroup_base: str | None) -> Release:
    """Undo what the journal says, then what is found below our base. Raises CommandError where that fails."""
    try:
        driver = CgroupDriver.open(base=cgroup_base)
    except CgroupError:
        driver = None  # then a daemon had none either: what it held back are processes, by the journal
    try:
        result = undo_all(journal if journal.exists() else None, driver)
    except OSError as error:
        raise CommandError(f"{journal}: {error.strerror}: run it as root, or give --state-dir") from error
    finally:
        if driver is not None:
            driver.close()
    if not result.complete:
        raise CommandError(f"could not be undone: {'; '.join(result.failed)}: run it as root")
    if result.journal_problem:
        raise CommandError(
            f"{result.journal_problem}; our cgroup was walked all the same, and {result.found_count} things lifted"
        )
    return result


def words(result: Release) -> list[str]:
    lines = []
    if result.undone_count:
        lines.append(f"undone from the journal: {result.undone_count}")
    if result.gone_count:
        lines.append(f"in the journal, but its process or cgroup is gone: {result.gone_count}")
    if result.found_count:
        lines.append(f"found below our cgroup and lifted: {result.found_count}")
    return lines or ["nothing was held back"]

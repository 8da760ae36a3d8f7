"""Errors of the daemon: each is one line that names the thing, its value and the remedy.

DaemonError
├── CgroupError       a cgroup could not be made, joined or changed for a reason that is not "it is gone"
│   └── LayoutError   this host offers no cgroup layout that we can use
├── JournalError      the journal cannot be opened, read or written
├── ListenError       an address or socket cannot be had
├── GuardianError     the guardian process did not start
├── RegistrationRefused   a sandbox or call was asked for that must not be; nothing was touched
└── CommandError      a command of the CLI cannot be carried out; the message is all that is printed
    └── PolicyError   a policy that cannot be read: one line for each thing that is wrong

That a cgroup, process or session is gone is never one of these: it is an outcome (see `cgroups.files.Effect`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DaemonError(Exception):
    """Base of everything the daemon raises on purpose."""


class CgroupError(DaemonError):
    """A cgroup refused; the message carries path, value and remedy."""


class LayoutError(CgroupError):
    """No cgroup layout here can carry sandboxes."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason
        self.remedy = remedy


class JournalError(DaemonError):
    """The journal is damaged, foreign, locked by another daemon, or the disk refuses."""


class ListenError(DaemonError):
    """An address is taken or not ours to bind."""


class GuardianError(DaemonError):
    """The guardian process did not come up; nothing may be held back without it."""


class CommandError(DaemonError):
    """What the user asked for cannot be done."""


@dataclass(frozen=True, slots=True)
class PolicyProblem:
    """One thing that is wrong with a policy. `str()` is its line: "policy.yaml:7:11: spec.mode: must be ..."."""

    file: str
    problem: str
    line: int | None = None
    """From 1; None: it is about the file as a whole."""
    column: int | None = None
    path: str = ""
    """Of the field; empty: the text is no YAML, or there is none."""

    def __str__(self) -> str:
        at = f":{self.line}:{self.column}" if self.line is not None else ""
        return f"{self.file}{at}: " + (f"{self.path}: " if self.path else "") + self.problem


class PolicyError(CommandError):
    """A policy is none: everything that is wrong with it, one line each."""

    def __init__(self, *problems: PolicyProblem) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        self.lines = [str(problem) for problem in self.problems]
        super().__init__("\n".join(self.lines))


class Refusal(Enum):
    """Why a registration was refused; each is a gRPC status of its own."""

    INVALID = "invalid"
    """It makes no sense whatever the host looks like."""
    NOT_FOUND = "not found"
    TAKEN = "taken"
    """Somebody else has it: the name, the process or the cgroup."""
    FORBIDDEN = "forbidden"
    """It would harm the host or the daemon."""


class RegistrationRefused(DaemonError):
    """Refused before anything was touched."""

    def __init__(self, reason: Refusal, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

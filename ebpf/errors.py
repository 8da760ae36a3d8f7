"""What can go wrong around eBPF, as one small tree.

EbpfError
├── BuildFailed          clang is missing or refused the source
├── LibbpfError          a libbpf call failed (also an OSError: errno says why)
├── ProbesUnavailable    no probes on this machine: reason and remedy; callers go on without
│   └── AbiMismatch      the compiled object is not what this version reads: build it anew
└── UnknownTag           a tag no tool record carries (it ended, or never began)
"""

from __future__ import annotations

import os


class EbpfError(Exception):
    """Base of everything this folder raises."""


class BuildFailed(EbpfError):
    """The objects could not be compiled; the message is one line with the remedy."""


class LibbpfError(EbpfError, OSError):
    """A libbpf call failed.

    `errno` is set; `log` holds what libbpf printed about it, oldest line first (the verifier's words, when it spoke).
    """

    def __init__(self, code: int, what: str, log: tuple[str, ...] = ()) -> None:
        OSError.__init__(self, code, f"{what}: {os.strerror(code)}")
        self.log = log


class ProbesUnavailable(EbpfError):
    """eBPF cannot be used here. The caller continues with cgroup files and says what it lacks."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"eBPF probes unavailable: {reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class AbiMismatch(ProbesUnavailable):
    """The object's layouts, numbers or events are not those this version can read."""

    def __init__(self, path: object, what: str) -> None:
        super().__init__(f"{path}: {what}", "rebuild it with `make ebpf`")


class UnknownTag(EbpfError, LookupError):
    """No record carries this tag."""

    def __init__(self, tag: int) -> None:
        super().__init__(f"no tool call with tag {tag:#x}: it ended or was never begun")
        self.tag = tag

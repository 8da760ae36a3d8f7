"""What this kernel lets eBPF do, found by trying (`equipoise doctor`).

Owns the tiny programs of src/capabilities.bpf.c: each is loaded alone, attached where that is harmless, and taken out
again within milliseconds. Nothing here is needed for the daemon to run; it explains why a tier is absent.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .errors import LibbpfError
from .libbpf import BpfObject, kernel_has_type
from .probes import checked_object, failure_reason, require_kernel

_PROGRAMS = {
    "tp_btf": "lineage of tool calls",
    "rss_stat": "memory per tool call and budgets in the kernel",
    "raw_tp": "tracepoints without BTF",
    "tracepoint": "classic tracepoints",
    "iter_task": "tagging of running processes",
    "iter_cgroup": "reading many cgroups at once",
    "cpu_sampling": "CPU profiles (perf_event)",
    "kprobe": "probing functions",
    "fentry": "probing functions cheaply",
    "fmod_ret": "refusing memory with ENOMEM instead of a stop",
    "lsm": "security hooks",
    "cgroup_skb": "network traffic per sandbox",
}
_LOAD_ONLY = {"iter_task", "iter_cgroup", "cpu_sampling", "cgroup_skb"}
"""Attaching needs a target (a walk, a perf event, a cgroup) that a mere question should not touch."""
_MAPS = {
    "ring_buffer": "events to the daemon",
    "task_storage": "tags in tasks",
    "cgroup_storage": "state per sandbox",
    "mmapable_array": "reading usage without system calls",
}
_STRUCT_OPS = {
    "sched_ext_ops": "CPU weights by sched_ext",
    "memcg_bpf_ops": "memory cgroup policy by struct_ops (in no released kernel yet)",
}


class CapabilityState(Enum):
    ATTACHED = "attached"
    LOADED = "loaded"
    """Accepted (or, for struct_ops, offered) by the kernel; not attached, because that would touch something."""
    REFUSED = "refused"
    ABSENT = "absent"
    """The kernel does not know of it."""


@dataclass(frozen=True, slots=True)
class Capability:
    kind: str
    purpose: str
    state: CapabilityState
    errno: int | None = None
    reason: str | None = None

    @property
    def usable(self) -> bool:
        return self.state in (CapabilityState.ATTACHED, CapabilityState.LOADED)


def probe_program_kinds() -> tuple[Capability, ...]:
    """Try every kind. Raises ProbesUnavailable where nothing can be tried at all (not root, no BTF, no libbpf)."""
    require_kernel()
    path = checked_object("capabilities")
    tried = [_try(path, kind, purpose) for kind, purpose in (_PROGRAMS | _MAPS).items()]
    return (*tried, *(_struct_ops(name, purpose) for name, purpose in _STRUCT_OPS.items()))


def _try(path: Path, kind: str, purpose: str) -> Capability:
    """Load one program or map of the object and nothing else of it."""
    bpf = BpfObject(path)
    try:
        for name, program in bpf.programs.items():
            program.set_autoload(name == kind)
        for name, a_map in bpf.maps.items():
            a_map.set_autocreate(name == kind)
        bpf.load()
        if kind not in bpf.programs or kind in _LOAD_ONLY:
            return Capability(kind, purpose, CapabilityState.LOADED)
        bpf.programs[kind].attach().destroy()
        return Capability(kind, purpose, CapabilityState.ATTACHED)
    except LibbpfError as error:
        state = CapabilityState.ABSENT if error.errno in (errno.ENOENT, errno.ESRCH) else CapabilityState.REFUSED
        return Capability(kind, purpose, state, error.errno, failure_reason(error))
    finally:
        bpf.close()


def _struct_ops(name: str, purpose: str) -> Capability:
    """Detected by type only: loading one would put it in charge."""
    state = CapabilityState.LOADED if kernel_has_type(name) else CapabilityState.ABSENT
    return Capability(name, purpose, state, reason=None if state is CapabilityState.LOADED else "not in this kernel")

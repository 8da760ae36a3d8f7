"""The two files QEMU boots: an uncompressed kernel and a small initramfs.

Owns the formats (bzImage payload, cpio newc). Must not start anything and knows nothing of what the guest runs later.
"""

import gzip
import lzma
import stat
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import PackageError
from .packages import Tree

# Needed before or beside the root file system; a kernel that has one built in simply has no such file.
# zram is the guest's swap; its compressors are separate modules.
MODULES = ("virtio_pci", "virtiofs", "overlay", "lzo_rle", "lz4", "zram")


def bzimage(kernel: Tree) -> Path:
    """The compressed kernel of the tree: in /boot, and since 7.x beside its modules."""
    for pattern in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"):
        for path in sorted(kernel.root.glob(pattern)):
            return path
    raise PackageError(f"{kernel.root}: no vmlinuz in the kernel's packages; choose another with VM_KERNEL=")


def extract_vmlinux(compressed: Path, output: Path, zstd: Path, environment: dict[str, str]) -> None:
    """Writes the ELF kernel that a bzImage carries: decompressing it in the guest takes seconds under TCG.

    The payload starts where the boot protocol's header says: setup sectors (byte 0x1f1) + payload_offset (0x248),
    length at 0x24c (kernel: Documentation/arch/x86/boot.rst).
    """
    image = compressed.read_bytes()
    start = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        done = subprocess.run([zstd, "-dcq"], input=payload, capture_output=True, check=False, env=environment)
        elf = done.stdout  # zstd complains of the four bytes of size after the frame; the ELF check below decides
    elif payload.startswith(b"\xfd7zXZ\x00"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = zlib.decompressobj(31).decompress(payload)
    else:
        output.write_bytes(image)  # older kernels use lz4, which nothing here unpacks: they unpack themselves
        return
    if not elf.startswith(b"\x7fELF"):
        raise PackageError(f"{compressed}: its payload is no ELF kernel; choose another kernel with VM_KERNEL=")
    output.write_bytes(elf)


def module_files(kernel: Tree, names: Sequence[str] = MODULES) -> list[Path]:
    """Files of the loadable modules among `names` with what they depend on, in loading order; built-in ones left out.

    Dependencies come from each module's own `depends=` entry (.modinfo): modules.dep is made when a kernel is
    installed, and nothing is installed here.
    """
    directory = kernel.root / "usr/lib/modules"
    available = {_module_name(path): path for path in directory.rglob("*.ko*")}
    ordered: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in ordered or name not in available:
            return
        for dependency in _depends(read_module(available[name])):
            visit(dependency)
        ordered[name] = available[name]

    for name in names:
        visit(name.replace("-", "_"))
    return list(ordered.values())


def read_module(path: Path) -> bytes:
    """The module's ELF bytes, whatever Debian compressed it with."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def write_initramfs(output: Path, busybox: Path, init: Path, modules: Sequence[Path]) -> None:
    """A gzipped newc archive: busybox, our init, the modules, and the empty directories that init mounts on."""
    entries: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "sys", "lower", "upper", "root", "modules")
    ]
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries.append(("init", stat.S_IFREG | 0o755, init.read_bytes()))
    for number, module in enumerate(modules):
        entries.append((f"modules/{number:02}-{_module_name(module)}.ko", stat.S_IFREG | 0o644, read_module(module)))
    archive = b"".join(_newc(inode, *entry) for inode, entry in enumerate(entries, start=1)) + _newc(
        0, "TRAILER!!!", 0, b""
    )
    temporary = output.with_suffix(".partial")
    temporary.write_bytes(gzip.compress(archive, 1))
    temporary.replace(output)


def _newc(inode: int, name: str, mode: int, data: bytes) -> bytes:
    """One member (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _depends(module: bytes) -> Iterator[str]:
    """Names in the module's `depends=a,b` string."""
    start = module.find(b"\0depends=")
    if start >= 0:
        text = module[start + 9 : module.index(b"\0", start + 9)].decode()
        yield from (name.replace("-", "_") for name in text.split(",") if name)

"""One boot of the guest, from nothing to its exit code.

Owns the processes (two virtiofsd, one QEMU), the share between host and guest, and every time limit. Must leave none of
them behind, whatever happens, and must not know what the command means.
"""

import fcntl
import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import image
from .children import child_process, signals_as_exceptions
from .errors import BootFailed, HostUnfit, VmError
from .outcome import Outcome, read_outcome
from .packages import DEFAULT_KERNEL, PackageStore

ATTEMPTS = 3  # one boot and at most two more, and only where the guest never reached its init
BOOT_FILES = Path(__file__).with_name("boot")
REPOSITORY = Path(__file__).resolve().parents[2]
SHARE_IN_GUEST = Path("/vmshare")
# Flags of a plain x86-64-v3 machine less what TCG does badly or not at all. erms: the kernel would clear and copy pages
# with string instructions on bytes, which TCG does one by one.
CPU = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid,-erms"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to boot. Sizes are QEMU's notation, times are seconds of the host's clock."""

    cache: Path = REPOSITORY / "build" / "vm"
    """Where packages, images and the last console lie."""
    kernel: str = DEFAULT_KERNEL
    """Package name, optionally /SUITE."""
    memory: str = "1536M"
    cpus: int = 2
    boot_limit_s: float = 150.0
    """Until the guest's init has started; 12 s is usual."""
    command_limit_s: float = 600.0
    """From then to the end of the command, kept inside by systemd."""
    grace_s: float = 60.0
    """So much later the host ends a guest that did not keep that limit."""


def settings_from_environment() -> Settings:
    """Defaults, changed by VM_KERNEL, VM_MEMORY and VM_LIMIT_S."""
    defaults = Settings()
    return Settings(
        kernel=os.environ.get("VM_KERNEL") or defaults.kernel,
        memory=os.environ.get("VM_MEMORY") or defaults.memory,
        command_limit_s=float(os.environ.get("VM_LIMIT_S") or defaults.command_limit_s),
    )


def check_host() -> None:
    """Raises HostUnfit, in one line, where no guest can be run whatever is fetched."""
    if os.uname().machine != "x86_64":
        raise HostUnfit(f"the VM runs on x86_64 only, this host is {os.uname().machine}")
    if os.geteuid() != 0:
        raise HostUnfit("virtiofsd shares the host's root only for root: run as root")


class Machine:
    """Boots guests of one kernel, one at a time on this host."""

    def __init__(
        self, settings: Settings, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    ) -> None:
        check_host()
        self.settings = settings
        self._say = say
        self.packages = PackageStore(settings.cache, settings.kernel, say)
        self.console = settings.cache.resolve() / "console.log"

    def prepare(self) -> None:
        """Packages and boot files, from the cache where it has them; and what the guest's tests take from there."""
        with self._exclusive():
            self._prepare()
            self.packages.bpf(), self.packages.clang()

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        share: Path | None = None,
        output: Callable[[bytes], object] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Outcome:
        """Runs `command` as root in a fresh guest.

        Its stdout and stderr go to `output` as they come (default: this process's stdout). `share`, a directory, is the
        guest's /vmshare; what the command writes to /vmshare/results is there at once and stays. Setting `cancelled`
        ends the guest. Raises BootFailed where no attempt reached the guest's init.
        """
        script = _command_script(command, cwd or Path.cwd(), environment or {})
        return self._boot(script, share, output or _to_stdout, cancelled or threading.Event())

    def shell(self) -> int:
        """An interactive root shell in the guest, on this terminal. Returns its exit code.

        Raises HostUnfit without a terminal: the end of a pipe would not reach the guest's shell, and no limit ends it.
        """
        if not sys.stdin.isatty():
            raise HostUnfit('a shell needs a terminal on standard input; for a script use make vm CMD="bash FILE"')
        script = _command_script(["/bin/bash", "-i"], Path.cwd(), _terminal_size())
        return self._boot(script, None, None, threading.Event()).exit_code

    def _boot(
        self, script: str, share: Path | None, output: Callable[[bytes], object] | None, cancelled: threading.Event
    ) -> Outcome:
        with self._exclusive(), signals_as_exceptions(), ExitStack() as stack:
            # Socket paths are limited to 107 bytes, which a build directory may exceed.
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="equipoise-vm-")))
            share = share or scratch / "share"
            self._prepare()
            for attempt in range(1, ATTEMPTS + 1):
                _fill_share(share, script, None if output is None else self.settings.command_limit_s)
                outcome = self._attempt(scratch, share, output, cancelled)
                if outcome is not None:
                    return outcome
                again = "trying again" if attempt < ATTEMPTS else "giving up"
                self._say(f"vm: boot {attempt} of {ATTEMPTS} never reached the guest's init: {again}")
            raise BootFailed(
                f"the guest never reached its init in {ATTEMPTS} boots; its console ({self.console}) ends:\n"
                + self._console_tail()
            )

    def _prepare(self) -> None:
        store = self.packages
        kernel, unpackers = store.kernel(), store.unpackers()
        if not self._vmlinux.exists():
            image.extract_vmlinux(
                image.bzimage(kernel), self._vmlinux, unpackers.program("usr/bin/zstd"), unpackers.environment()
            )
        busybox = unpackers.program("usr/bin/busybox")
        image.write_initramfs(self._initramfs, busybox, BOOT_FILES / "init", image.module_files(kernel))
        store.qemu(), store.virtiofsd(), store.guest()

    @property
    def vmlinux(self) -> Path:
        """The uncompressed kernel, whose BTF describes the guest; there after prepare()."""
        return self._vmlinux

    @property
    def _vmlinux(self) -> Path:
        return self.settings.cache.resolve() / f"vmlinux-{self.packages.kernel_key}"

    @property
    def _initramfs(self) -> Path:
        return self.settings.cache.resolve() / f"initramfs-{self.packages.kernel_key}"

    def _attempt(
        self, scratch: Path, share: Path, output: Callable[[bytes], object] | None, cancelled: threading.Event
    ) -> Outcome | None:
        """One boot. None where the guest never reached its init."""
        with ExitStack() as stack:
            for tag, directory, cache in (("hostroot", Path("/"), "always"), ("share", share, "none")):
                stack.enter_context(self._virtiofsd(scratch / f"{tag}.socket", directory, cache))
            started = time.monotonic()
            command = self._qemu_command(scratch)
            qemu = stack.enter_context(child_process(command, self.packages.qemu().environment(), output is not None))
            failure = self._watch(qemu, share, output, cancelled)
            seconds = time.monotonic() - started
            if not (share / "reached-init").exists() and not cancelled.is_set():
                return None
            return read_outcome(share / "outcome", seconds, failure, self._console_tail)

    @contextmanager
    def _virtiofsd(self, socket: Path, directory: Path, cache: str) -> Iterator[None]:
        """A file system daemon for one directory. Debian 12's is QEMU 7's, with options of its own."""
        tree = self.packages.virtiofsd()
        program = tree.program("usr/libexec/virtiofsd", "usr/lib/qemu/virtiofsd")
        if program.parent.name == "qemu":
            options = [
                "-f",
                f"--socket-path={socket}",
                "-o",
                f"source={directory}",
                "-o",
                f"cache={cache}",
                "-o",
                "sandbox=chroot",
                "-o",
                "no_posix_lock",
            ]
        else:
            options = [
                f"--socket-path={socket}",
                f"--shared-dir={directory}",
                f"--cache={cache.replace('none', 'never')}",
                "--sandbox=chroot",
            ]
        log = socket.with_suffix(".log")
        with log.open("wb") as sink, child_process([program, *options], tree.environment(), True, sink) as daemon:
            deadline = time.monotonic() + 10
            while not socket.exists():
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise VmError(
                        f"virtiofsd for {directory} did not start: {log.read_text(errors='replace').strip()[-300:]}"
                    )
                time.sleep(0.02)
            yield

    def _qemu_command(self, scratch: Path) -> list[str | Path]:
        tree, settings = self.packages.qemu(), self.settings
        guest_layer = self.packages.guest().root
        modules = self.packages.kernel().root / "usr/lib/modules"
        append = [
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 apparmor=0 psi=1 cgroup_no_v1=all",
            f"vm.modules={modules}",
            f"vm.layer={guest_layer}" if any(guest_layer.iterdir()) else "",
        ]
        shares: list[str] = []
        for tag in ("hostroot", "share"):
            shares += [
                "-chardev",
                f"socket,id={tag},path={scratch / tag}.socket",
                "-device",
                f"vhost-user-fs-pci,chardev={tag},tag={tag}",
            ]
        return [
            tree.program("usr/bin/qemu-system-x86_64"),
            *("-L", tree.root / "usr/share/qemu", "-L", tree.root / "usr/share/seabios"),
            # A KVM device may exist and not boot a kernel (nested virtualisation): one accelerator everywhere.
            *("-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(settings.cpus)),
            *("-M", "q35,memory-backend=ram", "-m", settings.memory),
            *("-object", f"memory-backend-memfd,id=ram,size={settings.memory},share=on"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"),
            *("-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"),
            *("-chardev", "stdio,id=command,signal=off", "-serial", "chardev:command"),
            *shares,
            *("-device", "virtio-rng-pci"),
            *("-kernel", self._vmlinux, "-initrd", self._initramfs, "-append", " ".join(filter(None, append))),
        ]

    def _watch(
        self,
        qemu: subprocess.Popen[bytes],
        share: Path,
        output: Callable[[bytes], object] | None,
        cancelled: threading.Event,
    ) -> str | None:
        """Streams the command's output until QEMU ends or a limit is passed; returns which.

        Without `output` somebody sits at the guest's terminal, and no limit is kept.
        """
        if output is None or qemu.stdout is None:
            qemu.wait()
            return None
        started = time.monotonic()
        deadline = started + self.settings.boot_limit_s
        booted = False
        while True:
            if not booted and (share / "reached-init").exists():
                booted = True
                deadline = time.monotonic() + self.settings.command_limit_s + self.settings.grace_s
            if cancelled.is_set():
                return "CANCELLED: the guest was ended on request"
            if time.monotonic() > deadline:
                if not booted:
                    return None  # not a hang of the command: the caller sees that init was never reached
                seconds = time.monotonic() - started
                return f"HUNG: the guest kept no time limit, ended from outside after {seconds:.0f} s"
            if select.select([qemu.stdout], [], [], 0.25)[0]:
                chunk = os.read(qemu.stdout.fileno(), 65536)
                if not chunk:
                    qemu.wait()
                    return None
                output(chunk.replace(b"\r\n", b"\n"))

    def _console_tail(self) -> str:
        try:
            lines = self.console.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "(no console output)"
        return "\n".join(line for line in lines if line.strip())[-1500:]

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One guest and one fetch at a time per cache: two would share a console file and starve each other."""
        self.settings.cache.mkdir(parents=True, exist_ok=True)
        with (self.settings.cache / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say(f"vm: waiting for another VM of {self.settings.cache} to end")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _fill_share(share: Path, script: str, limit_s: float | None) -> None:
    """Everything the guest reads to boot and run `script`. `limit_s`: None for somebody at a terminal, and no limit."""
    shutil.rmtree(share, ignore_errors=True)  # what an attempt that never booted has left
    (share / "results").mkdir(parents=True)
    shutil.copytree(BOOT_FILES, share / "boot")
    replacements = {
        "@LIMIT_S@": "infinity" if limit_s is None else f"{limit_s:.0f}",
        "@STDIN@": "tty" if limit_s is None else "null",
        "@STDOUT@": "tty" if limit_s is None else "file:/dev/ttyS1",
        "@TERM@": os.environ.get("TERM", "dumb") if limit_s is None else "dumb",
    }
    unit = share / "boot" / "units" / "vm-command.service"
    text = unit.read_text()
    for name, value in replacements.items():
        text = text.replace(name, value)
    unit.write_text(text)
    (share / "command").write_text(script)
    (share / "command").chmod(0o755)


def _command_script(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> str:
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    # A serial line would otherwise turn \n into \r\n and echo.
    line = _resize(environment) or "stty -F /dev/ttyS1 raw -echo\n"
    return f"#!/bin/bash\n{line}cd {shlex.quote(str(cwd))} || exit 125\n{exports}exec {shlex.join(command)}\n"


def _terminal_size() -> dict[str, str]:
    size = shutil.get_terminal_size()
    return {"LINES": str(size.lines), "COLUMNS": str(size.columns)}


def _resize(environment: Mapping[str, str]) -> str:
    return f"stty rows {environment['LINES']} cols {environment['COLUMNS']}\n" if "LINES" in environment else ""


def _to_stdout(chunk: bytes) -> None:
    sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()

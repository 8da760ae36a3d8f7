"""A private apt: the system's mirror and keys, other suites, nothing installed.

Owns one directory per area (index lists, downloaded archives) and asks apt-get and apt-cache there. Reads the system's
sources to learn the mirror and the keyring, and the system's dpkg status so that only what is missing is fetched. Must
not write outside its directory and must not know what the packages are for.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import HostUnfit, PackageError

UPDATE_LIMIT_S = 300
DOWNLOAD_LIMIT_S = 900


@dataclass(frozen=True, slots=True)
class Source:
    """One `deb` source of the system: where Debian comes from on this machine, and whose signature is trusted."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str | None


@dataclass(frozen=True, slots=True)
class Package:
    """One resolved package."""

    name: str
    version: str


def host_codename(os_release: Path = Path("/etc/os-release")) -> str:
    """Debian's name of this host's release, e.g. `bookworm`. Raises HostUnfit on anything but Debian."""
    fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    if fields.get("ID", "").strip('"') != "debian":
        raise HostUnfit(
            f"{os_release}: this is {fields.get('ID', 'unknown')}, the VM is made of Debian's packages: use Debian 12+"
        )
    return fields["VERSION_CODENAME"].strip('"')


def debian_source(codename: str, etc_apt: Path = Path("/etc/apt")) -> Source:
    """The first system source that serves `codename`'s main archive."""
    for source in _system_sources(etc_apt):
        if codename in source.suites:
            return source
    raise PackageError(
        f"{etc_apt}: no source for suite {codename} in the system's apt configuration; add one, then run again"
    )


def _system_sources(etc_apt: Path) -> Iterator[Source]:
    listed = sorted((etc_apt / "sources.list.d").glob("*")) if (etc_apt / "sources.list.d").is_dir() else []
    for path in [etc_apt / "sources.list", *listed]:
        if path.suffix == ".list" and path.is_file():
            yield from _one_line_sources(path.read_text())
        elif path.suffix == ".sources" and path.is_file():
            yield from _deb822_sources(path.read_text())


def _one_line_sources(text: str) -> Iterator[Source]:
    """`deb [signed-by=KEYRING] URI SUITE COMPONENT...`, sources.list(5)."""
    for line in text.splitlines():
        match = re.match(
            r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)", line.strip()
        )
        if match is None:
            continue
        signed_by = re.search(r"signed-by=(\S+)", match["options"] or "")
        yield Source(
            match["uri"], (match["suite"],), tuple(match["components"].split()), signed_by[1] if signed_by else None
        )


def _deb822_sources(text: str) -> Iterator[Source]:
    """Stanzas of `Key: value`, sources.list(5). A key given inline (a multi-line Signed-By) is kept as it stands."""
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        fields: dict[str, str] = {}
        key = ""
        for line in lines:
            if line[:1].isspace() and key:
                fields[key] += "\n" + line
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            yield Source(
                uri,
                tuple(fields.get("suites", "").split()),
                tuple(fields.get("components", "").split()),
                fields.get("signed-by"),
            )


class AptArea:
    """apt's state under `directory`, seeing exactly `suites` of the system's own mirror.

    The system's proxies, certificates and other Acquire settings stay in force, since apt still reads its
    configuration; its sources, preferences and index lists do not.
    """

    def __init__(self, directory: Path, source: Source, suites: Sequence[str]) -> None:
        self.suites = tuple(suites)
        self._directory = directory
        self._source = replace(source, suites=self.suites, components=("main",))
        self._options = self._write_configuration()
        self._updated = False

    def update(self) -> None:
        """Fetches the index lists, once per area object."""
        if self._updated:
            return
        result = self._run(["apt-get", "update", "-q", "--error-on=any"], UPDATE_LIMIT_S)
        if result.returncode != 0:
            raise PackageError(f"apt-get update for {' '.join(self.suites)} failed: {_last_complaint(result)}")
        self._updated = True

    def candidates(self, name: str) -> dict[str, str]:
        """Suite -> version of every offer of `name` here; empty where there is none."""
        self.update()
        found: dict[str, str] = {}
        for line in self._run(["apt-cache", "madison", name], 60).stdout.splitlines():
            _, version, where = (part.strip() for part in line.split("|", 2))
            for suite in self.suites:
                if f" {suite}/" in f" {where}":
                    found.setdefault(suite, version)
        return found

    def missing_for(self, names: Sequence[str], default_suite: str) -> list[Package]:
        """`names` and what they depend on that the system lacks, each at the version apt would pick."""
        self.update()
        result = self._run(
            ["apt-get", "install", "-s", "-q", "--no-install-recommends", "-t", default_suite, *names], 120
        )
        if result.returncode != 0:
            raise PackageError(
                f"package {' '.join(names)} cannot be resolved in {' '.join(self.suites)}: {_last_complaint(result)}"
            )
        wanted = dict(re.findall(r"^Inst (\S+) (?:\[[^]]*\] )?\((\S+)", result.stdout, re.MULTILINE))
        for name in names:  # installed at that very version: apt has nothing to do, we still want our own copy
            if name not in wanted:
                wanted[name] = self._candidate(name, default_suite)
        return [Package(name.split(":")[0], version) for name, version in wanted.items()]

    def closure(self, name: str, suite: str, pattern: str) -> list[Package]:
        """What `name` of `suite` depends on, at any depth, whose package name matches `pattern`."""
        self.update()
        without = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
        result = self._run(["apt-cache", "depends", "--recurse", *without, f"{name}/{suite}"], 60)
        names = sorted(
            {line for line in result.stdout.splitlines() if re.match(pattern, line)}
            | ({name} if re.match(pattern, name) else set())
        )
        if not names:
            raise PackageError(
                f"package {name} is not in {suite} (looked for {pattern}): choose another with VM_KERNEL="
            )
        return [Package(each, self._candidate(each, suite)) for each in names]

    def fetch(self, packages: Sequence[Package], into: Path) -> None:
        """Downloads `packages` and unpacks them into the tree `into`, which has merged /usr."""
        archives = self._directory / "archives"
        shutil.rmtree(archives, ignore_errors=True)
        archives.mkdir(parents=True)
        try:
            result = self._run(
                ["apt-get", "download", "-q", *(f"{p.name}={p.version}" for p in packages)],
                DOWNLOAD_LIMIT_S,
                cwd=archives,
            )
            if result.returncode != 0:
                raise PackageError(
                    f"download of {' '.join(p.name for p in packages)} failed: {_last_complaint(result)}"
                )
            _prepare_merged_usr(into)
            for archive in sorted(archives.glob("*.deb")):
                _unpack(archive, into)
        finally:
            shutil.rmtree(archives, ignore_errors=True)

    def _candidate(self, name: str, suite: str) -> str:
        offers = self.candidates(name)
        for each in (suite, *self.suites):
            if each in offers:
                return offers[each]
        raise PackageError(
            f"package {name} is in none of {' '.join(self.suites)}: check the name and the system's apt sources"
        )

    def _write_configuration(self) -> list[str]:
        state = self._directory / "state"
        (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self._directory / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        sources = self._directory / "debian.sources"
        signed_by = f"Signed-By: {self._source.signed_by}\n" if self._source.signed_by else ""
        sources.write_text(
            f"Types: deb\nURIs: {self._source.uri}\nSuites: {' '.join(self.suites)}\nComponents: main\n{signed_by}"
        )
        settings = {
            "Dir::State": state,
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": self._directory / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            # The build directory may lie where the user _apt cannot write.
            "APT::Sandbox::User": "root",
            "Acquire::Retries": "3",
            "Acquire::Languages": "none",
            "Debug::NoLocking": "1",
        }
        return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]

    def _run(self, command: Sequence[str], limit_s: float, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [command[0], *self._options, *command[1:]],
                capture_output=True,
                text=True,
                timeout=limit_s,
                cwd=cwd,
                check=False,
                env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            )
        except FileNotFoundError:
            raise HostUnfit(f"{command[0]} is not on PATH: the VM takes its packages by the system's apt") from None
        except subprocess.TimeoutExpired:
            raise PackageError(
                f"{' '.join(command[:2])} took longer than {limit_s:.0f} s: is the mirror reachable?"
            ) from None


def _prepare_merged_usr(root: Path) -> None:
    """Makes /lib, /bin and /sbin links into /usr first: old and new packages then unpack to one place."""
    for name in ("lib", "bin", "sbin", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")


def _unpack(archive: Path, into: Path) -> None:
    """`dpkg -x`, but a link that stands where the package has a directory stays a link."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as reader:
        command = ["tar", "-x", "-C", str(into), "--keep-directory-symlink", "--no-same-owner"]
        done = subprocess.run(command, stdin=reader.stdout, capture_output=True, text=True, check=False)
    if done.returncode != 0 or reader.returncode != 0:
        raise PackageError(f"{archive.name} could not be unpacked into {into}: {_last_complaint(done)}")


def _last_complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The line a person needs of apt's output: its last error, else its last line."""
    lines = [line for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "Err:", "dpkg"))]
    return (errors or lines or ["no output"])[-1]

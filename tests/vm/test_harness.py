"""The parts of the VM harness that need no VM: sources of apt, boot files, and what a dead guest leaves behind."""

import gzip
import json
import lzma
import subprocess
from pathlib import Path

import pytest
from equipoise.tests.vm.apt import AptArea, debian_source, host_codename
from equipoise.tests.vm.errors import HostUnfit, PackageError
from equipoise.tests.vm.image import module_files, write_initramfs
from equipoise.tests.vm.outcome import read_outcome
from equipoise.tests.vm.packages import Tree
from equipoise.tests.vm.suite import ReportLog


def etc_apt(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / "apt" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return tmp_path / "apt"


DEB822 = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
ONE_LINE = """\
# deb http://mirror.example/old buster main
deb [arch=amd64 signed-by=/etc/apt/keyrings/d.gpg] http://mirror.example/debian bookworm main contrib
deb-src http://mirror.example/debian bookworm main
"""


@pytest.mark.parametrize(
    ("name", "text", "keyring"),
    [
        ("sources.list.d/debian.sources", DEB822, "/usr/share/keyrings/debian-archive-keyring.gpg"),
        ("sources.list", ONE_LINE, "/etc/apt/keyrings/d.gpg"),
    ],
)
def test_the_mirror_and_the_keyring_come_from_the_systems_own_sources(tmp_path, name, text, keyring):
    source = debian_source("bookworm", etc_apt(tmp_path, name, text))
    assert (source.uri, source.signed_by) == ("http://mirror.example/debian", keyring)


def test_a_source_that_is_switched_off_does_not_count(tmp_path):
    apt = etc_apt(tmp_path, "sources.list.d/debian.sources", "Enabled: no\n" + DEB822)
    with pytest.raises(PackageError, match="no source for suite bookworm in the system's apt configuration"):
        debian_source("bookworm", apt)


def test_a_host_that_is_not_debian_is_told_so(tmp_path):
    release = tmp_path / "os-release"
    release.write_text('ID=arch\nNAME="Arch Linux"\n')
    with pytest.raises(HostUnfit, match="this is arch, the VM is made of Debian's packages"):
        host_codename(release)


def test_a_package_that_does_not_exist_is_one_clear_line(tmp_path, monkeypatch):
    area = AptArea(
        tmp_path / "area", debian_source("bookworm", etc_apt(tmp_path, "sources.list", ONE_LINE)), ["bookworm"]
    )
    monkeypatch.setattr(area, "update", lambda: None)  # an empty index, without the network
    with pytest.raises(PackageError) as caught:
        area.missing_for(["no-such-package"], "bookworm")
    assert str(caught.value).splitlines() == [str(caught.value)]
    assert "package no-such-package cannot be resolved in bookworm" in str(caught.value)


def kernel_tree(tmp_path: Path, **modules: str) -> Tree:
    directory = tmp_path / "usr/lib/modules/1.2.3/kernel"
    directory.mkdir(parents=True)
    for name, depends in modules.items():
        elf = b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=" + name.encode() + b"\0"
        (directory / f"{name.replace('_', '-')}.ko.xz").write_bytes(lzma.compress(elf))
    return Tree(tmp_path)


def test_modules_are_loaded_after_what_they_depend_on_and_built_in_ones_are_left_out(tmp_path):
    tree = kernel_tree(tmp_path, zram="zsmalloc,lz4_compress", zsmalloc="", lz4_compress="lz4_tables", lz4_tables="")
    files = [path.name.removesuffix(".ko.xz") for path in module_files(tree, ["zram", "overlay"])]
    assert files == ["zsmalloc", "lz4-tables", "lz4-compress", "zram"]


def test_the_initramfs_is_an_archive_that_other_programs_read(tmp_path):
    tree = kernel_tree(tmp_path, overlay="")
    for name in ("busybox", "init"):
        (tmp_path / name).write_bytes(f"content of {name}".encode())
    write_initramfs(tmp_path / "initramfs", tmp_path / "busybox", tmp_path / "init", module_files(tree, ["overlay"]))
    data = gzip.decompress((tmp_path / "initramfs").read_bytes())
    members, position = {}, 0
    while (name_end := data.index(b"\0", position + 110)) and data[position + 110 : name_end] != b"TRAILER!!!":
        fields = [int(data[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        start = (position + 110 + fields[11] + 3) // 4 * 4
        members[data[position + 110 : name_end].decode()] = (fields[1], data[start : start + fields[6]])
        position = (start + fields[6] + 3) // 4 * 4
    assert members["bin/busybox"] == (0o100755, b"content of busybox")
    assert members["init"] == (0o100755, b"content of init")
    assert members["modules/00-overlay.ko"][1].startswith(b"\x7fELF")
    assert members["lower"] == (0o040755, b"")


@pytest.mark.parametrize(
    ("said", "exit_code", "failure"),
    [
        ("success exited 0", 0, ""),
        ("exit-code exited 7", 7, ""),
        ("signal killed KILL", 137, ""),
        ("timeout killed TERM", 124, "HUNG"),
        (None, 124, "CRASHED"),
    ],
)
def test_how_the_command_ended_is_read_from_what_systemd_says(tmp_path, said, exit_code, failure):
    if said is not None:
        (tmp_path / "outcome").write_text(said + "\n")
    outcome = read_outcome(tmp_path / "outcome", 12.0, None, lambda: "the console's end")
    assert outcome.exit_code == exit_code
    assert (outcome.failure or "").partition(":")[0] == failure


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "reports.jsonl"

    def append(*entries: object) -> None:
        with path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    return path, append, ReportLog(path)


def test_a_report_is_there_as_soon_as_its_line_is_complete(log):
    path, append, reports = log
    append({"started": "a"}, {"report": {"nodeid": "a", "when": "call"}})
    with path.open("a") as file:
        file.write('{"finished": "a')
    reports.read()
    assert (reports.running, reports.finished("a")) == ("a", False)
    with path.open("a") as file:
        file.write('"}\n')
    reports.read()
    assert (reports.running, reports.finished("a")) == (None, True)
    assert reports.reports("a") == ({"nodeid": "a", "when": "call"},)


def test_a_hang_is_told_of_the_test_that_ran_and_named_by_those_that_did_not(log):
    _, append, reports = log
    append({"started": "a"}, {"finished": "a"}, {"started": "b"})
    reports.read()
    assert "HUNG: ended.\nThis test was running" in reports.why_missing("b", "HUNG: ended.", "output")
    assert reports.why_missing("c", "HUNG: ended", "output") == "not run: HUNG: ended, in b"


def test_every_script_of_the_guest_is_valid_for_its_shell():
    boot = Path(__file__).with_name("boot")
    for name, shell in (("init", "sh"), ("enter", "bash"), ("finish", "sh")):
        assert subprocess.run([shell, "-n", boot / name], check=False).returncode == 0, name

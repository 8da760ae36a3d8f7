"""The compiler step: when it runs and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess

import pytest
from equipoise.ebpf import build
from equipoise.ebpf.errors import BuildFailed


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of the sources with nothing built."""
    sources = tmp_path / "src"
    sources.mkdir()
    for path in build.SOURCES.glob("*.[ch]"):
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    return sources


def test_an_object_is_current_until_a_source_is_newer(object_file, elsewhere):
    assert not build.is_current("equipoise", elsewhere)
    target = build.compile_unit("equipoise")
    assert build.is_current("equipoise", elsewhere)
    newer = target.stat().st_mtime_ns + 1_000_000
    os.utime(elsewhere / "events.h", ns=(newer, newer))
    assert not build.is_current("equipoise", elsewhere)


def test_a_build_leaves_nothing_beside_the_objects(object_file, elsewhere):
    build.build()
    assert sorted(path.name for path in build.OBJECTS.iterdir()) == ["capabilities.bpf.o", "equipoise.bpf.o"]
    assert build.build() == ()


def test_a_missing_clang_names_the_packages(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildFailed, match="clang llvm libbpf-dev bpftool") as caught:
        build.find_clang()
    assert "\n" not in str(caught.value)


def test_an_error_in_the_source_is_one_line_that_names_the_place(object_file, elsewhere):
    (elsewhere / "memory.bpf.c").write_text("int broken(void) { return nonsense; }\n")
    with pytest.raises(BuildFailed, match=r"memory\.bpf\.c:1:.*nonsense") as caught:
        build.compile_unit("equipoise")
    assert "\n" not in str(caught.value)
    assert not list(build.OBJECTS.glob("*.tmp"))


def test_our_own_sources_compile_without_a_warning(object_file, elsewhere, monkeypatch):
    run = subprocess.run

    def strict(command, **options):
        return run([command[0], "-Werror", *command[1:]] if "-target" in command else command, **options)

    monkeypatch.setattr("equipoise.ebpf.build.subprocess.run", strict)
    assert len(build.build(force=True)) == len(build.UNITS)

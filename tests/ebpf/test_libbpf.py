"""The binding never lets a NULL reach libbpf, and errors carry what libbpf said."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest
from equipoise.ebpf import build
from equipoise.ebpf.errors import LibbpfError, ProbesUnavailable
from equipoise.ebpf.libbpf import BpfObject, library
from equipoise.ebpf.probes import Probes, checked_object, require_kernel


@pytest.fixture(autouse=True)
def needs_libbpf():
    try:
        library()
    except ProbesUnavailable as error:
        pytest.skip(str(error))


def test_a_missing_object_is_an_error_with_its_errno(tmp_path):
    with pytest.raises(LibbpfError) as caught:
        BpfObject(tmp_path / "none.bpf.o")
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value, OSError)


def test_a_file_that_is_no_object_is_an_error_with_libbpfs_words(tmp_path):
    path = tmp_path / "text.bpf.o"
    path.write_text("this is not ELF")
    with pytest.raises(LibbpfError) as caught:
        BpfObject(path)
    assert any("ELF" in line for line in caught.value.log)


def test_using_a_closed_object_is_an_error_not_a_crash(object_file):
    bpf = BpfObject(object_file)
    tools, fork = bpf.maps["tools"], bpf.programs["on_fork"]
    bpf.close()
    bpf.close()
    with pytest.raises(LibbpfError, match="closed"):
        bpf.load()
    with pytest.raises(LibbpfError, match="closed"):
        _ = tools.fd
    with pytest.raises(LibbpfError, match="closed"):
        fork.attach()


def test_a_key_or_value_of_the_wrong_size_is_refused_before_the_kernel_reads_it(object_file):
    bpf = BpfObject(object_file)
    try:
        with pytest.raises(LibbpfError, match="value of processes has 40 bytes, not 8"):
            bpf.maps["processes"].lookup(ctypes.c_uint32(1), ctypes.c_uint64())
        with pytest.raises(LibbpfError, match="key of processes has 4 bytes, not 8"):
            bpf.maps["processes"].lookup(ctypes.c_uint64(1), None)
    finally:
        bpf.close()


def test_without_root_the_reason_and_the_remedy_are_said(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ProbesUnavailable, match="not root; run the daemon as root"):
        Probes.load()


def test_without_kernel_types_the_reason_and_the_remedy_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("equipoise.ebpf.probes.BTF_PATH", tmp_path / "vmlinux")
    with pytest.raises(ProbesUnavailable, match="CONFIG_DEBUG_INFO_BTF=y"):
        require_kernel()


def test_an_installed_object_serves_without_a_compiler(object_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "OBJECTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProbesUnavailable, match="clang not found"):
        checked_object("equipoise")
    installed = tmp_path / "equipoise.bpf.o"
    installed.write_bytes(object_file.read_bytes())
    os.utime(installed, (0, 0))
    assert checked_object("equipoise") == installed


@pytest.mark.kernel
def test_a_map_is_read_whole_however_many_elements_it_has():
    try:
        require_kernel()
        probes = Probes.load()
    except ProbesUnavailable as error:
        pytest.skip(str(error))
    try:
        processes, kept = probes.object.maps["processes"], probes.layouts.struct("process_record")
        assert processes.items(ctypes.c_uint32, kept) == []
        for pid in range(1, 2001):
            processes.update(ctypes.c_uint32(pid), kept(tag=pid * 10))
        found = processes.items(ctypes.c_uint32, kept)
        assert sorted((pid, record.tag) for pid, record in found) == [(pid, pid * 10) for pid in range(1, 2001)]
    finally:
        probes.close()

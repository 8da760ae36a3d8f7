"""KV in files: appended, private, refused when damaged, cleared when abandoned."""

from __future__ import annotations

import stat

import pytest
from equipoise.gpuctl.engine.errors import SwapError
from equipoise.gpuctl.engine.schedule.sequence import SessionId
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier, _clear_abandoned
from equipoise.tests.gpuctl.engine.fakes import chunk_of


def test_the_disk_keeps_what_was_appended_and_is_private(tmp_path):
    disk = DiskTier(tmp_path / "kv", "model")
    session = SessionId("../../etc/passwd")
    disk.append(session, [chunk_of([1, 2])], 0)
    disk.append(session, [chunk_of([3, 4], first=2)], 2)
    chunks = disk.read(session, 3)
    assert [chunk.count for chunk in chunks] == [2, 1]
    (path,) = (tmp_path / "kv").rglob("*.kv")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent.parent == tmp_path / "kv"
    disk.close()
    assert not list((tmp_path / "kv").rglob("*.kv"))


def test_a_conversation_cut_since_is_written_anew(tmp_path):
    disk = DiskTier(tmp_path / "kv", "model")
    session = SessionId("a")
    disk.append(session, [chunk_of([1, 2, 3, 4])], 0)
    disk.append(session, [chunk_of([9], first=2)], 2)
    rows = [t for chunk in disk.read(session, 3) for t in chunk.planes[0].rows.copy().view("int32").ravel().tolist()]
    assert rows == [1, 2, 9]
    disk.close()


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "remove"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    disk = DiskTier(tmp_path / "kv", "model")
    session = SessionId("a")
    disk.append(session, [chunk_of([1, 2, 3, 4])], 0)
    disk.flush()
    (path,) = (tmp_path / "kv").rglob("*.kv")
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-5])
    elif damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "foreign":
        data[10] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(SwapError, match=r"\.kv"):
        disk.read(session, 4)
    disk.close()


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path):
    disk = DiskTier(tmp_path / "kv", "model")
    path = disk._path(SessionId("a"))
    path.symlink_to("/dev/full")
    disk.append(SessionId("a"), [chunk_of([1])], 0)
    disk.flush()
    failures = disk.take_failures()
    assert "No space left" in failures[SessionId("a")]
    assert not path.is_symlink()
    with pytest.raises(SwapError):
        disk.read(SessionId("a"), 1)
    disk.close()


def test_what_a_dead_engine_left_is_cleared_and_a_living_ones_is_not(tmp_path):
    folder = tmp_path / "kv"
    dead = folder / "engine-999999999"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "x.kv").write_bytes(b"old")
    alive = DiskTier(folder, "model")
    assert not dead.exists()
    alive.append(SessionId("a"), [chunk_of([1])], 0)
    alive.flush()
    _clear_abandoned(folder)
    assert alive.read(SessionId("a"), 1)
    alive.close()

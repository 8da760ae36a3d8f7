"""KV in files: the slowest tier, written behind and read ahead on one thread of its own.

Owns: the folder, one file per session, and the thread. Must not: decide, keep the ledger, or touch a context.

A file is a header and then records, each one chunk: header "EQKV", u32 format version, 32 bytes fingerprint of the
model and build; record u64 payload bytes, u32 CRC-32 of the payload, the payload (kv_image's saved form). Records are
only appended, so a second swap-out writes only what was appended to the conversation. Files live no longer than the
process: a folder whose owner is gone is cleared by the next engine that starts (an flock tells). The folder is 0700,
files are 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..compute.kv_image import KvChunk, compose, cut_to, parse
from ..errors import SwapError
from ..schedule.sequence import SessionId

_MAGIC = b"EQKV"
_FORMAT_VERSION = 1
_RECORD = struct.Struct("<QI")
_FINGERPRINT_BYTES = 32


class DiskTier:
    def __init__(self, folder: Path, fingerprint: str) -> None:
        """`fingerprint`: model and build the KV belongs to. Raises SwapError where the folder cannot be used."""
        self._fingerprint = hashlib.sha256(fingerprint.encode()).digest()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _clear_abandoned(folder)
            self.folder = _own(folder)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SwapError(f"{folder}: cannot be used for swapped KV: {error.strerror}: give --disk-folder") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine-disk")
        self._guard = threading.Lock()
        self._ahead: dict[SessionId, Future[list[KvChunk]]] = {}
        self._failed: dict[SessionId, str] = {}
        self._stored_tokens: dict[SessionId, int] = {}  # the thread's own

    def append(self, session_id: SessionId, chunks: list[KvChunk], valid_tokens: int) -> None:
        """Write behind: after the first `valid_tokens` already in the file come `chunks`. Returns at once."""
        with self._guard:
            self._ahead.pop(session_id, None)
        self._thread.submit(self._write, session_id, chunks, valid_tokens)

    def read_ahead(self, session_id: SessionId) -> None:
        """Begin to read the session's file. Safe to call again, and for a session that has none."""
        with self._guard:
            if session_id not in self._ahead:
                self._ahead[session_id] = self._thread.submit(self._read, session_id)

    def read(self, session_id: SessionId, tokens: int) -> list[KvChunk]:
        """The first `tokens`, waiting for the file where nobody read ahead. Raises SwapError."""
        self.read_ahead(session_id)
        with self._guard:
            reading = self._ahead.pop(session_id)
        chunks = cut_to(reading.result(), tokens)
        if not chunks or chunks[-1].end_token != tokens:
            raise SwapError(f"{self._path(session_id)}: holds fewer than {tokens} tokens")
        return chunks

    def discard(self, session_id: SessionId) -> None:
        """Remove the file. Safe where there is none."""
        with self._guard:
            self._ahead.pop(session_id, None)
        self._thread.submit(self._remove, session_id)

    def take_failures(self) -> dict[SessionId, str]:
        """Sessions whose copy could not be written since the last call, and why. Their files are gone."""
        with self._guard:
            failed, self._failed = self._failed, {}
        return failed

    def flush(self) -> None:
        """Wait until everything handed over so far is written."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Stop the thread and remove the files."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    # On the thread

    def _path(self, session_id: SessionId) -> Path:
        # Session ids come from clients: a digest is a safe file name whatever they contain.
        return self.folder / f"{hashlib.sha256(session_id.encode()).hexdigest()[:32]}.kv"

    def _write(self, session_id: SessionId, chunks: list[KvChunk], valid_tokens: int) -> None:
        path = self._path(session_id)
        try:
            if self._stored_tokens.get(session_id, 0) != valid_tokens:
                # The conversation was cut since: keep what still holds and write the file anew.
                kept = cut_to(self._parse_file(path), valid_tokens) if valid_tokens else []
                path.unlink(missing_ok=True)
                chunks = [*kept, *chunks]
            self._append_records(path, chunks)
            self._stored_tokens[session_id] = chunks[-1].end_token
        except (OSError, SwapError) as error:
            with self._guard:
                self._failed[session_id] = f"{path}: {getattr(error, 'strerror', None) or error}"
            self._remove(session_id)

    def _remove(self, session_id: SessionId) -> None:
        self._stored_tokens.pop(session_id, None)
        self._path(session_id).unlink(missing_ok=True)

    def _append_records(self, path: Path, chunks: list[KvChunk]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            if file.tell() == 0:
                file.write(_MAGIC + struct.pack("<I", _FORMAT_VERSION) + self._fingerprint)
            for chunk in chunks:
                payload = compose([chunk]).data
                file.write(_RECORD.pack(len(payload), zlib.crc32(payload)))
                file.write(payload)

    def _read(self, session_id: SessionId) -> list[KvChunk]:
        """Runs after every write handed over before it, so the file is complete."""
        return self._parse_file(self._path(session_id))

    def _parse_file(self, path: Path) -> list[KvChunk]:
        try:
            data = np.fromfile(path, np.uint8)
        except FileNotFoundError:
            raise SwapError(f"{path}: no such file") from None
        except OSError as error:
            raise SwapError(f"{path}: {error.strerror}") from None
        header = bytes(data[: len(_MAGIC) + 4 + _FINGERPRINT_BYTES])
        if header != _MAGIC + struct.pack("<I", _FORMAT_VERSION) + self._fingerprint:
            raise SwapError(f"{path}: not a swap file of this model and version")
        at = len(header)
        chunks = []
        while at < data.size:
            if at + _RECORD.size > data.size:
                raise SwapError(f"{path}: cut short at byte {at}")
            size, checksum = _RECORD.unpack_from(data.data, at)
            at += _RECORD.size
            payload = data[at : at + size]
            if payload.size != size:
                raise SwapError(f"{path}: cut short at byte {at}")
            if zlib.crc32(payload.data) != checksum:
                raise SwapError(f"{path}: the checksum at byte {at} does not match: the file is corrupt")
            chunks.append(parse(payload))
            at += size
        return chunks


def remove_own_folder(folder: Path) -> None:
    """Remove at once what this process has in `folder`: it ends. From any thread; safe where it has nothing."""
    shutil.rmtree(_own(folder), ignore_errors=True)


def _own(folder: Path) -> Path:
    return folder / f"engine-{os.getpid()}"


def _clear_abandoned(folder: Path) -> None:
    """Remove what engines left behind that no longer run: their lock can be had."""
    for left in folder.glob("engine-*"):
        with contextlib.suppress(OSError):  # another engine clears it at the same time, or it is not ours
            descriptor = os.open(left / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            except BlockingIOError:
                pass  # its engine runs
            finally:
                os.close(descriptor)

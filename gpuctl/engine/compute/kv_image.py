"""Reads and writes llama.cpp's saved form of a sequence, so that KV can be kept in pieces, cut at a token and joined.

Owns: that format (build 11549, src/llama-kv-cache.cpp state_write). Must not: move anything to or from a context.

Layout, little-endian: u32 magic, u32 id of the sequence it was saved from (not looked at when it is loaded), u32
stream count, then per stream a u32 cell count and, where it is not 0: per cell i32 position, u32 1, i32 sequence id;
u32 v_trans (0: we require flash attention), u32 layer count, two u32 that must be 0 (rotated K and V, which we never
ask for); then the K planes and the V planes, one per layer: i32 ggml type, u64 row bytes, the rows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import SwapError

Blob = npt.NDArray[np.uint8]
_HEADER = struct.Struct("<III")
_U32 = struct.Struct("<I")
_SHAPE = struct.Struct("<IIII")
_PLANE = struct.Struct("<iQ")
_CELL_BYTES = 12


@dataclass(frozen=True, slots=True)
class Plane:
    """K or V of one layer: `rows` has shape (tokens, row_bytes)."""

    ggml_type: int
    rows: Blob


@dataclass(frozen=True, slots=True)
class KvFormat:
    """What two contexts must have in common for one to take the other's KV."""

    magic: int
    stream_count: int
    """Of this context alone: a chunk is given the number of the context it is loaded into."""
    planes: tuple[tuple[int, int], ...]
    """ggml type and row bytes of each plane."""

    def takes(self, other: KvFormat) -> bool:
        """Whether a context of this format can load a chunk of the other's, once `adopt` has seen to it."""
        return replace(other, stream_count=self.stream_count) == self

    def adopt(self, chunk: KvChunk) -> KvChunk:
        """The chunk as this context would have saved it. Raises SwapError where it is of another kind."""
        if not self.takes(chunk.format):
            raise SwapError("the saved KV is of another model, build or type than this context's")
        if chunk.stream_count == self.stream_count:
            return chunk
        return replace(chunk, stream_count=self.stream_count, saved=None)


@dataclass(frozen=True, slots=True)
class KvChunk:
    """The KV of consecutive tokens. Immutable; a cut shares memory with what it was cut from."""

    magic: int
    sequence_id: int
    stream_count: int
    first_token: int
    planes: tuple[Plane, ...]
    count: int
    saved: Blob | None = None
    """The saved form it was read from, where its rows lie in order there: spares joining a single piece."""

    @property
    def format(self) -> KvFormat:
        planes = tuple((plane.ggml_type, plane.rows.shape[1]) for plane in self.planes)
        return KvFormat(self.magic, self.stream_count, planes)

    @property
    def end_token(self) -> int:
        return self.first_token + self.count

    @property
    def nbytes(self) -> int:
        """Bytes of its saved form, near enough: rows and cells."""
        return sum(plane.rows.nbytes for plane in self.planes) + _CELL_BYTES * self.count

    def head(self, count: int) -> KvChunk:
        """Its first `count` tokens. Copies where most of it is cut away, so that the rest can be freed."""
        cut = [plane.rows[:count] for plane in self.planes]
        if count < self.count // 2:
            cut = [rows.copy() for rows in cut]
        planes = tuple(Plane(plane.ggml_type, rows) for plane, rows in zip(self.planes, cut, strict=True))
        return KvChunk(self.magic, self.sequence_id, self.stream_count, self.first_token, planes, count)

    def tail(self, from_count: int) -> KvChunk:
        """What follows its first `from_count` tokens."""
        planes = tuple(Plane(plane.ggml_type, plane.rows[from_count:]) for plane in self.planes)
        first = self.first_token + from_count
        return KvChunk(self.magic, self.sequence_id, self.stream_count, first, planes, self.count - from_count)


def parse(blob: Blob) -> KvChunk:
    """The chunk a saved sequence holds; its rows are views of `blob`. Raises SwapError where the format is not ours."""
    try:
        return _parse(blob)
    except (struct.error, ValueError) as error:
        raise SwapError(f"a saved sequence of {blob.size} bytes is cut short or of another format: {error}") from None


def _parse(blob: Blob) -> KvChunk:
    data = blob.data
    magic, sequence_id, stream_count = _HEADER.unpack_from(data, 0)
    at = _HEADER.size
    chunk: KvChunk | None = None
    for _ in range(stream_count):
        (cells,) = _U32.unpack_from(data, at)
        at += _U32.size
        if cells == 0:
            continue
        if chunk is not None:
            raise ValueError("one sequence in two streams")
        meta = blob[at : at + cells * _CELL_BYTES].view(np.int32).reshape(cells, 3)
        at += cells * _CELL_BYTES
        v_trans, layers, rotated_k, rotated_v = _SHAPE.unpack_from(data, at)
        at += _SHAPE.size
        if v_trans or rotated_k or rotated_v:
            raise ValueError("K or V is stored transposed or rotated")
        planes = []
        for _ in range(2 * layers):
            ggml_type, row_bytes = _PLANE.unpack_from(data, at)
            at += _PLANE.size
            rows = blob[at : at + cells * row_bytes].reshape(cells, row_bytes)
            at += cells * row_bytes
            planes.append(Plane(ggml_type, rows))
        chunk = _in_order(blob, magic, sequence_id, stream_count, meta[:, 0], planes)
    if at != blob.size:
        raise ValueError(f"{blob.size - at} bytes too many")
    if chunk is None:
        return KvChunk(magic, sequence_id, stream_count, 0, (), 0)
    return chunk


def _in_order(
    blob: Blob, magic: int, sequence_id: int, stream_count: int, positions: npt.NDArray[np.int32], planes: list[Plane]
) -> KvChunk:
    """Cells lie where there was room; a chunk's rows lie in the order of their tokens."""
    first, count = int(positions.min()), len(positions)
    expected = np.arange(first, first + count, dtype=np.int32)
    saved: Blob | None = blob
    if not np.array_equal(positions, expected):
        saved = None
        order = np.argsort(positions, kind="stable")
        if not np.array_equal(positions[order], expected):
            raise ValueError("positions are not consecutive")
        planes = [Plane(plane.ggml_type, plane.rows[order]) for plane in planes]
    return KvChunk(magic, sequence_id, stream_count, first, tuple(planes), count, saved)


def compose(chunks: Sequence[KvChunk]) -> Blob:
    """The saved form of consecutive chunks. Raises SwapError where they do not join."""
    if not chunks:
        raise SwapError("nothing to restore")
    model = chunks[0]
    if len(chunks) == 1 and model.saved is not None:
        return model.saved
    start = end = model.first_token
    for chunk in chunks:
        if chunk.first_token != end:
            raise SwapError(f"pieces do not join: one ends at token {end}, the next begins at {chunk.first_token}")
        end = chunk.end_token
    count = end - start
    row_bytes = [plane.rows.shape[1] for plane in model.planes]
    size = _HEADER.size + _U32.size * model.stream_count + count * _CELL_BYTES + _SHAPE.size
    size += sum(_PLANE.size + count * width for width in row_bytes)
    blob = np.empty(size, np.uint8)
    data = blob.data
    _HEADER.pack_into(data, 0, model.magic, model.sequence_id, model.stream_count)
    # All of it as stream 0: llama.cpp puts it into the stream of the slot it is loaded into.
    _U32.pack_into(data, _HEADER.size, count)
    at = _HEADER.size + _U32.size
    meta = blob[at : at + count * _CELL_BYTES].view(np.int32).reshape(count, 3)
    meta[:, 0] = np.arange(start, end)
    meta[:, 1] = 1
    meta[:, 2] = 0
    at += count * _CELL_BYTES
    _SHAPE.pack_into(data, at, 0, len(model.planes) // 2, 0, 0)
    at += _SHAPE.size
    for index, width in enumerate(row_bytes):
        _PLANE.pack_into(data, at, model.planes[index].ggml_type, width)
        at += _PLANE.size
        rows = blob[at : at + count * width].reshape(count, width)
        for chunk in chunks:
            rows[chunk.first_token - start : chunk.end_token - start] = chunk.planes[index].rows
        at += count * width
    blob[at:] = 0  # the other streams are empty
    return blob


def from_token(chunks: Sequence[KvChunk], token: int) -> list[KvChunk]:
    """The pieces from `token` on."""
    kept = []
    for chunk in chunks:
        if chunk.end_token > token:
            kept.append(chunk if chunk.first_token >= token else chunk.tail(token - chunk.first_token))
    return kept


def cut_to(chunks: Sequence[KvChunk], tokens: int) -> list[KvChunk]:
    """The pieces that cover the first `tokens`; fewer where the pieces end before."""
    kept = []
    for chunk in chunks:
        if chunk.first_token >= tokens:
            break
        kept.append(chunk if chunk.end_token <= tokens else chunk.head(tokens - chunk.first_token))
    return kept

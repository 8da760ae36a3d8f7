"""Pieces of saved KV: cut and joined at any token, refused where they do not fit."""

from __future__ import annotations

import pytest
from equipoise.gpuctl.engine.compute.kv_image import compose, cut_to, parse
from equipoise.gpuctl.engine.errors import SwapError
from equipoise.tests.gpuctl.engine.fakes import chunk_of
from hypothesis import given
from hypothesis import strategies as st


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), keep=st.integers(1, 30))
def test_pieces_join_to_the_whole_and_cut_at_any_token(sizes, keep):
    tokens = list(range(1000, 1000 + sum(sizes)))
    pieces, at = [], 0
    for size in sizes:
        pieces.append(chunk_of(tokens[at : at + size], first=at))
        at += size
    joined = parse(compose(cut_to(pieces, keep)))
    rows = joined.planes[0].rows.copy().view("int32").ravel().tolist()
    assert rows == tokens[:keep]


def test_pieces_with_a_gap_are_refused():
    with pytest.raises(SwapError, match="do not join"):
        compose([chunk_of([1, 2]), chunk_of([3], first=5)])


@pytest.mark.parametrize("cut", [0, 5, 20, 60])
def test_a_blob_cut_short_is_refused(cut):
    blob = compose([chunk_of([1, 2, 3])])
    with pytest.raises(SwapError):
        parse(blob[:cut])

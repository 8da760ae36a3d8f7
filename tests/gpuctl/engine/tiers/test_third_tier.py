"""A tier more than there are: a line of the table is all that it takes. The attic is a second folder, in tests only."""

from __future__ import annotations

import argparse

import pytest
from equipoise.gpuctl.directives import OutcomeStatus, SwapOut
from equipoise.gpuctl.engine import metrics
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Tier
from equipoise.gpuctl.engine.tiers import table
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier
from equipoise.gpuctl.engine.tiers.table import DISK, HOST, Line, OpenTier, in_memory
from equipoise.gpuctl.reports import TierUse
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.asking import Asked, Watch, soon
from equipoise.tests.gpuctl.engine.driving import Driven, holding, moved, swap_out

ATTIC = Tier("attic", KvTier.DISK)
TOKENS = 54
"""Of each session here: its prompt and what it answered."""


@pytest.fixture
def stores(tmp_path):
    made = [DiskTier(tmp_path / name, "fake") for name in ("disk", "attic")]
    yield made
    for store in made:
        store.close()


@pytest.fixture
def driven(stores):
    """Room for one session's copy in host RAM, for one on the disk, and for three in the attic."""
    attic = OpenTier(ATTIC, 16 * 3 * 60, stores[1])
    return Driven(kv_tokens=1000, host_tokens=60, disk=stores[0], disk_tokens=60, below=[attic])


def fill(driven: Driven, names: str) -> dict[str, str]:
    """A turn of each session, one after the other, each swapped out before the next; what they said."""
    told = {}
    for name in names:
        told[name] = name * 50 + driven.complete(name, name * 50).text
        driven.direct(swap_out(driven, name, name=f"out-{name}"))
        driven.settle()
        driven.advance(1)
    return told


def test_sessions_go_down_one_tier_after_the_other_the_longest_unused_furthest(driven):
    fill(driven, "abcd")
    where = {name: holding(driven, name).longest() for name in "abcd"}
    assert where == {"a": (ATTIC, TOKENS), "b": (ATTIC, TOKENS), "c": (DISK, TOKENS), "d": (HOST, TOKENS)}
    assert [each.used_tokens for each in driven.engine._ledger.lower] == [TOKENS, TOKENS, 2 * TOKENS]


def test_each_comes_back_from_its_tier_and_computes_nothing_again(driven):
    for name, told in fill(driven, "abcd").items():
        again = driven.complete(name, told + "!")
        assert again.text == driven.runner.expected_output(told + "!", 5)
        assert again.end is not None
        assert (again.end.cached_tokens, again.end.recomputed_tokens) == (TOKENS, 0), name
    assert driven.engine.totals.swap_failures == 0


def test_when_all_of_them_are_full_a_swap_is_refused_and_the_session_stays_where_it_is(driven):
    fill(driven, "abcdefgh")
    assert [name for name in "abcdefgh" if holding(driven, name).longest()[0] is Tier.DEVICE] == ["f", "g", "h"]
    assert {driven.outcomes(f"out-{name}")[0].reason for name in "fgh"} == {"no room in the host tier"}
    assert [each.used_tokens for each in driven.engine._ledger.lower] == [TOKENS, TOKENS, 3 * TOKENS]


def test_the_daemon_is_told_of_the_attic_as_disk_and_its_directives_reach_it(driven):
    fill(driven, "ab")
    driven.complete("z", "z" * 50)
    assert driven.direct(swap_out(driven, "z", KvTier.DISK, "down")).status is OutcomeStatus.ACCEPTED
    driven.settle()
    assert holding(driven, "a").longest()[0] is ATTIC, "it made way on the disk"
    books = driven.engine._reporter.occupancy()
    assert (books.host_used_bytes, books.disk_used_bytes) == (16 * TOKENS, 16 * 2 * TOKENS)
    assert books.tiers[2] == TierUse("attic", 16 * TOKENS, 16 * 3 * 60)
    page = metrics.page(books, {}, driven.engine._accounts.now()).decode()
    assert f'equipoise_engine_tier_used_bytes{{tier="attic"}} {16 * TOKENS}.0' in page
    assert {kv.session_id: (kv.tier, kv.disk_bytes) for kv in books.sessions}["a"] == (KvTier.DISK, 16 * TOKENS)
    assert {(move.from_tier, move.to_tier) for move in moved(driven)} >= {(KvTier.DISK, KvTier.DISK)}
    assert driven.engine.facts().disk_capacity_bytes == 16 * (60 + 3 * 60)


def test_a_file_that_is_gone_from_it_costs_a_recompute_and_nothing_else(driven, tmp_path):
    told = fill(driven, "abc")
    assert holding(driven, "a").longest()[0] is ATTIC
    driven.engine._swapper.stores[ATTIC].flush()
    (path,) = (tmp_path / "attic").glob("*/*.kv")
    path.unlink()
    again = driven.complete("a", told["a"] + "!")
    assert again.text == driven.runner.expected_output(told["a"] + "!", 5)
    assert driven.engine.totals.swap_failures == 1


def test_a_line_of_the_table_brings_its_options_and_its_folder(monkeypatch, tmp_path):
    line = Line(ATTIC, "0", "a second folder", DiskTier, in_folder=True)
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, line))
    parser = argparse.ArgumentParser()
    table.add_options(parser.add_argument, int)
    options = parser.parse_args(["--host-bytes", "7", "--attic-bytes", "5", "--attic-folder", str(tmp_path / "up")])
    removals: list[object] = []
    opened = table.open_tiers(options, tmp_path, "fake", removals.append)
    try:
        assert [(each.tier, each.capacity_bytes) for each in opened] == [(HOST, 7), (ATTIC, 5)]
        assert opened[1].folder == tmp_path / "up"
        assert len(removals) == 1
    finally:
        for each in opened:
            each.store.close()


@pytest.mark.engine
def test_the_real_engine_resumes_exactly_from_it(make_engine, tmp_path):
    attic = DiskTier(tmp_path / "attic", "real")
    engine, runner = make_engine(tiers=[*in_memory(0), OpenTier(ATTIC, 1 << 30, attic)])
    watch = Watch(engine)
    texts, cached = [], []
    for session in ("calm", "moved"):
        first = Asked(engine, session, "One, two, three,", 16)
        first.finish()
        if session == "moved":
            directive = SwapOut(directive_id="d", deadline_ns=soon(), session_id=SessionId(session), tier=KvTier.DISK)
            assert watch.direct(directive).status is OutcomeStatus.COMPLETED
            assert runner.held_tokens(1) == 0 or runner.held_tokens(0) == 0
            attic.flush()
            assert len(list((tmp_path / "attic").glob("*/*.kv"))) == 1
        second = Asked(engine, session, f"One, two, three,{first.text} and then", 16)
        cached.append(second.finish().cached_tokens)
        texts.append((first.text, second.text))
    assert texts[0] == texts[1]
    assert cached[0] == cached[1] > 15
    assert engine.totals.swap_in_count == 1

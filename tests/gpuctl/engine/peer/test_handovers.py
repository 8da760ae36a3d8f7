"""Giving and taking a session, step by step over the fake runner: whatever fails when, no token differs or is lost."""

from __future__ import annotations

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.engine.schedule.sequence import FinishReason, SessionId
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier
from equipoise.gpuctl.reports import Occupancy, TurnEnded, TurnStarted
from equipoise.policies.accounting import Gamma, GammaSource
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.driving import Driven
from equipoise.tests.gpuctl.engine.fakes import FakeRunner
from equipoise.tests.gpuctl.engine.peer.handing_over import (
    PROMPT,
    TOKENS,
    HandingOver,
    expected,
    holds_nothing,
    under_way,
)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_a_turn_handed_over_at_any_step_goes_on_with_the_same_tokens(steps):
    a, b, turn = under_way(steps)
    handing = HandingOver(a, b, "s")
    handing.whole()
    assert holds_nothing(a)
    assert "s" not in a.engine._scheduler.sessions
    b.settle()
    handing.relay()
    handing.part()
    assert turn.text == expected(a)
    assert turn.end is not None
    assert turn.end.engine_id == b.engine.engine_id
    assert turn.end.output_tokens == TOKENS
    assert b.engine.totals.prefill_tokens == 0, "no prompt token was computed again"
    assert b.engine._ledger.holding(SessionId("s")).device_tokens == len(PROMPT) + TOKENS - 1
    handing.check()


def test_a_turn_handed_over_costs_what_both_engines_computed_of_it():
    gamma = Gamma(0.5, GammaSource.TABLE)
    alone = Driven(gamma=gamma).complete("s", PROMPT, TOKENS).end
    a, b = Driven(gamma=gamma), Driven(gamma=gamma)
    turn = a.turn("s", PROMPT, TOKENS)
    a.steps(5)
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.settle()
    handing.relay()
    assert alone is not None and turn.end is not None
    assert turn.end.cost.pte == alone.cost.pte
    assert turn.end.session_cost.pte == alone.session_cost.pte
    assert not a.engine._accounts._work and not b.engine._accounts._work


def test_an_unnamed_session_handed_over_idle_is_found_by_its_text_there_and_no_more_here():
    a, b = Driven(), Driven()
    a.complete("s", PROMPT, TOKENS, anonymous=True)
    handing = HandingOver(a, b, "s")
    handing.offer()
    handing.copy()
    handing.adopt(handing.release())
    handing.commit()
    a.steps(1)
    assert SessionId("s") in b.engine._by_text
    assert SessionId("s") not in a.engine._by_text


def test_a_session_whose_turn_ends_between_the_rounds_goes_over_idle():
    a, b, turn = under_way(11)
    handing = HandingOver(a, b, "s")
    handing.whole()
    assert turn.end is not None
    assert turn.end.engine_id == a.engine.engine_id
    again = b.complete("s", PROMPT + expected(a) + "more")
    assert again.end is not None
    assert again.end.cached_tokens == len(PROMPT) + TOKENS - 1


FAILURES = ("offered", "copied", "released", "adopted", "relaying", "relayed some")


@pytest.mark.parametrize("failure", FAILURES)
def test_the_giver_goes_on_by_itself_whenever_the_taker_is_lost(failure):
    a, b, turn = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.offer()
    if failure != "offered":
        handing.copy()
        a.steps(1)
    if failure in FAILURES[2:]:
        state = handing.release()
    if failure in FAILURES[3:]:
        handing.adopt(state)
    if failure in FAILURES[4:]:
        handing.commit()
    if failure == "relayed some":
        b.steps(4)
        handing.relay()
    a.engine.handovers.giver.take_back(handing.giving)
    a.engine.handovers.giver.take_back(handing.giving)
    a.settle()
    assert turn.text == expected(a)
    assert turn.end is not None
    assert turn.end.reason is FinishReason.LENGTH
    assert turn.end.engine_id == a.engine.engine_id
    ends = [r for r in a.reports if isinstance(r.report, TurnEnded)]
    assert len(ends) == 1
    # Only what had been confirmed to be gone was computed again.
    assert bool(turn.end.recomputed_tokens) == (failure in FAILURES[4:])
    handing.part()
    if failure not in FAILURES[4:]:
        b.settle()
        assert holds_nothing(b)
        assert not b.engine._scheduler.sessions
    handing.check()


def test_a_lost_taker_does_not_lose_a_turn_that_was_just_ending():
    a, b, turn = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.settle()
    handing.end = None  # all tokens came, the last word did not
    handing.relay()
    a.engine.handovers.giver.take_back(handing.giving)
    a.settle()
    assert turn.text == expected(a)
    assert turn.end is not None
    assert turn.end.reason is FinishReason.LENGTH


def test_a_stop_string_that_began_here_ends_the_text_there():
    text = FakeRunner().expected_output(PROMPT, TOKENS)
    a, b, turn = under_way(7, stop=(text[5:9],))  # seven outputs: in the midst of it
    handing = HandingOver(a, b, "s")
    handing.offer()
    handing.copy()
    handing.adopt(handing.release())
    handing.commit()
    assert turn.text == text[:5]
    b.settle()
    handing.relay()
    assert turn.text == text[:5]
    assert turn.end is not None
    assert turn.end.reason is FinishReason.STOP
    assert turn.end.output_tokens == 9


def test_the_giver_that_dies_leaves_a_cancelled_turn_and_a_kept_session():
    a, b, _ = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.steps(2)
    handing.part()
    b.settle()
    assert handing.end is not None
    assert handing.end.reason is FinishReason.CANCELLED
    assert "s" in b.engine._scheduler.sessions
    assert all(sampler.closed for sampler in b.runner.samplers)
    b.check()


def test_a_cancelled_turn_is_cancelled_where_it_is_computed():
    a, b, turn = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.steps(2)
    assert turn.id is not None
    a.engine.cancel(turn.id)
    a.steps(1)
    assert handing.cancels == 1
    b.engine.cancel(turn.id)
    b.settle()
    handing.relay()
    assert turn.end is not None
    assert turn.end.reason is FinishReason.CANCELLED
    assert turn.text == expected(a)[: len(turn.text)]


def test_a_turn_cancelled_while_in_doubt_ends_so_when_the_taker_is_lost():
    a, b, turn = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.offer()
    handing.copy()
    handing.release()
    assert turn.id is not None
    a.engine.cancel(turn.id)
    a.steps(1)
    a.engine.handovers.giver.take_back(handing.giving)
    a.settle()
    assert turn.end is not None
    assert turn.end.reason is FinishReason.CANCELLED
    handing.check()


@pytest.mark.parametrize("tier", [KvTier.DEVICE, KvTier.HOST, KvTier.DISK, KvTier.NONE])
def test_an_idle_session_goes_from_any_tier_and_its_next_turn_is_cached_there(tier, tmp_path):
    disk = DiskTier(tmp_path, "f")
    a, b = Driven(disk=disk, disk_tokens=1000), Driven()
    first = a.complete("s", PROMPT)
    if tier in (KvTier.HOST, KvTier.DISK):
        a.direct(ask.SwapOut(directive_id="d", deadline_ns=a.now_ns + 10**9, session_id=SessionId("s"), tier=tier))
    if tier is KvTier.NONE:
        a.direct(ask.Drop(directive_id="d", deadline_ns=a.now_ns + 10**9, session_id=SessionId("s"), from_token=0))
    assert a.engine._ledger.holding(SessionId("s")).longest()[0].told_as is tier
    HandingOver(a, b, "s").whole()
    assert holds_nothing(a)
    prompt = PROMPT + first.text + "more"
    second = b.complete("s", prompt)
    assert second.text == b.runner.expected_output(prompt, 5)
    assert second.end is not None
    assert second.end.cached_tokens == (0 if tier is KvTier.NONE else len(PROMPT) + 4)
    a.engine._swapper.close()


def test_a_waiting_turn_is_handed_over_and_admitted_there():
    a, b = Driven(kv_tokens=40), Driven()
    a.turn("first", "x" * 30, 9)
    a.steps(2)
    turn = a.turn("s", PROMPT, TOKENS)
    a.steps(1)
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.settle()
    handing.relay()
    assert turn.text == expected(a)
    started = [r.report for r in b.reports if isinstance(r.report, TurnStarted)]
    assert [start.turn_id for start in started] == [turn.id], "it was first admitted there"


def test_the_conversation_may_go_on_and_turn_elsewhere_between_the_rounds():
    a, b = Driven(), Driven()
    a.complete("s", PROMPT + "first thoughts")
    handing = HandingOver(a, b, "s")
    handing.offer()
    handing.copy()
    turn = a.turn("s", PROMPT + "quite other ones", TOKENS)
    a.steps(4)
    handing.adopt(handing.release())
    handing.commit()
    b.settle()
    handing.relay()
    assert turn.text == a.runner.expected_output(PROMPT + "quite other ones", TOKENS)
    handing.check()


def test_the_next_turn_waits_for_the_one_that_is_elsewhere():
    a, b, turn = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.whole()
    behind = a.turn("s", PROMPT + expected(a) + "more", 3)
    a.steps(3)
    assert not behind.events
    b.settle()
    handing.relay()
    a.settle()
    assert turn.end is not None
    assert behind.text == a.runner.expected_output(PROMPT + expected(a) + "more", 3)


def test_a_daemon_hears_of_the_session_from_its_owner_alone():
    a, b, turn = under_way(3)
    b.steps(1)
    handing = HandingOver(a, b, "s")
    handing.offer()
    handing.copy()
    state = handing.release()
    before = len(a.reports)
    a.advance(1)
    a.steps(1)
    assert not [r for r in a.reports[before:] if isinstance(r.report, Occupancy)], "in doubt"
    assert not _listed(b)
    handing.adopt(state)
    assert _listed(b) == {"s"}
    handing.commit()
    a.advance(1)
    a.steps(1)
    assert _listed(a) == set()
    b.settle()
    handing.relay()
    started = [r.report.turn_id for d in (a, b) for r in d.reports if isinstance(r.report, TurnStarted)]
    ended = [r.report.turn_id for d in (a, b) for r in d.reports if isinstance(r.report, TurnEnded)]
    assert started == ended == [turn.id]


def _listed(driven: Driven) -> set[str]:
    reports = [r.report for r in driven.reports if isinstance(r.report, Occupancy)]
    return {session.session_id for session in reports[-1].sessions} if reports else set()


def test_a_stopping_taker_gives_its_turn_back_and_a_stopping_giver_ends_its_own():
    a, b, turn = under_way(3)
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.steps(1)
    b.engine.handovers.close()
    assert handing.stops == 1
    assert not [r for r in b.reports if isinstance(r.report, TurnEnded)]
    assert holds_nothing(b)
    a.engine.handovers.close()
    assert handing.stops == 2
    a.engine.handovers.giver.take_back(handing.giving)
    a.settle()
    assert turn.text == expected(a)

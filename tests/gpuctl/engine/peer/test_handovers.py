"""Giving and taking a session, step by step over the fake runner: whatever fails when, no token differs or is lost."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.engine.compute.kv_image import KvChunk, cut_to
from equipoise.gpuctl.engine.errors import HandoverError, RequestError
from equipoise.gpuctl.engine.live import Sampled, token_of
from equipoise.gpuctl.engine.peer import wire as peer_wire
from equipoise.gpuctl.engine.peer.giving import Giving
from equipoise.gpuctl.engine.peer.session_state import Offer, SessionState
from equipoise.gpuctl.engine.peer.taking import Taking
from equipoise.gpuctl.engine.schedule.sequence import (
    FinishReason,
    SamplingParams,
    Session,
    SessionId,
    Slo,
    TenantId,
    Tier,
    TurnEvent,
    TurnFinished,
    TurnId,
    TurnRequest,
)
from equipoise.gpuctl.engine.schedule.sequence import Turn as EngineTurn
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier
from equipoise.gpuctl.engine.turn_cost import Spent
from equipoise.gpuctl.reports import Occupancy, TurnEnded, TurnStarted
from equipoise.policies.accounting import Gamma, GammaSource, SessionCost, Work
from equipoise.tests.gpuctl.engine.driving import Driven, Turn
from equipoise.tests.gpuctl.engine.fakes import FakeRunner

PROMPT = "the quick brown fox"
TOKENS = 12


class Held(NamedTuple):
    """In place of a compiled constraint."""

    kind: str
    text: str


def over_the_wire(chunk: KvChunk, driven: Driven) -> KvChunk:
    messages = [pb.SessionPart.FromString(m.SerializeToString()) for m in peer_wire.kv_messages(chunk)]
    blob = peer_wire.Assembly(messages[0].blob, driven.runner.bytes_per_token)
    for message in messages[1:]:
        blob.add(message.piece)
    assert blob.complete
    return blob.chunk(driven.runner.kv_format)


class HandingOver:
    """One hand-over between two driven engines, stage by stage, as peer.py makes them."""

    def __init__(self, giver: Driven, taker: Driven, session: str) -> None:
        self.a, self.b = giver, taker
        self.cancels = self.stops = 0
        self.giving = Giving(SessionId(session), on_cancel=self._count_cancel, on_stop=self._count_stop)
        self.chunks: list[KvChunk] = []
        self.sampled: list[Sampled] = []
        self.end: TurnFinished | None = None
        self.taking: Taking | None = None

    def _count_cancel(self) -> None:
        self.cancels += 1

    def _count_stop(self) -> None:
        self.stops += 1

    def offer(self) -> None:
        offer = self.a.engine.handovers.begin(self.giving)
        message = peer_wire.offer_message(offer, "f", 0).offer
        self.taking = Taking(peer_wire.offer_from(message), on_stop=self._count_stop)
        self.b.engine.handovers.accept(self.taking)

    def _receive(self, chunks: list[KvChunk]) -> None:
        assert self.taking is not None
        for chunk in chunks:
            self.b.engine.handovers.taker.reserve(self.taking, chunk.end_token)
            self.chunks = [*cut_to(self.chunks, chunk.first_token), over_the_wire(chunk, self.b)]

    def copy(self) -> None:
        self._receive(self.a.engine.handovers.giver.copy(self.giving))

    def release(self) -> SessionState:
        departure = self.a.engine.handovers.giver.release(self.giving)
        self._receive(departure.chunks)
        assert self.taking is not None
        return peer_wire.state_from(peer_wire.state_message(departure.state), self.taking.offer, cast(Any, Held))

    def adopt(self, state: SessionState) -> None:
        assert self.taking is not None
        self.b.engine.handovers.taker.adopt(self.taking, state, self.chunks, self._sink, self.sampled.append)

    def _sink(self, event: TurnEvent) -> None:
        if isinstance(event, TurnFinished):
            self.end = event

    def commit(self) -> None:
        assert self.taking is not None
        self.a.engine.handovers.giver.departed(self.giving)
        self.b.engine.handovers.taker.confirm(self.taking)

    def whole(self) -> None:
        self.offer()
        self.copy()
        self.a.steps(1)
        self.adopt(self.release())
        self.commit()
        self.check()

    def relay(self) -> None:
        """What peer.py does with the tokens that have come."""
        live, session = self.giving.live, self.giving.session
        assert live is not None
        assert session is not None
        for sampled in self.sampled:
            session.tokens.append(token_of(sampled))
            live.turn.output_tokens += 1
            self.giving.text_ended = live.take(sampled, self.a.engine.model)
        self.sampled.clear()
        if self.end is not None:
            live.flush()
            live.sink(self.end)
            self.a.engine.handovers.giver.ended(self.giving)

    def part(self) -> None:
        assert self.taking is not None
        self.b.engine.handovers.taker.part(self.taking)

    def check(self) -> None:
        for driven in (self.a, self.b):
            driven.check()


def holds_nothing(driven: Driven) -> bool:
    ledger = driven.engine._ledger
    return ledger.device_used_tokens == 0 and ledger.host_used_tokens == 0 and ledger.disk_used_tokens == 0


def expected(driven: Driven) -> str:
    return driven.runner.expected_output(PROMPT, TOKENS)


def under_way(steps: int, **request: Any) -> tuple[Driven, Driven, Turn]:
    a, b = Driven(), Driven()
    turn = a.turn("s", PROMPT, TOKENS, **request)
    a.steps(steps)
    return a, b, turn


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


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.NONE])
def test_an_idle_session_goes_from_any_tier_and_its_next_turn_is_cached_there(tier, tmp_path):
    disk = DiskTier(tmp_path, "f")
    a, b = Driven(disk=disk, disk_tokens=1000), Driven()
    first = a.complete("s", PROMPT)
    if tier in (Tier.HOST, Tier.DISK):
        a.direct(ask.SwapOut(directive_id="d", deadline_ns=a.now_ns + 10**9, session_id=SessionId("s"), tier=tier))
    if tier is Tier.NONE:
        a.direct(ask.Drop(directive_id="d", deadline_ns=a.now_ns + 10**9, session_id=SessionId("s"), from_token=0))
    assert a.engine._ledger.holding(SessionId("s")).longest()[0] is tier
    HandingOver(a, b, "s").whole()
    assert holds_nothing(a)
    prompt = PROMPT + first.text + "more"
    second = b.complete("s", prompt)
    assert second.text == b.runner.expected_output(prompt, 5)
    assert second.end is not None
    assert second.end.cached_tokens == (0 if tier is Tier.NONE else len(PROMPT) + 4)
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


# Refusals


def refused(a: Driven, b: Driven, status: str) -> HandoverError:
    handing = HandingOver(a, b, "s")
    with pytest.raises(HandoverError) as error:
        handing.whole()
    assert error.value.status == status
    a.engine.handovers.giver.take_back(handing.giving)
    if handing.taking is not None:
        handing.part()
    handing.check()
    return error.value


def test_an_unknown_session_is_refused():
    assert "s" in str(refused(Driven(), Driven(), "NOT_FOUND"))


def test_a_session_under_way_is_not_handed_over_twice():
    a, b, _ = under_way(2)
    HandingOver(a, b, "s").offer()
    with pytest.raises(HandoverError, match="already") as error:
        HandingOver(a, Driven(), "s").offer()
    assert error.value.status == "ALREADY_EXISTS"


def test_an_engine_takes_nothing_from_itself():
    a, _, turn = under_way(2)
    assert "itself" in str(refused(a, a, "INVALID_ARGUMENT"))
    a.settle()
    assert turn.text == expected(a)


def test_a_session_of_another_tenant_there_is_left_alone():
    a, b, turn = under_way(2)
    b.complete("s", "mine", tenant="other")
    refused(a, b, "PERMISSION_DENIED")
    a.settle()
    assert turn.text == expected(a)
    assert b.engine._scheduler.sessions[SessionId("s")].tenant_id == "other"


def test_a_session_with_a_turn_there_is_left_alone():
    a, b, _ = under_way(2)
    there = b.turn("s", "mine", 5)
    b.steps(1)
    refused(a, b, "ALREADY_EXISTS")
    b.settle()
    assert there.text == b.runner.expected_output("mine", 5)


def test_an_older_idle_session_of_that_name_gives_way():
    a, b, turn = under_way(3)
    b.complete("s", "older")
    handing = HandingOver(a, b, "s")
    handing.whole()
    b.settle()
    handing.relay()
    assert turn.text == expected(a)


def test_no_room_there_is_told_before_anything_is_sent():
    a, _, turn = under_way(2)
    b = Driven(host_tokens=10)
    assert "--host-bytes" in str(refused(a, b, "RESOURCE_EXHAUSTED"))
    assert b.engine._ledger.host_used_tokens == 0
    a.settle()
    assert turn.text == expected(a)


def test_no_room_here_for_the_copy_leaves_the_turn_running():
    a, b = Driven(host_tokens=4), Driven()
    turn = a.turn("s", PROMPT, TOKENS)
    a.steps(3)
    refused(a, b, "RESOURCE_EXHAUSTED")
    a.settle()
    assert turn.text == expected(a)


def test_a_conversation_longer_than_the_other_context_is_refused():
    a, _, _ = under_way(2)
    refused(a, Driven(kv_tokens=25), "RESOURCE_EXHAUSTED")


def test_a_full_queue_there_refuses_at_the_last_moment_and_the_turn_goes_on_here():
    a, _, turn = under_way(3)
    b = Driven(max_queued_turns=0)
    refused(a, b, "RESOURCE_EXHAUSTED")
    assert b.engine._ledger.host_used_tokens == 0
    a.settle()
    assert turn.text == expected(a)
    assert turn.end is not None
    assert turn.end.recomputed_tokens == 0


def test_kv_of_another_form_is_refused():
    a, b, _ = under_way(2)
    b.runner.kv_format = dataclasses.replace(b.runner.kv_format, planes=((1, 8), (1, 8)))
    refused(a, b, "FAILED_PRECONDITION")


def test_a_grammar_that_cannot_have_drawn_the_output_is_refused():
    a, b, turn = under_way(3)

    def sampler(params: SamplingParams, drawn: object = ()) -> object:
        raise RequestError("grammar: it cannot have drawn token 1")

    b.runner.sampler = sampler  # type: ignore[assignment,method-assign]
    refused(a, b, "FAILED_PRECONDITION")
    a.settle()
    assert turn.text == expected(a)


# The wire


def test_every_field_of_a_session_and_its_turn_survives_the_wire():
    held = cast(Any, Held("lark", "x"))
    request = TurnRequest(
        session_id=SessionId("s"),
        tenant_id=TenantId("t"),
        prompt="☃",
        max_tokens=0,
        stop=("a", "b"),
        sampling=SamplingParams(0.7, 0.9, 40, 0.05, 0, ((3, -1.5), (4, 0.25)), 0.5, -0.5, held, 0),
        slo=Slo(1, 2, 3),
        ephemeral=True,
        anonymous=True,
        peer_port=4711,
        may_call_tools=True,
        awaits_tool=True,
        ignore_end_of_text=True,
    )
    turn = EngineTurn(
        id=TurnId("t-1"),
        session_id=SessionId("s"),
        tenant_id=TenantId("t"),
        arrival_ns=5,
        prompt_tokens=2,
        max_output_tokens=9,
        cached_tokens=1,
        recomputed_tokens=3,
        output_tokens=2,
        preempted_count=6,
        due_ns=0,
        slo=Slo(1, 2, 3),
        group_waits=4,
        admitted_ns=7,
        first_token_ns=8,
    )
    session = Session(
        id=SessionId("s"),
        tenant_id=TenantId("t"),
        tokens=[5, 6, 7, 8],
        text=None,
        ephemeral=True,
        anonymous=True,
        cost=SessionCost(2, 9.5, 1.0, 0.25, 30, 10),
        computed_high_tokens=4,
        retain_until_ns=10,
        pinned_until_ns=11,
        held_until_ns=12,
        last_used_ns=13,
    )
    for made in (request, request.sampling, request.slo, turn, session):
        for field in dataclasses.fields(made):
            if field.name not in ("turn", "text") and field.default is not dataclasses.MISSING:
                assert getattr(made, field.name) != field.default, f"{field.name}: not its default, please"
    offer = Offer(SessionId("s"), TenantId("t"), "e", 4, 3, FakeRunner().kv_format)
    state = SessionState(session, 3, turn, request, Spent(Work(1, 2, 3, 4), 0.5))
    message = pb.SessionState.FromString(peer_wire.state_message(state).SerializeToString())
    back = peer_wire.state_from(message, offer, cast(Any, Held))
    assert back.request is not None
    assert back.request.sampling.logit_bias == request.sampling.logit_bias
    assert back == state


def test_a_corrupt_piece_is_refused():
    (begin, piece) = list(peer_wire.kv_messages(_chunk()))
    blob = peer_wire.Assembly(begin.blob, 16)
    piece.piece.data = piece.piece.data[:-1] + b"x"
    with pytest.raises(HandoverError, match="corrupt"):
        blob.add(piece.piece)


def test_a_blob_larger_than_its_tokens_can_be_is_refused_before_it_is_read():
    with pytest.raises(HandoverError, match="at most"):
        peer_wire.Assembly(pb.BlobBegin(kind=pb.BLOB_KIND_KV, total_bytes=1 << 40, token_count=5), 16)


def test_messages_stay_within_one_mebibyte():
    state = SessionState(Session(SessionId("s"), TenantId("t"), tokens=[1 << 20] * 1_000_000), 0)
    sizes = [message.ByteSize() for message in peer_wire.state_messages(state)]
    assert len(sizes) > 3
    assert max(sizes) <= 1 << 20


def _chunk() -> KvChunk:
    driven = Driven()
    driven.complete("s", PROMPT)
    slot = driven.engine._ledger.holding(SessionId("s")).slot
    assert slot is not None
    return driven.runner.copy(slot, 0)

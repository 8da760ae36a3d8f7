"""Hand-overs that cannot be: each is refused by its reason, and the session goes on where it was."""

from __future__ import annotations

import dataclasses

import pytest
from equipoise.gpuctl.engine.errors import HandoverError, RequestError
from equipoise.gpuctl.engine.schedule.sequence import (
    SamplingParams,
    SessionId,
)
from equipoise.tests.gpuctl.engine.driving import Driven
from equipoise.tests.gpuctl.engine.peer.handing_over import (
    PROMPT,
    TOKENS,
    HandingOver,
    expected,
    under_way,
)


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
    assert not any(each.used_tokens for each in b.engine._ledger.lower)
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
    assert not any(each.used_tokens for each in b.engine._ledger.lower)
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

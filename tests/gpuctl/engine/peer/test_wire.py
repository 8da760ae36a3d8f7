"""What goes from engine to engine: no field is lost, no corrupt or oversized piece is taken."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.engine.compute.kv_image import KvChunk
from equipoise.gpuctl.engine.errors import HandoverError
from equipoise.gpuctl.engine.peer import wire as peer_wire
from equipoise.gpuctl.engine.peer.session_state import Offer, SessionState
from equipoise.gpuctl.engine.schedule.sequence import (
    SamplingParams,
    Session,
    SessionId,
    Slo,
    TenantId,
    TurnId,
    TurnRequest,
)
from equipoise.gpuctl.engine.schedule.sequence import Turn as EngineTurn
from equipoise.gpuctl.engine.turn_cost import Spent
from equipoise.policies.accounting import SessionCost, Work
from equipoise.tests.gpuctl.engine.driving import Driven
from equipoise.tests.gpuctl.engine.fakes import FakeRunner
from equipoise.tests.gpuctl.engine.peer.handing_over import (
    PROMPT,
    Held,
)


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
        peer_address="10.0.0.2",
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

"""Hands a session from one driven engine to another, stage by stage, over the fake runner."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.engine.compute.kv_image import KvChunk, cut_to
from equipoise.gpuctl.engine.live import Sampled, token_of
from equipoise.gpuctl.engine.peer import wire as peer_wire
from equipoise.gpuctl.engine.peer.giving import Giving
from equipoise.gpuctl.engine.peer.session_state import SessionState
from equipoise.gpuctl.engine.peer.taking import Taking
from equipoise.gpuctl.engine.schedule.sequence import (
    SessionId,
    TurnEvent,
    TurnFinished,
)
from equipoise.tests.gpuctl.engine.driving import Driven, Turn

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
    """One hand-over between two driven engines, stage by stage, as the rpc ends make them."""

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
        """What giving_rpc.py does with the tokens that have come."""
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
    return ledger.device_used_tokens == 0 and not any(each.used_tokens for each in ledger.lower)


def expected(driven: Driven) -> str:
    return driven.runner.expected_output(PROMPT, TOKENS)


def under_way(steps: int, **request: Any) -> tuple[Driven, Driven, Turn]:
    a, b = Driven(), Driven()
    turn = a.turn("s", PROMPT, TOKENS, **request)
    a.steps(steps)
    return a, b, turn

"""Translates between what engines hand over and peer.proto: sessions, KV in checked pieces, tokens, ends.

Owns: the pieces' size and checksum. Must not: do I/O.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np

from ....policies.accounting import SessionCost, Work
from ...api.v1 import peer_pb2 as pb
from ...messages import SHARED
from ...translation import Translation, check_parts
from ..compute.constraint import Constraint
from ..compute.kv_image import Blob, KvChunk, KvFormat, compose, parse
from ..errors import HandoverError, SwapError
from ..live import Sampled
from ..schedule.sequence import (
    SamplingParams,
    Session,
    Slo,
    TokenLogprob,
    Turn,
    TurnFinished,
    TurnRequest,
)
from ..turn_cost import Spent
from .session_state import Offer, SessionState

Compiled = Callable[[str, str], Constraint]

PIECE_BYTES = (1 << 20) - 1024  # a message stays within 1 MiB
MAX_STATE_BYTES = 64 << 20
_KV_OVERHEAD_BYTES = 1 << 20  # of a saved chunk beside its tokens: headers, one per layer


# Offers


_OFFER = Translation(Offer, pb.SessionOffer, renamed={"kv_format": "kv_form"}, there=("fingerprint", "deadline_ns"))


def offer_message(offer: Offer, fingerprint: str, deadline_ns: int) -> pb.SessionPart:
    return pb.SessionPart(offer=_OFFER.encode(offer, fingerprint=fingerprint, deadline_ns=deadline_ns))


def offer_from(message: pb.SessionOffer) -> Offer:
    """Raises HandoverError where it names no session."""
    if not message.session_id or not message.tenant_id or message.held_tokens < 0:
        raise HandoverError("an offer must name a session and its tenant", status="INVALID_ARGUMENT")
    return _OFFER.decode(message)


# Blobs


def kv_messages(chunk: KvChunk) -> Iterator[pb.SessionPart]:
    blob = compose([chunk])
    begin = pb.BlobBegin(
        kind=pb.BLOB_KIND_KV, total_bytes=blob.size, first_token=chunk.first_token, token_count=chunk.count
    )
    return _blob_messages(begin, blob)


def state_messages(state: SessionState) -> Iterator[pb.SessionPart]:
    blob = np.frombuffer(state_message(state).SerializeToString(), np.uint8)
    return _blob_messages(pb.BlobBegin(kind=pb.BLOB_KIND_STATE, total_bytes=blob.size), blob)


def _blob_messages(begin: pb.BlobBegin, blob: Blob) -> Iterator[pb.SessionPart]:
    yield pb.SessionPart(blob=begin)
    for at in range(0, blob.size, PIECE_BYTES):
        data = blob[at : at + PIECE_BYTES].tobytes()
        yield pb.SessionPart(piece=pb.BlobPiece(data=data, crc32=zlib.crc32(data)))


class Assembly:
    """One blob on its way in."""

    def __init__(self, begin: pb.BlobBegin, bytes_per_token: int) -> None:
        """Raises HandoverError where it is larger than what it says it holds can be."""
        limit = begin.token_count * bytes_per_token + _KV_OVERHEAD_BYTES
        if begin.kind == pb.BLOB_KIND_STATE:
            limit = MAX_STATE_BYTES
        if not 0 < begin.total_bytes <= limit or begin.token_count < 0:
            raise HandoverError(f"a blob of {begin.total_bytes} bytes: at most {limit}", status="INVALID_ARGUMENT")
        self._begin = begin
        self._blob = np.empty(begin.total_bytes, np.uint8)
        self._filled = 0

    @property
    def complete(self) -> bool:
        return self._filled == self._blob.size

    def add(self, piece: pb.BlobPiece) -> None:
        """Raises HandoverError where it is corrupt or more than was announced."""
        end = self._filled + len(piece.data)
        if zlib.crc32(piece.data) != piece.crc32 or end > self._blob.size or not piece.data:
            raise HandoverError(f"the piece at byte {self._filled} came corrupt", status="DATA_LOSS")
        self._blob[self._filled : end] = np.frombuffer(piece.data, np.uint8)
        self._filled = end

    def chunk(self, form: KvFormat) -> KvChunk:
        """The KV it held, fit for a context of `form`. Raises HandoverError where it is other than announced."""
        try:
            chunk = form.adopt(parse(self._blob))
        except SwapError as error:
            raise HandoverError(f"the KV that came cannot be used: {error}", status="DATA_LOSS") from None
        if (chunk.first_token, chunk.count) != (self._begin.first_token, self._begin.token_count):
            raise HandoverError(
                f"KV of tokens {chunk.first_token} to {chunk.end_token} came where {self._begin.token_count} from "
                f"{self._begin.first_token} on were told",
                status="DATA_LOSS",
            )
        return chunk

    def state(self, offer: Offer, compiled: Compiled) -> SessionState:
        """See `state_from`."""
        return state_from(pb.SessionState.FromString(self._blob.tobytes()), offer, compiled)


# Sessions


_SESSION_COST = Translation(SessionCost, pb.SessionCost)
_SESSION = Translation(
    Session, pb.SessionState, here=("id", "tenant_id", "turn"), there=("kv_tokens", "turn"), using=(_SESSION_COST,)
)
_TURN = Translation(
    Turn,
    pb.TurnState,
    renamed={"id": "turn_id"},
    here=("session_id", "tenant_id", "output_tokens", "slo"),
    there=None,
)
_REQUEST = Translation(
    TurnRequest,
    pb.TurnState,
    here=("session_id", "tenant_id", "sampling", "slo", "ephemeral", "anonymous"),
    there=None,
)
_SLO = Translation(Slo, pb.TurnState, renamed={each.name: f"slo_{each.name}" for each in fields(Slo)}, there=None)
check_parts(pb.TurnState, (_TURN, _REQUEST, _SLO), there=("sampling", "work"))
_SAMPLING = Translation(SamplingParams, pb.Sampling, here=("constraint",), there=("constraint",))
_WORK = Translation(Work, pb.TurnWork, there=("energy_joules",))


def state_message(state: SessionState) -> pb.SessionState:
    turn = None
    if state.turn is not None and state.request is not None:
        turn = _turn_message(state.turn, state.request, state.spent)
    return _SESSION.encode(state.session, kv_tokens=state.kv_tokens, turn=turn)


def _turn_message(turn: Turn, request: TurnRequest, spent: Spent) -> pb.TurnState:
    message = _TURN.encode(turn)
    message.MergeFrom(_REQUEST.encode(request))
    message.MergeFrom(_SLO.encode(request.slo))
    held = request.sampling.constraint
    constraint = None if held is None else pb.Constraint(kind=held.kind, text=held.text)
    message.sampling.CopyFrom(_SAMPLING.encode(request.sampling, constraint=constraint))
    message.work.CopyFrom(_WORK.encode(spent.work, energy_joules=spent.energy_joules))
    return message


def state_from(message: pb.SessionState, offer: Offer, compiled: Compiled) -> SessionState:
    """`compiled` makes a constraint from its kind and text, which may take a second. Raises ConstraintError."""
    whose = {"session_id": offer.session_id, "tenant_id": offer.tenant_id}
    session = _SESSION.decode(message, id=offer.session_id, tenant_id=offer.tenant_id)
    if not message.HasField("turn"):
        return SessionState(session, message.kv_tokens)
    told, slo = message.turn, _SLO.decode(message.turn)
    held = told.sampling.constraint
    constraint = compiled(held.kind, held.text) if told.sampling.HasField("constraint") else None
    sampling = _SAMPLING.decode(told.sampling, constraint=constraint)
    request = _REQUEST.decode(
        told, **whose, sampling=sampling, slo=slo, ephemeral=message.ephemeral, anonymous=message.anonymous
    )
    turn = _TURN.decode(told, **whose, output_tokens=len(message.tokens) - told.prompt_tokens, slo=slo)
    energy_joules = told.work.energy_joules if told.work.HasField("energy_joules") else None
    return SessionState(session, message.kv_tokens, turn, request, Spent(_WORK.decode(told.work), energy_joules))


# Events

_LOGPROB = Translation(TokenLogprob, pb.SampledToken)
_DONE = Translation(TurnFinished, pb.TurnDone, renamed={"reason": "finish_reason"}, using=(*SHARED, _SESSION_COST))


def sampled_event(sampled: Sampled) -> pb.TakenEvent:
    # Of every token: a bare one, which is nearly all of them, takes no table.
    if not isinstance(sampled, TokenLogprob):
        return pb.TakenEvent(sampled=pb.SampledToken(token=sampled))
    return pb.TakenEvent(sampled=_LOGPROB.encode(sampled))


def sampled_from(message: pb.SampledToken) -> Sampled:
    return _LOGPROB.decode(message) if message.HasField("logprob") else message.token


def done_event(end: TurnFinished) -> pb.TakenEvent:
    return pb.TakenEvent(done=_DONE.encode(end))


def done_from(message: pb.TurnDone) -> TurnFinished:
    return _DONE.decode(message)

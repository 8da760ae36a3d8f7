"""Translates between what engines hand over and peer.proto: sessions, KV in checked pieces, tokens, ends.

Owns: the pieces' size and checksum. Must not: do I/O.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from ....policies.accounting import SessionCost, Work
from ...api.v1 import peer_pb2 as pb
from ...messages import FINISH_REASON, FINISH_REASON_TO_PB, turn_cost_message, turn_cost_of
from ..compute.constraint import Constraint
from ..compute.kv_image import Blob, KvChunk, KvFormat, compose, parse
from ..errors import HandoverError, SwapError
from ..live import Sampled
from ..schedule.sequence import (
    FinishReason,
    SamplingParams,
    Session,
    SessionId,
    Slo,
    TenantId,
    TokenLogprob,
    Turn,
    TurnFinished,
    TurnId,
    TurnRequest,
)
from ..turn_cost import Spent
from .session_state import Offer, SessionState

Compiled = Callable[[str, str], Constraint]

PIECE_BYTES = (1 << 20) - 1024  # a message stays within 1 MiB
MAX_STATE_BYTES = 64 << 20
_KV_OVERHEAD_BYTES = 1 << 20  # of a saved chunk beside its tokens: headers, one per layer


# Offers


def offer_message(offer: Offer, fingerprint: str, deadline_ns: int) -> pb.SessionPart:
    form = offer.kv_format
    planes = [pb.KvPlane(ggml_type=ggml_type, row_bytes=width) for ggml_type, width in form.planes]
    return pb.SessionPart(
        offer=pb.SessionOffer(
            session_id=offer.session_id,
            tenant_id=offer.tenant_id,
            engine_id=offer.engine_id,
            fingerprint=fingerprint,
            context_tokens=offer.context_tokens,
            held_tokens=offer.held_tokens,
            kv_form=pb.KvForm(magic=form.magic, stream_count=form.stream_count, planes=planes),
            deadline_ns=deadline_ns,
        )
    )


def offer_from(message: pb.SessionOffer) -> Offer:
    """Raises HandoverError where it names no session."""
    if not message.session_id or not message.tenant_id or message.held_tokens < 0:
        raise HandoverError("an offer must name a session and its tenant", status="INVALID_ARGUMENT")
    form = message.kv_form
    return Offer(
        session_id=SessionId(message.session_id),
        tenant_id=TenantId(message.tenant_id),
        engine_id=message.engine_id,
        context_tokens=message.context_tokens,
        held_tokens=message.held_tokens,
        kv_format=KvFormat(
            form.magic,
            form.stream_count,
            tuple((plane.ggml_type, plane.row_bytes) for plane in form.planes),
        ),
    )


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


def state_message(state: SessionState) -> pb.SessionState:
    session = state.session
    message = pb.SessionState(
        tokens=session.tokens,
        text=session.text,
        ephemeral=session.ephemeral,
        computed_high_tokens=session.computed_high_tokens,
        retain_until_ns=session.retain_until_ns,
        pinned_until_ns=session.pinned_until_ns,
        held_until_ns=session.held_until_ns,
        last_used_ns=session.last_used_ns,
        anonymous=session.anonymous,
        cost=_session_cost(session.cost),
        kv_tokens=state.kv_tokens,
    )
    if state.turn is not None and state.request is not None:
        message.turn.CopyFrom(_turn_message(state.turn, state.request, state.spent))
    return message


def _turn_message(turn: Turn, request: TurnRequest, spent: Spent) -> pb.TurnState:
    sampling = request.sampling
    return pb.TurnState(
        turn_id=turn.id,
        arrival_ns=turn.arrival_ns,
        prompt_tokens=turn.prompt_tokens,
        max_output_tokens=turn.max_output_tokens,
        cached_tokens=turn.cached_tokens,
        recomputed_tokens=turn.recomputed_tokens,
        preempted_count=turn.preempted_count,
        due_ns=turn.due_ns,
        admitted_ns=turn.admitted_ns,
        first_token_ns=turn.first_token_ns,
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        stop=request.stop,
        sampling=pb.Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            logit_bias=[pb.TokenNumber(token=token, number=bias) for token, bias in sampling.logit_bias],
            constraint=None
            if sampling.constraint is None
            else pb.Constraint(kind=sampling.constraint.kind, text=sampling.constraint.text),
            logprobs=sampling.logprobs,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        ),
        slo_ttft_ns=request.slo.ttft_ns,
        slo_deadline_ns=request.slo.deadline_ns,
        slo_tpot_ns=request.slo.tpot_ns,
        peer_port=request.peer_port,
        may_call_tools=request.may_call_tools,
        awaits_tool=request.awaits_tool,
        ignore_end_of_text=request.ignore_end_of_text,
        group_waits=turn.group_waits,
        work=pb.TurnWork(
            prefill_tokens=spent.work.prefill_tokens,
            wasted_tokens=spent.work.wasted_tokens,
            decode_tokens=spent.work.decode_tokens,
            decode_context_tokens=spent.work.decode_context_tokens,
            energy_joules=spent.energy_joules,
        ),
    )


def state_from(message: pb.SessionState, offer: Offer, compiled: Compiled) -> SessionState:
    """`compiled` makes a constraint from its kind and text, which may take a second. Raises ConstraintError."""
    session = Session(
        id=offer.session_id,
        tenant_id=offer.tenant_id,
        tokens=list(message.tokens),
        text=message.text if message.HasField("text") else None,
        ephemeral=message.ephemeral,
        computed_high_tokens=message.computed_high_tokens,
        retain_until_ns=message.retain_until_ns,
        pinned_until_ns=message.pinned_until_ns if message.HasField("pinned_until_ns") else None,
        held_until_ns=message.held_until_ns if message.HasField("held_until_ns") else None,
        last_used_ns=message.last_used_ns,
        anonymous=message.anonymous,
        cost=_session_cost_from(message.cost),
    )
    if not message.HasField("turn"):
        return SessionState(session, message.kv_tokens)
    told = message.turn
    request = _request_from(told, offer, message, compiled)
    turn = Turn(
        id=TurnId(told.turn_id),
        session_id=offer.session_id,
        tenant_id=offer.tenant_id,
        arrival_ns=told.arrival_ns,
        prompt_tokens=told.prompt_tokens,
        max_output_tokens=told.max_output_tokens,
        cached_tokens=told.cached_tokens,
        recomputed_tokens=told.recomputed_tokens,
        output_tokens=len(message.tokens) - told.prompt_tokens,
        preempted_count=told.preempted_count,
        due_ns=told.due_ns if told.HasField("due_ns") else None,
        admitted_ns=told.admitted_ns if told.HasField("admitted_ns") else None,
        slo=request.slo,
        group_waits=told.group_waits,
        first_token_ns=told.first_token_ns if told.HasField("first_token_ns") else None,
    )
    return SessionState(session, message.kv_tokens, turn, request, _spent_from(told.work))


def _spent_from(told: pb.TurnWork) -> Spent:
    work = Work(told.prefill_tokens, told.wasted_tokens, told.decode_tokens, told.decode_context_tokens)
    return Spent(work, told.energy_joules if told.HasField("energy_joules") else None)


def _request_from(told: pb.TurnState, offer: Offer, message: pb.SessionState, compiled: Compiled) -> TurnRequest:
    sampling, held = told.sampling, told.sampling.constraint
    return TurnRequest(
        session_id=offer.session_id,
        tenant_id=offer.tenant_id,
        prompt=told.prompt,
        max_tokens=told.max_tokens if told.HasField("max_tokens") else None,
        stop=tuple(told.stop),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed if sampling.HasField("seed") else None,
            logit_bias=tuple((bias.token, bias.number) for bias in sampling.logit_bias),
            constraint=compiled(held.kind, held.text) if sampling.HasField("constraint") else None,
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        ),
        slo=Slo(
            told.slo_ttft_ns if told.HasField("slo_ttft_ns") else None,
            told.slo_deadline_ns if told.HasField("slo_deadline_ns") else None,
            told.slo_tpot_ns if told.HasField("slo_tpot_ns") else None,
        ),
        ephemeral=message.ephemeral,
        anonymous=message.anonymous,
        peer_port=told.peer_port if told.HasField("peer_port") else None,
        may_call_tools=told.may_call_tools,
        awaits_tool=told.awaits_tool,
        ignore_end_of_text=told.ignore_end_of_text,
    )


# Costs


def _session_cost(cost: SessionCost) -> pb.SessionCost:
    return pb.SessionCost(
        turn_count=cost.turn_count,
        pte=cost.pte,
        wasted_pte=cost.wasted_pte,
        energy_joules=cost.energy_joules,
        duration_ns=cost.duration_ns,
        ideal_ns=cost.ideal_ns,
    )


def _session_cost_from(message: pb.SessionCost) -> SessionCost:
    return SessionCost(
        turn_count=message.turn_count,
        pte=message.pte if message.HasField("pte") else None,
        wasted_pte=message.wasted_pte,
        energy_joules=message.energy_joules if message.HasField("energy_joules") else None,
        duration_ns=message.duration_ns,
        ideal_ns=message.ideal_ns,
    )


# Events


def sampled_event(sampled: Sampled) -> pb.TakenEvent:
    if not isinstance(sampled, TokenLogprob):
        return pb.TakenEvent(sampled=pb.SampledToken(token=sampled))
    top = [pb.TokenNumber(token=token, number=logprob) for token, logprob in sampled.top]
    return pb.TakenEvent(sampled=pb.SampledToken(token=sampled.token, logprob=sampled.logprob, top=top))


def sampled_from(message: pb.SampledToken) -> Sampled:
    if not message.HasField("logprob"):
        return message.token
    return TokenLogprob(message.token, message.logprob, tuple((top.token, top.number) for top in message.top))


def done_event(end: TurnFinished) -> pb.TakenEvent:
    return pb.TakenEvent(
        done=pb.TurnDone(
            finish_reason=FINISH_REASON_TO_PB[end.reason],
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            recomputed_tokens=end.recomputed_tokens,
            output_tokens=end.output_tokens,
            queued_ns=end.queued_ns,
            ttft_ns=end.ttft_ns,
            cost=turn_cost_message(end.cost),
            session_cost=_session_cost(end.session_cost),
            awaits_tool=end.awaits_tool,
            error=end.error,
            engine_id=end.engine_id,
        )
    )


def done_from(message: pb.TurnDone) -> TurnFinished:
    return TurnFinished(
        reason=FINISH_REASON.get(message.finish_reason, FinishReason.ERROR),
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        recomputed_tokens=message.recomputed_tokens,
        output_tokens=message.output_tokens,
        queued_ns=message.queued_ns,
        ttft_ns=message.ttft_ns if message.HasField("ttft_ns") else None,
        cost=turn_cost_of(message.cost),
        session_cost=_session_cost_from(message.session_cost),
        awaits_tool=message.awaits_tool,
        error=message.error if message.HasField("error") else None,
        engine_id=message.engine_id,
    )

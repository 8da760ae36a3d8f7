"""Computes one step of a plan: the batch, its interruption by an urgent turn, and what came of it.

Owns: whether the step under way may be cut short. Must not: choose what is in it (scheduler.py) or move KV (mover.py).
On the engine's thread only, but for `hurry`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .compute.runner import BatchSlice, StepStatus
from .errors import ConstraintError, ContextError
from .live import LiveTurn, Sampled, token_of
from .parts import EngineParts
from .schedule.plan import Slice
from .schedule.sequence import FinishReason

_log = logging.getLogger(__name__)

# A step with fewer prompt tokens is over soon enough by itself.
_INTERRUPTIBLE_TOKENS = 16


class Stepper:
    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._urgent = False  # an urgent turn has arrived and is not queued yet
        self._interruptible = False  # the step under way may be cut short
        self._was_interrupted = False

    def hurry(self) -> None:
        """An urgent turn has just been put where the next step border finds it. From any thread."""
        # In this order: the step that begins now sees the mark, one already under way sees the flag.
        self._urgent = True
        if self._interruptible:
            self._parts.runner.interrupt()

    def arrivals_seen(self) -> None:
        """What has arrived until now will be queued before the next step."""
        self._urgent = False

    def step(self, slices: Sequence[Slice]) -> None:
        """Compute the slices and hand on what they produce. A llama.cpp that refuses costs their turns, no others."""
        try:
            self._compute(slices)
        except ContextError as error:
            self._fail(slices, error)

    def _compute(self, slices: Sequence[Slice]) -> None:
        parts = self._parts
        prompt_tokens = sum(item.count for item in slices if item.count > 1)
        # Never twice in a row: urgent turns that keep coming must not stop a prefill for good.
        self._interruptible = prompt_tokens >= _INTERRUPTIBLE_TOKENS and not self._was_interrupted
        self._was_interrupted = False
        parts.runner.forget_interrupt()
        if self._interruptible and self._urgent:
            return
        parts.accounts.begin_step()
        result = parts.runner.step([self._batched(item) for item in slices])
        parts.accounts.end_step((parts.live[item.session_id].turn, item) for item in slices)
        self._interruptible = False
        parts.totals.steps += 1
        if result.status is StepStatus.NO_ROOM:
            raise ContextError("llama.cpp finds no room for the step although the books have it")
        if result.status is StepStatus.ABORTED:
            self._was_interrupted = True
            parts.totals.interrupted_steps += 1
            self._book_aborted(slices)
            return
        now_ns = parts.clock()
        for item, sampled in zip(slices, result.sampled, strict=True):
            self._book(item, item.count)
            if isinstance(sampled, ConstraintError):
                parts.finish(parts.live[item.session_id], FinishReason.ERROR, str(sampled))
            elif sampled is not None:
                self._take_token(parts.live[item.session_id], sampled, now_ns)

    def _batched(self, item: Slice) -> BatchSlice:
        live = self._parts.live[item.session_id]
        tokens = self._parts.scheduler.sessions[item.session_id].tokens[item.start : item.start + item.count]
        sampler = live.sampler if item.samples else None
        return BatchSlice(item.slot, item.start, tokens, sampler, live.request.sampling.logprobs)

    def _book(self, item: Slice, count: int) -> None:
        turn = self._parts.live[item.session_id].turn
        before = turn.recomputed_tokens
        self._parts.scheduler.computed(item.session_id, item.start, count)
        self._parts.accounts.book(turn, item.start, count, turn.recomputed_tokens - before)

    def _book_aborted(self, slices: Sequence[Slice]) -> None:
        """An interrupted step keeps what llama.cpp had finished; the rest is planned again."""
        runner = self._parts.runner
        for item in slices:
            held = runner.held_tokens(item.slot)
            done = min(max(0, held - item.start), item.count)
            if done == item.count and item.samples:
                done -= 1  # its logits are gone: compute the last token again
                runner.cut(item.slot, item.start + done)
            if done:
                self._book(item, done)

    def _take_token(self, live: LiveTurn, sampled: Sampled, now_ns: int) -> None:
        parts, turn = self._parts, live.turn
        parts.scheduler.sessions[turn.session_id].tokens.append(token_of(sampled))
        parts.scheduler.produced(turn.session_id)
        parts.totals.decode_tokens += 1
        if turn.first_token_ns is None:
            turn.first_token_ns = now_ns
        if live.take(sampled, parts.model):
            parts.finish(live, FinishReason.STOP)
        elif turn.output_tokens >= turn.max_output_tokens:
            parts.finish(live, FinishReason.LENGTH)

    def _fail(self, slices: Sequence[Slice], error: ContextError) -> None:
        """End the step's turns with an error, forget their KV, serve the others on."""
        _log.error("step_failed error=%r turns=%d", str(error), len(slices))
        for item in slices:
            live = self._parts.live.get(item.session_id)
            self._parts.runner.cut(item.slot, 0)
            self._parts.scheduler.lost(item.session_id)
            if live is not None:
                self._parts.finish(live, FinishReason.ERROR, str(error))

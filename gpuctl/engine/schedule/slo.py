"""What a client's wishes for its turn's timing mean for the scheduler, by the cost model.

Owns: when a turn is due, and how long a step that decodes may spend on prompts. Pure functions. Must not: order turns
or fill batches (scheduler.py).

A turn's margin is the time left until it must be computed for its tightest wish to be met still; the least margin goes
first within a tenant's share (JITServe). Before the first token that is the time to first token and the deadline; from
then on the deadline and the pace: token n + 1 is due n wished times after the first, so a turn that is ahead may let a
prompt take a larger chunk of a step, and one that fell behind catches up.
"""

from __future__ import annotations

from collections.abc import Sequence

from .cost_figures import CostFigures
from .sequence import Turn


def begin_by_ns(turn: Turn, cost: CostFigures, held_tokens: int) -> int | None:
    """When a turn that has produced nothing must begin, given that `held_tokens` of its prompt need no computing.

    None: it wishes neither a time to first token nor a deadline.
    """
    slo, due = turn.slo, []
    prefill_s = cost.prefill_seconds(turn.prompt_tokens, held_tokens)
    if slo.ttft_ns is not None:
        due.append(turn.arrival_ns + slo.ttft_ns - int(prefill_s * 1e9))
    if slo.deadline_ns is not None:
        decode_s = cost.decode_step_seconds * turn.max_output_tokens
        due.append(turn.arrival_ns + slo.deadline_ns - int((prefill_s + decode_s) * 1e9))
    return min(due, default=None)


def due_ns(turn: Turn, cost: CostFigures) -> int | None:
    """When the turn must be computed next to meet its wishes; None: it has none that still counts."""
    if turn.first_token_ns is None:
        return turn.due_ns
    due = []
    if (paced := _next_token_due_ns(turn)) is not None:
        due.append(paced - int(cost.decode_step_seconds * 1e9))
    if turn.slo.deadline_ns is not None:
        decode_s = cost.decode_step_seconds * (turn.max_output_tokens - turn.output_tokens)
        due.append(turn.arrival_ns + turn.slo.deadline_ns - int(decode_s * 1e9))
    return min(due, default=None)


def prefill_seconds_allowed(decoding: Sequence[Turn], cost: CostFigures, now_ns: int) -> float | None:
    """How long the prompts of a step may take so that each decoding turn's next token comes when it wishes.

    None: nobody wishes a pace. 0 or less where somebody is behind. A pace faster than a step of these turns without any
    prompt is not met by small chunks either, so it does not count: it would slow everyone's prompts for nothing.
    """
    decode_s = cost.decode_seconds(len(decoding))
    margins = [
        (due - now_ns) / 1e9 - decode_s
        for turn in decoding
        if (due := _next_token_due_ns(turn)) is not None and turn.slo.tpot_ns is not None
        if turn.slo.tpot_ns / 1e9 > decode_s
    ]
    return min(margins, default=None)


def _next_token_due_ns(turn: Turn) -> int | None:
    if turn.slo.tpot_ns is None or turn.first_token_ns is None:
        return None
    return turn.first_token_ns + turn.output_tokens * turn.slo.tpot_ns

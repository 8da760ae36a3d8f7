"""What a run of a world came to: counted while it runs, read at its end.

Owns the meaning of each figure of a replay. Counting begins anew after the warm-up, so that a steady loop is not
measured while it fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..accounting import Gamma, Work, pte

GIB = float(1 << 30)


@dataclass(slots=True)
class Tally:
    """Running sums since `since_s`."""

    since_s: float = 0.0
    turn_count: int = 0
    """Turns ended, those after a killed call left out: what the agent asked for was not done."""
    spoilt_count: int = 0
    """Turns ended after a call of theirs had been killed."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Prompt tokens that were new and output tokens, by tenant: what each was served."""
    first_token_s: list[float] = field(default_factory=list)
    """Of resumed turns: from the agent's request to the first token, the wait at the door included."""
    tool_s: list[float] = field(default_factory=list)
    kill_count: int = 0
    stalled_s: float = 0.0
    """Seconds that tool calls stood for want of memory."""
    throttled_s: float = 0.0
    work: Work = field(default_factory=Work)
    recomputed_tokens: int = 0
    idle_byte_seconds: float = 0.0
    """Device KV of sessions without a turn being computed, over time."""
    swapped_bytes: float = 0.0
    """Copied between tiers, either way; to and from the disk included."""
    disk_bytes: float = 0.0
    prefill_s: float = 0.0
    most_tool_bytes: int = 0
    """That all tool calls ever used together."""

    def restart(self, now_s: float) -> None:
        """Count from now on: the warm-up is over."""
        fresh = Tally(since_s=now_s)
        for each in fields(Tally):
            setattr(self, each.name, getattr(fresh, each.name))

    def take(self, other: Tally) -> None:
        """Add the sums of another run to these; the most is the most of either."""
        for each in fields(Tally):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            if each.name == "most_tool_bytes":
                setattr(self, each.name, max(mine, more))
            elif each.name == "tokens":
                self.tokens = {t: mine.get(t, 0) + more.get(t, 0) for t in sorted(mine | more)}
            elif each.name != "since_s":
                setattr(self, each.name, mine + more)


@dataclass(frozen=True, slots=True)
class Score:
    """The figures of one policy on one world. Times in seconds; None: nothing of the kind happened, or no gamma."""

    policy: str
    span_s: float
    turns: int
    turns_per_minute: float
    """Goodput: turns whose calls were not killed."""
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    first_token_p99_s: float | None
    tool_p50_s: float | None
    tool_p95_s: float | None
    tool_p99_s: float | None
    kills: int
    stalled_s: float
    throttled_s: float
    recomputed_tokens: int
    pte: float | None
    kv_idle_gib_s: float
    swapped_gib: float
    disk_busy_ratio: float | None
    prefill_busy_ratio: float
    fairness_gap: float | None
    """Spread over tenants of (share of the tokens served) / (share of the weights): 0 is even. None: one tenant."""
    bound_ratio: float | None = None
    """turns_per_minute over what no policy can exceed; None: not computed."""


def quantile(values: Sequence[float], q: float) -> float | None:
    """The value below which a share `q` of them lies (nearest rank); None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def fairness_gap(tokens: Mapping[str, int], weights: Mapping[str, float]) -> float | None:
    total, weight = sum(tokens.get(t, 0) for t in weights), sum(weights.values())
    if len(weights) < 2 or not total:
        return None
    shares = [tokens.get(t, 0) / total / (w / weight) for t, w in weights.items()]
    return max(shares) - min(shares)


def score(
    policy: str,
    tally: Tally,
    now_s: float,
    weights: Mapping[str, float],
    gamma: Gamma | None,
    disk_bytes_per_second: float,
) -> Score:
    span_s = max(1e-9, now_s - tally.since_s)
    return Score(
        policy=policy,
        span_s=span_s,
        turns=tally.turn_count,
        turns_per_minute=60.0 * tally.turn_count / span_s,
        first_token_p50_s=quantile(tally.first_token_s, 0.5),
        first_token_p95_s=quantile(tally.first_token_s, 0.95),
        first_token_p99_s=quantile(tally.first_token_s, 0.99),
        tool_p50_s=quantile(tally.tool_s, 0.5),
        tool_p95_s=quantile(tally.tool_s, 0.95),
        tool_p99_s=quantile(tally.tool_s, 0.99),
        kills=tally.kill_count,
        stalled_s=tally.stalled_s,
        throttled_s=tally.throttled_s,
        recomputed_tokens=tally.recomputed_tokens,
        pte=pte(tally.work, gamma) if gamma else None,
        kv_idle_gib_s=tally.idle_byte_seconds / GIB,
        swapped_gib=tally.swapped_bytes / GIB,
        disk_busy_ratio=tally.disk_bytes / disk_bytes_per_second / span_s if disk_bytes_per_second else None,
        prefill_busy_ratio=tally.prefill_s / span_s,
        fairness_gap=fairness_gap(tally.tokens, weights),
    )

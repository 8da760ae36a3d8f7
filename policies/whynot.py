"""Why not: which rules look at a tool call or a session, and what stops each, thresholds against measurements.

Owns the answer for the moment of a snapshot. It decides nothing: each look says of one rule of the ladder, of the KV
economy or of the door where it would have ended, in the order in which decide() asks. Costs are not weighed again here:
the last decision about a session has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .actions import Decision
from .fairness import Share, shares
from .memory.relief import THROTTLE_AT_LEAST_RATIO, has_run_for_it
from .model import MIB, NS_PER_S, KvTier, Session, SessionPhase, TenantId, ToolCall, ToolCallPhase
from .policy import LadderRule, Mode, Policy
from .snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Look:
    """One rule that looked, and did nothing."""

    rule: str
    why: str
    measurement: float | None = None
    threshold: float | None = None
    """None: it did not come to that."""
    unit: str = ""


def why_not_call(snapshot: Snapshot, policy: Policy, call: ToolCall) -> tuple[Look, ...]:
    """Of a call that runs or has ended; what was decided about it is told elsewhere."""
    looks = [*_mode(policy), _budget(policy, call)]
    if call.gone_ns is not None:
        return (*looks, Look("the ladder", "all of its processes are gone: nothing is left to hold back"))
    by_tenant = shares(snapshot, policy)
    return (*looks, *(_ladder(rule, snapshot, policy, call, by_tenant) for rule in policy.memory.ladder))


def last_weighed(decisions: Iterable[Decision], now_ns: int) -> tuple[Look, ...]:
    """The newest decision about a session in which places were weighed: what each would have cost. Newest first."""
    made = next((decision for decision in decisions if decision.candidates), None)
    if made is None:
        return ()
    costs = ", ".join(f"{c.name} {c.cost:.4g}" for c in made.candidates)
    why = f"{(now_ns - made.at_ns) / NS_PER_S:.1f} s ago {made.rule}: {costs}"
    return (Look("what it was last weighed at", why, made.measurement, made.threshold, made.unit),)


def budget_looks(policy: Policy, call: ToolCall) -> tuple[Look, ...]:
    """Of a call whose time is long over: how near it came to its budget."""
    return (_budget(policy, call),)


def passed_over(call: ToolCall, decisions: Iterable[Decision]) -> tuple[Look, ...]:
    """Decisions about others in which this call was a runner-up, or may have been: they know calls by kind and tenant.

    One look a rule, the newest; `decisions` newest first, all of the call's time.
    """
    name = f"{call.kind} of {call.tenant}"
    found: dict[str, Look] = {}
    for decision in decisions:
        if getattr(decision.action, "tool_call", call.id) == call.id or decision.rule in found:
            continue
        behind = next((c for c in decision.candidates[1:] if c.name.endswith(name)), None)
        if behind is not None:
            chosen = decision.candidates[0]
            why = f"{decision.subject} was chosen: {chosen.name} {chosen.cost:.4g}, {behind.name} {behind.cost:.4g}"
            found[decision.rule] = Look(decision.rule, why, decision.measurement, decision.threshold, decision.unit)
    return tuple(found.values())


def why_not_session(snapshot: Snapshot, policy: Policy, session: Session) -> tuple[Look, ...]:
    """Of its KV: what would move it, bring it back, or hold its next turn."""
    engine = snapshot.engine(session.engine)
    looks = list(_mode(policy))
    if engine is None or not engine.attached:
        return (*looks, Look("its engine", "is not attached: nothing can be asked of it"))
    looks.append(_placement(snapshot, policy, session))
    if session.tier in (KvTier.HOST, KvTier.DISK):
        free = engine.device_capacity_tokens - engine.device_used_tokens
        short = session.held_tokens > free
        why = "the device has no room for it" if short else "no tool call of it has ended since it was moved out"
        looks.append(Look("bring back what was moved out", why, session.held_tokens, free, "tokens"))
    door = policy.kv.door_ratio
    if door is None:
        looks.append(Look("the door", "the policy has none (kv.door)"))
    elif not {"hold", "release"} <= engine.supported_directives:
        looks.append(Look("the door", f"engine {engine.kind} can not hold a turn"))
    else:
        room = door * (engine.device_capacity_tokens + engine.host_capacity_bytes / max(1, engine.bytes_per_token))
        awake = sum(s.context_tokens for s in snapshot.sessions if s.engine == engine.id and s.held_tokens)
        looks.append(Look("the door", "the awake leave room, or its KV is in place", awake, room, "tokens"))
    return tuple(looks)


def _mode(policy: Policy) -> list[Look]:
    if policy.mode is Mode.OBSERVE:
        return [Look("the policy's mode", "is observe: nothing is decided")]
    return [Look("the policy's mode", "is dry-run: nothing is done")] if policy.mode is Mode.DRY_RUN else []


def _budget(policy: Policy, call: ToolCall) -> Look:
    """Stop and ask: a grant, a wait or an end."""
    rule = "tool call at its budget"
    hard = call.hard_bytes or policy.budget_for(call).hard_bytes
    figures = (call.peak_bytes / MIB, hard / MIB, "MiB")
    if call.exempt:
        return Look(rule, "it has no budget: it could be the agent")
    if call.stopped_ns is not None:
        return Look(rule, "it stands there: its wait is decided on at every turn", *figures)
    if call.peak_bytes >= hard:
        return Look(rule, "it reached it: see what was decided then", *figures)
    return Look(rule, "its peak is below: it never had to ask", *figures)


def _ladder(
    rule: LadderRule, snapshot: Snapshot, policy: Policy, call: ToolCall, by_tenant: dict[TenantId, Share]
) -> Look:
    pool = policy.memory.pool_bytes(snapshot.host.memory_total_bytes)
    name = f"{rule.words}: {rule.rung.value}"
    measured = rule.measure.of(snapshot.tool_used_bytes(), pool, snapshot.host)
    if measured is None:
        return Look(name, f"{rule.measure.value} is not measured on this host")
    figures = (measured, rule.above_ratio, rule.measure.unit)
    since_ns = dict(snapshot.pressed).get(rule)
    if since_ns is None:
        return Look(name, "it does not press", *figures)
    pressed_s = (snapshot.now_ns - since_ns) / NS_PER_S
    if snapshot.now_ns - since_ns < rule.for_ns:
        why = f"it has pressed for {pressed_s:.1f} s and must for {rule.for_ns / NS_PER_S:g} s"
        return Look(name, why, *figures)
    if (own := _spared(call, pool)) is not None:
        return Look(name, own, *figures)
    if not has_run_for_it(rule, call, snapshot):
        ran_s, lasting_s = (snapshot.now_ns - call.phase_since_ns) / NS_PER_S, rule.lasting_ns / NS_PER_S
        return Look(name, "it must first run for as long as a freeze lasts", ran_s, lasting_s, "s")
    others = [c for c in snapshot.tool_calls if c.id != call.id and c.gone_ns is None and _spared(c, pool) is None]
    share = by_tenant[call.tenant].weighted
    ahead = [c for c in others if (by_tenant[c.tenant].weighted, c.used_bytes) > (share, call.used_bytes)]
    if ahead:
        before = "1 call goes" if len(ahead) == 1 else f"{len(ahead)} calls go"
        why = f"{before} before it: {ahead[0].kind} of {ahead[0].tenant} is further above its share"
        return Look(name, why, *figures)
    return Look(name, "it is next", *figures)


def _spared(call: ToolCall, pool: int) -> str | None:
    """Why no rule of the ladder holds this call back; None: one may."""
    if call.exempt:
        return "it could be the agent: nothing holds it back"
    if call.phase is not ToolCallPhase.RUNNING:
        return f"it is {call.phase.value} already"
    if call.used_bytes < THROTTLE_AT_LEAST_RATIO * pool:
        return f"it holds {call.used_bytes / MIB:.0f} MiB, less than {THROTTLE_AT_LEAST_RATIO:.0%} of the pool"
    return None


def _placement(snapshot: Snapshot, policy: Policy, session: Session) -> Look:
    """Keep, swap or drop."""
    rule = "keep, swap or drop while a tool runs"
    if session.phase is not SessionPhase.IDLE:
        return Look(rule, f"a turn of it is {session.phase.value}: its KV is in use")
    if not session.held_tokens:
        return Look(rule, "it holds no KV", 0, 0, "tokens")
    call = snapshot.running_call_of(session.id)
    if call is None:
        return Look(rule, "no tool call of its agent runs")
    elapsed_s, after_s = call.elapsed_ns(snapshot.now_ns) / NS_PER_S, policy.kv.decide_after_ns / NS_PER_S
    if elapsed_s < after_s:
        return Look(rule, f"{call.kind} has run for less than kv.decideAfter", elapsed_s, after_s, "s")
    since_s, dwell_s = (snapshot.now_ns - session.verdict_ns) / NS_PER_S, policy.kv.dwell_ns / NS_PER_S
    if session.verdict_ns and since_s < dwell_s:
        return Look(rule, "the last verdict is younger than kv.dwell", since_s, dwell_s, "s")
    stands = session.verdict.value if session.verdict else "keep"
    return Look(rule, f"{stands} stands: nothing else is cheaper by kv.hysteresis, {policy.kv.hysteresis_ratio:.0%}")

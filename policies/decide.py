"""decide(): one snapshot and one policy in, decisions out.

Owns the order of the parts (tool calls first, since a stopped one waits; then KV; then weights) and the making of
Decision records. Pure: the same snapshot gives the same decisions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .actions import Action, Candidate, Decision, Drop, Hold, Release, Retain, SetTenantWeight, SwapIn, SwapOut
from .kv.door import watch
from .kv.economy import UNIT, Books, Prices, Weighed, choose, expected_wait_s, running_bytes, standing, weigh
from .memory.ladder import climb
from .memory.step import subject
from .model import NS_PER_S, DecisionId, Engine, KvTier, Session, SessionId, SessionPhase, TenantId, ToolCall, Verdict
from .policy import KvPart, Policy
from .snapshot import Snapshot


class _Decisions:
    """Collects decisions of one instant and numbers them."""

    def __init__(self, now_ns: int) -> None:
        self._now_ns = now_ns
        self.made: list[Decision] = []

    def add(
        self,
        action: Action,
        tenant: TenantId,
        subject: str,
        rule: str,
        evidence: str,
        measurement: float,
        threshold: float,
        unit: str,
        candidates: tuple[Candidate, ...] = (),
        trigger_ns: int | None = None,
    ) -> None:
        self.made.append(
            Decision(
                id=DecisionId(f"d{self._now_ns:x}-{len(self.made)}"),
                at_ns=self._now_ns,
                rule=rule,
                measurement=measurement,
                threshold=threshold,
                unit=unit,
                action=action,
                tenant=tenant,
                subject=subject,
                evidence=evidence,
                candidates=candidates,
                trigger_ns=trigger_ns,
            )
        )


def decide(snapshot: Snapshot, policy: Policy) -> tuple[Decision, ...]:
    """What to do now, the most urgent first; usually nothing."""
    decisions = _Decisions(snapshot.now_ns)
    for step in climb(snapshot, policy):
        decisions.add(
            step.action,
            step.call.tenant,
            subject(step.call, snapshot.sandboxes),
            step.rule,
            step.evidence,
            step.measurement,
            step.threshold,
            step.unit,
            step.candidates,
            step.trigger_ns,
        )
    for engine in snapshot.engines:
        if engine.attached:
            at_door = _watch_door(snapshot, policy, engine, decisions)
            _place_kv(snapshot, policy, engine, at_door, decisions)
            _tell_weights(snapshot, policy, engine, decisions)
    return tuple(decisions.made)


def _watch_door(snapshot: Snapshot, policy: Policy, engine: Engine, decisions: _Decisions) -> frozenset[SessionId]:
    """Answers whom it holds, or has just let go on: their KV is left where it is."""
    expires_ns = snapshot.now_ns + policy.kv.directive_ns
    passages = watch(snapshot, policy, engine)
    for passage in passages:
        session = passage.session
        decisions.add(
            Hold(engine.id, session.id, policy.kv.retain_ns, expires_ns)
            if passage.hold
            else Release(engine.id, session.id, expires_ns),
            session.tenant,
            str(session.id),
            "the awake need more than the door lets in" if passage.hold else "session at the door may go on",
            f"{passage.why}; with it they need {passage.need_tokens:.0f} of {passage.room_tokens:.0f} tokens",
            passage.need_tokens,
            passage.room_tokens,
            "tokens",
        )
    held = {s.id for s in snapshot.sessions if s.hold_until_ns > snapshot.now_ns and s.id not in snapshot.left_behind}
    return frozenset(held | {passage.session.id for passage in passages})


def _calls_by_session(snapshot: Snapshot) -> dict[SessionId, list[ToolCall]]:
    """Looked up once a moment: asking every call for every session would take seconds with 10,000 of each."""
    calls: dict[SessionId, list[ToolCall]] = defaultdict(list)
    for call in snapshot.tool_calls:
        calls[call.session].append(call)
    return calls


@dataclass(frozen=True, slots=True)
class _InCall:
    """An idle session whose agent is in a tool call long enough to be decided on."""

    session: Session
    call: ToolCall
    wait_s: float


def _place_kv(
    snapshot: Snapshot, policy: Policy, engine: Engine, at_door: frozenset[SessionId], decisions: _Decisions
) -> None:
    """A verdict on every idle session of this engine whose agent is in a tool call, or has just come out of one.

    One at a time, whoever saves most per byte first, each on the books that the ones before have left.
    """
    can = engine.supported_directives
    device_free = engine.device_capacity_tokens - engine.device_used_tokens
    calls_of = _calls_by_session(snapshot)
    in_call = []
    for session in snapshot.sessions:
        if session.engine != engine.id or session.phase is not SessionPhase.IDLE or session.held_tokens == 0:
            continue
        if session.id in at_door:
            continue
        if session.id in snapshot.left_behind:
            if "drop" in can and session.verdict is not Verdict.DROP and not _dwells(session, snapshot, policy):
                _forget_session(snapshot, policy, engine, session, decisions)
            continue
        calls = calls_of.get(session.id, [])
        call = min((c for c in calls if c.running), key=lambda c: c.start_ns, default=None)  # the longest-running
        if call is None:
            if "swap_in" in can and _wants_back(session, calls) and session.held_tokens <= device_free:
                device_free -= session.held_tokens
                _bring_back(snapshot, policy, engine, session, decisions)
        elif call.elapsed_ns(snapshot.now_ns) >= policy.kv.decide_after_ns and not _dwells(session, snapshot, policy):
            in_call.append(_InCall(session, call, expected_wait_s(snapshot, call)))
    _judge(snapshot, policy, engine, in_call, decisions)


def _judge(snapshot: Snapshot, policy: Policy, engine: Engine, in_call: list[_InCall], decisions: _Decisions) -> None:
    books = Books.of(snapshot, policy, engine)
    busy = running_bytes(snapshot, engine)
    copies = KvPart.COPIES not in policy.kv.without
    raises = KvPart.RAISE not in policy.kv.without
    price = books.prices()

    def options_for(each: _InCall) -> list[Weighed]:
        held = each.session.held_tokens * engine.bytes_per_token
        host = KvTier.HOST in policy.kv.tiers and books.host_free_bytes >= held
        disk = KvTier.DISK in policy.kv.tiers and books.disk_free_bytes >= held
        device = raises and books.takes_up(each.session)
        return weigh(each.session, engine, each.wait_s, price, busy, host, disk, copies, device)

    def saving(each: _InCall) -> float:
        """Of the cheapest option over staying as it is, by token; the more, the sooner it is decided on."""
        options = options_for(each)
        now = standing(each.session)
        stays = next((o.cost for o in options if o.verdict is now), options[0].cost) if options else 0.0
        return (stays - options[0].cost) / each.session.held_tokens if options else 0.0

    for each in sorted(in_call, key=lambda e: (-saving(e), e.session.id)):
        if KvPart.MARGINAL not in policy.kv.without:
            price = books.prices()
        options = options_for(each)
        if not options:
            continue
        chosen = choose(options, standing(each.session), policy.kv.hysteresis_ratio)
        if not _says_something_new(chosen.verdict, each.session, snapshot.now_ns):
            continue
        stays = chosen.verdict is Verdict.KEEP and each.session.tier is KvTier.DEVICE
        if stays and "retain" not in engine.supported_directives:
            continue  # it stays where it is, as long as the engine likes
        books.enter(chosen.verdict, each.session)
        decisions.add(
            _kv_action(chosen.verdict, each.session, engine, snapshot.now_ns, policy),
            each.session.tenant,
            f"{each.session.id} during {each.call.kind}",
            f"{chosen.verdict.value} is the cheapest"
            if chosen is options[0]
            else f"{chosen.verdict.value} stands: nothing is cheaper by {policy.kv.hysteresis_ratio:.0%}",
            _kv_evidence(engine, each, price),
            chosen.cost,
            next((o.cost for o in options if o is not chosen), chosen.cost),
            UNIT,
            tuple(Candidate(o.verdict.value, o.cost) for o in sorted(options, key=lambda o: o is not chosen)),
        )


def _kv_evidence(engine: Engine, each: _InCall, price: Prices) -> str:
    mib = each.session.held_tokens * engine.bytes_per_token / (1 << 20)
    return (
        f"{each.call.kind} is {each.call.phase.value} and expected to take {each.wait_s:.1f} s more; the session holds "
        f"{mib:.1f} MiB; "
        f"device {engine.device_used_ratio:.0%} full with {engine.waiting_count} turns waiting: price "
        f"{price.device:.2f}; host RAM: price {price.host:.2f}"
    )


def _dwells(session: Session, snapshot: Snapshot, policy: Policy) -> bool:
    """Whether it is too early to ask again. verdict_ns outlives a verdict that was refused: no is an answer as well."""
    return session.verdict_ns > 0 and snapshot.now_ns - session.verdict_ns < policy.kv.dwell_ns


def _says_something_new(verdict: Verdict, session: Session, now_ns: int) -> bool:
    """Whether asking the engine would change anything: it has not been asked, or a retention is about to end."""
    if verdict is Verdict.KEEP:
        return session.verdict is not Verdict.KEEP or session.retain_until_ns <= now_ns + NS_PER_S // 2
    places = {Verdict.SWAP_HOST: KvTier.HOST, Verdict.SWAP_DISK: KvTier.DISK, Verdict.DROP: KvTier.NONE}
    return session.verdict is not verdict and session.tier is not places[verdict]


def _kv_action(verdict: Verdict, session: Session, engine: Engine, now_ns: int, policy: Policy) -> Action:
    expires_ns = now_ns + policy.kv.directive_ns
    match verdict:
        case Verdict.KEEP if session.tier is not KvTier.DEVICE:
            return SwapIn(engine.id, session.id, expires_ns)
        case Verdict.KEEP:
            return Retain(engine.id, session.id, policy.kv.retain_ns, expires_ns)
        case Verdict.SWAP_HOST:
            return SwapOut(engine.id, session.id, KvTier.HOST, expires_ns)
        case Verdict.SWAP_DISK:
            return SwapOut(engine.id, session.id, KvTier.DISK, expires_ns)
        case Verdict.DROP:
            return Drop(engine.id, session.id, 0, expires_ns)


def _wants_back(session: Session, calls: list[ToolCall]) -> bool:
    """A session swapped out by our verdict whose tool call has ended: its next turn is near."""
    if session.tier not in (KvTier.HOST, KvTier.DISK):
        return False
    return session.verdict in (Verdict.SWAP_HOST, Verdict.SWAP_DISK) and any(
        c.end_ns is not None and c.end_ns >= session.verdict_ns for c in calls
    )


def _forget_session(
    snapshot: Snapshot, policy: Policy, engine: Engine, session: Session, decisions: _Decisions
) -> None:
    decisions.add(
        Drop(engine.id, session.id, 0, snapshot.now_ns + policy.kv.directive_ns),
        session.tenant,
        str(session.id),
        "session's sandbox has been removed",
        f"no agent will come back for its {session.held_tokens} tokens in {session.tier.value}",
        session.held_tokens,
        0,
        "tokens",
    )


def _bring_back(snapshot: Snapshot, policy: Policy, engine: Engine, session: Session, decisions: _Decisions) -> None:
    decisions.add(
        SwapIn(engine.id, session.id, snapshot.now_ns + policy.kv.directive_ns),
        session.tenant,
        str(session.id),
        "tool call of a swapped session has ended",
        f"its next turn is near; {session.held_tokens} tokens are in {session.tier.value}",
        session.held_tokens,
        engine.device_capacity_tokens - engine.device_used_tokens,
        "tokens",
    )


def _tell_weights(snapshot: Snapshot, policy: Policy, engine: Engine, decisions: _Decisions) -> None:
    """The engine orders token service by tenant weight: say each weight once per attachment."""
    if "set_tenant_weight" not in engine.supported_directives:
        return
    for tenant in snapshot.tenants:
        if (engine.id, tenant.id, tenant.weight) not in snapshot.weights_told:
            decisions.add(
                SetTenantWeight(engine.id, tenant.id, tenant.weight, snapshot.now_ns + policy.kv.directive_ns),
                tenant.id,
                str(tenant.id),
                "engine does not know the tenant's weight",
                f"weight {tenant.weight:g} by policy {policy.name}",
                tenant.weight,
                tenant.weight,
                "weight",
            )

"""What every decision must obey, whatever the situation: checked on literals, random states and replays alike."""

from __future__ import annotations

from collections import Counter

from equipoise.policies.actions import (
    Action,
    Decision,
    Drop,
    EngineAction,
    Freeze,
    Grant,
    Hold,
    Kill,
    Release,
    Retain,
    SetHostTierCapacity,
    SetTenantWeight,
    SwapIn,
    SwapOut,
    Thaw,
    Throttle,
    Wait,
)
from equipoise.policies.decide import decide
from equipoise.policies.fairness import shares
from equipoise.policies.memory.grants import PROMISE_NS
from equipoise.policies.memory.ladder import is_dying
from equipoise.policies.model import KvTier, SessionPhase, ToolCall, ToolCallPhase
from equipoise.policies.policy import Policy
from equipoise.policies.snapshot import Snapshot

DIRECTIVE = {
    SwapOut: "swap_out",
    SwapIn: "swap_in",
    Retain: "retain",
    Drop: "drop",
    Hold: "hold",
    Release: "release",
    SetTenantWeight: "set_tenant_weight",
    SetHostTierCapacity: "set_host_tier_capacity",
}


def decide_lawfully(snapshot: Snapshot, policy: Policy) -> tuple[Decision, ...]:
    """decide(), checked. Raises AssertionError where a law is broken."""
    made = decide(snapshot, policy)
    assert made == decide(snapshot, policy), "the same snapshot gives the same decisions"
    assert len({d.id for d in made}) == len(made)
    for decision in made:
        _check_record(decision, snapshot)
        _check_expiry(decision.action, snapshot.now_ns)
        match decision.action:
            case Throttle() | Freeze() | Thaw() | Grant() | Wait() | Kill():
                _check_call(decision.action, snapshot, policy)
            case action:
                _check_directive(action, snapshot)
    _check_together([d.action for d in made], snapshot, policy)
    return made


def _check_record(decision: Decision, snapshot: Snapshot) -> None:
    assert decision.at_ns == snapshot.now_ns
    for text in (decision.rule, decision.subject, decision.evidence, decision.unit):
        assert text and text.isprintable(), decision


def _check_expiry(action: Action, now_ns: int) -> None:
    """Whatever holds something back undoes itself; only a kill, a grant and letting go are final."""
    expires_ns = getattr(action, "expires_ns", None)
    assert isinstance(action, Kill | Grant | Thaw) or (expires_ns is not None and expires_ns > now_ns), action
    assert not isinstance(action, Retain) or action.ttl_ns > 0, action


def _check_call(action: Throttle | Freeze | Thaw | Grant | Wait | Kill, snapshot: Snapshot, policy: Policy) -> None:
    call = _call(action.tool_call, snapshot)
    assert call.gone_ns is None, f"{action}: all its processes are gone"
    assert call.phase is not ToolCallPhase.KILLED, f"{action}: it was killed"
    if isinstance(action, Kill) and call.stopped_ns is None:
        _check_debtor(call, snapshot, policy)
    elif isinstance(action, Grant | Wait | Kill):
        assert call.stopped_ns is not None, f"{action}: it does not stand at its budget"
    else:
        assert call.running, f"{action}: it has ended"
    match action:
        case Throttle():
            assert call.phase is ToolCallPhase.RUNNING
            assert action.high_bytes > 0
        case Thaw():
            assert call.phase in (ToolCallPhase.THROTTLED, ToolCallPhase.FROZEN)
        case Grant():
            assert call.used_bytes < action.hard_bytes
            _check_largest(call, action.hard_bytes, snapshot, policy)
            assert call.hard_bytes <= action.hard_bytes
            assert 0 <= action.soft_bytes <= action.hard_bytes
        case Wait():
            assert call.waiting_until_ns is None, f"{action}: told twice"
        case Kill():
            assert action.message and action.message.isprintable()


def _check_largest(call: ToolCall, hard_bytes: int, snapshot: Snapshot, policy: Policy) -> None:
    """Past the largest budget only where it bends, and where another call could still have as much."""
    memory = policy.memory
    if hard_bytes > memory.max_bytes:
        pool = memory.pool_bytes(snapshot.host.memory_total_bytes)
        left = pool - snapshot.tool_used_bytes() - (hard_bytes - call.used_bytes)
        assert memory.bends and left >= memory.max_bytes, f"{call}: granted {hard_bytes}, {left} are left"


def _check_debtor(call: ToolCall, snapshot: Snapshot, policy: Policy) -> None:
    """A call that gets on is ended only for one whose wait is over, only where it was granted more than it began with,
    and only where its tenant is further above its share than the one that waited."""
    assert call.used_bytes > policy.budget_for(call).hard_bytes, f"{call}: it holds no grant"
    by_tenant = shares(snapshot, policy)
    waited = [
        c
        for c in snapshot.tool_calls
        if c.stopped_ns is not None and snapshot.now_ns - c.stopped_ns >= policy.memory.wait_ns
    ]
    assert any(by_tenant[c.tenant].weighted < by_tenant[call.tenant].weighted for c in waited), f"{call}: for nobody"


def _check_directive(action: EngineAction, snapshot: Snapshot) -> None:
    on = snapshot.engine(action.engine)
    assert on is not None and on.attached, action
    assert DIRECTIVE[type(action)] in on.supported_directives, action
    if isinstance(action, Hold):
        assert action.ttl_ns > 0
        waiting = next(s for s in snapshot.sessions if s.id == action.session)
        assert waiting.tier in (KvTier.DISK, KvTier.NONE), f"{action}: what it holds would stand there for nothing"
        assert waiting.phase is not SessionPhase.RUNNING, f"{action}: it is being computed"
    if isinstance(action, Release):
        assert next(s for s in snapshot.sessions if s.id == action.session).hold_until_ns > snapshot.now_ns, action
    if isinstance(action, SwapOut | SwapIn | Retain | Drop):
        held = next(s for s in snapshot.sessions if s.id == action.session)
        assert held.engine == on.id
        assert held.phase is SessionPhase.IDLE, f"{action}: its turn is not over"
        assert held.held_tokens > 0
        assert not isinstance(action, Retain) or held.tier is KvTier.DEVICE
        assert not isinstance(action, SwapIn) or held.tier in (KvTier.HOST, KvTier.DISK)
        assert not isinstance(action, SwapOut) or held.tier is not action.tier


def _check_together(actions: list[Action], snapshot: Snapshot, policy: Policy) -> None:
    about = Counter(
        ("call", a.tool_call)
        if isinstance(a, Throttle | Freeze | Thaw | Grant | Wait | Kill)
        else ("session", a.session)
        for a in actions
        if not isinstance(a, SetTenantWeight | SetHostTierCapacity)
    )
    assert all(count == 1 for count in about.values()), f"two actions on one subject: {about}"
    _check_pool(actions, snapshot, policy)
    for on in snapshot.engines:
        swapped = [
            next(s for s in snapshot.sessions if s.id == a.session)
            for a in actions
            if isinstance(a, SwapOut) and a.engine == on.id and a.tier is KvTier.HOST
        ]
        held = sum(s.held_tokens for s in swapped) * on.bytes_per_token
        assert not held or on.host_used_bytes + held <= on.host_capacity_bytes, "the host tier is overdrawn"


def _check_pool(actions: list[Action], snapshot: Snapshot, policy: Policy) -> None:
    """No byte is handed out twice: not the pool's, not the host's, not what a grant of a moment ago was promised.

    Memory of a call that is ended counts as free from that moment until its processes are gone, whether the kill is
    one of these decisions or an earlier one: until then it is in the snapshot's sums, and whoever it was freed for may
    stand only now. But what has not died for long is not about to.
    """
    grants = {a.tool_call: a.hard_bytes for a in actions if isinstance(a, Grant)}
    if not grants:
        return
    alive = [c for c in snapshot.tool_calls if c.gone_ns is None]
    ending = {a.tool_call for a in actions if isinstance(a, Kill)}
    ending |= {c.id for c in alive if is_dying(c, snapshot.now_ns)}
    freed = sum(c.used_bytes for c in alive if c.id in ending)
    granted = sum(hard_bytes - _call(id, snapshot).used_bytes for id, hard_bytes in grants.items())
    promised = sum(
        max(0, c.hard_bytes - c.used_bytes)
        for c in alive
        if c.granted_ns is not None and snapshot.now_ns - c.granted_ns < PROMISE_NS
        if c.stopped_ns is None and c.id not in ending
    )
    pool = policy.memory.pool_bytes(snapshot.host.memory_total_bytes)
    assert snapshot.tool_used_bytes() - freed + promised + granted <= pool, "the pool is overdrawn"
    if snapshot.host.memory_total_bytes:
        assert granted + promised <= snapshot.host.memory_available_bytes + freed, "the host has not got it"


def _call(tool_call: int, snapshot: Snapshot) -> ToolCall:
    found = [c for c in snapshot.tool_calls if c.id == tool_call]
    assert len(found) == 1, f"tool call {tool_call:x} is not in the picture"
    return found[0]

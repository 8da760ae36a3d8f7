"""What must hold for every sequence of events: no error, no broken invariant, no unlawful decision."""

from __future__ import annotations

from dataclasses import replace

from equipoise.policies.actions import Outcome, OutcomeStatus
from equipoise.policies.events import (
    BudgetChanged,
    BudgetLevel,
    BudgetReached,
    ConnectionOpened,
    DecisionMade,
    EngineAttached,
    EngineDetached,
    Event,
    EventsLost,
    HostSampled,
    IntentDeclared,
    KvObserved,
    OutcomeObserved,
    PolicyApplied,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    SandboxSampled,
    SessionJoined,
    SessionMoved,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
    ToolCallWithdrawn,
    TurnEnded,
    TurnPreempted,
    TurnStarted,
)
from equipoise.policies.model import (
    MIB,
    NS_PER_S,
    CgroupId,
    CostModel,
    DecisionId,
    EngineId,
    EngineTotals,
    FinishReason,
    KvTier,
    Session,
    SessionId,
    SessionPhase,
    TenantId,
    ToolCallId,
    ToolCallSource,
)
from equipoise.policies.policy import Budget, KvPolicy, LadderRule, Measure, MemoryPolicy, Policy, Rung
from equipoise.policies.state import State
from equipoise.tests.policies.facts import engine, observed, policy, sandbox, session, started, stepped
from equipoise.tests.policies.laws import decide_lawfully
from hypothesis import given, settings
from hypothesis import strategies as st

AT = st.integers(0, 300).map(lambda tenths: tenths * NS_PER_S // 10)
CALLS = st.integers(1, 4).map(ToolCallId)
CGROUPS = st.integers(1, 3).map(CgroupId)
ENGINES = st.sampled_from(("e1", "e2")).map(EngineId)
SESSIONS = st.sampled_from(("gold/ada", "silver/bo", "x")).map(SessionId)
TENANTS = st.sampled_from(("gold", "silver", "stranger")).map(TenantId)
BYTES = st.integers(0, 2048).map(lambda mib: mib * MIB)
COMMANDS = st.sampled_from(("pytest -q", "git status", "equipoise tool -- cc a.c", ""))
TIERS = st.sampled_from(KvTier)
DECISIONS = st.integers(0, 30).map(lambda n: DecisionId(f"d{n}"))
SANDBOXES = st.builds(
    lambda cgroup, tenant, session: replace(sandbox(cgroup, tenant), session=session), CGROUPS, TENANTS, SESSIONS
)


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    tier = draw(TIERS)
    held = 0 if tier is KvTier.NONE else draw(st.integers(0, 5000))
    return Session(
        id=draw(SESSIONS),
        tenant=draw(TENANTS),
        engine=draw(ENGINES),
        phase=draw(st.sampled_from(SessionPhase)),
        tier=tier,
        held_tokens=held,
        context_tokens=draw(st.integers(0, 6000)),
        host_bytes=draw(BYTES),
        disk_bytes=draw(BYTES),
        retain_until_ns=draw(st.just(0) | AT),
    )


@st.composite
def rules(draw: st.DrawFn) -> LadderRule:
    above = draw(st.floats(0.01, 1.0))
    return LadderRule(
        measure=draw(st.sampled_from(Measure)),
        above_ratio=above,
        below_ratio=draw(st.floats(0, above)),
        for_ns=draw(st.integers(0, 5)) * NS_PER_S,
        rung=draw(st.sampled_from(Rung)),
        lasting_ns=draw(st.integers(1, 5)) * NS_PER_S,
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    hard = draw(st.integers(1, 1024))
    memory = MemoryPolicy(
        tool_pool_bytes=draw(st.none() | st.integers(1, 4096).map(lambda mib: mib * MIB)),
        tool_pool_ratio=draw(st.floats(0.01, 1.0)),
        budget=Budget(draw(st.integers(1, hard)) * MIB, hard * MIB),
        max_bytes=draw(st.integers(hard, 2048)) * MIB,
        bends=draw(st.booleans()),
        step_bytes=draw(st.integers(1, 512)) * MIB,
        wait_ns=draw(st.integers(0, 30)) * NS_PER_S,
        ladder=tuple(draw(st.lists(rules(), max_size=3, unique=True))),
    )
    made = policy(tenants=draw(st.sampled_from(({"gold": 4.0, "silver": 1.0}, {"gold": 1.0}))))
    return replace(made, memory=memory, kv=KvPolicy(door_ratio=draw(st.none() | st.floats(0.01, 1.0))))


OCCUPANCY = {"sessions": st.lists(sessions(), max_size=3).map(tuple)} | dict.fromkeys(
    ("device_used_tokens", "device_capacity_tokens"), st.integers(0, 10_000)
)
STEPS = st.builds(ToolCallMemoryStepped, AT, CALLS, BYTES, BYTES)
STOPS = st.builds(BudgetReached, AT, CALLS, st.sampled_from(BudgetLevel), BYTES, BYTES, st.integers(1, 99))
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(SandboxRegistered, AT, SANDBOXES),
    st.builds(SandboxRemoved, AT, CGROUPS),
    st.builds(SandboxSampled, AT, CGROUPS, BYTES, BYTES, st.integers(0, 10**12)),
    st.builds(HostSampled, AT, BYTES, BYTES, st.none() | st.floats(0, 1), st.none() | st.floats(0, 1)),
    st.builds(
        ToolCallStarted,
        AT,
        CALLS,
        CGROUPS,
        COMMANDS,
        st.sampled_from(ToolCallSource),
        st.floats(0, 1),
        st.none() | st.integers(1, 99),
        st.none() | SESSIONS,
        BYTES,
        BYTES,
    ),
    st.builds(
        ToolCallAttributed,
        AT,
        CALLS,
        st.sampled_from(ToolCallSource),
        st.floats(0, 1),
        st.none() | COMMANDS,
        st.none() | SESSIONS,
    ),
    st.builds(ToolCallMerged, AT, CALLS, CALLS),
    st.builds(ToolCallWithdrawn, AT, CALLS),
    st.builds(SessionJoined, AT, ENGINES, SESSIONS, CGROUPS),
    st.builds(ConnectionOpened, AT, CGROUPS, CALLS, st.just(9), st.booleans(), *map(st.just, ("::1", 4, "::1", 5, 6))),
    STEPS,
    STOPS,
    st.builds(BudgetChanged, AT, CALLS, BYTES, BYTES),
    st.builds(
        ToolCallEnded, AT, CALLS, st.none() | st.integers(0, 255), st.none(), st.integers(0, 2), st.none() | BYTES
    ),
    st.builds(ProcessesGone, AT, CALLS),
    st.builds(
        IntentDeclared,
        AT,
        CGROUPS,
        st.sampled_from(("pytest", "git")),
        st.none() | BYTES,
        st.none() | st.integers(0, 10**11),
    ),
    st.builds(
        lambda at, name, waiting, disk, cost: EngineAttached(
            at, engine(name, waiting_count=waiting, disk_capacity_bytes=disk, cost=cost, bytes_per_token=20_000)
        ),
        AT,
        ENGINES,
        st.integers(0, 3),
        st.sampled_from((0, 1 << 40)),
        st.sampled_from((CostModel(), CostModel(1e-3, 1e-8, host_bytes_per_second=1e9))),
    ),
    st.builds(EngineDetached, AT, ENGINES),
    st.builds(
        KvObserved,
        at_ns=AT,
        engine=ENGINES,
        host_used_bytes=BYTES,
        disk_used_bytes=BYTES,
        host_capacity_bytes=BYTES,
        running_count=st.integers(0, 3),
        waiting_count=st.integers(0, 3),
        totals=st.just(EngineTotals()),
        cost=st.none(),
        **OCCUPANCY,
    ),
    st.builds(TurnStarted, AT, ENGINES, SESSIONS, st.just("t"), st.integers(0, 100), st.integers(0, 100)),
    st.builds(
        TurnEnded,
        AT,
        ENGINES,
        SESSIONS,
        st.just("t"),
        st.sampled_from(FinishReason),
        *[st.integers(0, 100)] * 4,
        *[st.integers(0, 10**9)] * 2,
    ),
    st.builds(
        SessionMoved, AT, ENGINES, SESSIONS, TIERS, TIERS, st.integers(0, 100), BYTES, st.integers(0, 10**9), st.none()
    ),
    st.builds(TurnPreempted, AT, ENGINES, SESSIONS, st.just("t"), TIERS, st.none()),
    st.builds(PolicyApplied, AT, policies()),
    st.builds(EventsLost, AT, st.just("ring"), st.integers(0, 9)),
    st.builds(OutcomeObserved, AT, st.builds(Outcome, DECISIONS, st.sampled_from(OutcomeStatus), AT, st.just("test"))),
)


class Look:
    """In a sequence of events: a turn of the loop, whose decisions end as `status` says."""

    def __init__(self, now_ns: int, status: OutcomeStatus) -> None:
        self.now_ns = now_ns
        self.status = status

    def __repr__(self) -> str:
        return f"Look({self.now_ns}, {self.status})"


LOOKS = st.builds(Look, AT, st.sampled_from(OutcomeStatus))
PRELUDE: list[Event] = [
    HostSampled(0, 16_384 * MIB, 8_192 * MIB, None, None),
    SandboxRegistered(0, sandbox(1, "gold", "ada")),
    SandboxRegistered(0, sandbox(2, "silver", "bo")),
    EngineAttached(0, engine("e1", capacity_tokens=10_000, bytes_per_token=20_000)),
    observed(
        0.0,
        session("gold/ada", "gold"),
        session("silver/bo", "silver"),
        device_used_tokens=9_000,
        device_capacity_tokens=10_000,
    ),
    started(0.0, 1, 1, hard_bytes=512 * MIB),
    started(0.0, 2, 2, hard_bytes=512 * MIB),
    stepped(0.1, 400, id=1),
    stepped(0.1, 300, id=2),
]
"""A host at work, so that what follows meets something; sequences without it start from nothing."""
SEQUENCES = st.builds(
    lambda prelude, rest: [*prelude, *rest],
    st.sampled_from(([], PRELUDE, PRELUDE)),
    # Chosen by weight first: one_of alone would flatten, and a look would be one choice in thirty.
    st.lists(
        st.sampled_from((LOOKS, LOOKS, STOPS, STEPS, EVENTS, EVENTS)).flatmap(lambda kind: kind),
        min_size=5,
        max_size=40,
    ),
)


def run(sequence: list[Event | Look], of: Policy) -> State:
    """Apply a sequence; every look decides lawfully and tells the state what came of it."""
    state = State(of)
    for step in sequence:
        if isinstance(step, Look):
            for decision in decide_lawfully(state.snapshot(step.now_ns), state.policy):
                state.apply(DecisionMade(step.now_ns, decision))
                state.apply(OutcomeObserved(step.now_ns, Outcome(decision.id, step.status, step.now_ns, "test")))
                state.check_integrity()
        else:
            state.apply(step)
        state.check_integrity()
    return state


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, policies())
def test_no_sequence_of_events_breaks_the_state_or_the_law(sequence: list[Event | Look], of: Policy) -> None:
    run(sequence, of)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, policies(), AT)
def test_the_same_events_give_the_same_picture_and_the_same_decisions(
    sequence: list[Event | Look], of: Policy, now_ns: int
) -> None:
    first, second = run(sequence, of).snapshot(now_ns), run(sequence, of).snapshot(now_ns)
    assert first == second
    assert decide_lawfully(first, of) == decide_lawfully(second, of)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, policies(), policies(), AT)
def test_another_policy_can_be_asked_about_the_same_picture(
    sequence: list[Event | Look], of: Policy, candidate: Policy, now_ns: int
) -> None:
    """What-if: a recorded state, a policy that was never in force."""
    decide_lawfully(run(sequence, of).snapshot(now_ns), candidate)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, policies())
def test_within_the_memory_of_the_state_every_ended_call_has_its_books_in_order(
    sequence: list[Event | Look], of: Policy
) -> None:
    for call in run(sequence, of).tool_calls.values():
        assert call.stalled_ns >= 0
        assert call.kv.idle_byte_seconds >= 0 and call.kv.host_byte_seconds >= 0
        assert call.kv.held_bytes >= 0
        if call.end_ns is not None:
            assert call.stopped_ns is None or call.gone_ns is None

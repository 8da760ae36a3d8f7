"""What people and programs read: words, the recent history, and the messages of PolicyService.

Long for telling each message from the same few facts, field by field.
"""

from __future__ import annotations

import time
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from equipoise.daemon.api.v1 import policy_pb2 as pb
from equipoise.daemon.cli import printing
from equipoise.daemon.observe.history import History
from equipoise.daemon.rpc import views, words
from equipoise.daemon.rpc.sandbox_server import notice
from equipoise.policies.accounting import TurnCost
from equipoise.policies.actions import (
    Action,
    Drop,
    Freeze,
    Grant,
    Hold,
    Kill,
    Outcome,
    OutcomeStatus,
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
from equipoise.policies.events import (
    DecisionMade,
    EngineAttached,
    Event,
    OutcomeObserved,
    SandboxRegistered,
    SandboxRemoved,
    TurnEnded,
)
from equipoise.policies.model import (
    MIB,
    NS_PER_S,
    CgroupId,
    DecisionId,
    FinishReason,
    KvTier,
    TenantId,
    ToolCallId,
    Verdict,
)
from equipoise.policies.state import State
from equipoise.policies.whynot import Look
from equipoise.tests.policies.facts import (
    ENGINE,
    call,
    came_of_it,
    decided,
    decision,
    ended,
    engine,
    host_sampled,
    ns,
    observed,
    policy,
    sandbox,
    session,
    started,
    stepped,
)
from rich.console import Console

CALL = ToolCallId(1)
GRANT = Grant(CALL, 384 * MIB, 640 * MIB)
KILL = Kill(CALL, "Equipoise ended this tool call: it was too much.")
EXPIRES = ns(9)


class Told:
    """State and History fed with the same events, as the loop does it."""

    def __init__(self, *events: Event) -> None:
        self.state = State(policy())
        self.history = History()
        self.feed(SandboxRegistered(0, sandbox()), host_sampled(), started(0.0), *events)

    def feed(self, *events: Event) -> Told:
        for event in events:
            self.state.apply(event)
            self.history(event, self.state)
        return self

    def call(self):
        return self.state.tool_calls[CALL]


def outcome(status: OutcomeStatus, latency_ns: int | None = None, detail: str = "") -> OutcomeObserved:
    return OutcomeObserved(ns(1), Outcome(DecisionId("d1"), status, ns(1), "tier", detail, latency_ns))


# -- words


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (Throttle(CALL, 1, 0.2, EXPIRES), "throttle"),
        (Freeze(CALL, EXPIRES), "freeze"),
        (Thaw(CALL), "let go"),
        (GRANT, "grant 640 MiB"),
        (Wait(CALL, MIB, EXPIRES), "wait for memory"),
        (KILL, "kill the tool call"),
        (SwapOut(ENGINE, session().id, KvTier.DISK, EXPIRES), "swap KV out to disk"),
        (SwapIn(ENGINE, session().id, EXPIRES), "swap KV in"),
        (Retain(ENGINE, session().id, ns(2.5), EXPIRES), "keep KV for 2.5 s"),
        (Drop(ENGINE, session().id, 0, EXPIRES), "drop KV"),
        (Hold(ENGINE, session().id, ns(10), EXPIRES), "hold the next turn for 10 s"),
        (Release(ENGINE, session().id, EXPIRES), "let the next turn go on"),
        (SetTenantWeight(ENGINE, TenantId("gold"), 2.0, EXPIRES), "set weight 2"),
        (SetHostTierCapacity(ENGINE, 3 * MIB, EXPIRES), "set KV host tier to 3 MiB"),
    ],
)
def test_every_action_has_words(action, said):
    assert words.of_action(action) == said


def test_a_decision_in_words_tells_what_came_of_it():
    made = decision(GRANT)

    def said(status: OutcomeStatus, latency_ns: int | None = None, detail: str = "") -> str:
        return words.of_decision(made, Outcome(made.id, status, 0, "tier", detail, latency_ns))

    assert words.of_decision(made, None) == "grant 640 MiB"
    assert said(OutcomeStatus.COMPLETED, 12_400_000) == "grant 640 MiB: done in 12 ms"
    assert said(OutcomeStatus.COMPLETED) == "grant 640 MiB: done"
    assert said(OutcomeStatus.GONE, 5, "it ended") == "grant 640 MiB: gone (it ended)"
    assert said(OutcomeStatus.DRY_RUN) == "grant 640 MiB: dry-run"


def test_ids_are_sixteen_hex_digits():
    assert words.tool_call_hex(ToolCallId(0xAB)) == "00000000000000ab"


# -- history


def test_a_decision_keeps_its_newest_outcome():
    told = Told(decided(GRANT), came_of_it(OutcomeStatus.ACCEPTED), came_of_it(OutcomeStatus.COMPLETED))
    [newest] = told.history.newest(5)
    assert newest.outcome is not None and newest.outcome.status is OutcomeStatus.COMPLETED


def test_an_outcome_of_nobody_knows_what_changes_nothing():
    told = Told(came_of_it(OutcomeStatus.COMPLETED, id="stranger"))
    assert told.history.newest(5) == []


def test_failures_are_counted():
    told = Told(decided(GRANT), came_of_it(OutcomeStatus.FAILED))
    assert told.history.failed_action_count == 1


def test_the_newest_come_first_and_the_bookkeeping_of_weights_is_left_out():
    weight = SetTenantWeight(ENGINE, TenantId("gold"), 2.0, EXPIRES)
    told = Told(decided(GRANT, 1, "a"), decided(weight, 2, "b"), decided(KILL, 3, "c"))
    assert [t.decision.id for t in told.history.newest(5)] == ["c", "a"]
    assert [t.decision.id for t in told.history.newest(1)] == ["c"]
    assert [t.decision.id for t in told.history.find(5)] == ["c", "b", "a"]


def test_finding_narrows_down_by_each_argument():
    swap = SwapOut(ENGINE, session("gold/ada").id, KvTier.HOST, EXPIRES)
    told = Told(decided(GRANT, 1, "a"), decided(swap, 2, "b"))
    find = told.history.find
    assert [t.decision.id for t in find(5, decision=DecisionId("a"))] == ["a"]
    assert [t.decision.id for t in find(5, session=session("gold/ada").id)] == ["b"]
    assert not find(5, tenant=TenantId("silver"))
    assert [t.decision.id for t in find(1)] == ["b"]


def test_a_call_is_told_with_what_became_of_its_sessions_kv_while_it_ran():
    def swap(at_s: float, id: str) -> DecisionMade:
        return decided(SwapOut(ENGINE, session("gold/ada").id, KvTier.HOST, EXPIRES), at_s, id)

    told = Told(decided(GRANT, 1, "mine"), swap(2, "meanwhile"), ended(3), swap(4, "later"))
    assert [t.decision.id for t in told.history.about(told.call())] == ["mine", "meanwhile"]


def test_ended_calls_are_remembered_after_the_state_has_forgotten_them():
    told = Told(stepped(1, 77), ended(2), SandboxRemoved(ns(3), CgroupId(1)))
    told.state.snapshot(ns(1000))
    assert not told.state.tool_calls
    assert [c.peak_bytes for c in told.history.ended()] == [77 * MIB]
    assert told.history.ended_call(CALL) is not None
    assert told.history.sandbox_names[CgroupId(1)] == "ada"


def test_memory_of_decisions_is_bounded(monkeypatch):
    monkeypatch.setattr("equipoise.daemon.observe.history.DECISIONS", 3)
    told = Told(*(decided(GRANT, n, f"d{n}") for n in range(5)))
    assert [t.decision.id for t in told.history.find(99)] == ["d4", "d3", "d2"]


# -- what an agent is told


def test_an_undisturbed_call_is_told_nothing():
    told = Told(decided(Retain(ENGINE, session("gold/ada").id, ns(1), EXPIRES)), came_of_it(OutcomeStatus.COMPLETED))
    assert notice(told.call(), told.history) == ""


def test_a_killed_call_is_told_why():
    told = Told(decided(GRANT, 1, "a"), came_of_it(OutcomeStatus.COMPLETED, id="a"))
    told.feed(decided(KILL, 2, "b"), came_of_it(OutcomeStatus.COMPLETED, id="b"))
    assert notice(told.call(), told.history) == KILL.message


def test_what_was_not_carried_out_is_not_told():
    told = Told(decided(KILL), came_of_it(OutcomeStatus.DRY_RUN))
    assert notice(told.call(), told.history) == ""


def test_waits_grants_and_throttles_are_told_once_each_with_the_time_they_cost():
    told = Told(stepped(0.5, 640))
    actions: tuple[Action, ...] = (Wait(CALL, MIB, EXPIRES), GRANT, GRANT, Throttle(CALL, 1, 0.2, EXPIRES))
    for n, action in enumerate(actions):
        told.feed(decided(action, 1, f"d{n}"), came_of_it(OutcomeStatus.COMPLETED, id=f"d{n}"))
    call_ = replace(told.call(), stalled_ns=ns(1.24))
    assert notice(call_, told.history) == (
        "Equipoise: this tool call peaked at 640 MiB, 1.2 s stalled; it waited for memory at its budget; "
        "was granted up to 640 MiB; was slowed down because memory was short."
    )


# -- messages


def test_a_watch_response_holds_the_whole_picture():
    told = Told(EngineAttached(0, engine()), observed(0, session("gold/ada", held_tokens=10, host_bytes=5)))
    told.feed(stepped(1, 100), decided(GRANT, 1), outcome(OutcomeStatus.COMPLETED, 2_000_000, "4 processes"))
    shown = views.watch_response(told.state.snapshot(ns(2)), told.state.policy, told.history)
    assert shown.now_ns == ns(2) and shown.host.tool_used_bytes == 100 * MIB
    assert shown.host.tool_pool_bytes == 1024 * MIB and not shown.host.HasField("gpu_total_bytes")
    assert {t.tenant_id: t.memory_bytes for t in shown.tenants} == {"gold": 100 * MIB, "silver": 0}
    assert [(s.name, s.cgroup_path) for s in shown.sandboxes] == [("ada", "equipoise/gold/ada")]
    assert [(s.tier, s.held_tokens, s.in_tool_call) for s in shown.sessions] == [("device", 10, True)]
    assert [(e.engine_id, e.attached) for e in shown.engines] == [(ENGINE, True)]
    [view] = shown.tool_calls
    assert (view.command, view.kind, view.sandbox, view.peak_bytes) == ("pytest -q", "pytest", "ada", 100 * MIB)
    assert view.actions == ["grant 640 MiB: done in 2 ms (a rule)"]
    [made] = shown.decisions
    assert (made.outcome, made.tier, made.latency_ms, made.detail) == ("completed", "tier", 2.0, "4 processes")
    assert made.tool_call_id == view.tool_call_id


def test_a_running_call_has_no_end_and_an_unknown_exit_code_is_absent():
    told = Told()
    view = views.tool_call_view(told.call(), {}, told.history)
    assert view.end_ns == 0 and not view.HasField("exit_code") and not view.HasField("overshoot_bytes")
    assert view.sandbox == "1", "its sandbox has no name any more"
    finished = views.tool_call_view(replace(call(), end_ns=5, exit_code=0, verdict=Verdict.DROP), {}, told.history)
    assert finished.HasField("exit_code") and finished.exit_code == 0 and finished.verdict == "drop"


def test_a_decision_without_an_outcome_says_so():
    told = Told(decided(GRANT))
    view = views.decision_view(told.history.newest(1)[0])
    assert view.outcome == "" and not view.HasField("latency_ms")


def sessions_of(*costs: TurnCost) -> list[pb.SessionView]:
    told = Told(EngineAttached(0, engine()), observed(0, session("gold/ada", held_tokens=10)))
    for number, cost in enumerate(costs):
        told.feed(TurnEnded(1, ENGINE, session("gold/ada").id, f"t{number}", FinishReason.STOP, 1, 0, 0, 1, 0, 0, cost))
    return list(views.watch_response(told.state.snapshot(ns(2)), told.state.policy, told.history).sessions)


def test_a_session_shows_what_its_turns_cost_and_nothing_in_place_of_what_is_not_known():
    turn = TurnCost(pte=10.5, wasted_pte=4, energy_joules=2.0, duration_ns=30, ideal_ns=10)
    [measured] = sessions_of(turn, turn)
    assert (measured.ended_turn_count, measured.pte, measured.wasted_pte) == (2, 21.0, 8.0)
    assert (measured.energy_joules, measured.slowdown_ratio) == (4.0, 3.0)
    [bare] = sessions_of(TurnCost())
    assert bare.ended_turn_count == 1
    assert not any(bare.HasField(name) for name in ("pte", "energy_joules", "slowdown_ratio"))


# -- the command line's tables


def printed(print_, rows) -> str:
    out = StringIO()
    print_(rows, Console(file=out, width=160, highlight=False))
    return out.getvalue()


def test_tables_are_one_line_a_call_whatever_its_command_holds():
    told = Told()
    view = views.tool_call_view(replace(told.call(), command="sh -c 'a\nb\tc'"), {CgroupId(1): "ada"}, told.history)
    lines = printed(printing.tool_calls, [view]).splitlines()
    assert len(lines) == 2 and "sh -c 'a b c'" in lines[1] and "gold/ada" in lines[1]
    assert printed(printing.tool_calls, []) == "no tool calls\n"


def test_sessions_are_a_table_that_says_what_was_not_measured():
    [measured] = sessions_of(TurnCost(pte=10.4, wasted_pte=4, energy_joules=2.0, duration_ns=30, ideal_ns=10))
    [bare] = sessions_of(TurnCost())
    measured.sandbox = "gold/bo"
    head, first, second = printed(printing.sessions, [measured, bare]).splitlines()
    assert head.split()[5:] == ["TOKENS", "TURNS", "PTE", "WASTED", "JOULES", "SLOWDOWN"]
    assert first.split() == ["gold/ada", "gold", "gold/bo", "idle", "device", "10/10", "1", "10", "4", "2.0", "3.00"]
    assert second.split()[4:] == ["10/10", "1", "not", "known", "0", "not", "measured", "not", "known"]
    assert printed(printing.sessions, []) == "no sessions\n"


def test_what_was_not_measured_is_null_in_the_json_of_a_session():
    [bare] = sessions_of(TurnCost())
    plain = printing.session_dict(bare)
    assert (plain["energy_joules"], plain["pte"], plain["slowdown_ratio"]) == (None, None, None)
    assert (plain["held_tokens"], plain["wasted_pte"]) == (10, 0.0)


def test_commands_and_evidence_are_printed_as_they_are_and_never_as_markup():
    told = Told(decided(GRANT))
    view = views.tool_call_view(replace(told.call(), command="test [red]x[/red]"), {}, told.history)
    assert "test [red]x[/red]" in printed(printing.tool_calls, [view])
    made = views.decision_view(told.history.newest(1)[0])
    made.evidence, made.detail = "used [1] of [/2]", "[/bold]"
    assert "used [1] of [/2]" in printed(printing.decisions, [made])


def test_numbers_stay_numbers_in_json():
    told = Told(stepped(1, 3))
    plain = printing.as_dict(views.tool_call_view(told.call(), {}, told.history))
    assert plain["peak_bytes"] == 3 * MIB and isinstance(plain["start_ns"], int)
    assert plain["tool_call_id"] == "0000000000000001"


# -- explain

AT_NOON = 1_000_000 * NS_PER_S
"""Of the wall clock, for a decision at 0 of its boot."""


def local(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(AT_NOON // NS_PER_S + second))


def explained(*made: pb.DecisionView, **changes: Any) -> list[str]:
    out = StringIO()
    console = Console(file=out, width=400, highlight=False)
    printing.decisions(list(made), console, now_unix_ns=AT_NOON + 90 * NS_PER_S, **changes)
    return out.getvalue().splitlines()


def made_at(at_s: float, id: str = "d1", action: Action = GRANT, **changes: object) -> pb.DecisionView:
    told = Told(decided(action, at_s, id))
    view = views.decision_view(told.history.newest(1)[0], AT_NOON)
    for name, value in changes.items():
        setattr(view, name, value)
    return view


def test_a_decision_is_five_lines_with_its_figures_clock_times_and_expiry():
    view = made_at(
        30.0, action=Throttle(ToolCallId(1), 5, 0.2, ns(95.0)), outcome="completed", tier="cgroup-v2", latency_ms=3.0
    )
    view.candidates.extend([pb.CandidateView(name="throttle a", cost=1.5), pb.CandidateView(name="throttle b", cost=2)])
    assert explained(view) == [
        f"throttle  gold/ada  at {local(30)}, 1 min ago",
        "  because  a rule: why",
        "  measured 1 against 0.5 MiB",
        "  weighed  throttle a 1.5 (chosen), throttle b 2",
        f"  outcome  completed after 3.0 ms by cgroup-v2; expires at {local(95)} [d1]",
    ]
    bare = explained(made_at(89.0))
    assert bare[0] == f"grant 640 MiB  gold/ada  at {local(89)}, 1.0 s ago"
    assert bare[3:] == ["  weighed  nothing else", "  outcome  none yet by - [d1]"]


def test_repeats_of_one_subject_are_one_paragraph_and_another_thing_between_them_is_not():
    kept = [made_at(at, f"d{at}", outcome="completed") for at in (80, 60, 40)]
    first, *_ = lines = explained(*kept)
    assert len(lines) == 5 and first.startswith("grant 640 MiB  gold/ada  at ") and "; 3 times since " in first
    other = made_at(70.0, "d70", action=Kill(ToolCallId(1), "x"), outcome="completed")
    assert len(explained(kept[0], other, *kept[1:])) == 15
    elsewhere = made_at(70.0, "d71", subject="gold/bo", outcome="completed")
    assert len(explained(kept[0], elsewhere, *kept[1:])) == 10, "what happens to others is nothing between"
    assert len(explained(kept[0], other, limit=1)) == 5


def test_what_a_dry_run_would_do_is_called_so():
    assert explained(made_at(1.0, outcome="dry-run"))[0].startswith("would grant 640 MiB  gold/ada")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.24, "4.2 s ago"), (200, "3 min ago"), (7200, "2.0 h ago"), (864_000, "10 days ago"), (-5, "0.0 s ago")],
)
def test_how_long_ago_is_said_in_one_unit(seconds: float, words: str):
    assert printing.ago(AT_NOON, AT_NOON + int(seconds * NS_PER_S)) == words
    assert ("-" in printing.clock(AT_NOON, AT_NOON + int(seconds * NS_PER_S))) == (seconds == 864_000)


def test_why_not_is_a_line_a_rule_with_its_figures():
    looks = (Look("tool pool above 0.90", "it does not press", 0.1, 0.9, "of the pool"), Look("the door", "[none]"))
    lines = printed(printing.why_not, views.why_not_response("gold/ada pytest", looks)).splitlines()
    assert lines == [
        "gold/ada pytest",
        "  tool pool above 0.90  0.1 against 0.9 of the pool: it does not press",
        "  the door              [none]",
    ]

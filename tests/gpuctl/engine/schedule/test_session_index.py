"""Turns that name no session: whose conversation they continue, what they never touch, and who leaves first."""

from __future__ import annotations

import itertools
import time

import pytest
from equipoise.gpuctl.engine.schedule.ledger import Ledger
from equipoise.gpuctl.engine.schedule.scheduler import Scheduler, SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import IdlePolicy, Session, SessionId, TenantId, Tier, TurnAccepted
from equipoise.gpuctl.engine.schedule.session_index import SessionIndex
from equipoise.gpuctl.engine.tiers.table import HOST
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven, Turn
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = itertools.count()
RED, BLUE = TenantId("red"), TenantId("blue")


def session_of(turn: Turn) -> str:
    (accepted,) = [event for event in turn.events if isinstance(event, TurnAccepted)]
    return accepted.session_id


def unnamed(driven: Driven, prompt: str, tokens: int = 5, tenant: str = "t") -> Turn:
    return driven.complete(f"new-{next(NUMBERS)}", prompt, tokens, tenant=tenant, anonymous=True)


# The index alone

TEXTS = st.one_of(
    st.text("ab", max_size=6),
    # Around the size of a block, where full blocks and rests meet.
    st.builds(lambda n, end: "a" * n + end, st.integers(60, 70), st.text("ab", max_size=3)),
    st.builds(lambda n, end: "a" * n + end, st.integers(126, 130), st.text("ab", max_size=3)),
)


@given(
    changes=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([RED, BLUE]), TEXTS, st.booleans()), max_size=12),
    tenant=st.sampled_from([RED, BLUE]),
    prompt=TEXTS,
)
def test_the_index_finds_what_a_comparison_with_every_session_finds(changes, tenant, prompt):
    index = SessionIndex()
    filed: dict[str, tuple[TenantId, str]] = {}
    for number, owner, text, removed in changes:
        name = f"{owner}{number}"
        filed.pop(name, None)
        if removed:
            index.remove(SessionId(name))
        else:
            index.add(Session(SessionId(name), owner, text=text))
            if text:
                filed[name] = (owner, text)
    matching = [
        (len(text), place, name)
        for place, (name, (owner, text)) in enumerate(filed.items())
        if owner == tenant and prompt.startswith(text)
    ]
    assert index.find(tenant, prompt) == (max(matching)[2] if matching else None)
    assert len(index) == len(filed)
    for name in filed:
        index.remove(SessionId(name))
    assert not index._files


def test_a_look_up_among_thousands_of_sessions_takes_no_scan():
    """Against ten sessions and five thousand with the same beginning, as agents with one system prompt have."""
    system = "You are a careful agent. " * 100

    def best_ns(count: int) -> int:
        index = SessionIndex()
        for n in range(count):
            index.add(Session(SessionId(str(n)), RED, text=f"{system}{n:06} and what was said since. " * 2))
        prompt = f"{system}{7:06} and what was said since. " * 2 + "And one question more."
        took = []
        for _ in range(50):
            began = time.thread_time_ns()
            assert index.find(RED, prompt) == "7"
            took.append(time.thread_time_ns() - began)
        return min(took)

    assert best_ns(5000) < 5 * best_ns(10) + 50_000


# Above the fake runner


def test_a_turn_without_a_name_continues_the_conversation_its_prompt_begins_with():
    driven = Driven()
    first = unnamed(driven, "hello")
    second = unnamed(driven, "hello" + first.text + " and more")
    assert session_of(second) == session_of(first)
    assert second.end is not None
    assert second.end.cached_tokens == 5 + 4
    assert second.text == driven.runner.expected_output("hello" + first.text + " and more", 5)


def test_the_longest_conversation_is_continued_and_among_equal_ones_the_last_used():
    driven = Driven()
    short = unnamed(driven, "hello")
    driven.advance(1)
    long = unnamed(driven, "hello" + short.text + "x")
    twin = driven.turn("twin", "hello", 5, anonymous=True)  # the first conversation moved on: this begins a new one
    driven.settle()
    assert session_of(long) == session_of(short)
    assert session_of(twin) == "twin"
    again = unnamed(driven, "hello" + short.text + "x" + long.text + "y")
    assert session_of(again) == session_of(long)
    # Two sessions of one text: each is continued once, the one used last first.
    driven = Driven()
    one = driven.turn("one", "same", 5, anonymous=True)
    two = driven.turn("two", "same", 5, anonymous=True)
    driven.settle()
    assert one.text == two.text
    later = driven.turn("later", "same" + one.text + "a", 5, anonymous=True)
    other = driven.turn("other", "same" + one.text + "b", 5, anonymous=True)
    driven.settle()
    assert [session_of(later), session_of(other)] == ["two", "one"]
    assert later.text == driven.runner.expected_output("same" + one.text + "a", 5)
    assert other.text == driven.runner.expected_output("same" + one.text + "b", 5)


def test_a_prompt_that_departs_inside_leaves_the_conversation_as_it_was():
    driven = Driven(share_prefix_tokens=3)
    first = unnamed(driven, "hello world")
    branch = unnamed(driven, "hello there")
    assert session_of(branch) != session_of(first)
    assert branch.end is not None
    assert branch.end.cached_tokens == len("hello "), "shared, not taken"
    more = unnamed(driven, "hello world" + first.text + "!")
    assert session_of(more) == session_of(first)
    assert more.end is not None
    assert more.end.cached_tokens == len("hello world") + 4


def test_no_tenant_continues_anothers_conversation():
    driven = Driven(share_prefix_tokens=3)
    first = unnamed(driven, "hello", tenant="red")
    second = unnamed(driven, "hello" + first.text + "x", tenant="blue")
    assert session_of(second) != session_of(first)
    assert second.end is not None
    assert second.end.cached_tokens == 0


def test_a_conversation_with_a_turn_under_way_is_not_found():
    driven = Driven()
    first = unnamed(driven, "hello")
    busy = driven.turn("busy", "hello" + first.text + "x", 50, anonymous=True)
    driven.steps(3)
    other = driven.turn("other", "hello" + first.text + "x", 5, anonymous=True)
    driven.settle()
    assert session_of(busy) == session_of(first)
    assert session_of(other) == "other"
    assert other.text == busy.text[:5]


def test_a_named_session_is_its_clients_and_naming_an_unnamed_one_makes_it_so():
    driven = Driven()
    named = driven.complete("mine", "hello")
    stranger = unnamed(driven, "hello" + named.text + "x")
    assert session_of(stranger) != "mine"
    adopted = driven.complete(session_of(stranger), "hello" + named.text + "x" + stranger.text + "y")
    assert adopted.end is not None
    assert adopted.end.cached_tokens > 5
    after = unnamed(driven, "hello" + named.text + "x" + stranger.text + "y" + adopted.text + "z")
    assert session_of(after) != session_of(stranger)


def test_unnamed_sessions_leave_the_device_before_named_ones():
    driven = Driven(kv_tokens=100)
    driven.complete("named", "x" * 30)
    driven.advance(1)
    guest = unnamed(driven, "y" * 30)
    driven.complete("big", "z" * 50)
    ledger = driven.engine._ledger
    assert ledger.holding(SessionId(session_of(guest))).longest()[0] is HOST
    assert ledger.holding(SessionId("named")).longest()[0] is Tier.DEVICE


def test_an_unnamed_session_takes_no_host_room_from_a_named_one_but_gives_its_own():
    driven = Driven(kv_tokens=60, host_tokens=40)
    guest = unnamed(driven, "y" * 30)
    driven.complete("first", "a" * 40)
    ledger = driven.engine._ledger
    assert ledger.holding(SessionId(session_of(guest))).longest() == (HOST, 34)
    driven.advance(1)
    driven.complete("second", "b" * 30)  # "first" needs the host; no room for both
    assert ledger.holding(SessionId("first")).longest()[0] is Tier.NONE, "44 tokens fit no host tier of 40"
    assert ledger.holding(SessionId(session_of(guest))).longest()[0] is HOST
    driven.advance(1)
    driven.complete("third", "c" * 40)
    assert ledger.holding(SessionId("second")).longest() == (HOST, 34)
    driven.advance(2)
    driven.settle()
    assert session_of(guest) not in driven.engine._scheduler.sessions, "it gave its room and holds nothing"
    late = unnamed(driven, "d" * 20)
    driven.complete("fourth", "e" * 50)
    assert ledger.holding(SessionId(session_of(late))).longest()[0] is Tier.NONE
    assert ledger.holding(SessionId("second")).longest() == (HOST, 34)


def test_past_the_limit_of_sessions_an_unnamed_one_is_forgotten_first():
    driven = Driven(max_sessions=2)
    driven.complete("named", "hello")
    driven.advance(1)
    guest = unnamed(driven, "guest")
    driven.advance(1)
    driven.complete("next", "next")
    assert set(driven.engine._scheduler.sessions) == {"named", "next"}
    again = unnamed(driven, "guest" + guest.text + "x")
    assert session_of(again) != session_of(guest), "a forgotten session is not found"
    assert len(driven.engine._by_text) == 1


@pytest.mark.parametrize("options", [{"keep_anonymous": False}, {"idle_policy": IdlePolicy.DROP}])
def test_where_nothing_is_kept_no_unnamed_session_stays(options):
    driven = Driven(**options)
    first = unnamed(driven, "hello")
    driven.advance(2)
    driven.settle()
    assert not driven.engine._scheduler.sessions
    assert not driven.engine._by_text._files
    second = unnamed(driven, "hello" + first.text)
    assert second.end is not None
    assert second.end.cached_tokens == 0


def test_a_refused_turn_leaves_the_conversation_to_be_found():
    driven = Driven(kv_tokens=40)
    first = unnamed(driven, "hello")
    refused = driven.turn("r", "hello" + first.text + "x" * 100, 5, anonymous=True)
    driven.settle()
    assert refused.refusal is not None
    second = unnamed(driven, "hello" + first.text + "x")
    assert session_of(second) == session_of(first)


def test_a_step_with_thousands_of_idle_sessions_stays_cheap():
    """CPU time a step: sessions that only wait to be found again must not slow those that run."""
    ledger = Ledger(device_capacity_tokens=1000, slot_count=4, bytes_per_token=1, lower=[(HOST, 10**9)])
    scheduler = Scheduler(SchedulerConfig(), ledger, physical_tokens=1000)
    for n in range(4000):
        session = Session(SessionId(str(n)), RED, tokens=[1, 2, 3], anonymous=True, last_used_ns=SECOND)
        scheduler.sessions[session.id] = session
        ledger.copied(session.id, HOST, 3)
    took = []
    for _ in range(30):
        began = time.thread_time_ns()
        scheduler.plan(2 * SECOND)
        took.append(time.thread_time_ns() - began)
    assert len(scheduler.sessions) == 4000
    assert min(took) < 2_000_000

"""The KV of a session is charged to the calls that run meanwhile, once and to their end."""

from __future__ import annotations

import pytest
from equipoise.policies.events import EngineDetached
from equipoise.policies.model import KvTier
from equipoise.tests.policies.facts import (
    ENGINE,
    ended,
    moved,
    ns,
    observed,
    session,
    state_with_a_call,
    the_call,
    turn_ended,
    turn_started,
)


def test_a_call_is_charged_for_what_its_idle_session_held_where() -> None:
    state = state_with_a_call()  # 1000 tokens of 1 KiB from 0 s
    state.apply(moved(2.0, KvTier.HOST))
    state.apply(observed(2.0, session("gold/ada", tier=KvTier.HOST, host_bytes=500)))
    state.apply(ended(5.0))
    kv = the_call(state).kv
    assert kv.held_bytes == 1000 * 1024
    assert kv.idle_byte_seconds == pytest.approx(2 * 1000 * 1024)
    assert kv.host_byte_seconds == pytest.approx(3 * 500)


def test_a_call_is_not_charged_while_its_session_computes() -> None:
    state = state_with_a_call().apply(turn_started(1.0)).apply(turn_ended(4.0)).apply(ended(5.0))
    assert the_call(state).kv.idle_byte_seconds == pytest.approx(2 * 1000 * 1024)


def test_charging_ends_with_the_call() -> None:
    state = state_with_a_call().apply(ended(1.0)).apply(observed(9.0, session("gold/ada")))
    assert the_call(state).kv.idle_byte_seconds == pytest.approx(1000 * 1024)


def test_charging_ends_with_the_engine() -> None:
    state = state_with_a_call().apply(EngineDetached(ns(2), ENGINE)).apply(ended(5.0))
    assert the_call(state).kv.idle_byte_seconds == pytest.approx(2 * 1000 * 1024)


def test_a_later_report_about_an_earlier_time_is_not_charged_twice() -> None:
    state = state_with_a_call().apply(observed(3.0, session("gold/ada")))
    state.apply(observed(2.0, session("gold/ada"))).apply(ended(4.0))
    assert the_call(state).kv.idle_byte_seconds == pytest.approx(4 * 1000 * 1024)

"""The books of KV memory."""

from __future__ import annotations

import pytest
from equipoise.gpuctl.engine.schedule.ledger import Ledger
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Tier
from equipoise.gpuctl.engine.tiers.table import DISK, HOST
from equipoise.policies.model import KvTier


def test_the_books_refuse_to_balance_when_a_slot_is_lost():
    ledger = Ledger(device_capacity_tokens=100, slot_count=2, bytes_per_token=4)
    ledger.open(SessionId("a"))
    ledger.grow(SessionId("a"), 10)
    ledger.check_integrity()
    ledger._holdings[SessionId("a")].slot = None
    with pytest.raises(AssertionError, match="slot leaked"):
        ledger.check_integrity()


def test_truncating_shortens_every_copy():
    ledger = Ledger(device_capacity_tokens=100, slot_count=2, bytes_per_token=4, lower=[(HOST, 400), (DISK, 400)])
    session = SessionId("a")
    ledger.open(session)
    ledger.grow(session, 30)
    ledger.copied(session, HOST, 20)
    ledger.copied(session, DISK, 10)
    ledger.truncate(session, 15)
    assert (ledger.device_used_tokens, ledger.used_bytes(KvTier.HOST), ledger.used_bytes(KvTier.DISK)) == (15, 60, 40)
    assert ledger.holding(session).longest() == (Tier.DEVICE, 15)
    ledger.forget(session)
    assert (ledger.device_used_tokens, ledger.used_bytes(KvTier.HOST), ledger.used_bytes(KvTier.DISK)) == (0, 0, 0)
    ledger.check_integrity()

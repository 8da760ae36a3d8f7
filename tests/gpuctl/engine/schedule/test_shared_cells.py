"""The tree of shared prefixes against cells that know who uses them, as llama.cpp's do."""

from __future__ import annotations

import pytest
from equipoise.gpuctl.engine.schedule.ledger import Ledger
from equipoise.gpuctl.engine.schedule.sequence import SessionId
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

NAMES = [SessionId(name) for name in "abcde"]


class CellsMachine(RuleBasedStateMachine):
    """Sessions grow, share, are cut and leave; each session's cells are kept one by one beside the books."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(device_capacity_tokens=1000, slot_count=5, bytes_per_token=1)
        self.cells: dict[SessionId, list[int]] = {}
        self.made = 0

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 12))
    def grow(self, name: SessionId, count: int) -> None:
        self.ledger.open(name)
        self.ledger.grow(name, count)
        self.cells.setdefault(name, []).extend(range(self.made, self.made + count))
        self.made += count

    @rule(name=st.sampled_from(NAMES), donor=st.sampled_from(NAMES), part=st.floats(0, 1))
    def share(self, name: SessionId, donor: SessionId, part: float) -> None:
        count = int(part * len(self.cells.get(donor, [])))
        if name == donor or self.cells.get(name) or not count:
            return
        self.ledger.open(name)
        self.ledger.share(donor, name, count)
        self.cells[name] = self.cells[donor][:count]

    @rule(name=st.sampled_from(NAMES), to_tokens=st.integers(0, 30))
    def truncate(self, name: SessionId, to_tokens: int) -> None:
        self.ledger.truncate(name, to_tokens)
        self.cells[name] = self.cells.get(name, [])[:to_tokens]

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: SessionId) -> None:
        self.ledger.leave_device(name)
        self.cells.pop(name, None)

    @invariant()
    def the_books_count_the_cells(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.device_used_tokens == len({cell for held in self.cells.values() for cell in held})
        for name in NAMES:
            held = self.cells.get(name, [])
            users = [sum(cell in other for other in self.cells.values()) for cell in held]
            assert self.ledger.shared_tokens(name) == sum(count > 1 for count in users)
            assert self.ledger.charged_tokens(name) == pytest.approx(sum(1 / count for count in users))

    @rule(leaving=st.sets(st.sampled_from(NAMES)))
    def what_several_free_together_is_foretold(self, leaving: set[SessionId]) -> None:
        stay = {cell for name, held in self.cells.items() if name not in leaving for cell in held}
        used = {cell for held in self.cells.values() for cell in held}
        assert self.ledger.freed_by_leaving(*leaving) == len(used - stay)


TestCellsMachine = CellsMachine.TestCase
TestCellsMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_prefixes_nest_and_each_stretch_is_split_among_its_users():
    ledger = Ledger(device_capacity_tokens=1000, slot_count=4, bytes_per_token=1)
    a, b, c, d = NAMES[:4]
    ledger.open(a)
    ledger.grow(a, 100)
    for name, donor, tokens in ((b, a, 80), (c, b, 30), (d, a, 60)):
        ledger.open(name)
        ledger.share(donor, name, tokens)
    ledger.check_integrity()
    assert ledger.device_used_tokens == 100
    assert [ledger.shared_tokens(name) for name in (a, b, c, d)] == [80, 80, 30, 60]
    # 30 tokens have four users, the next 30 three, the next 20 two, and a alone has its last 20.
    assert ledger.charged_tokens(a) == pytest.approx(30 / 4 + 30 / 3 + 20 / 2 + 20)
    assert ledger.charged_tokens(c) == pytest.approx(30 / 4)
    assert ledger.freed_by_leaving(a) == 20
    assert ledger.freed_by_leaving(a, b) == 40

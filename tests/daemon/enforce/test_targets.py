"""Where a tool call is, under each of its ids."""

from __future__ import annotations

from equipoise.daemon.enforce import freeze
from equipoise.policies.actions import Freeze, OutcomeStatus, Thaw
from equipoise.policies.model import ToolCallId

from .conftest import CALL, LEAVES, World


def test_merged_ids_mean_the_same_call_and_keep_its_holds(world: World) -> None:
    tag = ToolCallId(0x77)
    world.do(Freeze(CALL, world.in_s(10)))
    world.actuator.merge(CALL, tag)
    assert world.do(Thaw(tag)).status is OutcomeStatus.COMPLETED
    world.do(Freeze(tag, world.in_s(10)))
    assert world.done(LEAVES[CALL], freeze.FREEZE)
    world.actuator.unbind(CALL)
    assert not world.done(LEAVES[CALL], freeze.FREEZE) and not world.book.entries

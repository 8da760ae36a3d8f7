"""Which process is the runtime of what a record forks."""

from __future__ import annotations

from typing import Any

from equipoise.daemon.sandboxes.kept import Kept
from equipoise.daemon.sandboxes.processes import ProcessRef
from equipoise.daemon.sandboxes.who.helpers import Helpers
from equipoise.daemon.sandboxes.who.runtimes import Runtimes
from equipoise.policies.model import CgroupId, ProcessRole, Role, ToolCallId

NONE: Any = None
AGENT_TAG, BEFORE, SINCE, SHELL, CALL = (ToolCallId(number) for number in range(1, 6))
AGENT, RUNTIME, BASH = 40, 41, 42
"""Processes."""


def test_records_from_before_and_since_it_spoke_and_its_shells_are_all_of_one_process():
    helpers = Helpers(NONE, lambda: 0)
    for record, pid, role, parent in (
        (BEFORE, RUNTIME, Role.START_UP, AGENT_TAG),
        (SHELL, BASH, Role.SHELL, SINCE),
    ):
        helpers.note(record, ProcessRole(record, CgroupId(1), pid, "", role, 0.9, "", 0), parent)
    runtimes = Runtimes(NONE, NONE, helpers, NONE, {}, lambda: 0)
    kept = Kept(NONE, agent=ProcessRef(AGENT, 1), agent_tag=AGENT_TAG, runtimes={SINCE: RUNTIME}, shells={SHELL: BASH})
    assert [runtimes.above(record, kept) for record in (BEFORE, SINCE, SHELL)] == [RUNTIME] * 3
    assert runtimes.above(AGENT_TAG, kept) == AGENT, "which has not spoken yet"
    assert runtimes.above(CALL, kept) is None and runtimes.above(None, kept) is None

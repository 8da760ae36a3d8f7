"""How long an exec waits for its conversation, and which one that can mean."""

from __future__ import annotations

from equipoise.daemon.sandboxes.who.rulings import Ruled, Unwitnessed
from equipoise.policies.events import ToolCallStarted
from equipoise.policies.model import NS_PER_S, CgroupId, Role, SessionId, ToolCallId, ToolCallSource
from equipoise.policies.roles import Asked, Exec, Ruling

BOX = CgroupId(7)


def ruled(number: int, at_s: float, command: str, *, in_shell: bool = False, role: Role = Role.TOOL_CALL) -> Ruled:
    event = ToolCallStarted(int(at_s * NS_PER_S), ToolCallId(number), BOX, command, ToolCallSource.LINEAGE, 0.9, number)
    seen = Exec(command, below_runtime=True, in_shell=in_shell)
    return Ruled(event, seen, None, "", Ruling(role, 0.8, "", command), [])


def asked(command: str, from_s: float, to_s: float) -> Asked:
    return Asked("id", SessionId("s"), command, int(from_s * NS_PER_S), int(to_s * NS_PER_S))


def test_a_line_of_a_shell_waits_for_its_answer_and_another_exec_some_seconds():
    waiting = Unwitnessed()
    waiting.wait(ruled(1, 1, "/shims/pytest", in_shell=True))
    waiting.wait(ruled(2, 1, "git status"))
    waiting.wait(ruled(3, 1, "git status", in_shell=True, role=Role.HOUSEKEEPING))
    waiting.wait(ruled(4, 60, "make"))
    assert [each.event.id for each in waiting.of(BOX)] == [1, 4]
    found = waiting.in_time(BOX, asked("pytest -q", 0.5, 70))
    assert found is not None and found.event.id == 1
    assert waiting.in_time(BOX, asked("pytest -q", 2, 70)) is None, "it began before that was asked for"


def test_what_a_line_put_in_the_background_may_begin_a_little_after_its_answer():
    waiting = Unwitnessed()
    waiting.wait(ruled(1, 2.1, "make all", in_shell=True, role=Role.HOUSEKEEPING))
    found = waiting.left_behind(BOX, asked("make all &", 1, 2))
    assert found is not None and found.event.id == 1
    assert waiting.left_behind(BOX, asked("make install &", 1, 2)) is None
    assert waiting.left_behind(BOX, asked("make all &", 0.5, 1)) is None, "too long after"


def test_no_more_wait_than_can_be_looked_through():
    waiting = Unwitnessed()
    for number in range(1, 400):
        waiting.wait(ruled(number, 1, "make", in_shell=True))
    assert len(waiting.of(BOX)) == 256
    waiting.forget(BOX)
    assert waiting.of(BOX) == []

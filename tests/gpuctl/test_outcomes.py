"""Memory for how directives ended: what answers a repeated one."""

from __future__ import annotations

from equipoise.gpuctl.directives import Outcome, OutcomeStatus
from equipoise.gpuctl.outcomes import Outcomes


def test_the_newest_outcome_of_a_directive_answers_its_repetition() -> None:
    outcomes = Outcomes()
    outcomes.note(Outcome("a", OutcomeStatus.DEFERRED, "no room yet"))
    outcomes.note(Outcome("a", OutcomeStatus.COMPLETED))
    assert outcomes.of("a") == Outcome("a", OutcomeStatus.COMPLETED)
    assert outcomes.of("b") is None


def test_of_more_than_it_may_remember_it_forgets_the_one_first_heard_of() -> None:
    outcomes = Outcomes(remembered_count=2)
    for directive_id in ("a", "b", "a", "c"):
        outcomes.note(Outcome(directive_id, OutcomeStatus.COMPLETED))
    assert [each for each in "abc" if outcomes.of(each)] == ["b", "c"]

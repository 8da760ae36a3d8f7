"""Scoring: which row of the daemon belongs to which asked-for call, with literals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.tests.agents.score import Asked, Said, Truth, score

CALLS = (
    Asked(0, "git status --short", 1_000_000_000, 2_000_000_000),
    Asked(1, "python3 -c 'print(1)'", 2_000_000_000, 3_000_000_000, exit_code=3),
)


def said(command: str, at_ns: int, pid: int = 100, exit_code: int = 0, **fields) -> Said:
    return Said(f"{at_ns}", pid, command, at_ns, at_ns + 1_000_000, exit_code=exit_code, **fields)


RIGHT = (
    said("/bin/bash -c eval 'git status --short' && pwd", 1_100_000_000),
    said("bash -c python3 -c 'print(1)'", 2_100_000_000, exit_code=3),
)


def test_what_was_asked_for_and_nothing_else_is_perfect():
    result = score(CALLS, RIGHT, {7}, survived=True)
    assert result.perfect and (result.precision, result.recall) == (1.0, 1.0)
    assert result.confusion() == {(Truth.CALL, "tool call"): 2}


def test_the_same_words_before_they_were_asked_for_are_start_up():
    early = said("git --no-optional-locks status --short", 500_000_000)
    result = score(CALLS, (early, *RIGHT), (), survived=True)
    assert result.rows[0].truth is Truth.START_UP and result.recall == 1.0
    assert result.precision == pytest.approx(2 / 3) and not result.perfect


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        (said("git write-tree", 1_050_000_000), Truth.HOUSEKEEPING),
        (said("git status --short", 1_900_000_000), Truth.AGAIN),
        (said("/usr/bin/codex exec 'git status --short'", 1_500_000_000, pid=7), Truth.RUNTIME),
    ],
)
def test_other_rows_are_told_apart(row, truth):
    result = score(CALLS, (*RIGHT, row), {7}, survived=True)
    assert [r.truth for r in result.rows if r.said is row] == [truth]
    assert result.recall == 1.0 and result.precision < 1.0


def test_ids_count_where_somebody_can_tell_them():
    calls = tuple(replace(c, call_id=f"c{c.number}", id_known=not c.number, session="gold/s") for c in CALLS)
    rows = tuple(replace(row, call_id=f"c{number}", session="gold/s") for number, row in enumerate(RIGHT))
    assert score(calls, rows, (), survived=True).perfect
    assert score(calls, (rows[0], replace(rows[1], call_id="")), (), survived=True).perfect
    assert score(calls, (replace(rows[0], call_id=""), rows[1]), (), survived=True).wrong == ["call 0: id '', not 'c0'"]
    wrong = (replace(rows[0], call_id="c1"), replace(rows[1], session="gold/other"))
    assert score(calls, wrong, (), survived=True).wrong == [
        "call 0: id 'c1', not 'c0'",
        "call 1: session 'gold/other', not 'gold/s'",
    ]


def test_a_call_that_no_row_shows_is_missed():
    result = score(CALLS, RIGHT[:1], (), survived=True)
    assert (result.precision, result.recall, result.missed) == (1.0, 0.5, [1])
    assert result.confusion()[Truth.MISSED, "nothing"] == 1


def test_a_row_that_is_not_said_to_be_a_tool_call_costs_no_precision():
    row = said("git write-tree", 1_050_000_000, role="housekeeping")
    result = score(CALLS, (*RIGHT, row), (), survived=True)
    assert result.perfect and result.confusion()[Truth.HOUSEKEEPING, "housekeeping"] == 1


def test_a_call_that_is_taken_for_something_else_costs_recall():
    result = score(CALLS, (RIGHT[0], said("python3 -c print(1)", 2_100_000_000, role="service")), (), survived=True)
    assert result.recall == 0.5 and result.precision == 1.0


def test_a_command_that_was_cut_short_is_known_by_its_beginning():
    cut = said("/bin/bash -c source /home/ada/.claude/snapshot.sh && eval 'git status --…", 1_100_000_000)
    assert score(CALLS[:1], (cut,), (), survived=True).recall == 1.0
    other = said("/bin/bash -c source /home/ada/.claude/snapshot.sh && eval 'git log --…", 1_100_000_000)
    assert score(CALLS[:1], (other,), (), survived=True).recall == 0.0


def test_a_wrapper_that_hides_the_text_is_known_by_the_time():
    hidden = said("/proc/self/exe --codex-run-as-process-setup 40 17658 pipe…", 2_100_000_000, exit_code=3)
    assert score(CALLS, (RIGHT[0], hidden), (), survived=True).perfect


def test_the_same_text_asked_for_twice_at_once_is_two_calls():
    twice = tuple(Asked(n, "git status --short", 1_000_000_000, 2_000_000_000) for n in (0, 1))
    rows = tuple(said("bash -c git status --short", at) for at in (1_100_000_000, 1_200_000_000))
    assert score(twice, rows, (), survived=True).perfect


def test_an_agent_that_died_is_not_perfect_and_what_was_measured_wrong_is_named():
    assert not score(CALLS, RIGHT, (), survived=False).perfect
    big = Asked(0, "make", 0, None, peak_bytes=300 << 20, leaves_behind=True)
    result = score((big,), (said("make", 5, exit_code=1, peak_bytes=8 << 20),), (), survived=True)
    assert result.wrong == [
        "call 0: exit code 1, not 0",
        "call 0: peak 8 MiB, not 300",
        "call 0: nothing left behind",
    ]

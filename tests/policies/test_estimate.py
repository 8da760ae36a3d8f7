"""Kinds of commands, and what is expected of them."""

from __future__ import annotations

import pytest
from equipoise.policies.estimate import MOST_KINDS, Estimates, LogHistogram, command_kind
from equipoise.policies.model import MIB, NS_PER_S


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("pytest -q", "pytest"),
        ("/usr/bin/git status", "git"),
        ("timeout 60 python -m pytest -q", "pytest"),
        ("timeout -s KILL 1.5m pytest", "pytest"),
        ("nice -n 10 cc -O2 a.c", "cc"),
        ("sudo -u bob make", "make"),
        ("env -u HOME CC=clang make -j2", "make"),
        ("uv run pytest", "pytest"),
        ("npm run test", "npm"),
        ("./run --fast", "run"),
        ("python3.11 -W ignore train.py --epochs 3", "train.py"),
        ("python -c 'import this'", "python"),
        ("python", "python"),
        ("bash", "bash"),
        ("bash build.sh all", "build.sh"),
        ("bash --norc build.sh", "build.sh"),
        ("bash -lc 'cd /src && make -j2'", "make"),
        ("bash -c cd /src && make -j2", "make"),
        ("/bin/bash -c -l source /x/snapshot.sh && eval 'pytest -q' < /dev/null && pwd -P", "pytest"),
        ("cd /src; pytest -q", "pytest"),
        ("(cd /src && go test ./...)", "go"),
        ("if true; then cargo build; fi", "cargo"),
        ("for f in a b; do pytest $f; done", "pytest"),
        ("sh -c 'sh -c \"git log\"'", "git"),
        ("git commit -m 'a; b && c'", "git"),
        ("cd /src", "cd"),
        ("grep 'unbalanced", "grep"),
        ("", "unknown"),
        ("  ", "unknown"),
        ("A=1 B=2", "unknown"),
        ("equipoise tool --tenant gold -- pytest -q", "pytest"),
        ("/venv/bin/python -m equipoise.daemon.cli tool -- cc a.c", "cc"),
        ("equipoise top", "equipoise"),
    ],
)
def test_the_kind_is_the_program_that_does_the_work(command: str, kind: str) -> None:
    assert command_kind(command) == kind


def test_a_hostile_command_line_is_answered_all_the_same() -> None:
    assert command_kind("bash -c " * 10_000) == "bash"
    assert command_kind("'" * 10_000) == "unknown"
    assert command_kind("equipoise tool -- " * 10_000)


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1 << 60, 47)])
def test_a_histogram_counts_by_power_of_two(value: int, bucket: int) -> None:
    counts = LogHistogram().observe(value).counts
    assert counts[bucket] == 1.0 and sum(counts) == 1.0


def test_the_mean_beyond_zero_is_the_mean() -> None:
    assert LogHistogram().observe(8).mean_beyond(0.0) == 12.0  # the middle of [8, 16)
    assert LogHistogram().observe(8).observe(32).mean_beyond(0.0) == (12 + 48) / 2


def test_the_mean_beyond_counts_only_what_lasted_longer() -> None:
    both = LogHistogram().observe(8).observe(32)
    assert both.mean_beyond(16.0) == 48 - 16
    # Inside [8, 16) half of the short ones are left, on average at 14; the long ones are all left.
    assert both.mean_beyond(12.0) == pytest.approx((0.5 * (14 - 12) + 1.0 * (48 - 12)) / 1.5)


def test_beyond_all_history_there_is_no_mean() -> None:
    assert LogHistogram().observe(8).mean_beyond(16.0) is None
    assert LogHistogram().mean_beyond(0.0) is None


def test_a_quantile_is_the_upper_edge_of_its_bucket() -> None:
    histogram = LogHistogram().observe(8, weight=9.0).observe(1000, weight=1.0)
    assert histogram.quantile(0.5) == 16.0
    assert histogram.quantile(0.9) == 16.0
    assert histogram.quantile(0.91) == 1024.0
    assert histogram.quantile(1.0) == 1024.0
    assert LogHistogram().quantile(0.5) is None


def test_rounding_never_loses_the_last_quantile() -> None:
    histogram = LogHistogram()
    for exponent in range(40):
        histogram = histogram.observe(1 << exponent, weight=0.1)
    assert histogram.quantile(1.0) == float(1 << 40)


def test_blending_keeps_the_shape_of_the_other() -> None:
    blended = LogHistogram().plus(LogHistogram().observe(8, 30.0).observe(64, 10.0), weight=2.0)
    assert blended.total == pytest.approx(2.0)
    assert blended.counts[3] == pytest.approx(1.5) and blended.counts[6] == pytest.approx(0.5)
    assert LogHistogram().observe(4).plus(LogHistogram(), 2.0) == LogHistogram().observe(4)


def test_what_is_seen_often_outweighs_the_prior() -> None:
    estimates = Estimates()
    for _ in range(200):
        estimates = estimates.observe("sleep", 30 * NS_PER_S, 4 * MIB)
    assert estimates.mean_residual_s("sleep", 0) == pytest.approx(26, abs=3)  # the bucket's middle
    assert estimates.peak_quantile_bytes("sleep", 0.9) == 8 * MIB
    assert estimates.mean_residual_s("other", 0) == Estimates().mean_residual_s("other", 0)


def test_a_call_that_outlived_all_history_is_expected_to_run_as_long_again() -> None:
    assert Estimates().mean_residual_s("pytest", 10**12) == pytest.approx(1000.0)


def test_an_unknown_kind_leans_on_the_prior() -> None:
    assert 0.5 < Estimates().mean_residual_s("never seen", 0) < 5.0
    assert Estimates().peak_quantile_bytes("never seen", 0.5) == 4 * MIB
    assert 5 * MIB < Estimates().peak_mean_bytes("never seen") < 20 * MIB


def test_observing_leaves_the_former_estimate_as_it_was() -> None:
    before = Estimates()
    before.observe("cc", 1, 1)
    assert before == Estimates()


def test_the_kind_not_seen_for_longest_is_forgotten_first() -> None:
    estimates = Estimates().observe("pytest", NS_PER_S, MIB)
    for number in range(MOST_KINDS + 10):
        estimates = estimates.observe(f"script{number}.py", NS_PER_S, MIB)
        if number % 100 == 0:
            estimates = estimates.observe("pytest", NS_PER_S, MIB)
    assert len(estimates.durations) == len(estimates.peaks) == MOST_KINDS
    assert "pytest" in estimates.durations
    assert "script0.py" not in estimates.durations

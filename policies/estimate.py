"""What a tool call will take: kinds of commands, how long they last, how much memory they reach.

Owns the online estimates. Each kind of command has a log2 histogram of durations and one of peaks; a kind that has
not been seen leans on a prior that all kinds share.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from .model import MIB, NS_PER_S

_LAUNCHERS = frozenset({"env", "nice", "nohup", "setsid", "stdbuf", "time", "timeout", "uv", "poetry", "exec", "sudo"})
_SHELLS = frozenset({"sh", "bash", "dash", "zsh"})
_BUCKETS = 48
PRIOR_WEIGHT = 2.0
"""A kind's prior counts as this many observations."""


def command_kind(command: str) -> str:
    """The program that does the work: `timeout 60 python -m pytest -q` -> `pytest`. Never empty."""
    try:
        words = shlex.split(command, posix=True)
    except ValueError:  # an unbalanced quote: the kernel may have cut the command line short
        words = command.split()
    return _kind_of(words) or "unknown"


def _kind_of(words: list[str]) -> str:
    words = list(words)
    while words:
        word = words.pop(0)
        name = PurePosixPath(word).name
        if not name or "=" in word or word.startswith("-") or name == "run" or word.isdigit():
            continue
        if name in _LAUNCHERS:
            continue
        if name in _SHELLS:
            return _shell_kind(words) or name
        if name.startswith("python"):
            return _python_kind(words) or "python"
        return name
    return ""


def _shell_kind(words: list[str]) -> str:
    """What `sh -c '...'` or `sh script` runs: the last command of a `cd x && make` chain."""
    for index, word in enumerate(words):
        if word.startswith("-") and "c" in word and index + 1 < len(words):
            script = " ".join(words[index + 1 :])
            parts = script.replace("&&", ";").replace("||", ";").split(";")
            kinds = [_kind_of(part.split()) for part in parts]
            return next((kind for kind in kinds if kind and kind not in ("cd", "export", "set", "source", ".")), "")
        if not word.startswith("-"):
            return PurePosixPath(word).name
    return ""


def _python_kind(words: list[str]) -> str:
    for index, word in enumerate(words):
        if word == "-m" and index + 1 < len(words):
            return words[index + 1]
        if word == "-c":
            return "python"
        if not word.startswith("-"):
            return PurePosixPath(word).name
    return ""


@dataclass(frozen=True, slots=True)
class LogHistogram:
    """Counts by power of two. Bucket b holds values in [2^b, 2^(b+1)); bucket 0 holds 0 and 1 too."""

    counts: tuple[float, ...] = (0.0,) * _BUCKETS

    def observe(self, value: int, weight: float = 1.0) -> LogHistogram:
        bucket = min(_BUCKETS - 1, max(0, value.bit_length() - 1))
        counts = list(self.counts)
        counts[bucket] += weight
        return LogHistogram(tuple(counts))

    @property
    def total(self) -> float:
        return sum(self.counts)

    def plus(self, other: LogHistogram, weight: float) -> LogHistogram:
        """Self with `other` blended in as `weight` observations; self where other is empty."""
        if not other.total:
            return self
        scale = weight / other.total
        return LogHistogram(tuple(a + scale * b for a, b in zip(self.counts, other.counts, strict=True)))

    def mean_beyond(self, elapsed: float) -> float | None:
        """Expected value of X - elapsed given X > elapsed, values spread evenly within a bucket.

        None where nothing observed lies beyond: the caller has outlived all history.
        """
        mass = excess = 0.0
        for bucket, count in enumerate(self.counts):
            low, high = float(1 << bucket), float(2 << bucket)
            if not count or high <= elapsed:
                continue
            start = max(low, elapsed)
            part = count * (high - start) / (high - low)
            mass += part
            excess += part * ((start + high) / 2 - elapsed)
        return excess / mass if mass else None

    def quantile(self, q: float) -> float | None:
        """Upper edge of the bucket in which the q-quantile lies; None without observations."""
        need, seen = q * self.total, 0.0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= need:
                return float(2 << bucket)
        return None


def _prior_durations() -> LogHistogram:
    # Shape of 6,641 tool calls of the AgentCgroup traces: p50 35 ms, p90 9.3 s, p99 19 s.
    prior = LogHistogram()
    for value_ms, weight in ((10, 25.0), (35, 25.0), (400, 20.0), (2_000, 15.0), (7_000, 10.0), (15_000, 5.0)):
        prior = prior.observe(value_ms * 1_000_000, weight)
    return prior


def _prior_peaks() -> LogHistogram:
    prior = LogHistogram()
    for value_mib, weight in ((16, 50.0), (64, 25.0), (256, 20.0), (1024, 5.0)):
        prior = prior.observe(value_mib * MIB, weight)
    return prior


@dataclass(frozen=True, slots=True)
class Estimates:
    """What has been learned of each kind of command. Immutable: `observe` returns the next one."""

    durations: Mapping[str, LogHistogram] = field(default_factory=dict)
    peaks: Mapping[str, LogHistogram] = field(default_factory=dict)
    prior_durations: LogHistogram = field(default_factory=_prior_durations)
    prior_peaks: LogHistogram = field(default_factory=_prior_peaks)

    def observe(self, kind: str, duration_ns: int, peak_bytes: int) -> Estimates:
        durations, peaks = dict(self.durations), dict(self.peaks)
        durations[kind] = durations.get(kind, LogHistogram()).observe(duration_ns)
        peaks[kind] = peaks.get(kind, LogHistogram()).observe(peak_bytes)
        return Estimates(durations, peaks, self.prior_durations, self.prior_peaks)

    def mean_residual_s(self, kind: str, elapsed_ns: int) -> float:
        """Seconds a call that has run for elapsed_ns is expected to run on.

        One that has outlived all history is expected to run as long again as it has (the Lindy rule), since a
        heavy-tailed duration gives no better guess.
        """
        known = self.durations.get(kind, LogHistogram()).plus(self.prior_durations, PRIOR_WEIGHT)
        beyond = known.mean_beyond(float(elapsed_ns))
        return (beyond if beyond is not None else float(elapsed_ns)) / NS_PER_S

    def peak_quantile_bytes(self, kind: str, q: float) -> int:
        known = self.peaks.get(kind, LogHistogram()).plus(self.prior_peaks, PRIOR_WEIGHT)
        return int(known.quantile(q) or 0)

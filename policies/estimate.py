"""What a tool call will take: kinds of commands, how long they last, how much memory they reach.

Owns the online estimates. Each kind of command has a log2 histogram of durations and one of peaks; a kind that has
not been seen leans on a prior that all kinds share.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath

from .model import MIB, NS_PER_S

_LAUNCHERS: dict[str, frozenset[str]] = {
    "env": frozenset({"-u", "-C", "-S"}),
    "exec": frozenset({"-a"}),
    "eval": frozenset(),
    "nice": frozenset({"-n"}),
    "ionice": frozenset({"-c", "-n"}),
    "nohup": frozenset(),
    "poetry": frozenset(),
    "setsid": frozenset(),
    "stdbuf": frozenset({"-i", "-o", "-e"}),
    "sudo": frozenset({"-u", "-g", "-C", "-D"}),
    "time": frozenset({"-f", "-o"}),
    "timeout": frozenset({"-s", "-k"}),
    "uv": frozenset(),
}
"""Programs that only start another, and those of their options that take the next word."""
_SHELLS = frozenset({"sh", "bash", "dash", "zsh"})
_LAUNCHERS |= dict.fromkeys(("!", "do", "else", "if", "then", "until", "while"), frozenset())
_QUIET = frozenset(
    {"cd", "export", "set", "unset", "source", ".", ":", "true", "shopt", "setopt", "ulimit", "umask", "pushd", "popd"}
    | {"[", "[[", "test", "for", "trap"}
)
"""What prepares a shell script's work and is not the work."""
_DURATION = re.compile(r"[0-9]+(\.[0-9]+)?[smhd]?")
_LONGEST_COMMAND = 4096
_DEEPEST = 8
"""Shells within shells that are looked into: a command line comes from outside and must not exhaust the stack."""
_BUCKETS = 48
_OWN_MODULE = "equipoise.daemon.cli"
PRIOR_WEIGHT = 2.0
"""A kind's prior counts as this many observations."""
MOST_KINDS = 1024
"""Kinds remembered; the one not seen for longest goes first. Agents invent script names without end."""


def command_kind(command: str) -> str:
    """The program that does the work: `timeout 60 python -m pytest -q` -> `pytest`. Never empty, never raises."""
    command = command[:_LONGEST_COMMAND]
    try:
        words = shlex.split(command, posix=True)
    except ValueError:  # an unbalanced quote: the kernel may have cut the command line short
        words = command.split()
    kind = _kind_of(words, _DEEPEST)
    if kind in _QUIET:  # a hook tells the script itself, without the shell that runs it
        kind = _script_kind(command, _DEEPEST) or kind
    return kind or "unknown"


def _kind_of(words: list[str], depth: int) -> str:
    valued: frozenset[str] = frozenset()
    launched = False
    for index, word in enumerate(words):
        if index and words[index - 1] in valued:
            continue
        name = PurePosixPath(word.strip("'\"(){};")).name
        if not name or "=" in word or word.startswith("-"):
            continue
        if launched and (name == "run" or _DURATION.fullmatch(name)):
            continue  # `uv run`, `timeout 60s`
        if name in _LAUNCHERS:
            launched, valued = True, _LAUNCHERS[name]
            continue
        rest = words[index + 1 :]
        if name in _SHELLS:
            return (_shell_kind(rest, depth - 1) if depth else "") or name
        if name.startswith("python"):
            return _python_kind(rest) or "python"
        return (_wrapped_kind(rest) if name == "equipoise" else "") or name
    return ""


def _wrapped_kind(words: list[str]) -> str:
    """What our own wrapper runs: `equipoise tool -- pytest`."""
    return _kind_of(words[words.index("--") + 1 :], 0) if words[:1] == ["tool"] and "--" in words else ""


def _shell_kind(words: list[str], depth: int) -> str:
    """What `sh -c '...'` or `sh script` runs."""
    for index, word in enumerate(words):
        if word.startswith("-") and not word.startswith("--") and "c" in word and index + 1 < len(words):
            # As the kernel tells it the quotes are gone: all that follows is the script.
            return _script_kind(" ".join(words[index + 1 :]), depth)
        if not word.startswith("-"):
            return PurePosixPath(word).name
    return ""


def _script_kind(script: str, depth: int) -> str:
    """The first command of a `cd x && make` chain that is not preparation."""
    kinds = (_kind_of(part.split(), depth) for part in re.split(r"&&|\|\||[;\n|]", script))
    return next((kind for kind in kinds if kind and kind not in _QUIET), "")


def _python_kind(words: list[str]) -> str:
    for index, word in enumerate(words):
        if word == "-m" and index + 1 < len(words):
            module, rest = words[index + 1], words[index + 2 :]
            return (_wrapped_kind(rest) if module == _OWN_MODULE else "") or module
        if word == "-c":
            return "python"
        if not word.startswith("-") and (not index or words[index - 1] not in ("-W", "-X")):
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

    def quantile_beyond(self, least: float, q: float) -> float | None:
        """The q-quantile of X given X > least, values spread evenly within a bucket; None: nothing lies beyond."""
        parts = []
        for bucket, count in enumerate(self.counts):
            low, high = float(1 << bucket), float(2 << bucket)
            if count and high > least:
                start = max(low, least)
                parts.append((start, high, count * (high - start) / (high - low)))
        need = q * sum(mass for _, _, mass in parts)
        for start, high, mass in parts:
            if need <= mass:
                return start + (high - start) * need / mass
            need -= mass
        return parts[-1][1] if parts else None

    def quantile(self, q: float) -> float | None:
        """Upper edge of the bucket in which the q-quantile lies; None without observations."""
        need, seen, edge = q * self.total, 0.0, None
        for bucket, count in enumerate(self.counts):
            if not count:
                continue
            seen, edge = seen + count, float(2 << bucket)
            if seen >= need:
                break
        return edge  # the last one where rounding kept `seen` just below


def _prior_durations() -> LogHistogram:
    # Shape of 6,641 tool calls of the AgentCgroup traces: p50 35 ms, p90 9.3 s, p99 19 s.
    prior = LogHistogram()
    for value_ms, weight in ((10, 25.0), (35, 25.0), (400, 20.0), (2_000, 15.0), (7_000, 10.0), (15_000, 5.0)):
        prior = prior.observe(value_ms * 1_000_000, weight)
    return prior


def _prior_peaks() -> LogHistogram:
    # Growth of the container's memory during 6,641 tool calls of the AgentCgroup traces: p50 2.6 MiB, p90 21 MiB,
    # p99 130 MiB, most 1.8 GiB. Percent of the calls by power of two.
    prior = LogHistogram()
    percents = ((1, 42.4), (3, 22.4), (6, 19.7), (12, 4.6), (24, 2.2), (48, 5.2), (96, 2.4), (192, 0.9), (384, 0.2))
    for value_mib, percent in percents:
        prior = prior.observe(value_mib * MIB, percent)
    return prior


@lru_cache(maxsize=2 * MOST_KINDS)
def _with_prior(known: LogHistogram, prior: LogHistogram) -> LogHistogram:
    """Kept: every decision asks for every running call, and a histogram changes only when a call of its kind ends."""
    return known.plus(prior, PRIOR_WEIGHT)


@dataclass(frozen=True, slots=True)
class Estimates:
    """What has been learned of each kind of command. Immutable: `observe` returns the next one."""

    durations: Mapping[str, LogHistogram] = field(default_factory=dict)
    peaks: Mapping[str, LogHistogram] = field(default_factory=dict)
    prior_durations: LogHistogram = field(default_factory=_prior_durations)
    prior_peaks: LogHistogram = field(default_factory=_prior_peaks)

    def observe(self, kind: str, duration_ns: int, peak_bytes: int) -> Estimates:
        durations, peaks = dict(self.durations), dict(self.peaks)
        # Taken out and put back last: a dict keeps its order, so the first key is the kind not seen for longest.
        durations[kind] = durations.pop(kind, LogHistogram()).observe(duration_ns)
        peaks[kind] = peaks.pop(kind, LogHistogram()).observe(peak_bytes)
        for known in (durations, peaks):
            if len(known) > MOST_KINDS:
                del known[next(iter(known))]
        return Estimates(durations, peaks, self.prior_durations, self.prior_peaks)

    def mean_residual_s(self, kind: str, elapsed_ns: int) -> float:
        """Seconds a call that has run for elapsed_ns is expected to run on.

        One that has outlived all history is expected to run as long again as it has (the Lindy rule), since a
        heavy-tailed duration gives no better guess.
        """
        known = _with_prior(self.durations.get(kind, LogHistogram()), self.prior_durations)
        beyond = known.mean_beyond(float(elapsed_ns))
        return (beyond if beyond is not None else float(elapsed_ns)) / NS_PER_S

    def ended_count(self, kind: str) -> float:
        """How many calls of this kind it has learned from."""
        return self.peaks[kind].total if kind in self.peaks else 0.0

    def peak_quantile_bytes(self, kind: str, q: float) -> int:
        return int(self._known_peaks(kind).quantile(q) or 0)

    def peak_beyond_bytes(self, kind: str, used_bytes: int, q: float) -> int:
        """The q-quantile of the peaks of calls that reached `used_bytes`; twice that where none was seen beyond it."""
        beyond = self._known_peaks(kind).quantile_beyond(float(used_bytes), q)
        return int(beyond if beyond is not None else 2 * used_bytes)

    def peak_mean_bytes(self, kind: str) -> int:
        return int(self._known_peaks(kind).mean_beyond(0.0) or 0)

    def _known_peaks(self, kind: str) -> LogHistogram:
        return _with_prior(self.peaks.get(kind, LogHistogram()), self.prior_peaks)

"""Rules of the ladder as they read aloud: "tool pool above 90% for 2s", "below 80%", "throttle to 20% of a CPU for 5s".

Owns the phrases, both ways. A phrase that does not read raises `Wrong`.
"""

from __future__ import annotations

import re
from typing import Any

from ..policy import LadderRule, Measure, Rung
from .problems import kind, near, shown
from .quantities import Wrong, life_of, ns_of, ratio_of, share_of, written_ns, written_ratio

_WHEN = re.compile(r"(?:the )?(\S+(?: \S+)??) above (\S+) for (\S+)")
_UNTIL = re.compile(r"(?:it is )?below (\S+)")
_DO = re.compile(r"(\S+)(?: to (\S+) of a CPU)? for (\S+)", re.IGNORECASE)
WHEN_LIKE = "tool pool above 90% for 2s"
UNTIL_LIKE = "below 80%"
DO_LIKE = "throttle to 20% of a CPU for 5s"


def when_of(value: object) -> dict[str, Any]:
    """Fields of a LadderRule: measure, above_ratio, for_ns."""
    what, above, lasting = _groups(_WHEN, value, WHEN_LIKE)
    known = {measure.value: measure for measure in Measure}
    if what not in known:
        raise Wrong(f"`{shown(what)}` is not measured; {near(what, known)}")
    return {"measure": known[what], "above_ratio": share_of(_number(above)), "for_ns": ns_of(lasting)}


def until_of(value: object) -> float:
    (below,) = _groups(_UNTIL, value, UNTIL_LIKE)
    return ratio_of(_number(below))


def do_of(value: object) -> dict[str, Any]:
    """Fields of a LadderRule: rung, lasting_ns, and cpu_ratio where it is said."""
    what, cpu, lasting = _groups(_DO, value, DO_LIKE)
    known = {rung.value: rung for rung in Rung}
    if what not in known:
        raise Wrong(f"`{shown(what)}` is no rung; {near(what, known)}")
    made: dict[str, Any] = {"rung": known[what], "lasting_ns": life_of(lasting)}
    if cpu and known[what] is not Rung.THROTTLE:
        raise Wrong(f"`{what}` leaves no CPU: write `{what} for {shown(lasting)}`")
    return made | ({"cpu_ratio": ratio_of(_number(cpu))} if cpu else {})


def written_rule(rule: LadderRule) -> dict[str, str]:
    """The three phrases of a rule."""
    at_cpu = f" to {written_ratio(rule.cpu_ratio)} of a CPU" if rule.rung is Rung.THROTTLE else ""
    return {
        "when": f"{rule.measure.value} above {written_ratio(rule.above_ratio)} for {written_ns(rule.for_ns)}",
        "until": f"below {written_ratio(rule.below_ratio)}",
        "do": f"{rule.rung.value}{at_cpu} for {written_ns(rule.lasting_ns)}",
    }


def _groups(pattern: re.Pattern[str], value: object, example: str) -> tuple[Any, ...]:
    match = pattern.fullmatch(" ".join(value.split())) if isinstance(value, str) else None
    if match is None:
        raise Wrong(f"expected words such as `{example}`, found {kind(value)}")
    return match.groups()


def _number(text: str) -> object:
    """A ratio within words: `0.9` as a number, `90%` as it is."""
    try:
        return float(text)
    except ValueError:
        return text

"""The policies that can be played, by name: a rival, what is added to it, what is taken away.

Owns the grammar: `NAME`, then `+PART` or `-PART`, then `=VALUE` where a part has one: `minwaste+append+near=60`,
`economy-door`. Parts are the fields of rules.Rule; those of decide() (policy.KvPart) can be taken away:
`decide-marginal`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..policy import KvPart
from .rules import BASES, Rule
from .tools import Keeping

NEAR_S = 20.0
DOOR = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy to play."""

    name: str
    rule: Rule
    keeping: Keeping = Keeping.STAND
    decides: str = ""
    """What of decide() is in force: "all", "tools" (the ladder alone), or nothing."""
    without: frozenset[KvPart] = frozenset()
    """Parts of decide() that are taken out."""
    door: float | None = None
    """Of decide(): its door, in place of the engine's own."""
    unlimited: bool = False
    """KV without end: what is lost to want of room is nothing. No ceiling: see bound.py."""


def _value(text: str | None, default: float, part: str) -> float:
    try:
        number = default if text is None else float(text)
    except ValueError:
        raise ValueError(f"{part}={text}: not a number") from None
    if not 0 < number < float("inf"):
        raise ValueError(f"{part}={text}: must be above 0")
    return number


Part = Callable[[Rule, str | None], Rule]
_ADD: dict[str, Part] = {
    "append": lambda rule, _: replace(rule, append=True),
    "behind": lambda rule, _: replace(rule, append=True, behind=True),
    "near": lambda rule, text: replace(rule, near_s=_value(text, NEAR_S, "near")),
    "meet": lambda rule, _: replace(rule, meet=True),
    "door": lambda rule, text: replace(rule, door=_value(text, DOOR, "door")),
    "prefetch": lambda rule, _: replace(rule, prefetch=True),
    "follow": lambda rule, _: replace(rule, host_share=None),
    "split": lambda rule, text: replace(rule, host_share=min(1.0, _value(text, 0.5, "split"))),
    "fair": lambda rule, _: replace(rule, fair=True),
}
_TAKE: dict[str, Part] = {
    "append": lambda rule, _: replace(rule, append=False, behind=False),
    "behind": lambda rule, _: replace(rule, behind=False),
    "near": lambda rule, _: replace(rule, near_s=None),
    "meet": lambda rule, _: replace(rule, meet=False),
    "door": lambda rule, _: replace(rule, door=None),
    "prefetch": lambda rule, _: replace(rule, prefetch=False),
    "follow": lambda rule, _: replace(rule, host_share=0.5),
    "worth": lambda rule, _: replace(rule, worth=BASES["swap"].worth),
    "fair": lambda rule, _: replace(rule, fair=False),
}
_OF_DECIDE = tuple(part.value for part in KvPart)
PARTS = tuple(sorted(_ADD.keys() | _TAKE.keys()))
_ENGINE = replace(BASES["swap"], fair=True, append=True)
"""What the embedded engine does by itself: least recently used to host, then disk; copies stay valid; VTC."""
_ECONOMY = replace(
    BASES["worth"], host_share=None, append=True, near_s=NEAR_S, meet=True, door=DOOR, prefetch=True, fair=True
)
_PLANS: dict[str, Plan] = {
    **{name: Plan(name, rule) for name, rule in BASES.items()},
    "none": Plan("none", BASES["swap"], Keeping.NOBODY),
    "ladder": Plan("ladder", _ENGINE, Keeping.LADDER, "tools"),
    "decide": Plan("decide", _ENGINE, Keeping.LADDER, "all"),
    "unlimited": Plan("unlimited", BASES["drop"], unlimited=True),
    "economy": Plan("economy", _ECONOMY),
}
WHAT_THEY_ARE = {
    "drop": "least recently used KV is dropped and computed again (vLLM's prefix cache)",
    "swap": "least recently used to a fixed host tier, then to disk",
    "ttl": "the same, after two seconds in which KV stays",
    "minwaste": "InferCept's minimum of preserve, swap and discard, fixed host tier",
    "worth": "least seconds lost per byte and second first, fixed host tier",
    "none": "swap, and nobody keeps the tools: the largest is killed when the host is full",
    "ladder": "the daemon's ladder for tool calls, the engine left alone",
    "decide": "the daemon's decide() as it is, ladder and KV",
    "unlimited": "KV without end",
    "economy": "worth with all parts: follow, append, near, meet, door, prefetch, fair",
}
_NAME = re.compile(r"([a-z]+)((?:[+-][a-z]+(?:=[0-9.]+)?)*)")
_PART = re.compile(r"([+-])([a-z]+)(?:=([0-9.]+))?")


def plan(name: str) -> Plan:
    """The policy of that name.

    Raises:
        ValueError: what is wrong with the name, and what there is.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in _PLANS:
        raise ValueError(f"no policy {name!r}: one of {', '.join(_PLANS)}, with +PART or -PART of {', '.join(PARTS)}")
    made = _PLANS[found[1]]
    rule = made.rule
    door = None
    for sign, part, text in _PART.findall(found[2]):
        if made.decides == "all" and sign == "-" and part in _OF_DECIDE:
            made = replace(made, without=made.without | {KvPart(part)})
            continue
        if made.decides == "all" and part == "door":
            door = _value(text or None, DOOR, "door") if sign == "+" else None
            continue
        change = (_ADD if sign == "+" else _TAKE).get(part)
        if change is None:
            raise ValueError(f"{name!r}: there is no part {sign}{part}: {', '.join(PARTS)}")
        rule = change(rule, text or None)
    return replace(made, name=name, rule=replace(rule, name=name), door=door)

"""The table of a policy document: every key, what it may hold, what it does, and the value made of it.

Owns the grammar. Parser, JSON Schema and `equipoise policy schema` are read from it; a key that is not here does not
exist, and a key that does nothing is not here. How a policy is written down again is in write.py.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

from ..model import KvTier, Role, RoleRule, Tenant, TenantId, ToolCallSource
from ..policy import Budget, CallClass, KvPolicy, LadderRule, MemoryPolicy, Mode, Policy
from .problems import Path, kind, near
from .quantities import (
    BYTES_PATTERN,
    PERCENT_PATTERN,
    TIME_PATTERN,
    Wrong,
    bytes_of,
    life_of,
    ns_of,
    ratio_of,
    share_of,
    written_bytes,
)
from .rules import DO_LIKE, UNTIL_LIKE, WHEN_LIKE, do_of, until_of, when_of
from .shapes import Group, Key, Listed, Named, Say, Scalar, Shape, Values

API_VERSION = "equipoise/v1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROLES = {role.value: role for role in (Role.TOOL_CALL, Role.SERVICE, Role.HOUSEKEEPING, Role.SHELL)}
_TIERS = {tier.value: tier for tier in (KvTier.HOST, KvTier.DISK)}

# -- single values


def _one_of(choices: dict[str, Any]) -> Scalar:
    words = f"one of {', '.join(choices)}" if len(choices) > 1 else f"`{next(iter(choices))}`"

    def read(value: object) -> Any:
        if isinstance(value, str) and value in choices:
            return choices[value]
        hint = near(value, choices) if isinstance(value, str) and len(choices) > 1 else ""
        raise Wrong(f"must be {words}, found {kind(value)}" + (f"; {hint}" if hint.startswith("did") else ""))

    return Scalar(read, {"enum": list(choices)})


def _name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise Wrong(f"must be letters, digits, `.`, `_` or `-`, at most 64, found {kind(value)}")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise Wrong(f"expected a word, found {kind(value)}")
    return value


def _expression(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise Wrong(f"expected a regular expression for the command line, found {kind(value)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # "[[": what it means is about to change
            re.compile(value)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise Wrong(f"no regular expression: {error}") from None
    return value


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise Wrong(f"must be a number above 0 and at most 1000, found {kind(value)}")
    return float(value)


def _pool(value: object) -> dict[str, Any]:
    """Fields of a MemoryPolicy: a share of the host's RAM, or an amount."""
    if isinstance(value, float) or (isinstance(value, str) and value.strip().endswith("%")):
        return {"tool_pool_ratio": share_of(value)}
    return {"tool_pool_bytes": bytes_of(value)}


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise Wrong(f"must be true or false, found {kind(value)}")
    return value


_YES_OR_NO = Scalar(_yes_or_no, {"type": "boolean"})
_BYTES = Scalar(bytes_of, {"type": "string", "pattern": BYTES_PATTERN, "examples": ["512MiB"]})
_TIME = Scalar(ns_of, {"type": "string", "pattern": TIME_PATTERN, "examples": ["10s"]})
_LIFE = Scalar(life_of, dict(_TIME.schema))
_PERCENT = {"type": "string", "pattern": PERCENT_PATTERN, "examples": ["80%"]}
_RATIO = Scalar(ratio_of, {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, _PERCENT]})
_SHARE = Scalar(share_of, {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, _PERCENT]})
_POOL = Scalar(
    _pool, {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, _PERCENT, dict(_BYTES.schema)]}
)
_NAMED = Scalar(_name, {"type": "string", "pattern": f"^{NAME.pattern}$"})
_WORD = Scalar(_word, {"type": "string", "minLength": 1})
_EXPRESSION = Scalar(_expression, {"type": "string", "format": "regex", "minLength": 1})


def _phrase(read: Any, example: str) -> Scalar:
    return Scalar(read, {"type": "string", "examples": [example]})


def _within(say: Say, *place: str) -> Say:
    """To say what is wrong at places below one."""

    def say_below(path: Path, text: str) -> None:
        say((*place, *path), text)

    return say_below


# -- budgets


def _budget_of(values: Values, say: Say, default: Budget) -> Budget:
    hard = values.get("hard", default.hard_bytes)
    soft = values.get("soft", min(default.soft_bytes, hard))
    if soft > hard:
        say(("soft",), f"must not be above `hard`, which is {written_bytes(hard)}")
    return Budget(soft, hard)


_BUDGET_KEYS = (
    Key("soft", _BYTES, "a notice"),
    Key("hard", _BYTES, "here the kernel stops the call, and the policy is asked"),
)
_PARTIAL_BUDGET = Group(_BUDGET_KEYS)
"""Of a class, a kind or a tenant: what it does not say is the usual budget's."""


def _usual_budget(values: Values, say: Say) -> MemoryPolicy:
    default = MemoryPolicy()
    budget = _budget_of(values, say, default.budget)
    maximum = values.get("max", max(default.max_bytes, budget.hard_bytes))
    if maximum < budget.hard_bytes:
        say(("max",), "must not be below `hard`")
    rest = {"step_bytes": values.get("step", default.step_bytes), "bends": values.get("bends", default.bends)}
    return replace(default, budget=budget, max_bytes=maximum, **rest)


def _own_budget(values: Values | None, usual: MemoryPolicy, say: Say) -> Budget | None:
    if values is None:
        return None
    budget = _budget_of(values, say, usual.budget)
    if budget.hard_bytes > usual.max_bytes:
        say(("hard",), f"must not be above `memory.budget.max`, which is {written_bytes(usual.max_bytes)}")
    return budget


# -- the ladder


def _rule(values: Values, say: Say) -> LadderRule:
    below = values["until"]
    if below > values["when"]["above_ratio"]:
        say(("until",), "must not be above what `when` says")
    return LadderRule(**values["when"], below_ratio=below, **values["do"])


def _pressure(values: Values, say: Say) -> dict[str, Any]:
    default = LadderRule()
    above = values.get("above", default.above_ratio)
    below = values.get("below", min(default.below_ratio, above))
    if below > above:
        say(("below",), "must not be above `above`")
    return {"above_ratio": above, "below_ratio": below, "for_ns": values.get("for", default.for_ns)}


def _throttle(values: Values, say: Say) -> dict[str, Any]:
    default = LadderRule()
    return {"cpu_ratio": values.get("cpu", default.cpu_ratio), "lasting_ns": values.get("for", default.lasting_ns)}


_LADDER = Listed(
    Group(
        (
            Key("when", _phrase(when_of, WHEN_LIKE), f"what presses, and for how long: `{WHEN_LIKE}`", needed=True),
            Key("until", _phrase(until_of, UNTIL_LIKE), f"when it is over: `{UNTIL_LIKE}`", needed=True),
            Key("do", _phrase(do_of, DO_LIKE), f"`{DO_LIKE}` or `freeze for 2s`", needed=True),
        ),
        _rule,
    )
)


# -- sections


def _memory(values: Values, say: Say) -> MemoryPolicy:
    policy: MemoryPolicy = values.get("budget", MemoryPolicy())
    kinds = values.get("budgets", {})
    budgets = [(name, _own_budget(of, policy, _within(say, "budgets", name))) for name, of in kinds.items()]
    rules = values.get("ladder")
    if "pressure" in values or "throttle" in values:
        if rules is not None:
            say(("ladder",), "says what `pressure` and `throttle` say: leave those out")
        rules = (LadderRule(**values.get("pressure", {}), **values.get("throttle", {})),)
    return replace(
        policy,
        **values.get("toolPool", {}),
        kind_budgets=tuple((name, of) for name, of in budgets if of is not None),
        wait_ns=values.get("maxWait", policy.wait_ns),
        ladder=policy.ladder if rules is None else rules,
    )


_MEMORY = Group(
    (
        Key("toolPool", _POOL, "RAM that all tool calls may use together: an amount, or a share of the host's"),
        Key(
            "budget",
            Group(
                (
                    *_BUDGET_KEYS,
                    Key("max", _BYTES, "the largest budget that a call may be granted; at it a call is ended"),
                    Key("bends", _YES_OR_NO, "false: at `max` a call is ended though nobody else needs the memory"),
                    Key("step", _BYTES, "what one grant adds"),
                ),
                _usual_budget,
            ),
            "what a call may use before anybody is asked",
        ),
        Key(
            "budgets",
            Named(_PARTIAL_BUDGET, _word, "."),
            "budgets of single kinds of command, by program; see toolCalls",
        ),
        Key("maxWait", _TIME, "how long a stopped call waits for memory before it is ended"),
        Key("ladder", _LADDER, "when calls are slowed down or frozen, one at a time; [] for never"),
        Key(
            "pressure",
            Group(
                (
                    Key("above", _SHARE, "of the tool pool: above this calls are throttled"),
                    Key("below", _RATIO, "below this they are let go before their time"),
                    Key("for", _TIME, "so long it must have lasted"),
                ),
                _pressure,
            ),
            "with `throttle`: the one rule of a ladder that throttles by the tool pool",
        ),
        Key(
            "throttle",
            Group(
                (
                    Key("cpu", _RATIO, "of one CPU, where memory.high does not exist"),
                    Key("for", _LIFE, "after this it undoes itself"),
                ),
                _throttle,
            ),
            "see `pressure`",
        ),
    ),
    _memory,
)


def _kv(values: Values, say: Say) -> KvPolicy:
    default = KvPolicy()
    return KvPolicy(
        decide_after_ns=values.get("decideAfter", default.decide_after_ns),
        dwell_ns=values.get("dwell", default.dwell_ns),
        hysteresis_ratio=values.get("hysteresis", default.hysteresis_ratio),
        retain_ns=values.get("retain", default.retain_ns),
        directive_ns=values.get("deadline", default.directive_ns),
        door_ratio=values.get("door") or None,
        door_longest_ns=values.get("doorLongest", default.door_longest_ns),
        tiers=frozenset(values.get("tiers", default.tiers)),
    )


_KV = Group(
    (
        Key("decideAfter", _TIME, "tool calls shorter than this cause no decision"),
        Key("dwell", _TIME, "least time between two verdicts on one session"),
        Key("hysteresis", _RATIO, "a new verdict must be cheaper by this than the one in force"),
        Key("retain", _LIFE, "longest retention asked of an engine at a time"),
        Key("deadline", _LIFE, "a directive that an engine has not applied by then is void"),
        Key("tiers", Listed(_one_of(_TIERS)), "where KV may be moved to, of what the engine has; [] for nowhere"),
        Key("door", _RATIO, "agents awake at a time need at most so much of device and host tier; 0% for no door"),
        Key("doorLongest", _LIFE, "nobody is held at the door for longer"),
    ),
    _kv,
)
_TENANTS = Named(
    Group(
        (
            Key("weight", Scalar(_weight, {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}), "share under "
                "contention, relative to the others"),
            Key("budget", _PARTIAL_BUDGET, "what its tool calls may use before anybody is asked"),
        )
    ),
    _name,
    f"^{NAME.pattern}$",
)  # fmt: skip
_SOURCES = {source.value: source for source in ToolCallSource}
_CLASSES = Named(
    Group(
        (
            Key(
                "match",
                Group(
                    (
                        Key("command", _EXPRESSION, "a regular expression, looked for in the command line"),
                        Key("tool", _WORD, "the program that does the work: pytest, cc"),
                        Key("source", _one_of(_SOURCES), "how the call was found"),
                        Key("tenant", _NAMED, "whose it is"),
                    )
                ),
                "which calls; all of what is given must match",
                needed=True,
            ),
            Key("budget", _PARTIAL_BUDGET, "what such a call may use before anybody is asked"),
            Key("maxWait", _TIME, "how long such a call waits for memory when it is stopped"),
        )
    ),
    _name,
    f"^{NAME.pattern}$",
)


def _role(values: Values, say: Say) -> RoleRule:
    return RoleRule(values["match"], values["role"])


_ROLE_RULES = Listed(
    Group(
        (
            Key("match", _EXPRESSION, "a regular expression, looked for in the command line", needed=True),
            Key("role", _one_of(_ROLES), "what such a process is", needed=True),
        ),
        _role,
    )
)


def _spec(values: Values, say: Say) -> dict[str, Any]:
    memory: MemoryPolicy = values.get("memory", MemoryPolicy())
    tenants, budgets, classes = [], [], []
    for name, of in values.get("tenants", {}).items():
        tenants.append(Tenant(TenantId(name), of.get("weight", 1.0)))
        own = _own_budget(of.get("budget"), memory, _within(say, "tenants", name, "budget"))
        budgets += [(TenantId(name), own)] if own is not None else []
    for name, of in values.get("toolCalls", {}).items():
        match = of["match"]
        if not match:
            say(("toolCalls", name, "match"), "matches every call: give command, tool, source or tenant")
        own = _own_budget(of.get("budget"), memory, _within(say, "toolCalls", name, "budget"))
        classes.append(CallClass(name, **match, budget=own, wait_ns=of.get("maxWait")))
    return {
        "mode": values.get("mode", Mode.ENFORCE),
        "tenants": tuple(sorted(tenants, key=lambda t: t.id)) or Policy().tenants,
        "tenant_budgets": tuple(sorted(budgets)),
        "classes": tuple(classes),
        "memory": memory,
        "kv": values.get("kv", KvPolicy()),
        "roles": values.get("roles", ()),
    }


_SPEC = Group(
    (
        Key("mode", _one_of({mode.value: mode for mode in Mode}), "observe: measure only; dry-run: decide, do nothing"),
        Key("tenants", _TENANTS, "who shares the host; others weigh 1"),
        Key("toolCalls", _CLASSES, "classes of tool calls by name; the first that matches counts"),
        Key("memory", _MEMORY, "how host RAM is shared among tool calls"),
        Key("kv", _KV, "how the KV of sessions in tool calls is treated"),
        Key("roles", _ROLE_RULES, "what commands are, by your own word; the first that matches counts"),
    ),
    _spec,
)


def _policy(values: Values, say: Say) -> Policy:
    return Policy(name=values["metadata"]["name"], **values.get("spec", _spec({}, say)))


DOCUMENT: Shape = Group(
    (
        Key("apiVersion", _one_of({API_VERSION: API_VERSION}), f"`{API_VERSION}`", needed=True),
        Key("kind", _one_of({"Policy": "Policy"}), "`Policy`", needed=True),
        Key("metadata", Group((Key("name", _NAMED, "of the policy", needed=True),)), "its name", needed=True),
        Key("spec", _SPEC, "the policy; all of it has defaults"),
    ),
    _policy,
)

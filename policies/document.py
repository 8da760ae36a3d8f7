"""A policy document (a YAML mapping, already parsed) -> Policy.

Owns the document's grammar: known keys, quantities with units, ranges. Every error carries the path of the field and
what would be right. Reading files is the daemon's business.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .model import Role, RoleRule, Tenant, TenantId
from .policy import Budget, KvPolicy, MemoryPolicy, Policy

API_VERSION = "equipoise/v1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BYTES |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z%]+)")
_LARGEST = 1 << 62
"""Every quantity fits the 64 bits that carry it, sums of two included."""
_SHOWN = 40
"""Characters of a wrong value that an error repeats."""


class DocumentError(ValueError):
    """A document that says something else than a policy. `str()` is one line: "spec.memory.budget.hard: ..."."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class _Mapping:
    """One mapping of the document and the path that leads to it; remembers which keys were asked for."""

    def __init__(self, value: object, path: str) -> None:
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise DocumentError(path or "document", f"expected a mapping, found {_kind(value)}")
        for key in value:
            if not isinstance(key, str):
                raise DocumentError(path or "document", f"keys are words, found {_kind(key)}")
        self._value: Mapping[str, object] = value
        self.path = path

    def at(self, key: str) -> str:
        return f"{self.path}.{_shown(key)}" if self.path else _shown(key)

    def only(self, known: Iterable[str]) -> None:
        """Raise for the first key that is not known, with the nearest one that is."""
        known = list(known)
        for key in self._value:
            if key not in known:
                near = difflib.get_close_matches(key[:_SHOWN], known, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
                raise DocumentError(self.at(key), "unknown key" + hint)

    def get(self, key: str) -> object:
        return self._value.get(key)

    def mapping(self, key: str) -> _Mapping:
        return _Mapping(self._value.get(key), self.at(key))

    def entries(self, key: str) -> list[_Mapping]:
        """The mappings of a list; none where the key is absent."""
        value = self._value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise DocumentError(self.at(key), f"expected a list, found {_kind(value)}")
        return [_Mapping(each, f"{self.at(key)}[{number}]") for number, each in enumerate(value)]

    def items(self) -> list[tuple[str, object]]:
        return list(self._value.items())

    def quantity_bytes(self, key: str, default: int) -> int:
        return default if key not in self._value else parse_bytes(self._value[key], self.at(key))

    def quantity_ns(self, key: str, default: int, *, least_ns: int = 0) -> int:
        if key not in self._value:
            return default
        amount = parse_ns(self._value[key], self.at(key))
        if amount < least_ns:
            raise DocumentError(self.at(key), "must be above 0")
        return amount

    def ratio(self, key: str, default: float) -> float:
        return default if key not in self._value else parse_ratio(self._value[key], self.at(key))

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value.get(key, default)
        if not isinstance(value, str):
            raise DocumentError(self.at(key), f"expected a word, found {_kind(value)}")
        return value


def parse_bytes(value: object, path: str) -> int:
    """ "512MiB" -> bytes. Raises DocumentError for a bare number, an unknown unit or nothing above 0."""
    number, unit = _split(value, path, "512MiB")
    if unit not in _BYTES:
        raise DocumentError(path, f"unknown unit `{unit}`; use one of {', '.join(_BYTES)}")
    amount = int(number * _BYTES[unit])
    if amount <= 0:
        raise DocumentError(path, "must be above 0")
    if amount > _LARGEST:
        raise DocumentError(path, "must be at most 4 EiB")
    return amount


def parse_ns(value: object, path: str) -> int:
    """ "1.5s" -> nanoseconds. Raises DocumentError for a bare number or an unknown unit."""
    number, unit = _split(value, path, "10s")
    if unit not in _TIMES:
        raise DocumentError(path, f"unknown unit `{unit}`; use one of {', '.join(_TIMES)}")
    amount = int(number * _TIMES[unit])
    if amount > _LARGEST:
        raise DocumentError(path, "must be at most a century")
    return amount


def parse_ratio(value: object, path: str) -> float:
    """ "80%" or 0.8 -> 0.8. Raises DocumentError outside 0..1."""
    if isinstance(value, str) and value.endswith("%"):
        number, unit = _split(value, path, "80%")
        ratio = number / 100 if unit == "%" else -1.0
    elif isinstance(value, float | int) and not isinstance(value, bool):
        ratio = float(value) if -1 <= value <= 2 else -1.0
    else:
        raise DocumentError(path, f"expected a ratio such as 0.8 or `80%`, found {_kind(value)}")
    if not 0.0 <= ratio <= 1.0:
        raise DocumentError(path, f"must be within 0 and 1, found {_kind(value)}")
    return ratio


def parse_policy(document: object) -> Policy:
    """The policy a whole document stands for. Raises DocumentError, never anything else."""
    top = _Mapping(document, "")
    top.only(("apiVersion", "kind", "metadata", "spec"))
    if (version := top.text("apiVersion", "")) != API_VERSION:
        raise DocumentError("apiVersion", f"must be `{API_VERSION}`, found {_kind(version)}")
    if (kind := top.text("kind", "")) != "Policy":
        raise DocumentError("kind", f"must be `Policy`, found {_kind(kind)}")
    metadata = top.mapping("metadata")
    metadata.only(("name",))
    name = metadata.text("name", "")
    if not NAME.fullmatch(name):
        problem = f"must be letters, digits, `.`, `_` or `-`, at most 64, found {_kind(name)}"
        raise DocumentError("metadata.name", problem)
    spec = top.mapping("spec")
    spec.only(("mode", "tenants", "memory", "kv", "roles"))
    mode = spec.text("mode", "enforce")
    if mode not in ("enforce", "observe"):
        raise DocumentError("spec.mode", f"must be `enforce` or `observe`, found {_kind(mode)}")
    return Policy(
        name=name,
        enforce=mode == "enforce",
        tenants=_tenants(spec.mapping("tenants")),
        memory=_memory(spec.mapping("memory")),
        kv=_kv(spec.mapping("kv")),
        roles=_roles(spec),
    )


def _tenants(tenants: _Mapping) -> tuple[Tenant, ...]:
    parsed = []
    for name, _ in tenants.items():
        if not NAME.fullmatch(name):
            raise DocumentError(tenants.at(name), "a tenant's name is letters, digits, `.`, `_` or `-`, at most 64")
        entry = tenants.mapping(name)
        entry.only(("weight",))
        weight = entry.get("weight") if entry.get("weight") is not None else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1000:
            problem = f"must be a number above 0 and at most 1000, found {_kind(weight)}"
            raise DocumentError(entry.at("weight"), problem)
        parsed.append(Tenant(TenantId(name), float(weight)))
    return tuple(sorted(parsed, key=lambda t: t.id)) or Policy().tenants


_ROLES = {role.value: role for role in (Role.TOOL_CALL, Role.SERVICE, Role.HOUSEKEEPING, Role.SHELL)}


def _roles(spec: _Mapping) -> tuple[RoleRule, ...]:
    """`roles: [{match: REGEX, role: service}]`."""
    rules: list[RoleRule] = []
    for entry in spec.entries("roles"):
        entry.only(("match", "role"))
        match, role = entry.text("match", ""), entry.text("role", "")
        try:
            re.compile(match)
        except re.error as error:
            raise DocumentError(entry.at("match"), f"no regular expression: {error}") from None
        if not match:
            raise DocumentError(entry.at("match"), "expected a regular expression for the command line")
        if role not in _ROLES:
            raise DocumentError(entry.at("role"), f"must be one of {', '.join(_ROLES)}; found {_kind(role)}")
        rules.append(RoleRule(match, _ROLES[role]))
    return tuple(rules)


def _budget(entry: _Mapping, default: Budget, extra: tuple[str, ...] = ()) -> Budget:
    entry.only(("soft", "hard", *extra))
    hard = entry.quantity_bytes("hard", default.hard_bytes)
    soft = entry.quantity_bytes("soft", min(default.soft_bytes, hard))
    if soft > hard:
        raise DocumentError(entry.at("soft"), f"must not be above `hard`, which is {hard / (1 << 20):g}MiB")
    return Budget(soft, hard)


def _memory(memory: _Mapping) -> MemoryPolicy:
    default = MemoryPolicy()
    memory.only(("toolPool", "budget", "budgets", "maxWait", "pressure", "throttle"))
    policy = default
    pool = memory.get("toolPool")
    if isinstance(pool, float) or (isinstance(pool, str) and pool.endswith("%")):
        policy = replace(policy, tool_pool_ratio=parse_ratio(pool, memory.at("toolPool")))
        if not policy.tool_pool_ratio:
            raise DocumentError(memory.at("toolPool"), "must be above 0")
    elif pool is not None:
        policy = replace(policy, tool_pool_bytes=parse_bytes(pool, memory.at("toolPool")))
    entry = memory.mapping("budget")
    budget = _budget(entry, default.budget, ("max", "step"))
    maximum = entry.quantity_bytes("max", max(default.max_bytes, budget.hard_bytes))
    if maximum < budget.hard_bytes:
        raise DocumentError(entry.at("max"), "must not be below `hard`")
    kinds = memory.mapping("budgets")
    kind_budgets = tuple((kind, _budget(kinds.mapping(kind), budget)) for kind, _ in kinds.items())
    for kind, of_kind in kind_budgets:
        if of_kind.hard_bytes > maximum:
            problem = f"must not be above `budget.max`, which is {maximum / (1 << 20):g}MiB"
            raise DocumentError(f"{kinds.at(kind)}.hard", problem)
    pressure = memory.mapping("pressure")
    pressure.only(("above", "below", "for"))
    above = pressure.ratio("above", default.pressure_above_ratio)
    if not above:
        raise DocumentError(pressure.at("above"), "must be above 0: at 0 everything is pressure")
    below = pressure.ratio("below", min(default.pressure_below_ratio, above))
    if below > above:
        raise DocumentError(pressure.at("below"), "must not be above `above`")
    throttle = memory.mapping("throttle")
    throttle.only(("cpu", "for"))
    return replace(
        policy,
        budget=budget,
        kind_budgets=kind_budgets,
        max_bytes=maximum,
        step_bytes=entry.quantity_bytes("step", default.step_bytes),
        wait_ns=memory.quantity_ns("maxWait", default.wait_ns),
        pressure_above_ratio=above,
        pressure_below_ratio=below,
        pressure_for_ns=pressure.quantity_ns("for", default.pressure_for_ns),
        throttle_cpu_ratio=throttle.ratio("cpu", default.throttle_cpu_ratio),
        throttle_ns=throttle.quantity_ns("for", default.throttle_ns, least_ns=1),
    )


def _kv(kv: _Mapping) -> KvPolicy:
    default = KvPolicy()
    kv.only(("decideAfter", "dwell", "hysteresis", "retain", "deadline", "door", "doorLongest"))
    return KvPolicy(
        decide_after_ns=kv.quantity_ns("decideAfter", default.decide_after_ns),
        dwell_ns=kv.quantity_ns("dwell", default.dwell_ns),
        hysteresis_ratio=kv.ratio("hysteresis", default.hysteresis_ratio),
        retain_ns=kv.quantity_ns("retain", default.retain_ns, least_ns=1),
        directive_ns=kv.quantity_ns("deadline", default.directive_ns, least_ns=1),
        door_ratio=kv.ratio("door", 0.0) or None,
        door_longest_ns=kv.quantity_ns("doorLongest", default.door_longest_ns, least_ns=1),
    )


def _split(value: object, path: str, example: str) -> tuple[float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise DocumentError(path, f"a bare number has no unit; write it as `{example}`")
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise DocumentError(path, f"expected a quantity such as `{example}`, found {_kind(value)}")
    return float(match[1]), match[2]


def _kind(value: object) -> str:
    """A wrong value, for an error's single line."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"`{_shown(value)}`"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge number"
    return f"{value!r}" if isinstance(value, int | float) else f"a {type(value).__name__}"


def _shown(text: str) -> str:
    """At most _SHOWN printable characters of it."""
    text = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

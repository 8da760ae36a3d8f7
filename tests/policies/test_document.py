"""Policy documents: what is read, and what is refused with which words.

Long for holding the whole grammar, key after key, with what each refuses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from equipoise import policies
from equipoise.policies.document import DocumentError, changes, json_schema, parse_bytes, parse_policy, place, written
from equipoise.policies.document.quantities import ns_of, ratio_of
from equipoise.policies.model import MIB, NS_PER_S, KvTier, Role, RoleRule, Tenant, TenantId, ToolCallSource
from equipoise.policies.policy import (
    Budget,
    CallClass,
    KvPolicy,
    LadderRule,
    Measure,
    MemoryPolicy,
    Mode,
    Policy,
    Rung,
)
from hypothesis import given
from hypothesis import strategies as st

BUILTIN = sorted((Path(policies.__file__).parent / "builtin").glob("*.yaml"))


def document(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "equipoise/v1", "kind": "Policy", "metadata": {"name": "p"}, "spec": spec}


def refused(value: object) -> str:
    with pytest.raises(DocumentError) as caught:
        parse_policy(value)
    return str(caught.value)


def rule(**phrases: str) -> dict[str, Any]:
    """A memory section with one rule of a ladder, which is right but for the phrases given."""
    right = {"when": "tool pool above 90% for 2s", "until": "below 80%", "do": "throttle for 5s"}
    return {"ladder": [right | phrases]}


# -- what is read


def test_an_empty_spec_is_the_defaults() -> None:
    assert parse_policy(document()) == Policy(name="p")
    assert parse_policy({**document(), "spec": None}) == Policy(name="p")


def test_every_field_is_read() -> None:
    text = """
    apiVersion: equipoise/v1
    kind: Policy
    metadata: {name: full}
    spec:
      mode: observe
      tenants: {silver: {}, gold: {weight: 4, budget: {hard: 900MiB}}}
      toolCalls:
        tests: {match: {tool: pytest, tenant: gold}, budget: {soft: 500MiB, hard: 600MiB}, maxWait: 1m}
        announced: {match: {source: wrapper, command: "^make .*test"}}
      memory:
        toolPool: 12GiB
        budget: {soft: 100MiB, hard: 200MiB, step: 50MiB, max: 1GiB}
        budgets: {pytest: {soft: 300MiB, hard: 400MiB}, git: {hard: 64MiB}}
        maxWait: 1m
        ladder:
          - {when: tool pool above 85% for 1500ms, until: below 0.5, do: throttle to 10% of a CPU for 2s}
          - {when: the memory pressure above 0.3 for 0s, until: it is below 10%, do: freeze for 1s}
      kv:
        {decideAfter: 0s, dwell: 1s, hysteresis: 10%, retain: 3s, deadline: 4s, door: 80%, doorLongest: 1m,
         tiers: [host]}
      roles: [{match: ^vite, role: service}]
    """
    assert parse_policy(yaml.safe_load(text)) == Policy(
        name="full",
        mode=Mode.OBSERVE,
        tenants=(Tenant(TenantId("gold"), 4.0), Tenant(TenantId("silver"), 1.0)),
        tenant_budgets=((TenantId("gold"), Budget(100 * MIB, 900 * MIB)),),
        classes=(
            CallClass(
                "tests",
                tool="pytest",
                tenant=TenantId("gold"),
                budget=Budget(500 * MIB, 600 * MIB),
                wait_ns=60 * NS_PER_S,
            ),
            CallClass("announced", source=ToolCallSource.WRAPPER, command="^make .*test"),
        ),
        memory=MemoryPolicy(
            tool_pool_bytes=12 << 30,
            budget=Budget(100 * MIB, 200 * MIB),
            kind_budgets=(("pytest", Budget(300 * MIB, 400 * MIB)), ("git", Budget(64 * MIB, 64 * MIB))),
            max_bytes=1 << 30,
            step_bytes=50 * MIB,
            wait_ns=60 * NS_PER_S,
            ladder=(
                LadderRule(Measure.TOOL_POOL, 0.85, 1_500_000_000, 0.5, Rung.THROTTLE, 0.1, 2 * NS_PER_S),
                LadderRule(Measure.MEMORY_PRESSURE, 0.3, 0, 0.1, Rung.FREEZE, lasting_ns=NS_PER_S),
            ),
        ),
        kv=KvPolicy(0, NS_PER_S, 0.1, 3 * NS_PER_S, 4 * NS_PER_S, 0.8, 60 * NS_PER_S, tiers=frozenset({KvTier.HOST})),
        roles=(RoleRule("^vite", Role.SERVICE),),
    )


def test_the_older_way_to_say_the_one_rule_of_a_ladder_is_still_read() -> None:
    older = {"pressure": {"above": "85%", "below": 0.5, "for": "1s"}, "throttle": {"cpu": "10%", "for": "2s"}}
    newer = {
        "ladder": [
            {"when": "tool pool above 85% for 1s", "until": "below 50%", "do": "throttle to 10% of a CPU for 2s"}
        ]
    }
    assert parse_policy(document(memory=older)) == parse_policy(document(memory=newer))
    assert refused(document(memory=older | newer)) == (
        "spec.memory.ladder: says what `pressure` and `throttle` say: leave those out"
    )


def test_everything_that_is_wrong_is_said_at_once() -> None:
    wrong = {
        "apiVersion": "equipoise/v2",
        "kind": "Policy",
        "metadata": {},
        "spec": {
            "mode": "enfroce",
            "tenants": {"gold": {"weight": 0}, "a b": {}},
            "memory": {"maxWait": 20, "budget": {"soft": "2GiB", "hard": "1GiB", "hrad": "1GiB"}, "ladder": [{}]},
        },
    }
    assert refused(wrong).splitlines() == [
        "apiVersion: must be `equipoise/v1`, found `equipoise/v2`",
        "metadata.name: is missing: of the policy",
        "spec.mode: must be one of observe, dry-run, enforce, found `enfroce`; did you mean `enforce`?",
        "spec.tenants.gold.weight: must be a number above 0 and at most 1000, found 0",
        "spec.tenants.a b: must be letters, digits, `.`, `_` or `-`, at most 64, found `a b`",
        "spec.memory.maxWait: a bare number has no unit; write it as `10s`",
        "spec.memory.budget.hrad: unknown key; did you mean `hard`?",
        "spec.memory.budget.soft: must not be above `hard`, which is 1GiB",
        "spec.memory.ladder[0].when: is missing: what presses, and for how long: `tool pool above 90% for 2s`",
        "spec.memory.ladder[0].until: is missing: when it is over: `below 80%`",
        "spec.memory.ladder[0].do: is missing: `throttle to 20% of a CPU for 5s` or `freeze for 2s`",
    ]


@pytest.mark.parametrize("path", BUILTIN, ids=lambda path: path.name)
def test_the_policies_that_come_along_are_read(path: Path) -> None:
    parsed = parse_policy(yaml.safe_load(path.read_text()))
    assert parsed.name == path.stem


def test_the_default_policy_differs_from_the_defaults_in_budgets_only() -> None:
    parsed = parse_policy(yaml.safe_load((BUILTIN[0].parent / "default.yaml").read_text()))
    default = Policy()
    assert (parsed.name, parsed.enforce, parsed.tenants, parsed.kv) == (
        default.name,
        default.enforce,
        default.tenants,
        default.kv,
    )
    in_budgets = {"budget", "max_bytes", "step_bytes"}
    for field in MemoryPolicy.__dataclass_fields__.keys() - in_budgets:
        assert getattr(parsed.memory, field) == getattr(default.memory, field), field


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("1kB", 1000),
        ("2 TB", 2 * 10**12),
        (" 7B ", 7),
    ],
)
def test_sizes_carry_binary_or_decimal_units(text: str, amount: int) -> None:
    assert parse_bytes(text, "x") == amount


@pytest.mark.parametrize(("text", "amount"), [("1ns", 1), ("2us", 2000), ("1.5s", 1_500_000_000), ("1h", 3600 * 10**9)])
def test_times_carry_units(text: str, amount: int) -> None:
    assert ns_of(text) == amount


@pytest.mark.parametrize(("value", "ratio"), [("80%", 0.8), (0.8, 0.8), (1, 1.0), (0, 0.0), ("12.5%", 0.125)])
def test_ratios_are_percents_or_fractions(value: object, ratio: float) -> None:
    assert ratio_of(value) == pytest.approx(ratio)


def test_a_pool_is_a_share_or_a_size() -> None:
    assert parse_policy(document(memory={"toolPool": "60%"})).memory.tool_pool_ratio == 0.6
    assert parse_policy(document(memory={"toolPool": 0.5})).memory.tool_pool_ratio == 0.5
    assert parse_policy(document(memory={"toolPool": "1GiB"})).memory.tool_pool_bytes == 1 << 30


def test_a_budget_given_in_part_is_completed_sensibly() -> None:
    small = parse_policy(document(memory={"budget": {"hard": "100MiB"}})).memory
    assert small.budget == Budget(100 * MIB, 100 * MIB), "the notice comes no later than the stop"
    large = parse_policy(document(memory={"budget": {"hard": "8GiB"}})).memory
    assert large.max_bytes == 8 << 30, "the largest is never below the first"


def test_the_documents_that_the_readme_shows_are_read() -> None:
    readme = (Path(policies.__file__).parent / "README.md").read_text()
    shown = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert [parse_policy(yaml.safe_load(text)).name for text in shown] == ["site"]


# -- what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "apiVersion: is missing: `equipoise/v1`"),
        ([], "document: expected a mapping, found a list"),
        ("text", "document: expected a mapping, found `text`"),
        ({1: 2}, "document: keys are words, found 1"),
        ({"apiVersion": "v2"}, "apiVersion: must be `equipoise/v1`, found `v2`"),
        ({"apiVersion": 1}, "apiVersion: must be `equipoise/v1`, found 1"),
        ({**document(), "kind": "Pod"}, "kind: must be `Policy`, found `Pod`"),
        ({**document(), "metdata": {}}, "metdata: unknown key; did you mean `metadata`?"),
        ({**document(), "metadata": None}, "metadata.name: is missing: of the policy"),
        (
            {**document(), "metadata": {"name": "a b"}},
            "metadata.name: must be letters, digits, `.`, `_` or `-`, at most 64",
        ),
        (
            {**document(), "metadata": {"name": 7}},
            "metadata.name: must be letters, digits, `.`, `_` or `-`, at most 64, found 7",
        ),
        ({**document(), "metadata": {"name": "p", "labels": {}}}, "metadata.labels: unknown key; known: name"),
        ({**document(), "spec": []}, "spec: expected a mapping, found a list"),
        (document(memmory={}), "spec.memmory: unknown key; did you mean `memory`?"),
        (document(zzz=1), "spec.zzz: unknown key; known: mode, tenants, toolCalls, memory, kv, roles"),
        (document(mode="dry"), "spec.mode: must be one of observe, dry-run, enforce, found `dry`"),
        (document(mode=True), "spec.mode: must be one of observe, dry-run, enforce, found True"),
    ],
)
def test_a_document_that_is_none_is_refused_where_it_goes_wrong(value: object, message: str) -> None:
    assert refused(value).startswith(message)


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ([], "spec.tenants: expected a mapping, found a list"),
        ({"a b": {}}, "spec.tenants.a b: must be letters, digits, `.`, `_` or `-`"),
        ({"gold": 4}, "spec.tenants.gold: expected a mapping, found 4"),
        ({"gold": {"wieght": 4}}, "spec.tenants.gold.wieght: unknown key; did you mean `weight`?"),
        ({"gold": {"weight": 0}}, "spec.tenants.gold.weight: must be a number above 0 and at most 1000, found 0"),
        ({"gold": {"weight": -1}}, "spec.tenants.gold.weight: must be a number above 0"),
        ({"gold": {"weight": 1001}}, "spec.tenants.gold.weight: must be a number above 0"),
        ({"gold": {"weight": True}}, "spec.tenants.gold.weight: must be a number above 0"),
        ({"gold": {"weight": "4"}}, "spec.tenants.gold.weight: must be a number above 0"),
        ({"gold": {"weight": float("nan")}}, "spec.tenants.gold.weight: must be a number above 0"),
        ({"gold": {"weight": float("inf")}}, "spec.tenants.gold.weight: must be a number above 0"),
    ],
)
def test_tenants_that_are_none_are_refused(tenants: object, message: str) -> None:
    assert refused(document(tenants=tenants)).startswith(message)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"budgte": {}}, "budgte: unknown key; did you mean `budget`?"),
        ({"toolPool": 12}, "toolPool: a bare number has no unit; write it as `512MiB`"),
        ({"toolPool": 1.5}, "toolPool: must be within 0 and 1, found 1.5"),
        ({"toolPool": "0%"}, "toolPool: must be above 0"),
        ({"toolPool": "120%"}, "toolPool: must be within 0 and 1, found `120%`"),
        ({"toolPool": "all"}, "toolPool: expected a quantity such as `512MiB`, found `all`"),
        ({"toolPool": [1]}, "toolPool: expected a quantity such as `512MiB`, found a list"),
        ({"budget": "1GiB"}, "budget: expected a mapping, found `1GiB`"),
        ({"budget": {"hard": 512}}, "budget.hard: a bare number has no unit; write it as `512MiB`"),
        ({"budget": {"hard": "512mb"}}, "budget.hard: unknown unit `mb`; did you mean `MB`?"),
        ({"budget": {"hard": "512x"}}, "budget.hard: unknown unit `x`; use one of B, KiB, MiB"),
        ({"budget": {"hard": None}}, "budget.hard: expected a quantity such as `512MiB`, found nothing"),
        ({"budget": {"hard": "0MiB"}}, "budget.hard: must be above 0"),
        ({"budget": {"hard": "0.1B"}}, "budget.hard: must be above 0"),
        ({"budget": {"hard": "-5MiB"}}, "budget.hard: expected a quantity"),
        ({"budget": {"hard": "1e3MiB"}}, "budget.hard: expected a quantity"),
        ({"budget": {"hard": "999999999999999999TiB"}}, "budget.hard: must be at most 4 EiB"),
        ({"budget": {"hard": "9" * 500 + "GiB"}}, "budget.hard: expected a quantity"),
        ({"budget": {"soft": "1GiB", "hard": "512MiB"}}, "budget.soft: must not be above `hard`, which is 512MiB"),
        ({"budget": {"hard": "1GiB", "max": "512MiB"}}, "budget.max: must not be below `hard`"),
        ({"budget": {"step": "0MiB"}}, "budget.step: must be above 0"),
        ({"budget": {"stpe": "1MiB"}}, "budget.stpe: unknown key; did you mean `step`?"),
        ({"budgets": {"pytest": {"max": "1GiB"}}}, "budgets.pytest.max: unknown key; known: soft, hard"),
        ({"budgets": {"pytest": {"soft": "2GiB"}}}, "budgets.pytest.soft: must not be above `hard`"),
        (
            {"budget": {"max": "1GiB"}, "budgets": {"pytest": {"hard": "2GiB"}}},
            "budgets.pytest.hard: must not be above `memory.budget.max`, which is 1GiB",
        ),
        ({"maxWait": 20}, "maxWait: a bare number has no unit; write it as `10s`"),
        ({"maxWait": "20sec"}, "maxWait: unknown unit `sec`; use one of ns, us, ms, s, m, h"),
        ({"maxWait": "99999999999999h"}, "maxWait: must be at most a century"),
        ({"pressure": {"above": 1.2}}, "pressure.above: must be within 0 and 1, found 1.2"),
        ({"pressure": {"above": 0}}, "pressure.above: must be above 0"),
        ({"pressure": {"above": 0.5, "below": 0.6}}, "pressure.below: must not be above `above`"),
        ({"pressure": {"above": "90"}}, "pressure.above: expected a ratio such as 0.8 or `80%`, found `90`"),
        ({"pressure": {"above": True}}, "pressure.above: expected a ratio such as 0.8 or `80%`, found True"),
        ({"pressure": {"above": float("nan")}}, "pressure.above: must be within 0 and 1, found nan"),
        ({"pressure": {"above": 10**400}}, "pressure.above: must be within 0 and 1, found a huge number"),
        ({"pressure": {"over": 0.9}}, "pressure.over: unknown key"),
        ({"throttle": {"cpu": "20"}}, "throttle.cpu: expected a ratio"),
        ({"throttle": {"for": "0s"}}, "throttle.for: must be above 0"),
        ({"throttle": {"form": "1s"}}, "throttle.form: unknown key; did you mean `for`?"),
        ({"ladder": {}}, "ladder: expected a list, found a dict"),
        (rule(when="tool pool above 90%"), "ladder[0].when: expected words such as `tool pool above 90% for 2s`"),
        (
            rule(when="tol pool above 90% for 2s"),
            "ladder[0].when: `tol pool` is not measured; did you mean `tool pool`?",
        ),
        (rule(when="tool pool above 90 for 2s"), "ladder[0].when: must be within 0 and 1, found 90.0"),
        (rule(when="tool pool above 90% for 2"), "ladder[0].when: expected a quantity such as `10s`, found `2`"),
        (rule(when="tool pool above 90% for 2sec"), "ladder[0].when: unknown unit `sec`"),
        (rule(when="tool pool above 0 for 2s"), "ladder[0].when: must be above 0"),
        (rule(until="80%"), "ladder[0].until: expected words such as `below 80%`, found `80%`"),
        (rule(until="below 95%"), "ladder[0].until: must not be above what `when` says"),
        (rule(do="throtle for 5s"), "ladder[0].do: `throtle` is no rung; did you mean `throttle`?"),
        (rule(do="freeze to 20% of a CPU for 5s"), "ladder[0].do: `freeze` leaves no CPU: write `freeze for 5s`"),
        (rule(do="freeze for 0s"), "ladder[0].do: must be above 0"),
        (rule(do="freeze"), "ladder[0].do: expected words such as"),
    ],
)
def test_memory_rules_that_are_none_are_refused(memory: object, message: str) -> None:
    assert refused(document(memory=memory)).startswith("spec.memory." + message)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a b": {"match": {"tool": "x"}}}, "a b: must be letters, digits"),
        ({"tests": {}}, "tests.match: is missing: which calls"),
        ({"tests": {"match": {}}}, "tests.match: matches every call: give command, tool, source or tenant"),
        ({"tests": {"match": {"comand": "x"}}}, "tests.match.comand: unknown key; did you mean `command`?"),
        ({"tests": {"match": {"command": "("}}}, "tests.match.command: no regular expression: "),
        ({"tests": {"match": {"tool": ""}}}, "tests.match.tool: expected a word, found ``"),
        ({"tests": {"match": {"source": "hok"}}}, "tests.match.source: must be one of hook, wrapper, lineage, found"),
        ({"tests": {"match": {"tenant": 7}}}, "tests.match.tenant: must be letters, digits"),
        (
            {"tests": {"match": {"tool": "x"}, "budget": {"soft": "9GiB"}}},
            "tests.budget.soft: must not be above `hard`",
        ),
        ({"tests": {"match": {"tool": "x"}, "budget": {"hard": "9GiB"}}}, "tests.budget.hard: must not be above `mem"),
    ],
)
def test_classes_that_are_none_are_refused(classes: object, message: str) -> None:
    assert refused(document(toolCalls=classes)).startswith("spec.toolCalls." + message)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({"dwel": "1s"}, "dwel: unknown key; did you mean `dwell`?"),
        ({"dwell": 1}, "dwell: a bare number has no unit; write it as `10s`"),
        ({"hysteresis": "20"}, "hysteresis: expected a ratio"),
        ({"hysteresis": "20MiB"}, "hysteresis: expected a ratio"),
        ({"retain": "0s"}, "retain: must be above 0"),
        ({"deadline": "0.1ns"}, "deadline: must be above 0"),
        ({"door": "110%"}, "door: must be within 0 and 1"),
        ({"doorLongest": "0s"}, "doorLongest: must be above 0"),
        ({"tiers": ["disc"]}, "tiers[0]: must be one of host, disk, found `disc`; did you mean `disk`?"),
    ],
)
def test_kv_rules_that_are_none_are_refused(kv: object, message: str) -> None:
    assert refused(document(kv=kv)).startswith("spec.kv." + message)


def test_an_error_says_where_as_a_path_of_its_own() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_policy(document(memory={"budget": {"hard": 1}, "ladder": [{"wehn": ""}]}))
    assert [problem.path for problem in caught.value.problems][:2] == [
        ("spec", "memory", "budget", "hard"),
        ("spec", "memory", "ladder", 0, "wehn"),
    ]
    assert place(("spec", "memory", "ladder", 0, "wehn")) == "spec.memory.ladder[0].wehn"


@pytest.mark.parametrize("nasty", ["two\nlines", "x" * 10_000, "\x1b[31mred", "\0"])
def test_an_error_is_one_short_printable_line_whatever_was_written(nasty: str) -> None:
    for value in (
        document(**{nasty: 1}),
        document(mode=nasty),
        document(tenants={nasty: {}}),
        document(memory={"toolPool": nasty}),
        document(memory={"budgets": {nasty: {"hard": 1}}}),
        {**document(), "metadata": {"name": nasty}},
        {**document(), nasty: 1},
    ):
        for line in refused(value).split("\n"):
            assert line.isprintable()
            assert len(line) < 250


def test_a_number_too_large_to_print_is_refused_like_any_other() -> None:
    assert refused(document(tenants={"gold": {"weight": 1 << 70_000}})).endswith("found a huge number")
    assert refused(document(mode=1 << 70_000)).endswith("found a huge number")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10) | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)
KEYS = ("mode", "tenants", "memory", "kv", "budget", "budgets", "hard", "soft", "max", "step", "toolPool", "pressure",
        "above", "below", "for", "throttle", "cpu", "maxWait", "dwell", "retain", "gold", "weight")  # fmt: skip
NEARLY = st.recursive(
    ANYTHING | st.sampled_from(("1MiB", "0s", "5s", "90%", "1.5", "-1MiB", "enforce", 0.5)),
    lambda inner: st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(ANYTHING | NEARLY.map(lambda spec: {**document(), "spec": spec}))
def test_any_value_is_a_policy_or_a_document_error(value: object) -> None:
    try:
        parsed = parse_policy(value)
    except DocumentError as error:
        assert all(str(problem).isprintable() for problem in error.problems)
        assert error.problems
    else:
        assert isinstance(parsed, Policy)
        assert fits(value, json_schema()), "an editor lets pass what is read"


# -- the JSON Schema

TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": (int, float), "null": type(None)}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """A validator of the words that our schema uses; JSON Schema 2020-12 says what each means."""
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(fits(value, each) for each in schema["anyOf"]):
        return False
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if isinstance(value, bool):
            return "boolean" in types
        if not any(isinstance(value, TYPES[each]) for each in types):
            return False
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None and len(value) >= schema.get("minLength", 0)
    if isinstance(value, int | float):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return bool(low <= value <= high and value > schema.get("exclusiveMinimum", -math.inf))
    if isinstance(value, list):
        return all(fits(each, schema["items"]) for each in value)
    if isinstance(value, dict):
        known, named = schema.get("properties", {}), schema.get("patternProperties", {})
        if any(each not in value for each in schema.get("required", ())):
            return False
        for key, inner in value.items():
            matching = (
                [known[key]] if key in known else [of for pattern, of in named.items() if re.search(pattern, key)]
            )
            if not matching or not all(fits(inner, each) for each in matching):
                return False
    return True


@pytest.mark.parametrize("path", BUILTIN, ids=lambda path: path.name)
def test_the_schema_lets_pass_what_comes_along(path: Path) -> None:
    assert fits(yaml.safe_load(path.read_text()), json_schema())


def test_the_schema_stops_what_an_editor_can_see() -> None:
    specs: tuple[dict[str, Any], ...]
    specs = ({"memroy": {}}, {"mode": "on"}, {"memory": {"maxWait": 20}}, {"memory": {"budget": {"hard": "1"}}})
    for spec in specs:
        assert not fits(document(**spec), json_schema()), spec
    assert not fits({**document(), "metadata": {}}, json_schema())
    assert not fits(document(toolCalls={"tests": {}}), json_schema())
    assert json.loads(json.dumps(json_schema())) == json_schema()


def test_every_key_says_what_it_does() -> None:
    def keys(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for inner in [*schema.get("properties", {}).values(), *schema.get("patternProperties", {}).values()]:
            yield inner
            yield from keys(inner)
        yield from keys(schema["items"]) if "items" in schema else ()

    named = [key for key in keys(json_schema()) if "description" in key]
    assert len(named) > 50
    assert all(5 < len(key["description"]) < 120 for key in named if key["description"] != "`Policy`")


# -- round trips

BYTES = st.integers(1, 1 << 50)
TIMES = st.integers(0, 10**15)
LIVES = st.integers(1, 10**15)
RATIOS = st.floats(0, 1)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@st.composite
def rules(draw: st.DrawFn) -> LadderRule:
    above, rung = draw(st.floats(0.01, 1)), draw(st.sampled_from(Rung))
    cpu = draw(RATIOS) if rung is Rung.THROTTLE else LadderRule().cpu_ratio
    below = draw(st.floats(0, above))
    return LadderRule(draw(st.sampled_from(Measure)), above, draw(TIMES), below, rung, cpu, draw(LIVES))


@st.composite
def any_policy(draw: st.DrawFn) -> Policy:
    hard = draw(BYTES)
    maximum = draw(st.integers(hard, 1 << 51))

    def own() -> Budget:
        top = draw(st.integers(1, maximum))
        return Budget(draw(st.integers(1, top)), top)

    share = draw(st.none() | st.floats(0.01, 1))
    weights = draw(st.dictionaries(NAMES, st.floats(0.001, 1000), min_size=1, max_size=4))
    memory = MemoryPolicy(
        tool_pool_bytes=draw(BYTES) if share is None else None,
        tool_pool_ratio=MemoryPolicy().tool_pool_ratio if share is None else share,
        budget=Budget(draw(st.integers(1, hard)), hard),
        kind_budgets=tuple((kind, own()) for kind in draw(st.sets(NAMES, max_size=3))),
        max_bytes=maximum,
        step_bytes=draw(BYTES),
        wait_ns=draw(TIMES),
        ladder=tuple(draw(st.lists(rules(), max_size=3))),
    )
    kv = KvPolicy(
        draw(TIMES),
        draw(TIMES),
        draw(RATIOS),
        draw(LIVES),
        draw(LIVES),
        draw(RATIOS) or None,
        draw(LIVES),
        tiers=draw(st.frozensets(st.sampled_from((KvTier.HOST, KvTier.DISK)))),
    )
    classes = tuple(
        CallClass(
            name,
            draw(st.none() | st.sampled_from(("^make", "test$"))),
            draw(NAMES),
            draw(st.none() | st.sampled_from(ToolCallSource)),
            TenantId(draw(NAMES)),
            own() if draw(st.booleans()) else None,
            draw(st.none() | TIMES),
        )
        for name in draw(st.sets(NAMES, max_size=3))
    )
    return Policy(
        name=draw(NAMES),
        mode=draw(st.sampled_from(Mode)),
        tenants=tuple(Tenant(TenantId(name), weight) for name, weight in sorted(weights.items())),
        tenant_budgets=tuple((TenantId(name), own()) for name in sorted(weights) if draw(st.booleans())),
        classes=classes,
        memory=memory,
        kv=kv,
        roles=tuple(RoleRule("^vite", role) for role in draw(st.sets(st.sampled_from((Role.SERVICE, Role.SHELL))))),
    )


@given(any_policy())
def test_a_policy_written_down_reads_the_same_through_yaml_and_fits_the_schema(policy: Policy) -> None:
    assert fits(written(policy), json_schema())
    assert parse_policy(yaml.safe_load(yaml.safe_dump(written(policy), sort_keys=False))) == policy


def test_changes_name_each_place_that_differs() -> None:
    before = parse_policy(document(tenants={"gold": {"weight": 4}, "silver": {}}))
    after = parse_policy(document(tenants={"gold": {"weight": 2}, "bronze": {}}, memory={"maxWait": "5s"}))
    assert changes(before, after) == [
        "spec.tenants.gold.weight: 4.0 -> 2.0",
        "spec.tenants.silver.weight: 1.0 is gone",
        "spec.memory.maxWait: 20s -> 5s",
        "spec.tenants.bronze.weight: 1.0 is new",
    ]
    assert changes(before, before) == []

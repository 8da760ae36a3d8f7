"""Policy documents: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from equipoise import policies
from equipoise.policies.document import DocumentError, parse_bytes, parse_ns, parse_policy, parse_ratio
from equipoise.policies.model import MIB, NS_PER_S, Tenant, TenantId
from equipoise.policies.policy import Budget, KvPolicy, MemoryPolicy, Policy
from hypothesis import given
from hypothesis import strategies as st

BUILTIN = sorted((Path(policies.__file__).parent / "builtin").glob("*.yaml"))


def document(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "equipoise/v1", "kind": "Policy", "metadata": {"name": "p"}, "spec": spec}


def refused(value: object) -> str:
    with pytest.raises(DocumentError) as caught:
        parse_policy(value)
    return str(caught.value)


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
      tenants: {silver: {}, gold: {weight: 4}}
      memory:
        toolPool: 12GiB
        budget: {soft: 100MiB, hard: 200MiB, step: 50MiB, max: 1GiB}
        budgets: {pytest: {soft: 300MiB, hard: 400MiB}, git: {hard: 64MiB}}
        maxWait: 1m
        pressure: {above: 85%, below: 0.5, for: 1500ms}
        throttle: {cpu: 10%, for: 2s}
      kv: {decideAfter: 0s, dwell: 1s, hysteresis: 10%, retain: 3s, deadline: 4s, door: 80%, doorLongest: 1m}
    """
    assert parse_policy(yaml.safe_load(text)) == Policy(
        name="full",
        enforce=False,
        tenants=(Tenant(TenantId("gold"), 4.0), Tenant(TenantId("silver"), 1.0)),
        memory=MemoryPolicy(
            tool_pool_bytes=12 << 30,
            budget=Budget(100 * MIB, 200 * MIB),
            kind_budgets=(("pytest", Budget(300 * MIB, 400 * MIB)), ("git", Budget(64 * MIB, 64 * MIB))),
            max_bytes=1 << 30,
            step_bytes=50 * MIB,
            wait_ns=60 * NS_PER_S,
            pressure_above_ratio=0.85,
            pressure_below_ratio=0.5,
            pressure_for_ns=1_500_000_000,
            throttle_cpu_ratio=0.1,
            throttle_ns=2 * NS_PER_S,
        ),
        kv=KvPolicy(0, NS_PER_S, 0.1, 3 * NS_PER_S, 4 * NS_PER_S, 0.8, 60 * NS_PER_S),
    )


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
    assert parse_ns(text, "x") == amount


@pytest.mark.parametrize(("value", "ratio"), [("80%", 0.8), (0.8, 0.8), (1, 1.0), (0, 0.0), ("12.5%", 0.125)])
def test_ratios_are_percents_or_fractions(value: object, ratio: float) -> None:
    assert parse_ratio(value, "x") == pytest.approx(ratio)


def test_a_pool_is_a_share_or_a_size() -> None:
    assert parse_policy(document(memory={"toolPool": "60%"})).memory.tool_pool_ratio == 0.6
    assert parse_policy(document(memory={"toolPool": 0.5})).memory.tool_pool_ratio == 0.5
    assert parse_policy(document(memory={"toolPool": "1GiB"})).memory.tool_pool_bytes == 1 << 30


def test_a_budget_given_in_part_is_completed_sensibly() -> None:
    small = parse_policy(document(memory={"budget": {"hard": "100MiB"}})).memory
    assert small.budget == Budget(100 * MIB, 100 * MIB), "the notice comes no later than the stop"
    large = parse_policy(document(memory={"budget": {"hard": "8GiB"}})).memory
    assert large.max_bytes == 8 << 30, "the largest is never below the first"


# -- what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "apiVersion: must be `equipoise/v1`, found ``"),
        ([], "document: expected a mapping, found a list"),
        ("text", "document: expected a mapping, found `text`"),
        ({1: 2}, "document: keys are words, found 1"),
        ({"apiVersion": "v2"}, "apiVersion: must be `equipoise/v1`, found `v2`"),
        ({"apiVersion": 1}, "apiVersion: expected a word, found 1"),
        ({**document(), "kind": "Pod"}, "kind: must be `Policy`, found `Pod`"),
        ({**document(), "metdata": {}}, "metdata: unknown key; did you mean `metadata`?"),
        (
            {**document(), "metadata": None},
            "metadata.name: must be letters, digits, `.`, `_` or `-`, at most 64, found ``",
        ),
        (
            {**document(), "metadata": {"name": "a b"}},
            "metadata.name: must be letters, digits, `.`, `_` or `-`, at most 64",
        ),
        ({**document(), "metadata": {"name": 7}}, "metadata.name: expected a word, found 7"),
        ({**document(), "metadata": {"name": "p", "labels": {}}}, "metadata.labels: unknown key; known: name"),
        ({**document(), "spec": []}, "spec: expected a mapping, found a list"),
        (document(memmory={}), "spec.memmory: unknown key; did you mean `memory`?"),
        (document(zzz=1), "spec.zzz: unknown key; known: mode, tenants, memory, kv"),
        (document(mode="dry"), "spec.mode: must be `enforce` or `observe`, found `dry`"),
        (document(mode=True), "spec.mode: expected a word, found True"),
    ],
)
def test_a_document_that_is_none_is_refused_where_it_goes_wrong(value: object, message: str) -> None:
    assert refused(value).startswith(message)


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ([], "spec.tenants: expected a mapping, found a list"),
        ({"a b": {}}, "spec.tenants.a b: a tenant's name is letters, digits"),
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
        ({"budget": {"hard": "512mb"}}, "budget.hard: unknown unit `mb`; use one of B, KiB, MiB"),
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
            "budgets.pytest.hard: must not be above `budget.max`, which is 1024MiB",
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
    ],
)
def test_memory_rules_that_are_none_are_refused(memory: object, message: str) -> None:
    assert refused(document(memory=memory)).startswith("spec.memory." + message)


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
    ],
)
def test_kv_rules_that_are_none_are_refused(kv: object, message: str) -> None:
    assert refused(document(kv=kv)).startswith("spec.kv." + message)


def test_an_error_says_where_as_a_field_of_its_own() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_policy(document(memory={"budget": {"hard": 1}}))
    assert caught.value.path == "spec.memory.budget.hard"


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
        message = refused(value)
        assert message.isprintable()
        assert len(message) < 250


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
        assert str(error).isprintable()
    else:
        assert isinstance(parsed, Policy)


# -- round trips

BYTES = st.integers(1, 1 << 50)
TIMES = st.integers(0, 10**15)
LIVES = st.integers(1, 10**15)
RATIOS = st.floats(0, 1)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@st.composite
def any_policy(draw: st.DrawFn) -> Policy:
    hard = draw(BYTES)
    budget = Budget(draw(st.integers(1, hard)), hard)
    maximum = draw(st.integers(hard, 1 << 51))
    kinds = draw(st.dictionaries(NAMES, st.integers(1, maximum), max_size=3))
    above = draw(st.floats(0.01, 1))
    share = draw(st.none() | st.floats(0.01, 1))
    weights = draw(st.dictionaries(NAMES, st.floats(0.001, 1000), min_size=1, max_size=4))
    memory = MemoryPolicy(
        tool_pool_bytes=draw(BYTES) if share is None else None,
        tool_pool_ratio=MemoryPolicy().tool_pool_ratio if share is None else share,
        budget=budget,
        kind_budgets=tuple((kind, Budget(draw(st.integers(1, top)), top)) for kind, top in kinds.items()),
        max_bytes=maximum,
        step_bytes=draw(BYTES),
        wait_ns=draw(TIMES),
        pressure_above_ratio=above,
        pressure_below_ratio=draw(st.floats(0, above)),
        pressure_for_ns=draw(TIMES),
        throttle_cpu_ratio=draw(RATIOS),
        throttle_ns=draw(LIVES),
    )
    kv = KvPolicy(draw(TIMES), draw(TIMES), draw(RATIOS), draw(LIVES), draw(LIVES), draw(RATIOS) or None, draw(LIVES))
    tenants = tuple(Tenant(TenantId(name), weight) for name, weight in sorted(weights.items()))
    return Policy(draw(NAMES), draw(st.booleans()), tenants, memory, kv)


def written(policy: Policy) -> dict[str, Any]:
    """The document that says the same as `policy`."""
    memory, kv = policy.memory, policy.kv
    pool = memory.tool_pool_ratio if memory.tool_pool_bytes is None else f"{memory.tool_pool_bytes}B"
    return {
        "apiVersion": "equipoise/v1",
        "kind": "Policy",
        "metadata": {"name": policy.name},
        "spec": {
            "mode": "enforce" if policy.enforce else "observe",
            "tenants": {str(t.id): {"weight": t.weight} for t in policy.tenants},
            "memory": {
                "toolPool": pool,
                "budget": {
                    **_budget(memory.budget),
                    "max": f"{memory.max_bytes}B",
                    "step": f"{memory.step_bytes}B",
                },
                "budgets": {kind: _budget(budget) for kind, budget in memory.kind_budgets},
                "maxWait": f"{memory.wait_ns}ns",
                "pressure": {
                    "above": memory.pressure_above_ratio,
                    "below": memory.pressure_below_ratio,
                    "for": f"{memory.pressure_for_ns}ns",
                },
                "throttle": {"cpu": memory.throttle_cpu_ratio, "for": f"{memory.throttle_ns}ns"},
            },
            "kv": {
                "decideAfter": f"{kv.decide_after_ns}ns",
                "dwell": f"{kv.dwell_ns}ns",
                "hysteresis": kv.hysteresis_ratio,
                "retain": f"{kv.retain_ns}ns",
                "deadline": f"{kv.directive_ns}ns",
                "door": kv.door_ratio or 0.0,
                "doorLongest": f"{kv.door_longest_ns}ns",
            },
        },
    }


def _budget(budget: Budget) -> dict[str, str]:
    return {"soft": f"{budget.soft_bytes}B", "hard": f"{budget.hard_bytes}B"}


@given(any_policy())
def test_a_policy_written_down_reads_the_same_through_yaml(policy: Policy) -> None:
    assert parse_policy(yaml.safe_load(yaml.safe_dump(written(policy), sort_keys=False))) == policy

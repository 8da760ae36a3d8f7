"""Policies as text: where each error stands, twice-given keys, and what one layer says over another."""

from __future__ import annotations

import json

import pytest
import yaml
from equipoise.daemon.policy import BUILTINS, PolicyError, Text, builtin_text, dump, policy_of
from equipoise.daemon.policy.places import MOST_VALUES, read
from equipoise.policies.document import parse_policy
from equipoise.policies.model import MIB, NS_PER_S
from equipoise.policies.policy import Budget, Mode, Policy

HEAD = "apiVersion: equipoise/v1\nkind: Policy\nmetadata: {name: p}\n"


def lines(*texts: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        policy_of([Text(f"{name}.yaml", text) for name, text in zip("abc", texts, strict=False)])
    assert str(caught.value) == "\n".join(caught.value.lines)
    return caught.value.lines


def policy(*texts: str) -> Policy:
    return policy_of([Text(f"{name}.yaml", text) for name, text in zip("abc", texts, strict=False)])


# -- places


def test_each_error_has_its_line_and_column_and_all_are_said() -> None:
    text = (
        HEAD
        + "spec:\n  mode: enfroce\n  memory:\n    maxWait: 20\n    budget:\n      hrad: 1GiB\n    ladder:\n    - {}\n"
    )
    assert lines(text) == [
        "a.yaml:5:9: spec.mode: must be one of observe, dry-run, enforce, found `enfroce`; did you mean `enforce`?",
        "a.yaml:7:14: spec.memory.maxWait: a bare number has no unit; write it as `10s`",
        "a.yaml:9:7: spec.memory.budget.hrad: unknown key; did you mean `hard`?",
        "a.yaml:11:7: spec.memory.ladder[0].when: is missing: what presses, and for how long: "
        "`tool pool above 90% for 2s`",
        "a.yaml:11:7: spec.memory.ladder[0].until: is missing: when it is over: `below 80%`",
        "a.yaml:11:7: spec.memory.ladder[0].do: is missing: `throttle to 20% of a CPU for 5s` or `freeze for 2s`",
    ]


def test_a_key_that_is_given_twice_is_an_error_wherever_it_stands() -> None:
    assert lines(HEAD + "spec:\n  mode: observe\n  tenants: {gold: {}, gold: {}}\n  mode: enforce\n") == [
        "a.yaml:6:23: spec.tenants.gold: is given twice: first in line 6",
        "a.yaml:7:3: spec.mode: is given twice: first in line 5",
    ]


def test_what_is_missing_is_missing_in_its_mapping() -> None:
    assert lines("kind: Policy\nmetadata:\n  nmae: p\n") == [
        "a.yaml:1:1: apiVersion: is missing: `equipoise/v1`",
        "a.yaml:2:1: metadata.name: is missing: of the policy",
        "a.yaml:3:3: metadata.nmae: unknown key; did you mean `name`?",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("spec: {memory: [", "a.yaml:1:17: not YAML: "),
        ("\x00", "a.yaml:1:1: not YAML: "),
        ("ok: 1\nbad: \x07\n", "a.yaml:2:6: not YAML: "),
        ("a: 1\n---\nb: 2\n", "a.yaml:2:1: not YAML: but found another document"),
        ("a: &x [*x]", "a.yaml:1:4: a[0]: an alias of what it stands in"),
        ("? [a]\n: 1\n", "a.yaml:1:3: document: keys are words"),
        ("1: 2\n", "a.yaml:1:1: document: keys are words, found 1"),
        ("a: !!int x\n", "a.yaml:1:4: a: is no value of the kind int"),
        ("a: !!python/object:os.x {}\n", "a.yaml:1:1: apiVersion: is missing"),
        ("- a\n", "a.yaml:1:1: document: expected a mapping, found a list"),
        ("", "a.yaml:1:1: apiVersion: is missing"),
    ],
)
def test_what_is_no_policy_as_text_is_an_error_with_its_place(text: str, line: str) -> None:
    assert any(said.startswith(line) for said in lines(text)), lines(text)


def test_deep_and_swollen_texts_are_refused_and_do_no_harm() -> None:
    assert lines("[" * 20_000) == ["a.yaml:1:1: not YAML for people: nested too deeply"]
    bomb = "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else '1'}]" for n in range(9)])
    assert any(f"more than {MOST_VALUES} values" in line for line in lines(bomb))


def test_a_policy_larger_than_any_is_refused_before_it_is_read() -> None:
    (line,) = lines(HEAD, "#" * (1 << 17))
    assert line.startswith(f"a.yaml: {len(HEAD) + (1 << 17)} characters of policy are more than 131072")


def test_aliases_and_merges_mean_what_they_mean_elsewhere() -> None:
    text = "x: &x {a: 1, b: [1, 2]}\ny: {<<: *x, a: 3}\nz: {<<: [{a: 5}, *x]}\nw: *x\n"
    assert read(text, "a.yaml").value == yaml.safe_load(text)
    assert not read(text, "a.yaml").wrong


# -- layers


def test_a_later_text_says_its_keys_over_those_before() -> None:
    below = HEAD + "spec: {mode: enforce, memory: {maxWait: 20s, budget: {soft: 100MiB, hard: 200MiB}}}"
    above = "spec: {mode: dry-run, memory: {budget: {hard: 300MiB}}}"
    made = policy(below, above)
    assert (made.mode, made.memory.wait_ns) == (Mode.DRY_RUN, 20 * NS_PER_S)
    assert made.memory.budget == Budget(100 * MIB, 300 * MIB)


def test_nothing_takes_away_what_stood_there_and_a_list_replaces_a_list() -> None:
    rule = "{when: tool pool above 90% for 2s, until: below 80%, do: freeze for 1s}"
    below = HEAD + f"spec: {{memory: {{maxWait: 1s, ladder: [{rule}, {rule}]}}, tenants: {{gold: {{}}, silver: {{}}}}}}"
    made = policy(below, f"spec: {{memory: {{maxWait: , ladder: [{rule}]}}, tenants: {{gold: }}}}")
    assert made.memory.wait_ns == Policy().memory.wait_ns
    assert len(made.memory.ladder) == 1
    assert [tenant.id for tenant in made.tenants] == ["silver"]


def test_a_class_that_only_a_later_text_has_is_asked_first() -> None:
    below = HEAD + "spec: {toolCalls: {all: {match: {source: hook}}, tests: {match: {tool: pytest}}}}"
    made = policy(below, "spec: {toolCalls: {mine: {match: {tool: make}}, all: {maxWait: 1s}}}")
    assert [each.name for each in made.classes] == ["mine", "all", "tests"]
    assert made.classes[1].wait_ns == NS_PER_S


def test_errors_name_the_text_they_are_from() -> None:
    good = HEAD + "spec: {memory: {budget: {hard: 1GiB}}}"
    assert lines(good, "spec:\n  memory:\n    budget: {soft: 2GiB}\n", "spec: {mode: on}") == [
        "b.yaml:3:20: spec.memory.budget.soft: must not be above `hard`, which is 1GiB",
        "c.yaml:1:14: spec.mode: must be one of observe, dry-run, enforce, found True",
    ]
    assert lines(good, "spec: [", "spec: {mode: on}") == [
        "b.yaml:1:8: not YAML: expected the node content, but found '<stream end>'"
    ]


@pytest.mark.parametrize("name", BUILTINS)
def test_what_is_dumped_reads_the_same(name: str) -> None:
    made = policy(builtin_text(name))
    assert made.name == name
    assert policy(dump(made)) == made
    assert parse_policy(json.loads(json.dumps(yaml.safe_load(dump(made))))) == made


def test_the_policies_that_come_along_are_those_we_name() -> None:
    assert set(BUILTINS) == {"default", "laptop", "shared-gpu-box", "evaluation-farm", "observe-only"}
    assert policy(builtin_text("observe-only")).mode is Mode.OBSERVE

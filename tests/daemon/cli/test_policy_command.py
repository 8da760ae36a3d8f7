"""`equipoise policy` as people type it; what needs a daemon is in whole/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from equipoise.daemon.cli.main import main
from equipoise.daemon.policy import BUILTINS, builtin_text
from equipoise.policies.document import json_schema


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.yaml"
    path.write_text(builtin_text("laptop").replace("maxWait: 30s", "maxWait: 30").replace("mode:", "mdoe:"))
    return path


def test_check_says_everything_a_line_each(wrong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(wrong)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        f"equipoise: {wrong}:7:3: spec.mdoe: unknown key; did you mean `mode`?",
        f"equipoise: {wrong}:11:14: spec.memory.maxWait: a bare number has no unit; write it as `10s`",
    ]


def test_check_as_json_has_each_error_in_parts(wrong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", "--json", str(wrong)]) == 1
    answered = json.loads(capsys.readouterr().out)
    assert not answered["ok"]
    assert answered["errors"][0] == {
        "file": str(wrong),
        "line": 7,
        "column": 3,
        "path": "spec.mdoe",
        "problem": "unknown key; did you mean `mode`?",
    }


@pytest.mark.parametrize("name", BUILTINS)
def test_each_policy_that_comes_along_is_shown_as_it_is_and_well_formed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy", "show", name]) == 0
    assert capsys.readouterr().out == builtin_text(name)
    assert main(["policy", "check", name]) == 0
    assert f"policy {name} is well formed" in capsys.readouterr().out


def test_show_whole_is_one_document_of_all_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("spec: {memory: {maxWait: 1m}}")
    assert main(["policy", "show", "laptop", str(site)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["metadata"]["name"], shown["spec"]["memory"]["maxWait"]) == ("laptop", "1m")
    assert shown["spec"]["kv"]["dwell"] == "2s", "the defaults are written out"
    assert main(["policy", "show", "--json", "laptop", str(site)]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_diff_names_each_place_and_says_by_its_code_whether_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "diff", "default", "laptop", "--exit-code"]) == 1
    assert "spec.memory.toolPool: 60% -> 40%" in capsys.readouterr().out.splitlines()
    assert main(["policy", "diff", "default", "default", "--exit-code"]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_schema_is_the_grammars_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


@pytest.mark.parametrize("action", ["check", "show", "diff", "apply", "schema"])
def test_every_action_has_examples(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["policy", action, "--help"])
    assert f"  equipoise policy {action}" in capsys.readouterr().out


def test_without_a_daemon_apply_and_diff_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["apply"], ["diff", "laptop"], ["show", "--running"]):
        assert main(["policy", *words, "--socket", str(tmp_path / "none.sock")]) == 1
        assert "no daemon at" in capsys.readouterr().err

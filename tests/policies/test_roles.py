"""Who is who: the rules on what real agents were seen to exec, and on what nobody has recorded.

`tests/fixtures/agents/*.jsonl` are recordings of Claude Code, Codex, opencode and Gemini CLI, plain and behind
launchers (tests/agents/trace.py): each direct exec of the runtime that differs from the others, and whether it was one
of the ten scripted tool calls.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from equipoise.policies.model import Role, RoleRule, SessionId
from equipoise.policies.roles import (
    PROFILES,
    Asked,
    Exec,
    Ruling,
    asked_text,
    is_agent,
    matching,
    may_be_agent,
    profile_of,
    rule,
    same_program,
)

RECORDINGS = sorted((Path(__file__).parents[1] / "fixtures" / "agents").glob("*.jsonl"))
SESSION = SessionId("gold/ada")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_of_a_recorded_agent_exactly_the_scripted_calls_are_tool_calls(path):
    recorded = rows(path)
    above = [row["command"] for row in recorded if row["truth"] in ("launcher", "runtime")]
    runtime = next(row["command"] for row in recorded if row["truth"] == "runtime")
    profile = profile_of(above)
    assert profile is not None
    wrong = []
    for row in recorded:
        if row["truth"] not in ("call", "other"):
            continue
        seen = Exec(row["command"], session_leader=row["session_leader"], below_runtime=row["after_connection"])
        ruling = rule(seen, profile, runtime)
        if (ruling.role is Role.TOOL_CALL) != (row["truth"] == "call") or ruling.budgeted != (row["truth"] == "call"):
            wrong.append((row["truth"], ruling))
    assert wrong == []
    assert sum(row["truth"] == "call" for row in recorded) >= 8


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_launchers_and_shims_of_a_recorded_agent_are_protected_and_only_the_runtime_may_be_it(path):
    for row in rows(path):
        if row["truth"] == "launcher":
            assert rule(Exec(row["command"])).role is Role.START_UP
        if row["truth"] == "runtime":
            assert may_be_agent(row["command"])


@pytest.mark.parametrize(
    ("profile", "command", "text"),
    [
        ("claude-code", "/bin/bash -c source /s 2>/dev/null || true && eval 'git status' < /dev/null && pwd -P >| /t",
         "git status"),
        ("claude-code", "/bin/bash -c source /s.sh && eval 'echo '\"'\"'a b'\"'\"'' < /dev/null && pwd -P >| /t",
         "echo 'a b'"),
        ("codex", "/bin/bash -c pytest -q", "pytest -q"),
        ("opencode", "/bin/bash -c cd x && make", "cd x && make"),
        ("gemini-cli", "/usr/bin/bash -c shopt -u x; _bgpids_file=/t\n(\n  trap 'jobs -p > \"$_bgpids_file\"' EXIT\n"
         "ls -l\nwc\n)\n__code=$?\nexit $__code", "ls -l\nwc"),
    ],
)  # fmt: skip
def test_an_agents_wrapping_is_taken_off_its_command(profile, command, text):
    assert asked_text(command, next(p for p in PROFILES if p.name == profile)) == text


def test_before_anybody_has_spoken_to_a_model_nothing_is_a_tool_call():
    for command in ("/bin/bash -c make", "pytest -q", "node cli.js", "/opt/x/agent-bin --flag"):
        ruling = rule(Exec(command, session_leader=True))
        assert (ruling.role, ruling.budgeted) == (Role.START_UP, False)


def test_the_command_that_the_conversation_asked_for_is_that_call_whatever_the_agent_looks_like():
    asked = [Asked("call_1", SESSION, "pytest -q tests"), Asked("call_2", SESSION, "echo 'two words' | wc -c")]
    seen = Exec('/bin/zsh -lc cd /w && { echo "two words" | wc -c; }', below_runtime=True)
    ruling = rule(seen, PROFILES[0], "claude -p x", asked)
    assert (ruling.role, ruling.call_id, ruling.session, ruling.budgeted) == (Role.TOOL_CALL, "call_2", SESSION, True)
    assert ruling.confidence > 0.98


def test_a_command_line_that_was_cut_short_ends_in_the_beginning_of_what_was_asked():
    asked = [Asked("a", SESSION, "python3 -c 'print(sum(range(1000)))'")]
    assert matching("/bin/bash -c python3 -c 'print(su…", asked) is asked[0]
    assert matching("/bin/bash -c python3 -c 'print(mi…", asked) is None


ALIKE = [Asked("a", SESSION, "cd /w/project && make lint"), Asked("b", SESSION, "cd /w/project && make test")]
CODEX = next(p for p in PROFILES if p.name == "codex")


def test_cut_short_where_two_that_were_asked_for_are_alike_it_is_a_call_and_neither_of_them_yet():
    cut = "/bin/bash -c cd /w/project && mak…"
    assert matching(cut, ALIKE) is None and matching(cut, [ALIKE[0], ALIKE[0]]) is ALIKE[0]
    ruling = rule(Exec(cut, below_runtime=True), None, "agent.py", ALIKE, witnessed=True)
    assert (ruling.role, ruling.call_id, ruling.budgeted) == (Role.TOOL_CALL, None, True)
    assert 0.8 < ruling.confidence < 0.95


def test_cut_short_before_the_command_begins_what_looks_as_a_call_is_one_while_something_is_asked_for():
    cut = "/proc/self/exe --codex-run-as-process-setup 55 17544 pipe  /tmp/home/.codex/snapsh…"
    for asked, role in ((ALIKE, Role.TOOL_CALL), ([], Role.HOUSEKEEPING)):
        assert rule(Exec(cut, below_runtime=True), CODEX, "codex exec x", asked, witnessed=True).role is role
    whole = cut.rstrip("…") + " ls"
    ruling = rule(Exec(whole, below_runtime=True), CODEX, "codex exec x", ALIKE, witnessed=True)
    assert ruling.role is Role.HOUSEKEEPING, "its words are there, and are others"


def test_the_calls_id_in_the_environment_goes_before_words_that_two_conversations_share():
    same = [Asked("l", SESSION, "git status"), Asked("r", SessionId("gold/bo"), "git status")]
    seen = Exec("bash -c git status", below_runtime=True, environment={"CODEX_TOOL_CALL_ID": "r"})
    ruling = rule(seen, CODEX, "codex exec x", same, witnessed=True)
    assert (ruling.call_id, ruling.session) == ("r", SessionId("gold/bo"))


def test_a_very_short_command_is_matched_whole_or_not_at_all():
    asked = [Asked("a", SESSION, "ls")]
    assert matching("/bin/bash -c ls", asked) is asked[0]
    assert matching("git ls-files --others", asked) is None


def test_of_two_equal_commands_the_one_asked_for_first_is_meant():
    asked = [Asked("a", SESSION, "make test"), Asked("b", SESSION, "make test")]
    assert matching("sh -c make test", asked) is asked[0]


def test_an_id_in_the_environment_names_the_call():
    profile = next(p for p in PROFILES if p.name == "codex")
    ruling = rule(Exec("/bin/bash -c ls", environment={"CODEX_TOOL_CALL_ID": "call_9"}), profile)
    assert (ruling.role, ruling.call_id, ruling.command) == (Role.TOOL_CALL, "call_9", "ls")


def test_the_operators_word_stands_above_profiles_and_shapes():
    rules = (RoleRule(r"^vite ", Role.SERVICE), RoleRule("^git ", Role.TOOL_CALL))
    assert rule(Exec("vite dev", below_runtime=True), rules=rules).role is Role.SERVICE
    ruling = rule(Exec("git push", below_runtime=True), PROFILES[0], "claude", rules=rules)
    assert (ruling.role, ruling.budgeted) == (Role.TOOL_CALL, True)


@pytest.mark.parametrize(
    ("command", "role", "budgeted"),
    [
        ("pytest -q", Role.TOOL_CALL, True),
        ("/bin/sh -c make", Role.TOOL_CALL, True),
        ("bash --norc", Role.SHELL, False),
        ("/bin/bash", Role.SHELL, False),
        ("bash -l", Role.SHELL, False),
        ("bash build.sh", Role.TOOL_CALL, True),
        ("npx @modelcontextprotocol/server-filesystem /", Role.SERVICE, False),
        ("/usr/bin/python3 -m my_mcp_server", Role.SERVICE, False),
        ("/usr/bin/python -c from multiprocessing.resource_tracker import main;main(7)", Role.SERVICE, False),
        (
            "python -c from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=8)",
            Role.SERVICE,
            False,
        ),
        ("typescript-language-server --stdio", Role.SERVICE, False),
        ("claude -p help", Role.START_UP, False),
        ("equipoise tool -- make", Role.TOOL_CALL, True),
        ("python -m equipoise.daemon.cli run --name x -- y", Role.WRAPPER, False),
        ("sh -c python -m equipoise.integrations.claude_code.hook", Role.WRAPPER, False),
    ],
)
def test_below_an_agent_that_nobody_knows(command, role, budgeted):
    ruling = rule(Exec(command, below_runtime=True), None, "python agent.py")
    assert (ruling.role, ruling.budgeted) == (role, budgeted)


def test_a_relaunch_of_the_agent_itself_is_protected():
    runtime = "node /opt/agent/cli.js --yolo -p hi"
    relaunch = "/usr/bin/node --max-old-space-size=8192 /opt/agent/cli.js --yolo -p hi"
    assert same_program(relaunch, runtime) and not same_program("node build.js", runtime)
    assert rule(Exec(relaunch, below_runtime=True), None, runtime).role is Role.START_UP


def test_what_writes_where_the_agent_does_may_be_the_agent_and_has_no_budget():
    ruling = rule(Exec("/opt/x/agent-bin --flag", below_runtime=True, shares_output=True), None, "node shim.js")
    assert (ruling.role, ruling.budgeted) == (Role.TOOL_CALL, False)
    assert rule(Exec("sh -c make", below_runtime=True, shares_output=True), None, "node shim.js").budgeted


@pytest.mark.parametrize(
    "command",
    ["timeout 90 codex", "env -u X codex", "sh -c codex", "npx codex", "node /usr/bin/npx codex", "npm exec codex",
     "uv run agent", "sudo -u ada claude", "git clone https://x", "/usr/lib/git-core/git-remote-https x", "curl x",
     "python3 -m pip install x", "bash start.sh"],
)  # fmt: skip
def test_a_launcher_or_a_tool_is_no_agent_whatever_it_connects_to(command):
    assert not may_be_agent(command)


@pytest.mark.parametrize("command", ["python agent.py", "/opt/codex exec x", "node cli.js", "claude", "ruby bot.rb"])
def test_any_other_program_that_speaks_may_be_the_agent(command):
    assert may_be_agent(command)


def test_where_the_conversation_is_heard_what_it_did_not_ask_for_is_housekeeping():
    asked = [Asked("a", SESSION, "pytest -q")]
    seen = Exec("git status --short", below_runtime=True)
    assert rule(seen, None, "python agent.py", asked, witnessed=True).role is Role.HOUSEKEEPING
    assert rule(seen, None, "python agent.py", [], witnessed=True).role is Role.HOUSEKEEPING
    assert rule(seen, None, "python agent.py", asked).role is Role.TOOL_CALL


def test_a_call_whose_arguments_hold_no_command_may_start_any_program():
    asked = [Asked("a", SESSION, "")]
    ruling = rule(Exec("pytest tests", below_runtime=True), None, "python agent.py", asked, witnessed=True)
    assert (ruling.role, ruling.budgeted) == (Role.TOOL_CALL, True)


def test_what_was_asked_for_must_stand_whole_in_the_command_line():
    asked = [Asked("a", SESSION, "git status"), Asked("b", SESSION, "echo 1"), Asked("c", SESSION, "make")]
    for command in ("git status --porcelain=v2", "sh -c git status -s", "/bin/sh -c echo 12", "cmake .", "make -v"):
        assert matching(command, asked) is None, command
    for command, wanted in (
        ("git status", 0),
        ("/bin/bash -c eval 'git status' < /dev/null && pwd -P >| /t", 0),
        ('sh -c "git status" 2>&1', 0),
        ("bash -c cd /w && git status; exit 3", 0),
        ("bash -c (\n  trap x EXIT\necho 1\n)\n__code=$?", 1),
        ("/usr/bin/make", 2),
    ):
        assert matching(command, asked) is asked[wanted], command


def test_of_two_that_stand_in_it_the_longer_is_meant():
    asked = [Asked("a", SESSION, "make"), Asked("b", SESSION, "cd x && make")]
    assert matching("bash -c cd x && make", asked) is asked[1]


def test_a_command_waits_from_its_asking_to_its_answer():
    asked = Asked("a", SESSION, "make", at_ns=10, answered_ns=20)
    assert [asked.waits_at(at_ns) for at_ns in (9, 10, 20, 21)] == [False, True, True, False]
    assert Asked("b", SESSION, "make", at_ns=10).waits_at(1 << 62)


def test_a_program_of_a_shell_is_of_the_line_it_stands_in_and_else_of_one_that_is_yet_to_be_told():
    asked = [Asked("a", SESSION, "cd x; ls *.c | wc -l"), Asked("b", SESSION, "cat 'two words'; make")]

    def ruled(command: str, *asked: Asked) -> Ruling:
        return rule(Exec(command, below_runtime=True, in_shell=True), asked=asked, witnessed=True)

    ruling = ruled("cat two words", *asked)
    assert (ruling.role, ruling.call_id, ruling.command) == (Role.TOOL_CALL, "b", "cat 'two words'; make")
    ruling = ruled("ls a.c b.c", *asked)
    assert (ruling.role, ruling.call_id) == (Role.TOOL_CALL, None)
    assert ruled("git --version").role is Role.HOUSEKEEPING


@pytest.mark.parametrize(
    "command", ["bash", "bash --norc", "/bin/sh -s", "bash --rcfile /tmp/x -i", "-bash", "zsh -f -i", "bash -il"]
)
def test_a_shell_without_a_command_is_fed_unless_its_input_is_a_file(command):
    assert rule(Exec(command, below_runtime=True)).role is Role.SHELL
    assert rule(Exec(command, below_runtime=True, fed=False)).role is Role.TOOL_CALL


def test_servers_and_shells_are_what_they_are_though_nobody_asked_for_them():
    for command, role in (
        ("node mcp-server-files /w", Role.SERVICE),
        ("python -c from multiprocessing.resource_tracker import main;main(4)", Role.SERVICE),
        ("bash --norc", Role.SHELL),
        ("git status", Role.HOUSEKEEPING),
    ):
        assert rule(Exec(command, below_runtime=True), witnessed=True).role is role, command


def test_one_agent_that_starts_another_makes_a_call_that_no_budget_stops():
    codex = next(p for p in PROFILES if p.name == "codex")
    ruling = rule(Exec("claude -p look", below_runtime=True), codex, "codex exec")
    assert (ruling.role, ruling.budgeted) == (Role.TOOL_CALL, False)
    assert rule(Exec("codex app-server", below_runtime=True), codex, "codex tui").role is Role.START_UP


def test_an_agents_script_is_found_behind_its_interpreters_options():
    assert is_agent("node --max-old-space-size=8192 /usr/bin/gemini --yolo")
    assert is_agent("/usr/bin/env node /opt/opencode") is False, "a launcher is none"
    assert not is_agent("python -c codex") and not is_agent("python -m codex")

"""`equipoise replay`: from trace files, from a journal, from nothing; its errors say what to give instead."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from equipoise.daemon import recordings, whatif
from equipoise.daemon.cli.main import main
from equipoise.daemon.errors import CommandError
from equipoise.daemon.observe.journal import Journal, Sample, Series
from equipoise.policies.events import Event, TurnEnded, TurnStarted
from equipoise.policies.model import NS_PER_S, ToolCall, ToolCallId
from equipoise.policies.policy import Policy
from equipoise.policies.world.daemon import Daemon
from equipoise.policies.world.machine import MACHINES
from equipoise.policies.world.names import plan
from equipoise.policies.world.traces import random_scripts, room_for
from equipoise.policies.world.world import World
from equipoise.tests.policies.world.test_traces import RUN

QUICK = ["--agents", "4", "--seconds", "120", "--warm-up", "20"]


def traces(path: Path, *runs: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


class Recording(Daemon):
    """Keeps what its host tells it."""

    def __init__(self) -> None:
        super().__init__(Policy())
        self.heard: list[Event] = []

    def hear(self, event: Event) -> None:
        self.heard.append(event)
        super().hear(event)


def test_a_journal_is_played_as_it_was_recorded(tmp_path: Path) -> None:
    """A world's own run is journalled and read back: the same turns, the same pauses, the same memory."""
    scripts = random_scripts(3, 3)
    machine = MACHINES["h100-8b"]
    daemon = Recording()
    world = World(scripts, machine, room_for(scripts, machine, 1.0, 4.0, 0), plan("decide"), daemon=daemon)
    journal = Journal.open(tmp_path / "j", boot_id="b", started_ns=0)
    calls: dict[ToolCallId, ToolCall] = {}
    samples = []
    while not world.done:
        world.step()
        calls |= daemon.state.tool_calls
        for box in daemon.state.sandboxes.values():
            used = sum(
                c.used_bytes for c in world.tools.calls.values() if world.agents[c.agent].cgroup == box.cgroup_id
            )
            at_ns = round(world.now_s * NS_PER_S)
            samples.append(Sample(at_ns, Series.SANDBOX_MEMORY, box.tenant, box.label, used))
    daemon.take_in()
    for event in daemon.heard:
        if isinstance(event, TurnStarted | TurnEnded):
            journal.record(event)
    for call in (calls | daemon.state.tool_calls).values():
        journal.record_tool_call(call)
    journal.record_samples(samples)
    journal.close()
    read = recordings.read([tmp_path / "j"])
    assert len(read) == len(scripts)
    played = {tuple((t.prompt_tokens, max(4, t.output_tokens)) for t in script.turns) for script in scripts}
    assert {tuple((t.prompt_tokens, t.output_tokens) for t in script.turns) for script in read} == played


def test_trace_files_are_read_packed_or_not_and_runs_without_a_turn_are_left_out(tmp_path: Path) -> None:
    plain = traces(tmp_path / "a.jsonl", RUN, RUN | {"turns": []}, RUN)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert len(recordings.read([plain, packed])) == 4
    assert [script.name for script in recordings.read([plain, packed])] == ["a0", "a1", "a2", "a3"]


def test_what_can_not_be_read_is_told_with_its_place_and_what_to_give(tmp_path: Path) -> None:
    broken = traces(tmp_path / "b.jsonl", RUN)
    broken.write_text(broken.read_text() + '{"turns": [{}]}\n')
    cut = tmp_path / "c.gz"
    cut.write_bytes(gzip.compress(json.dumps(RUN).encode())[:60])
    empty = traces(tmp_path / "d.jsonl", RUN | {"turns": []})
    for path, problem in (
        (tmp_path / "none", "No such file"),
        (broken, r"b\.jsonl:2: no field"),
        (cut, "give a trace file"),
        (empty, "no run with a turn"),
        (tmp_path, "give a trace file"),
    ):
        with pytest.raises(CommandError, match=problem):
            recordings.read([path])
    binary = tmp_path / "e"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match="not text"):
        recordings.read([binary])


def test_the_table_has_a_row_a_policy_and_json_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["replay", *QUICK, "--policy", "drop", "--policy", "economy"]) == 0
    shown = capsys.readouterr().out
    assert "drop" in shown and "economy" in shown and "TURNS/MIN" in shown
    path = traces(tmp_path / "a.jsonl", RUN, RUN)
    assert main(["replay", "--each", "--policy", "decide", "--disk", "none", "--json", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["setting"]["machine"] == "h100-8b" and told["setting"]["disk_bytes_per_second"] == 0
    (made,) = told["policies"]
    assert made["policy"] == "decide" and made["turns"] == 6
    assert told["bound"] == {"absent": "recordings played one after another have none"}


def test_the_bound_is_in_the_answer_where_scipy_is_installed_and_else_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["replay", *QUICK, "--policy", "drop", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    if "absent" in told["bound"]:
        assert "equipoise[whatif]" in told["bound"]["absent"]
        assert told["policies"][0]["bound_ratio"] is None
    else:
        assert 0 < told["policies"][0]["bound_ratio"] <= 1.02


def test_a_policy_document_is_played_like_a_policy_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "show"]) == 0
    document = tmp_path / "mine.yaml"
    document.write_text(capsys.readouterr().out)
    assert main(["replay", *QUICK, "--policy", str(document), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policies"][0]["policy"] == "mine"


def test_tenants_have_their_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *QUICK, "--tenants", "gold=4,silver", "--policy", "drop", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["setting"]["tenants"] == [["gold", 4.0], ["silver", 1.0]]
    assert told["policies"][0]["fairness_gap"] > 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--policy", "best"], "no policy 'best': one of"),
        (["--policy", "nowhere.yaml"], "nowhere.yaml"),
        (["--machine", "vax"], "give one of h100-8b"),
        (["--warm-up", "2000"], "leaves nothing"),
        (["--each"], "give a trace file"),
        (["nowhere.jsonl"], "No such file"),
    ],
)
def test_a_wrong_word_is_one_line_that_says_what_to_give(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *words]) == 1
    told = capsys.readouterr().err
    assert told.startswith("equipoise: ") and problem in told and told.count("\n") == 1


def test_a_machine_is_read_from_a_file_and_from_this_hosts_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"prefill_seconds_per_token": 1e-3, "decode_step_seconds": 0.01, "host_bytes_per_second": 1e9}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(figures | {"bytes_per_token": 1000}))
    assert whatif.machine(str(path), 5.0).bytes_per_token == 1000
    assert whatif.machine(str(path), 5.0).cost.disk_bytes_per_second == 5.0
    pytest.importorskip("xllamacpp", reason="the fit is the embedded engine's")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CommandError, match="not fitted yet"):
        whatif.machine("this", None)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cost-1.json").write_text(json.dumps(figures))
    assert whatif.machine("this", None).cost.decode_step_seconds == 0.01


def test_without_a_recording_long_enough_for_a_loop_it_says_so() -> None:
    script = random_scripts(1, 1)[0]
    setting = whatif.Setting(MACHINES["cpu"])
    with pytest.raises(CommandError, match="--each"):
        whatif.scripts_for([script], setting)
    assert len(whatif.scripts_for([script], replace(setting, each=True))) == 1


def test_random_agents_need_no_file_and_the_seed_decides() -> None:
    setting = whatif.Setting(MACHINES["cpu"], agents=3, tenants=(("gold", 2.0), ("silver", 1.0)))
    assert whatif.scripts_for([], setting) == whatif.scripts_for([], setting)
    assert [script.tenant for script in whatif.scripts_for([], setting)] == ["gold", "silver", "gold"]

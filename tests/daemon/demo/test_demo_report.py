"""The demo's scenario, report, tables and picture, from literals."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from equipoise.daemon.api.v1 import policy_pb2
from equipoise.daemon.demo import live, processes, report, scenario, tables, timeline, words
from equipoise.daemon.demo.agents.sample import git_environment, write_project
from equipoise.daemon.demo.record import sample_of
from equipoise.policies.document import parse_policy
from rich.console import Console

MIB = 1 << 20
S = 10**9
START = 500 * S


def call(**changes):
    fields = {
        "tool_call_id": "2a",
        "tenant_id": "bronze",
        "sandbox": "fox",
        "session_id": "bronze/fox",
        "command": "python jobs/runaway.py",
        "kind": "runaway.py",
        "source": "lineage",
        "confidence": 0.9,
        "start_ns": START + 2 * S,
        "end_ns": START + 5 * S,
        "phase": "ended",
        "peak_bytes": 512 * MIB,
        "hard_bytes": 512 * MIB,
        "overshoot_bytes": 112 * 1024,
        "stalled_ns": S,
        "signal": 9,
        "kv_held_bytes": 9 * MIB,
        "kv_idle_byte_seconds": 27.0 * MIB,
        "verdict": "swap",
        "actions": ["kill the tool call: done in 3 ms: at its largest budget"],
    }
    return policy_pb2.ToolCallView(**{**fields, **changes})


def decision(**changes):
    fields = {
        "decision_id": "d1",
        "at_ns": START + 3 * S,
        "rule": "at its largest budget",
        "tenant_id": "bronze",
        "subject": "bronze/fox runaway.py",
        "evidence": "512 MiB of 512 MiB",
        "action": "kill the tool call",
        "outcome": "completed",
        "latency_ms": 3.25,
        "tool_call_id": "2a",
    }
    return policy_pb2.DecisionView(**{**fields, **changes})


def watch(at_s, sandboxes=True):
    response = policy_pb2.WatchResponse(now_ns=START + int(at_s * S))
    response.host.tool_pool_bytes = 800 * MIB
    response.host.tool_used_bytes = 300 * MIB
    for tenant, weight, share in (("gold", 4.0, 0.1), ("bronze", 1.0, 0.4)):
        response.tenants.add(
            tenant_id=tenant,
            weight=weight,
            dominant_share=share,
            dominant_resource="memory",
            kv_device_bytes=9 * MIB,
            kv_host_bytes=2 * MIB,
        )
    if sandboxes:
        response.sandboxes.add(tenant_id="bronze", name="fox", cgroup_id=77, memory_bytes=int(at_s * 60) * MIB)
        response.sandboxes.add(tenant_id="gold", name="ada", cgroup_id=78, memory_bytes=120 * MIB)
    response.engines.add(
        kind="embedded",
        attached=True,
        bytes_per_token=23040,
        device_capacity_tokens=2048,
        swap_out_count=3,
        swap_out_bytes=30 * MIB,
        swap_out_ns=40_000_000,
        swap_in_count=2,
        swap_in_bytes=20 * MIB,
        swap_in_ns=25_000_000,
        recomputed_tokens=17,
        cached_tokens=900,
    )
    return response


def agent(name="fox", exit_code=0, **changes):
    fields = {
        "tenant": "bronze",
        "name": name,
        "plan": "runaway",
        "exit_code": exit_code,
        "ended": "plan done",
        "turn_count": 5,
        "tool_count": 4,
        "killed_count": 1,
        "prompt_tokens": 900,
        "cached_tokens": 600,
        "output_tokens": 100,
        "ttft_mean_seconds": 0.5,
        "notices": ("at its largest budget: 512 MiB of 512 MiB",),
        "last_answer": "Done.",
    }
    return report.AgentReport(**{**fields, **changes})


def built(**changes):
    responses = [watch(t) for t in range(8)]
    fields = {
        "status": policy_pb2.GetStatusResponse(
            version="0.1.0", probe_backend="libbpf", cgroup_layout="hybrid", ring_drop_count=2, late_event_count=1
        ),
        "calls": [call()],
        "decisions": [decision()],
        "engines": list(responses[-1].engines),
        "samples": [sample_of(r) for r in responses],
        "agents": [agent()],
    }
    return report.build(**{**fields, **changes})


def text_of(finished, width=170):
    text = io.StringIO()
    tables.print_report(finished, Console(width=width, file=text))
    return text.getvalue()


def test_the_json_holds_what_the_main_job_must_show(tmp_path):
    report.write(built(), tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    (one,) = written["tool_calls"]
    assert one["id"] == "2a" and one["tenant"] == "bronze" and one["sandbox"] == "fox"
    assert one["source"] == "lineage" and one["confidence"] == 0.9
    assert one["end_ns"] - one["start_ns"] == 3 * S
    assert one["peak_bytes"] == 512 * MIB and one["overshoot_bytes"] == 112 * 1024
    assert one["kv_held_bytes"] == 9 * MIB and one["kv_idle_byte_seconds"] == 27.0 * MIB
    assert one["verdict"] == "swap" and one["actions"] == ["kill the tool call: done in 3 ms: at its largest budget"]
    assert written["engine"]["swap_out_bytes"] == 30 * MIB and written["engine"]["swap_in_ms"] == 25.0
    assert written["engine"]["recomputed_tokens"] == 17
    (made,) = written["decisions"]
    assert made["latency_ms"] == 3.25 and made["outcome"] == "completed" and made["rule"] == "at its largest budget"
    assert written["losses"] == {"ring_drops": 2, "late_events": 1, "failed_actions": 0}
    assert (written["probe_backend"], written["cgroup_layout"]) == ("libbpf", "hybrid")


def test_what_is_not_known_is_null_and_never_zero(tmp_path):
    running = call(end_ns=0, phase="running")
    running.ClearField("signal")
    running.ClearField("overshoot_bytes")
    waiting = decision(outcome="")
    waiting.ClearField("latency_ms")
    finished = built(calls=[running], decisions=[waiting])
    one = finished.tool_calls[0]
    assert one.end_ns is None and one.signal is None and one.exit_code is None and one.overshoot_bytes is None
    assert finished.decisions[0].latency_ms is None


def test_a_sandbox_that_is_gone_keeps_its_name():
    assert built(calls=[call(sandbox="77")]).tool_calls[0].label == "bronze/fox"


def test_fairness_is_per_tenant_heaviest_first():
    gold, bronze = built().fairness
    assert (gold.tenant, gold.weight, bronze.tenant) == ("gold", 4.0, "bronze")
    assert bronze.dominant_share_mean == pytest.approx(0.4)
    assert bronze.service_tokens == 900 - 600 + 2 * 100
    assert bronze.stalled_seconds == 1.0 and gold.stalled_seconds == 0.0


def test_a_good_demo_has_no_complaints():
    assert built().complaints() == ()


def test_a_failed_agent_is_a_complaint():
    (complaint,) = built(agents=[agent(exit_code=1, ended="the engine does not answer")]).complaints()
    assert complaint == "agent bronze/fox: the engine does not answer (exit code 1)"


def test_an_agent_that_had_to_be_ended_is_a_complaint():
    assert len(built(agents=[agent(exit_code=None)]).complaints()) == 1


def test_nothing_correlated_is_a_complaint():
    assert built(calls=[call(kv_held_bytes=0)]).complaints() == ("no tool call was correlated with KV",)


def test_no_tool_call_at_all_is_a_complaint():
    assert built(calls=[]).complaints() == ("no tool call was seen",)


def test_the_tables_say_what_was_done_and_why():
    text = text_of(built())
    assert "SIGKILL" in text and "512 MiB" in text and "27.0 MiB·s" in text and "lineage 90%" in text
    assert "bronze/fox was told: at its largest budget: 512 MiB of 512 MiB" in text
    assert "stopped in the kernel at its budget (112 KiB above it at most), then ended" in text
    assert "KV moved out to host RAM 3 times (30.0 MiB in 40 ms)" in text
    assert "2 ring events, 1 late" in text


def test_nothing_that_did_not_happen_is_claimed():
    quiet = call(exit_code=0)
    quiet.ClearField("signal")
    quiet.ClearField("overshoot_bytes")
    text = text_of(built(calls=[quiet], engines=[], agents=[agent(killed_count=0)]))
    assert "stopped in the kernel" not in text and "moved out" not in text and "was told" not in text


def test_brackets_in_commands_and_answers_are_not_taken_for_markup():
    text = text_of(built(calls=[call(command="ls [bold]x[/bold]")], agents=[agent(last_answer="[/] broke")]))
    assert "[bold]x[/bold]" in text and "[/] broke" in text


def test_of_many_decisions_the_rare_kinds_are_shown():
    many = [decision(decision_id=f"k{n}", at_ns=START + n, action="keep KV for 5 s") for n in range(200)]
    text = text_of(built(decisions=[*many, decision(at_ns=START + 7 * S)]))
    assert "kill the tool call" in text and "Decisions (201, the 24 most telling)" in text


def test_an_agents_log_is_summed_up_even_if_it_breaks_off(tmp_path):
    log = tmp_path / "fox.jsonl"
    turn = {"kind": "turn", "prompt_tokens": 100, "cached_tokens": 40, "output_tokens": 9, "ttft_seconds": 0.5}
    tool = {"kind": "tool", "command": "x", "signal": 9, "accepted": True, "notice": "budget"}
    lines = [json.dumps({**turn, "answer": "a"}), json.dumps(tool), json.dumps({**turn, "answer": " b "})]
    log.write_text("\n".join([*lines, '{"kind": "tu']))
    summed = report.read_agent(scenario.AGENTS[5], log, None)
    assert (summed.turn_count, summed.tool_count, summed.killed_count) == (2, 1, 1)
    assert (summed.prompt_tokens, summed.cached_tokens, summed.output_tokens) == (200, 80, 18)
    assert summed.notices == ("budget",) and summed.last_answer == "b"
    assert summed.ended == "ended before its plan was done"


def test_an_agent_without_a_log_is_reported(tmp_path):
    assert report.read_agent(scenario.AGENTS[0], tmp_path / "none", 1).turn_count == 0


def test_the_picture_is_a_png_with_every_tenant_in_its_colour(tmp_path):
    from matplotlib import image

    path = tmp_path / "timeline.png"
    responses = [watch(t / 2) for t in range(16)]
    timeline.draw(built(), [sample_of(r) for r in responses], path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 1000 and pixels.shape[1] > 1500
    gold = (abs(pixels[:, :, :3] - [0xD9 / 255, 0xA5 / 255, 0x14 / 255]).sum(axis=2) < 0.02).sum()
    bronze = (abs(pixels[:, :, :3] - [0xB0 / 255, 0x6A / 255, 0x3B / 255]).sum(axis=2) < 0.02).sum()
    assert gold > 5000 and bronze > 5000


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the daemon was never heard"):
        timeline.draw(built(samples=[]), [], tmp_path / "x.png")


def test_the_demos_policy_is_valid_and_covers_its_agents():
    policy = parse_policy(scenario.POLICY)
    assert {agent.tenant for agent in scenario.AGENTS} == {tenant.id for tenant in policy.tenants}
    assert len({(agent.tenant, agent.name) for agent in scenario.AGENTS}) == 6
    assert len({tenant.weight for tenant in policy.tenants}) == 3


def test_preparing_replaces_only_what_an_earlier_demo_left(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    first = scenario.prepare(tmp_path)
    first.report.write_text("old")
    again = scenario.prepare(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert not again.report.exists()
    assert again.state.stat().st_mode & 0o777 == 0o700
    assert all((again.workdir(agent) / ".git").is_dir() for agent in scenario.AGENTS)


def test_the_sample_projects_tests_fail_until_the_patch_is_applied(tmp_path):
    work = tmp_path / "work"
    write_project(work, kernel_count=3)
    environment = {**os.environ, **dict(git_environment()), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(*argv):
        return subprocess.run(argv, cwd=work, env=environment, capture_output=True, text=True, check=False).returncode

    pytest_argv = (sys.executable, "-m", "pytest", "-q", "tests/test_cart.py")
    assert run(*pytest_argv) == 1
    assert run("git", "apply", "fix.patch") == 0
    assert run(*pytest_argv) == 0
    assert run("git", "commit", "-qam", "fixed") == 0


@pytest.mark.parametrize(("text", "seconds"), [("", 60.0), ("20", 20.0), ("7.5", 7.5)])
def test_demo_seconds_bounds_the_demo(monkeypatch, text, seconds):
    monkeypatch.setenv("DEMO_SECONDS", text)
    assert scenario.seconds_from_environment() == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "1e9"])
def test_a_wrong_demo_seconds_is_refused_with_the_remedy(monkeypatch, text):
    monkeypatch.setenv("DEMO_SECONDS", text)
    with pytest.raises(ValueError, match="give a number of seconds from 5 to 3600"):
        scenario.seconds_from_environment()


def test_a_process_that_escaped_with_setsid_is_found_by_its_folder_and_ended(tmp_path):
    argv = (sys.executable, "-c", "import time; time.sleep(60)")
    mine = subprocess.Popen(argv, cwd=tmp_path, start_new_session=True)
    other = subprocess.Popen(argv, cwd=tmp_path.parent, start_new_session=True)
    try:
        deadline = time.monotonic() + 5
        killed: list[str] = []
        while not killed and time.monotonic() < deadline:
            killed = processes.kill_leftovers(tmp_path)
        assert len(killed) == 1 and mine.wait(5) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_without_a_terminal_progress_is_one_line_each_two_seconds():
    text = io.StringIO()
    with live.view_for(Console(width=120, file=text), 60) as view:
        for _ in range(5):
            view.show(watch(1))
    lines = text.getvalue().splitlines()
    assert len(lines) == 1 and "memory 300 MiB of 800 MiB" in lines[0]


def test_on_a_terminal_the_live_table_shows_running_calls():
    response = watch(1)
    response.tool_calls.add().CopyFrom(call(end_ns=0, phase="stopped", used_bytes=512 * MIB))
    out = io.StringIO()
    Console(width=160, file=out).print(live.picture(response, 10, 60))
    text = out.getvalue()
    assert "stopped" in text and "██████████" in text and "python jobs/runaway.py" in text


def test_quantities_read_as_people_write_them():
    assert words.size(None) == "-" and words.size(3 * MIB) == "3.0 MiB" and words.size(5 << 30) == "5.0 GiB"
    assert words.seconds(2_500_000_000) == "2.5 s" and words.seconds(12_000_000) == "12 ms"
    assert (
        words.ending(None, 9) == "SIGKILL"
        and words.ending(0, None) == "exit 0"
        and words.ending(None, 99) == "signal 99"
    )

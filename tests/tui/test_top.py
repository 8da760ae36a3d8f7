"""The dashboard, driven as a person would, against a real gRPC server that answers from literals."""

import asyncio
import contextlib
import html
import re
import subprocess
import sys

import pytest
from equipoise.daemon.api.v1 import policy_pb2 as pb
from equipoise.tests.fixtures.daemon_server import MIB, DaemonServer
from equipoise.tui import text
from equipoise.tui.app import TopApp
from equipoise.tui.connection import NoDaemon, check, default_socket
from equipoise.tui.order import Order, ordered
from equipoise.tui.screens.detail import Detail
from equipoise.tui.screens.help import Help
from equipoise.tui.widgets.banner import Banner
from equipoise.tui.widgets.decisions import DecisionTable
from equipoise.tui.widgets.host_line import HostLine
from equipoise.tui.widgets.tool_calls import ToolCallTable

S = 10**9
NOW = 1000 * S


def call(number, **changes):
    fields = {
        "tool_call_id": f"{number:016x}",
        "tenant_id": "gold",
        "sandbox": "ada",
        "command": f"pytest -q part{number}",
        "source": "lineage",
        "confidence": 0.9,
        "start_ns": NOW - number * S,
        "phase": "running",
        "used_bytes": 64 * MIB,
        "peak_bytes": 128 * MIB,
        "hard_bytes": 256 * MIB,
        "kv_held_bytes": 9 * MIB,
        "verdict": "swap",
    }
    return pb.ToolCallView(**{**fields, **changes})


def decision(number, **changes):
    fields = {
        "decision_id": f"d{number}",
        "at_ns": NOW - number * S,
        "rule": "tool call at its largest budget",
        "tenant_id": "gold",
        "subject": "gold/ada pytest",
        "evidence": "it stood at 256 MiB of 256 MiB",
        "action": "kill the tool call",
        "outcome": "completed",
        "latency_ms": 3.2,
        "tool_call_id": f"{1:016x}",
        "candidates": [pb.CandidateView(name="kill", cost=0.5), pb.CandidateView(name="wait", cost=2.0)],
    }
    return pb.DecisionView(**{**fields, **changes})


def watch(calls=(), decisions=()):
    return pb.WatchResponse(
        now_ns=NOW,
        host=pb.HostView(
            memory_total_bytes=24 << 30,
            memory_available_bytes=18 << 30,
            psi_some_ratio=0.031,
            tool_pool_bytes=800 * MIB,
            tool_used_bytes=600 * MIB,
        ),
        tenants=[
            pb.TenantView(tenant_id="bronze", weight=1, dominant_share=0.4, kv_device_bytes=5 * MIB),
            pb.TenantView(tenant_id="gold", weight=4, dominant_share=0.1, dominant_resource="kv", kv_host_bytes=MIB),
        ],
        engines=[
            pb.EngineView(
                kind="embedded",
                model="SmolLM2",
                attached=True,
                bytes_per_token=23040,
                device_used_tokens=1700,
                device_capacity_tokens=2048,
                host_used_bytes=12 * MIB,
                host_capacity_bytes=64 * MIB,
                swap_out_count=9,
            )
        ],
        tool_calls=list(calls),
        decisions=list(decisions),
    )


@pytest.fixture
def server(tmp_path):
    with DaemonServer(tmp_path / "d.sock") as running:
        running.watch = watch([call(1), call(2), call(3)], [decision(1)])
        yield running


@contextlib.asynccontextmanager
async def top(server, size=(160, 44)):
    app = TopApp(str(server.socket), interval_ms=100)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.dashboard.query_one(ToolCallTable).row_count > 0)
        yield app, pilot


async def until(pilot, claim, seconds=5.0):
    """Wait until the claim holds; fails the test where it never does."""
    for _ in range(int(seconds / 0.05)):
        await pilot.pause(0.05)
        if claim():
            return
    raise AssertionError("it never came to hold")


def rows(app, table=ToolCallTable):
    """The table as text, one string a row."""
    shown = app.screen_stack[1].query_one(table)
    return [" | ".join(str(cell) for cell in shown.get_row_at(n)) for n in range(shown.row_count)]


def picture(app):
    """What is on the screen, line by line."""
    pieces = re.findall(r'<text[^>]* x="([0-9.]+)" y="([0-9.]+)"[^>]*>(.*?)</text>', app.export_screenshot(), re.S)
    lines: dict[float, list[tuple[float, str]]] = {}
    for x, y, piece in pieces:
        lines.setdefault(float(y), []).append((float(x), html.unescape(piece).replace("\xa0", " ")))
    return ["".join(piece for _, piece in sorted(line)) for _, line in sorted(lines.items())]


def plain(widget):
    return str(widget.render())


async def test_tool_calls_are_listed_with_memory_kv_and_verdict(server):
    async with top(server) as (app, _):
        first = rows(app)[0]
        assert "gold/ada" in first and "pytest -q part1" in first and "running" in first
        assert "64 MiB of 256 MiB" in first and "128 MiB" in first and "9.0 MiB" in first
        assert "swap" in first and "lineage 90%" in first
        assert app.dashboard.query_one(ToolCallTable).border_title.startswith("Tool calls: 3 running, 0 ended")


async def test_an_ended_call_says_how_it_ended(server):
    server.watch = watch([call(1, end_ns=NOW, phase="ended", signal=9), call(2, end_ns=NOW, exit_code=0)])
    async with top(server) as (app, _):
        assert "SIGKILL" in rows(app)[0] and "exit 0" in rows(app)[1]


async def test_host_and_pressure_are_shown(server):
    async with top(server) as (app, _):
        line = plain(app.dashboard.query_one(HostLine))
        assert "6.0 GiB of 24 GiB" in line and "600 MiB of 800 MiB" in line and "3.1%" in line


async def test_a_host_without_psi_says_so_and_a_gpu_is_shown_where_there_is_one(server):
    server.watch.host.ClearField("psi_some_ratio")
    server.watch.host.gpu_total_bytes = 80 << 30
    server.watch.host.gpu_used_bytes = 20 << 30
    async with top(server) as (app, _):
        line = plain(app.dashboard.query_one(HostLine))
        assert "not available" in line and "20 GiB of 80 GiB" in line


async def test_kv_is_shown_by_tier_and_by_tenant_heaviest_first(server):
    async with top(server) as (app, pilot):
        await pilot.pause(0.2)
        shown = "\n".join(picture(app))
        for piece in ("device 1700 of 2048 tokens", "12 MiB of 64 MiB", "out 9, in 0", "5.0 MiB"):
            assert piece in shown
        tenants = re.findall(r"│(gold|bronze) +[14]", shown)
        assert tenants == ["gold", "bronze"]


async def test_without_an_engine_the_panel_says_how_to_get_one(server):
    del server.watch.engines[:]
    async with top(server) as (app, pilot):
        await pilot.pause(0.2)
        assert "no engine is attached" in "\n".join(picture(app))


async def test_decisions_carry_their_evidence(server):
    async with top(server) as (app, _):
        (row,) = rows(app, DecisionTable)
        assert "kill the tool call" in row and "completed 3.2 ms" in row and "it stood at 256 MiB of 256 MiB" in row


async def test_s_sorts_and_says_by_what(server):
    server.watch = watch([call(1, used_bytes=1 * MIB), call(2, used_bytes=200 * MIB)])
    async with top(server) as (app, pilot):
        assert "part1" in rows(app)[0]
        await pilot.press("s")
        assert "part2" in rows(app)[0]
        assert str(app.dashboard.query_one(ToolCallTable).border_subtitle).startswith("by memory")


async def test_p_freezes_the_picture_and_p_again_shows_the_newest(server):
    async with top(server) as (app, pilot):
        await pilot.press("p")
        assert "paused" in plain(app.dashboard.query_one(Banner))
        server.watch = watch([call(9)])
        await pilot.pause(0.5)
        assert len(rows(app)) == 3
        await pilot.press("p")
        await until(pilot, lambda: len(rows(app)) == 1)
        assert not app.dashboard.query_one(Banner).display


async def test_the_cursor_stays_on_its_call_while_rows_come_and_go(server):
    async with top(server) as (app, pilot):
        table = app.dashboard.query_one(ToolCallTable)
        await pilot.press("down")
        assert table.current_key == f"{2:016x}"
        server.watch = watch([call(0), call(1), call(2), call(3)])
        await until(pilot, lambda: table.row_count == 4)
        assert table.current_key == f"{2:016x}"
        assert table.cursor_row == 2


async def test_enter_explains_the_call_under_the_cursor(server):
    server.watch = watch([call(1, overshoot_bytes=112 * 1024, stalled_ns=2 * S, actions=["grant 352 MiB: done"])])
    server.decisions = [decision(1), decision(2, tool_call_id="other", evidence="about another one")]
    async with top(server) as (app, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Detail) and app.screen.decisions is not None)
        await pilot.pause(0.2)
        shown = "\n".join(picture(app))
        assert "112 KiB above it at most" in shown and "grant 352 MiB: done" in shown
        assert "it stood at 256 MiB of 256 MiB" in shown and "about another one" not in shown
        assert "weighed:" in shown and "wait 2" in shown
        await pilot.press("escape")
        assert app.screen is app.dashboard


async def test_a_dry_run_is_called_so(server):
    server.watch = watch([call(1, would_be="ended")])
    server.decisions = [decision(1, outcome="dry-run")]
    async with top(server) as (app, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Detail) and app.screen.decisions is not None)
        await pilot.pause(0.2)
        shown = "\n".join(picture(app))
        assert "would be ended" in shown and "dry-run" in shown


async def test_a_call_about_which_nothing_was_decided_says_so(server):
    async with top(server) as (app, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Detail) and app.screen.decisions is not None)
        await pilot.pause(0.2)
        assert "Nothing was decided about it." in "\n".join(picture(app))


async def test_enter_on_a_decision_shows_what_was_weighed(server):
    async with top(server) as (app, pilot):
        await pilot.press("tab")
        assert app.focused is app.dashboard.query_one(DecisionTable)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Detail))
        await pilot.pause(0.2)
        assert "weighed:" in "\n".join(picture(app))


async def test_brackets_in_a_command_are_shown_as_they_are(server):
    server.watch = watch([call(1, command="ls [bold]x[/bold] [/]")])
    async with top(server) as (app, pilot):
        assert "ls [bold]x[/bold] [/]" in rows(app)[0]
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Detail))


async def test_question_mark_explains_keys_and_words(server):
    async with top(server) as (app, pilot):
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        await pilot.press("escape")
        assert app.screen is app.dashboard


async def test_q_leaves(server):
    async with top(server) as (app, pilot):
        await pilot.press("q")
        await pilot.pause(0.1)
        assert not app.is_running


async def test_a_daemon_that_goes_away_is_a_banner_and_coming_back_clears_it(server):
    async with top(server) as (app, pilot):
        server.stop()
        banner = app.dashboard.query_one(Banner)
        await until(pilot, lambda: banner.display and "trying again" in plain(banner))
        assert banner.has_class("alarm")
        assert len(rows(app)) == 3, "what was known stays to be seen"
        server.watch = watch([call(7)])
        server.start()
        await until(pilot, lambda: not banner.display and len(rows(app)) == 1, seconds=15)


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (220, 60)])
async def test_it_stands_on_small_and_large_terminals_and_through_a_resize(server, size):
    async with top(server, size) as (app, pilot):
        await pilot.resize_terminal(140, 40)
        await pilot.pause(0.2)
        assert len(rows(app)) == 3
        await pilot.resize_terminal(*size)
        await pilot.pause(0.2)
        assert len(rows(app)) == 3


async def test_many_answers_leave_no_tasks_behind(server):
    before = len(asyncio.all_tasks())
    async with top(server) as (_, pilot):
        await pilot.pause(0.5)
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)


def test_no_daemon_is_one_line_with_the_remedy(tmp_path):
    with pytest.raises(NoDaemon, match=r"no daemon at .*: start one with `equipoise daemon`"):
        check(str(tmp_path / "none.sock"))


def test_the_command_says_so_and_fails(tmp_path):
    argv = (sys.executable, "-m", "equipoise.daemon.cli", "top", "--socket", str(tmp_path / "none.sock"))
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("equipoise: no daemon at") and len(done.stderr.splitlines()) == 1


def test_the_command_without_a_terminal_names_the_one_that_needs_none(server):
    argv = (sys.executable, "-m", "equipoise.daemon.cli", "top", "--socket", str(server.socket))
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "equipoise ps" in done.stderr


def test_the_socket_comes_from_the_environment_first(monkeypatch):
    monkeypatch.setenv("EQUIPOISE_SOCKET", "/somewhere.sock")
    assert default_socket() == "/somewhere.sock"


def test_the_default_socket_is_the_daemons(monkeypatch):
    from equipoise.daemon.rpc import client

    monkeypatch.delenv("EQUIPOISE_SOCKET", raising=False)
    assert default_socket() == client.default_socket()


def test_running_calls_come_before_ended_ones_in_every_order():
    calls = [call(1, end_ns=NOW, peak_bytes=900 * MIB, kv_held_bytes=99 * MIB), call(2, tenant_id="zinc")]
    for order in Order:
        assert [c.tool_call_id for c in ordered(calls, order)] == [f"{2:016x}", f"{1:016x}"]


def test_every_order_is_reached_and_comes_round():
    order, seen = Order.NEWEST, []
    for _ in Order:
        seen.append(order)
        order = order.next()
    assert order is Order.NEWEST and set(seen) == set(Order)


@pytest.mark.parametrize(
    ("used", "peak", "expected"),
    [(0, 0, "░░░░░░░░░░"), (50, 80, "█████▓▓▓░░"), (100, 100, "██████████"), (250, 300, "██████████")],
)
def test_a_bar_never_leaves_its_width(used, peak, expected):
    assert text.bar(used, 100, 10, peak).plain == expected


def test_a_bar_of_nothing_is_blank():
    assert text.bar(5, 0, 4).plain == "    "


@pytest.mark.parametrize(("ns", "shown"), [(0, "0.0s"), (59 * S, "59.0s"), (125 * S, "2m05s"), (3720 * S, "1h02m")])
def test_durations_are_short(ns, shown):
    assert text.duration(ns) == shown

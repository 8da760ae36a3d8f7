"""200 sandboxes under one daemon: every call is known, once; and what is lost is said, and found again."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from equipoise.tests.fixtures.many_agents import ManyAgents, Orders
from equipoise.tests.fixtures.running_daemon import RunningDaemon, eventually

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
FULL = "EQUIPOISE_FULL" in os.environ


Make = Callable[..., tuple[RunningDaemon, ManyAgents]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A daemon with the given options and so many agents."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups and load eBPF programs")
    with ExitStack() as ends:

        def started(agents: int, *options: str) -> tuple[RunningDaemon, ManyAgents]:
            daemon = RunningDaemon(tmp_path)
            ends.callback(daemon.close)
            daemon.start(*options)
            if not daemon.status().probe_backend.startswith("libbpf"):
                pytest.skip(f"no probes here: {daemon.status().probe_backend}")
            many = ManyAgents(daemon, agents)
            ends.callback(many.close)
            return daemon, many

        yield started


def running(daemon: RunningDaemon) -> list[str]:
    return [call.command for call in daemon.tool_calls() if not call.end_ns]


def all_over(daemon: RunningDaemon, many: ManyAgents) -> None:
    """The agents leave, and nothing of them stays."""
    many.leave()
    eventually(lambda: not daemon.watch().sandboxes, within_s=30)
    assert "Traceback" not in daemon.said() and "turn_failed" not in daemon.log.read_text()
    assert daemon.stop() == 0
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}"))


def test_a_thousand_calls_a_minute_in_200_sandboxes_are_all_known_once_and_right(make: Make) -> None:
    daemon, many = make(200)
    many.run(Orders(seconds=60 if FULL else 2, period_s=12.0 if FULL else 2.0), within_s=120)
    eventually(lambda: not running(daemon))
    assert dict(daemon.status().losses) == {} and daemon.status().late_event_count == 0
    all_over(daemon, many)
    found = many.compare()
    print(f"{found.true} calls of 200 sandboxes")
    assert found.perfect, found
    assert found.due == found.known == found.true >= (900 if FULL else 200)


def test_what_a_full_ring_hides_is_counted_by_kind_said_and_found_again(make: Make) -> None:
    """The daemon's own process is stopped: nobody reads. Calls begin and end, others begin and stay."""
    daemon, many = make(40, "--ring-bytes", "32KiB", "--metrics-listen", "127.0.0.1:0")
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        many.run(Orders(calls=3, period_s=0.02, held_s=(0.0, 0.01)))
        many.begin(Orders(calls=1, held_s=(4.0, 4.5)))
        time.sleep(1.0)
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    eventually(lambda: len(running(daemon)) == 40)
    assert {call.sandbox for call in daemon.tool_calls() if not call.end_ns} == {f"a{n}" for n in range(40)}
    losses = dict(daemon.status().losses)
    assert losses.keys() == {f"ring buffer: {kind}" for kind in ("tool_exec", "tool_exit", "tool_gone")}
    metrics = scrape(daemon)
    for source, count in losses.items():
        assert f'equipoise_events_lost_total{{source="{source}"}} {float(count)}' in metrics
    many.end()
    eventually(lambda: not running(daemon))
    assert "what the probes lost" in daemon.cli("doctor", "--json").stdout
    many.run(Orders(calls=1, held_s=(0.0, 0.1)))
    eventually(lambda: not running(daemon) and "events_lost_in_all" in daemon.log.read_text(), within_s=15)
    assert len(re.findall(r"events_lost ", daemon.log.read_text())) == 1, "once a burst"
    all_over(daemon, many)
    found = many.compare()
    assert not (found.phantom or found.double or found.open), found
    assert not [word for word in found.lost if not re.search("-1-[123]-end", word)], "those of the first round alone"
    assert not [line for line in found.wrong if "-3-1-end" in line], "and afterwards all is told again"


def test_calls_for_which_there_is_no_record_are_said_and_known_as_soon_as_there_is_one(make: Make) -> None:
    daemon, many = make(20, "--tool-records", "40")
    many.begin(Orders(calls=2, at_once=2, held_s=(3.0, 3.5)))
    eventually(lambda: daemon.status().unrecorded_call_count >= 20)
    assert dict(daemon.status().losses) == {"not followed: no_slot": 20}
    eventually(lambda: len(running(daemon)) == 20)
    many.end()
    eventually(lambda: daemon.status().unrecorded_call_count == 0)
    many.run(Orders(calls=4, period_s=0.4, held_s=(0.0, 0.05), agents=10))
    eventually(lambda: not running(daemon))
    assert dict(daemon.status().losses) == {"not followed: no_slot": 20}, "every record came back"
    all_over(daemon, many)
    found = many.compare()
    assert not (found.phantom or found.double or found.open), found
    assert not [word for word in found.lost if re.search(r"-2-\d+-end", word)]


def scrape(daemon: RunningDaemon) -> str:
    import urllib.request

    with urllib.request.urlopen(daemon.status().metrics_url, timeout=10) as answer:
        return str(answer.read().decode())

"""A pool too small for all at once: calls get memory one after another, and nobody is ended who could have waited."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

import pytest
from equipoise.policies.model import MIB
from equipoise.tests.fixtures.running_daemon import RunningDaemon, eventually, with_probes

pytestmark = pytest.mark.kernel

POLICY = """
apiVersion: equipoise/v1
kind: Policy
metadata: {name: tight}
spec:
  mode: enforce
  tenants: {gold: {weight: 2}, silver: {weight: 1}}
  memory:
    toolPool: 500MiB
    budget: {soft: 96MiB, hard: 128MiB, step: 64MiB, max: 500MiB}
    maxWait: 60s
"""
GROW = """
import sys, time
peak, held = int(sys.argv[1]), []
while len(held) * 4 < peak - 12:
    held.append(bytearray(b"x" * (4 << 20)))
    time.sleep(0.01)
time.sleep(0.3)
"""


@pytest.fixture
def daemon(tmp_path) -> Iterator[RunningDaemon]:
    """A daemon that has learned nothing yet."""
    with with_probes(tmp_path, policy=POLICY) as running:
        yield running


def serial_s(peaks_mib: list[int]) -> float:
    """What they take one after another, as GROW says: their sleeping alone."""
    return sum(0.3 + peak / 4 * 0.01 for peak in peaks_mib)


@pytest.mark.parametrize(
    "peaks_mib", [[300] * 2, [300] * 3, [300, 250, 200, 150], random.Random(8).choices(range(30, 300), k=8)]
)
def test_calls_that_fit_one_after_another_all_end_well_together(daemon, peaks_mib):
    agents = [daemon.agent(("gold", "silver")[n % 2], f"a{n}-{len(peaks_mib)}") for n in range(len(peaks_mib))]
    eventually(lambda: len(daemon.watch().sandboxes) == len(agents))
    began = time.monotonic()
    for agent, peak in zip(agents, peaks_mib, strict=True):
        agent.begin(sys.executable, "-S", "-c", GROW, str(peak))
    done = [agent.result() for agent in agents]
    took_s = time.monotonic() - began
    assert [each.returncode for each in done] == [0] * len(agents), [each.stderr for each in done]
    names = {agent.name for agent in agents}
    calls = [c for c in daemon.tool_calls() if c.sandbox in names and c.kind != "true"]
    assert len(calls) == len(agents) and all(c.exit_code == 0 for c in calls)
    assert max(c.peak_bytes for c in calls) > (max(peaks_mib) - 20) * MIB
    print(f"{peaks_mib}: {took_s:.1f} s together, {serial_s(peaks_mib):.1f} s of sleeping one after another")
    for agent in agents:
        agent.leave()
    eventually(lambda: not daemon.watch().sandboxes)

"""The demo's cast: tenants, agents, the policy they live under, and the capacities that make memory scarce.

Owns these figures and the folder layout under the output directory. Must not: start anything.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...policies.model import MIB
from .agents.plan import BUILD, DATA, HISTORY, RUNAWAY, SERVER, TESTS, Plan
from .agents.sample import write_project

DEFAULT_SECONDS = 60.0
SHORTEST_SECONDS = 5.0
LONGEST_SECONDS = 3600.0

# The sessions grow to 400-700 tokens each, about 3000 together: half of them fit, the other half must go somewhere.
KV_DEVICE_TOKENS = 1536
# Of the default model (23,040 bytes a token) this holds some 2900 tokens: enough that swapping is a real choice.
KV_HOST_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent of the demo. Its sandbox has the same name."""

    tenant: str
    name: str
    plan: Plan


AGENTS = (
    Agent("gold", "ada", TESTS),
    Agent("gold", "bo", BUILD),
    Agent("silver", "cyd", DATA),
    Agent("silver", "dee", HISTORY),
    Agent("bronze", "eve", SERVER),
    Agent("bronze", "fox", RUNAWAY),
)

# One machine of any size: the pool is small on purpose, so that the bursts below meet it.
POLICY = {
    "apiVersion": "equipoise/v1",
    "kind": "Policy",
    "metadata": {"name": "demo"},
    "spec": {
        "mode": "enforce",
        "tenants": {"gold": {"weight": 4}, "silver": {"weight": 2}, "bronze": {"weight": 1}},
        "memory": {
            "toolPool": "800MiB",
            "budget": {"soft": "192MiB", "hard": "256MiB", "max": "512MiB", "step": "96MiB"},
            "maxWait": "15s",
            "pressure": {"above": 0.85, "below": 0.7, "for": "1s"},
            "throttle": {"cpu": 0.2, "for": "2s"},
        },
        "kv": {"decideAfter": "300ms", "dwell": "2s", "retain": "5s"},
    },
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the demo writes. Everything under `root` belongs to the demo and is replaced by the next run."""

    root: Path

    @property
    def state(self) -> Path:
        """The daemon's socket and journal."""
        return self.root / "state"

    @property
    def policy(self) -> Path:
        return self.root / "policy.yaml"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def timeline(self) -> Path:
        return self.root / "timeline.png"

    @property
    def daemon_log(self) -> Path:
        return self.root / "daemon.log"

    def workdir(self, agent: Agent) -> Path:
        return self.root / "work" / agent.name

    def agent_log(self, agent: Agent) -> Path:
        """JSON lines: what the agent did."""
        return self.root / "agents" / f"{agent.name}.jsonl"

    def agent_output(self, agent: Agent) -> Path:
        """What the agent's processes printed."""
        return self.root / "agents" / f"{agent.name}.log"


def prepare(root: Path) -> Layout:
    """Empty `root` of what an earlier demo left, and lay out policy, working directories and folders.

    Only the names in Layout are removed: a folder given by mistake loses nothing else.
    Raises OSError where `root` cannot be written and CalledProcessError where git fails.
    """
    layout = Layout(root.resolve())
    layout.root.mkdir(parents=True, exist_ok=True)
    for folder in (layout.state, layout.root / "work", layout.root / "agents"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (layout.policy, layout.report, layout.timeline, layout.daemon_log):
        file.unlink(missing_ok=True)
    (layout.root / "agents").mkdir()
    layout.state.mkdir(mode=0o700)
    layout.policy.write_text(yaml.safe_dump(POLICY, sort_keys=False))
    for agent in AGENTS:
        write_project(layout.workdir(agent))
    return layout


def seconds_from_environment() -> float:
    """DEMO_SECONDS, or the default. Raises ValueError with the remedy."""
    text = os.environ.get("DEMO_SECONDS", "")
    if not text:
        return DEFAULT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:
        raise ValueError(f"DEMO_SECONDS={text}: give a number of seconds from 5 to 3600")
    return seconds

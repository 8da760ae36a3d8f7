"""The world of policies/world with every decision held against the laws: what tests of the whole core play in.

Owns the checking and short ways to write a script; the world itself is the product's.
"""

from __future__ import annotations

from equipoise.policies.actions import Action, Decision
from equipoise.policies.model import NS_PER_S, CostModel
from equipoise.policies.policy import Policy
from equipoise.policies.snapshot import Snapshot
from equipoise.policies.world import names
from equipoise.policies.world.daemon import Daemon, actions_of
from equipoise.policies.world.machine import Machine
from equipoise.policies.world.script import Script, Tool, Turn
from equipoise.policies.world.world import Room, World
from equipoise.tests.policies.laws import decide_lawfully

TICK_S = 0.1
SECONDS_A_TOKEN = 0.1
READING_S = 0.3


def taking(turn_seconds: float, context_tokens: int, *tools: Tool) -> Turn:
    """A turn that decodes so long, alone, and leaves so long a context; after its tools the agent reads a while."""
    output = max(1, round(turn_seconds / SECONDS_A_TOKEN))
    return Turn(max(1, context_tokens - output), output, tools, READING_S)


class LawfulDaemon(Daemon):
    """A daemon whose decisions are checked, and whose picture is after each of its turns."""

    def __init__(self, policy: Policy, tick_s: float) -> None:
        super().__init__(policy, self._lawfully, tick_s)

    def _lawfully(self, snapshot: Snapshot, policy: Policy) -> tuple[Decision, ...]:
        self.state.check_integrity()
        return decide_lawfully(snapshot, policy)


class Simulation(World):
    """Scripts under decide(), on a small slow machine: a token takes 0.1 s, whoever else is computed."""

    def __init__(
        self,
        scripts: list[Script],
        policy: Policy,
        device_tokens: int,
        bytes_per_token: int = 23_040,
        host_bytes: int = 1 << 30,
        ram_bytes: int = 64 << 30,
        disk_bytes: int = 0,
        tick_s: float = TICK_S,
    ) -> None:
        cost = CostModel(2e-3, 0.0, SECONDS_A_TOKEN, 0.0, 4e9, 1e9 if disk_bytes else 0.0)
        machine = Machine("small", bytes_per_token, cost)
        self.lawful = LawfulDaemon(policy, tick_s)
        self.tick_s = tick_s
        room = Room(device_tokens, ram_bytes, disk_bytes)
        super().__init__(scripts, machine, room, names.plan("decide+split=1"), policy=policy, daemon=self.lawful)
        self.host_limit_bytes = host_bytes

    def actions(self, kind: type[Action]) -> list[Decision]:
        return actions_of(self.lawful.log, kind)

    def finished_s(self, name: str) -> float | None:
        return next(agent.done_s for agent in self.agents if agent.script.name == name)

    def killed_count(self, name: str) -> int:
        return next(agent.killed_count for agent in self.agents if agent.script.name == name)

    def play(self, at_most_s: float) -> Simulation:
        """Until every script is done. Raises AssertionError where one is not within `at_most_s`."""
        while not self.done:
            assert self.now_s < at_most_s, f"not done after {at_most_s} s: {self.unfinished()}"
            self.step(at_most_s)
            self.engine.tiers.check_integrity(self.engine.seats)
        self.lawful.take_in()
        self.lawful.state.check_integrity()
        return self

    def check_stops(self, policy: Policy) -> None:
        """Every stop was answered within the wait."""
        wait_s = policy.memory.wait_ns / NS_PER_S
        for stop in self.tools.stops:
            assert stop.answered_s - stop.at_s <= wait_s + self.tick_s + 1e-6

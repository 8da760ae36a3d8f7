"""What the agents of a simulation will do: rounds of a turn and the tools it asks for, each with its memory over time.

Owns the scripts alone. Nothing here runs: `simulation.py` plays them.
"""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.policies.model import MIB


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool call to be: its memory by seconds of work done."""

    command: str
    seconds: float
    memory: tuple[tuple[float, int], ...]
    """(second, bytes), ascending; held until the next."""

    def bytes_at(self, second: float) -> int:
        return next((size for at, size in reversed(self.memory) if at <= second), 0)


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of the model and the tools it asks for, which run side by side."""

    turn_seconds: float
    context_tokens: int
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Script:
    tenant: str
    name: str
    rounds: tuple[Round, ...]


def growing(command: str, seconds: float, peak_mib: int, base_mib: int = 10) -> Tool:
    """A tool that rises evenly to its peak at two thirds of its time and lets go of it at the end."""
    steps = 12
    rise = [
        (seconds * 2 / 3 * step / steps, (base_mib + (peak_mib - base_mib) * step // steps) * MIB)
        for step in range(steps + 1)
    ]
    return Tool(command, seconds, (*rise, (seconds * 0.95, base_mib * MIB)))

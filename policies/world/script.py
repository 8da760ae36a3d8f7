"""What the agents of a world will do: turns of the model and the tools each asks for, with their memory over time.

Owns the scripts alone. Nothing here runs: `world.py` plays them, `traces.py` reads them from recordings.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ..model import MIB


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool call to be: its memory by seconds of work done."""

    command: str
    seconds: float
    memory: tuple[tuple[float, int], ...] = ()
    """(second, bytes), ascending; held until the next. Empty: it uses none."""

    def bytes_at(self, second: float) -> int:
        index = bisect_right(self.memory, second, key=lambda step: step[0])
        return self.memory[index - 1][1] if index else 0

    @property
    def peak_bytes(self) -> int:
        return max((size for at, size in self.memory if at <= self.seconds), default=0)

    @property
    def byte_seconds(self) -> float:
        """Integral of its memory over its own time."""
        ends = (*(at for at, _ in self.memory[1:]), self.seconds)
        return sum(
            size * max(0.0, min(end, self.seconds) - at) for (at, size), end in zip(self.memory, ends, strict=False)
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the model, and the tools it asks for, which run side by side."""

    prompt_tokens: int
    """The whole context that it is asked with."""
    output_tokens: int
    """At least 1."""
    tools: tuple[Tool, ...] = ()
    pause_s: float = 0.0
    """What the agent itself takes after the last of the tools, before it asks again."""

    @property
    def context_tokens(self) -> int:
        """What the conversation holds when the turn is over."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Script:
    tenant: str
    name: str
    turns: tuple[Turn, ...]
    runtime_bytes: int = 0
    """RAM of the agent itself while none of its tools runs; their memory includes it while one does."""

    @property
    def peak_tokens(self) -> int:
        return max((turn.context_tokens for turn in self.turns), default=0)

    @property
    def peak_bytes(self) -> int:
        """Most that the tools of one turn use together, were each at its peak."""
        return max((sum(tool.peak_bytes for tool in turn.tools) for turn in self.turns), default=0)


def growing(command: str, seconds: float, peak_mib: int, base_mib: int = 10) -> Tool:
    """A tool that rises evenly to its peak at two thirds of its time and lets go of it at the end."""
    steps = 12
    rise = [
        (seconds * 2 / 3 * step / steps, (base_mib + (peak_mib - base_mib) * step // steps) * MIB)
        for step in range(steps + 1)
    ]
    return Tool(command, seconds, (*rise, (seconds * 0.95, base_mib * MIB)))

"""Scripts from recordings, and random ones from a seed.

Owns the reading of the recorded format: one JSON object a run, `memory` as [t_s, bytes, cpu_ratio] of the whole
container, `turns` with start_s, end_s, prompt_tokens and output_tokens, `tool_calls` with start_s, end_s, tool and
command (seconds on one clock). As memory was recorded of the container alone, what an agent does between two turns is
one tool call of the kind of the first that it made.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ..model import MIB
from .machine import Machine
from .script import Script, Tool, Turn, growing
from .world import Room

RUNTIME_BYTES = 60_000_000
"""An agent's own process, idle: what is left of the recorded containers between two calls."""
STEP_BYTES = 2 * MIB
"""Recorded memory that moves by less is taken for unchanged."""
EARLY_S = 0.5
"""Calls are recorded by another clock than turns and may seem to start so much before their turn has ended."""


def script_of(line: str, name: str, tenant: str = "default", scale: float = 1.0, tool_factor: float = 1.0) -> Script:
    """The script of one recorded run.

    Args:
        line: one JSON object.
        scale: of all token counts, for a model with a shorter context than the recorded one.
        tool_factor: of the tools' memory.

    Raises:
        ValueError: not such an object; says what is missing.
    """
    try:
        run = json.loads(line)
        return _script(run, name, tenant, scale, tool_factor)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except KeyError as error:
        raise ValueError(f"no field {error}") from None
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a recorded run: {error}") from None


def _script(run: dict[str, Any], name: str, tenant: str, scale: float, tool_factor: float) -> Script:
    at = [float(sample[0]) for sample in run["memory"]]
    size = [int(sample[1] * tool_factor) for sample in run["memory"]]
    calls = sorted((float(c["start_s"]), str(c["command"] or c["tool"])) for c in run["tool_calls"])
    starts = [start for start, _ in calls]
    made = []
    for turn, following in pairwise([*run["turns"], None]):
        prompt = max(16, int(turn["prompt_tokens"] * scale))
        output = max(4, int(turn["output_tokens"] * scale))
        if following is None:
            made.append(Turn(prompt, output))
            break
        ended, asked = float(turn["end_s"]), float(following["start_s"])
        first = bisect_left(starts, ended - EARLY_S)
        command = calls[first][1] if first < len(calls) and starts[first] <= asked else ""
        pause = max(0.0, asked - ended)
        if command and pause > 0:
            made.append(Turn(prompt, output, (Tool(command, pause, _steps(at, size, ended, ended + pause)),)))
        else:
            made.append(Turn(prompt, output, pause_s=pause))
    if not made:
        raise ValueError("it has no turns")
    return Script(tenant, name, tuple(made), RUNTIME_BYTES)


def _steps(at: list[float], size: list[int], begin: float, end: float) -> tuple[tuple[float, int], ...]:
    """The container's memory from `begin` to `end`, by seconds since `begin`; small moves left out."""
    first = max(0, bisect_right(at, begin) - 1)
    steps: list[tuple[float, int]] = []
    for index in range(first, len(at)):
        if at[index] >= end:
            break
        if not steps or abs(size[index] - steps[-1][1]) >= STEP_BYTES:
            steps.append((max(0.0, at[index] - begin), size[index]))
    return tuple(steps)


LEAST_TURNS = 12
"""A recording with fewer gaps between turns is not taken for a steady loop: it ended early."""
SKIPPED_TURNS, TAKEN_TURNS = 2, 24
"""A steady loop plays a piece from the middle, where contexts are no longer short."""


def sample(scripts: Sequence[Script], agents: int, seed: int) -> list[Script]:
    """Scripts for so many agents of a steady loop, drawn by the seed alone; fewer where there are not as many.

    Each is a piece from the middle of a recording that is long enough.
    """
    mixed = list(scripts)
    random.Random(seed).shuffle(mixed)
    drawn = [s for s in mixed if len(s.turns) > LEAST_TURNS][:agents]
    return [replace(s, turns=s.turns[SKIPPED_TURNS:-1][:TAKEN_TURNS]) for s in drawn]


def room_for(scripts: Sequence[Script], machine: Machine, kv_ratio: float, ram_ratio: float, disk_bytes: int) -> Room:
    """The room of a machine that is short of both: the shape in which all figures of the benches are given.

    The device holds `kv_ratio` of the sum of the scripts' longest contexts, and the longest alone at least; the RAM is
    `ram_ratio` of (half of that sum's bytes plus the sum of the tools' peaks).
    """
    peaks = sum(script.peak_tokens for script in scripts)
    longest = max(script.peak_tokens for script in scripts)
    ram = ram_ratio * (0.5 * peaks * machine.bytes_per_token + sum(script.peak_bytes for script in scripts))
    return Room(max(int(kv_ratio * peaks), int(1.2 * longest)), int(ram), disk_bytes)


_KINDS = ("pytest -q", "cc -O2 a.c", "git status", "python load.py", "ls", "npm install")


def random_scripts(seed: int, agents: int, tenants: Sequence[str] = ("default",), turns: int = 8) -> list[Script]:
    """Agents of no recording: contexts that grow, tools from milliseconds to half a minute, bursts of memory."""
    chance = random.Random(seed)
    scripts = []
    for number in range(agents):
        context = chance.randrange(200, 8000)
        made = []
        for _ in range(chance.randrange(1, turns + 1)):
            output = chance.randrange(4, 600)
            seconds = min(30.0, chance.lognormvariate(0.0, 2.0))
            tools = tuple(
                growing(chance.choice(_KINDS), max(0.01, seconds * chance.random()), chance.randrange(11, 600))
                for _ in range(chance.choice((0, 1, 1, 1, 2)))
            )
            made.append(Turn(context, output, tools, chance.random()))
            context += output + chance.randrange(0, 1500)
            if chance.random() < 0.05:
                context = max(100, context // 3)  # the agent summarised what it had
        scripts.append(Script(tenants[number % len(tenants)], f"a{number}", tuple(made)))
    return scripts

"""The plan of a mix: which calls an agent makes, in which ways, and what else it starts.

Pure: a number and a seed in, plans out. Every call has its mark (`mix17x`) in the arguments of each program it starts
that can take one, so that a row of the daemon says itself which call it shows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = re.compile(r"mix(\d+)x")
PROFILES = ("claude", "codex", "opencode", "gemini")
FILES = {"claude": "@anthropic-ai/claude-code/cli.py", "codex": "codex", "opencode": "opencode", "gemini": "gemini"}
"""What the agent's script is called, so that it has the name of the agent whose ways it has."""

SHIMS = {
    "sudo": '#!/bin/sh\nshift 0\nexec "$@"\n',
    "npx": '#!/bin/bash\nhere=$(dirname "$(readlink -f "$0")")\n"$here/npm-lookup" >/dev/null\nsh -c "$1"\n',
    "npm-lookup": "#!/bin/sh\nbasename x; uname\n",
    "shimmed-bash": '#!/bin/bash\nprogram=$(basename bash)\nreadlink -f "$0" >/dev/null\nexec /bin/bash "$@"\n',
    "mcp-server-files": "#!/bin/sh\nexec sleep 60\n",
    "toy-language-server": "#!/bin/sh\nwhile read -r line; do :; done\n",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that the agent starts."""

    number: int
    role: str
    """"tool call", "housekeeping", "service" or "start-up"."""
    how: str
    text: str
    code: int | None = 0
    """Its exit code; None: it is killed, or none is claimed."""
    leaves: bool = False
    """A process of it outlives it."""
    killed: bool = False
    """It meets the largest budget."""
    open: str = ""
    """Why nobody can tell it from outside the conversation; empty: it can be told."""


@dataclass(slots=True)
class Plan:
    """One agent."""

    name: str
    profile: str = ""
    at_once: bool = False
    before: list[Step] = field(default_factory=list)
    turns: list[list[Step]] = field(default_factory=list)
    stays_s: float = 0.5

    @property
    def steps(self) -> list[Step]:
        return [*self.before, *(step for turn in self.turns for step in turn)]

    def as_json(self, folder: Path) -> dict[str, Any]:
        def plain(step: Step) -> dict[str, Any]:
            return {"number": step.number, "role": step.role, "how": step.how, "text": step.text}

        return {
            "before": [plain(step) for step in self.before],
            "turns": [[plain(step) for step in turn] for turn in self.turns],
            "at_once": self.at_once,
            "stays_s": self.stays_s,
            "folder": str(folder),
        }


BODIES: tuple[tuple[str, int], ...] = (
    ("basename M", 0),
    ("basename M; dirname M; /bin/echo M", 0),
    ("basename M && /bin/echo 'two words' M || false", 0),
    ("for n in 1 2 3; do /bin/echo M $n; done", 0),
    ("/bin/echo M | tr a-z A-Z | wc -c", 0),
    ("(basename M; (/bin/echo M; exit 3))", 3),
    ("env KEY='it'\"'\"'s' /bin/echo M \"$HOME\" \\$HOME", 0),
    ("env A=M cat <<'END' | tail -n 1\nfirst M\nlast\nEND", 0),
    ("env A=M sleep 0.05; /bin/echo M", 0),
    ("env A=M ls /nowhere-M; env A=M sh -c 'exit 7'", 7),
    ("/bin/echo M one\n/bin/echo M two", 0),
    ("true; basename M; cd / && env A=M pwd", 0),
)
SUBSTITUTION = ('x=$(basename M); /bin/echo "$x" M', 0)
LEFT = (
    "nohup env A=M sleep 0.8 >/dev/null 2>&1 &",
    "setsid env A=M sleep 0.8 >/dev/null 2>&1 &",
    "(env A=M sleep 0.8 >/dev/null 2>&1 &)",
    "basename M; { env A=M sleep 0.8 & } >/dev/null 2>&1",
)
BUILTINS = ("cd / # M", "export OTHER=M", "alias m=true # M", "umask 022 # M")
WAYS = ("sh -c", "bash -c", "bash -lc", "dash -c", "session", "env", "timeout", "nice nohup", "sudo", "npx", "pyenv")
SHELLS = ("shell bash pipe", "shell dash pipe", "shell sh pipe", "shell bash socket", "shell bash terminal")
GROW = (
    "python3 -S -c 'held = [bytearray(b\"x\" * (8 << 20)) for _ in range(20)]; import time; time.sleep(20)' M; echo rc"
)
OF_BUILTINS = "a line of builtins starts no program"
SAME_FILES = "an unknown agent's own git looks as its calls do"


class _Numbers:
    def __init__(self) -> None:
        self.last = 0

    def call(self, how: str, text: str, code: int | None = 0, **more: Any) -> Step:
        self.last += 1
        return Step(self.last, "tool call", how, text.replace("M", f"mix{self.last}x"), code, **more)

    def other(self, role: str, how: str, text: str, why_open: str = "") -> Step:
        self.last += 1
        return Step(self.last, role, how, text.replace("M", f"mix{self.last}x"), None, open=why_open)


def plans(calls: int, seed: int = 7, *, folder: Path) -> list[Plan]:
    """Some agents that make about as many calls together; a tenth of it at once, up to 40."""
    chance, numbers = random.Random(seed), _Numbers()
    share = max(1, calls // 100)
    unknown = Plan("unknown", before=list(_start_up(numbers)))
    unknown.turns += [[step] for step in _services(numbers, folder)]
    mixed = [numbers.call(WAYS[n % len(WAYS)], *BODIES[n % len(BODIES)]) for n in range(26 * share)]
    mixed += [numbers.call("argv", "/bin/echo M as words") for _ in range(2 * share)]
    mixed += [numbers.call("wrapper", "basename M; env A=M sleep 0.05") for _ in range(share)]
    mixed += [numbers.call(WAYS[n], LEFT[n % 4], leaves=True) for n in range(min(4 * share, len(WAYS)))]
    mixed += [numbers.call("bash -c", *SUBSTITUTION) for _ in range(share)]
    mixed += [numbers.call("bash -c", GROW, None, killed=True)]
    mixed += [numbers.other("housekeeping", "argv", "git --version", SAME_FILES) for _ in range(2 * share)]
    chance.shuffle(mixed)
    unknown.turns += [[step] for step in mixed]
    burst = Plan("burst", at_once=True)
    burst.turns = [[numbers.call(WAYS[n % 4], "env A=M sleep 0.4; basename M") for n in range(min(40, 12 * share))]]
    return [unknown, _of_shells(numbers, chance, share), burst, *(_known(p, numbers, share) for p in PROFILES)]


def _start_up(numbers: _Numbers) -> Iterator[Step]:
    yield numbers.other("start-up", "pyenv", "basename M")
    yield numbers.other("start-up", "argv", "readlink -f /bin/M")
    yield numbers.other("start-up", "sh -c", "uname; env A=M sleep 0.02")


def _services(numbers: _Numbers, folder: Path) -> Iterator[Step]:
    yield numbers.other("service", "stays", f"{folder}/shims/mcp-server-files M")
    yield numbers.other("service", "stays", f"{folder}/shims/toy-language-server M")
    yield numbers.other("service", "spawned workers", "")


def _of_shells(numbers: _Numbers, chance: random.Random, share: int) -> Plan:
    steps = []
    for shell in SHELLS:
        lines = [numbers.call(shell, *BODIES[n % len(BODIES)]) for n in range(5 * share)
                 if not ("terminal" in shell and "END" in BODIES[n % len(BODIES)][0])]  # fmt: skip
        if "pipe" in shell:
            lines += [numbers.call(shell, *SUBSTITUTION) for _ in range(share)]
            lines += [numbers.call(shell, LEFT[n % 4], leaves=True) for n in range(share)]
        lines += [numbers.call(shell, BUILTINS[n % len(BUILTINS)], open=OF_BUILTINS) for n in range(share)]
        chance.shuffle(lines)
        steps.append(numbers.call(shell, "cd /usr; export KEPT=yes # M", open=OF_BUILTINS))
        steps += lines
        steps.append(numbers.call(shell, 'test "$KEPT" = yes && env A=M pwd'))
    steps.insert(len(steps) // 3, numbers.call("shell bash pipe", GROW, killed=True))
    return Plan("shells", turns=[[step] for step in steps])


def _known(profile: str, numbers: _Numbers, share: int) -> Plan:
    steps = []
    for n in range(5 * share):
        steps.append(numbers.other("housekeeping", "argv", "git --version"))
        steps.append(numbers.call(f"as {profile}", *BODIES[(3 * n) % len(BODIES)]))
    return Plan(profile, profile, before=[numbers.other("start-up", "argv", "git version")], turns=[[s] for s in steps])

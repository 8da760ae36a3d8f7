"""What a scripted model asks for: turns of shell commands, then a last word.

Owns the commands and their texts. Every command is one that real models write; none needs more than coreutils, git and
`python3`, and each works in the workspace that clients.py makes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Command:
    """One shell command as the model writes it."""

    name: str
    text: str
    exit_code: int = 0
    peak_bytes: int = 0
    """The least that it has in RAM at once; 0: not worth a look."""
    leaves_behind: bool = False
    """A process of it lives on for some seconds after it has returned."""
    ends_agent: bool = False
    """Its agent ends by it, so that no result of it comes back."""


@dataclass(frozen=True, slots=True)
class Script:
    """Turn by turn: the commands of one turn are asked for in one answer, and may run side by side."""

    turns: tuple[tuple[Command, ...], ...]
    last_word: str = "All done."

    @property
    def commands(self) -> tuple[Command, ...]:
        return tuple(command for turn in self.turns for command in turn)

    def then(self, command: Command) -> Script:
        """The same with one more turn."""
        return replace(self, turns=(*self.turns, (command,)))

    def telling(self) -> Script:
        """The same, with every command's own process in its result: "shell 1234"."""
        turns = tuple(tuple(replace(c, text=f"echo shell $$; {c.text}") for c in turn) for turn in self.turns)
        return replace(self, turns=turns)

    def of_lines(self) -> Script:
        """The same without the commands of several lines, for an agent that runs each line by itself."""
        turns = tuple(tuple(command for command in turn if "\n" not in command.text) for turn in self.turns)
        return replace(self, turns=tuple(turn for turn in turns if turn))


ECHO = Command("echo", "echo one two three")
PIPELINE = Command("pipeline", "ls -la | sort -k5 | head -n 3 | wc -l")
ALLOCATE = Command(
    "allocate",
    "python3 -c 'import time; held = b\"x\" * (300 << 20); time.sleep(1); print(len(held))'",
    peak_bytes=300 * MIB,
)
BACKGROUND = Command("background", "nohup sleep 4 >/dev/null 2>&1 & echo left one behind", leaves_behind=True)
FAILING = Command("failing", "python3 -c 'import sys; print(\"it failed\"); sys.exit(3)'", exit_code=3)
QUOTES = Command(
    "quotes",
    """printf '%s\\n' "it's" 'a "quoted" word' "\\$HOME is $HOME"
cat <<'END' | tr a-z A-Z
it's "here" $HOME \\n
END""",
)
GIT_STATUS = Command("git-status", "git status --short")
PYTHON = Command("python", 'python3 -c "print(sum(range(1000)))"')
SLOW = Command("slow", "cd sub && for n in 1 2 3; do sleep 0.3; cat part-$n.txt; done")
GIT_AGAIN = Command("git-again", "git status --short")
"""The same text as an earlier one: only the time tells them apart."""

TEN = Script(tuple((c,) for c in (ECHO, PIPELINE, ALLOCATE, BACKGROUND, FAILING, QUOTES, GIT_STATUS, PYTHON, SLOW,
                                  GIT_AGAIN)))  # fmt: skip
"""The default: ten, one after another."""

SIDE_BY_SIDE = Script(((ECHO,), (SLOW, ALLOCATE, GIT_STATUS), (PYTHON,)))
"""Three of its five in one answer."""

FEW = Script(((ECHO,), (ALLOCATE,), (GIT_STATUS,)))
"""The least that shows whether a launcher is looked through: a call, one above its budget, one that follows it."""

SCRIPTS = {"few": FEW, "ten": TEN, "side-by-side": SIDE_BY_SIDE}

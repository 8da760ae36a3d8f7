"""What is wrong with a document, where, and what would be right.

Owns `Problem` and the words for a wrong value. A place is a path of keys and positions: whoever read the text knows the
line and column of each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""("spec", "ladder", 0, "when"); () is the whole document."""
_SHOWN = 40
"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `str()` is one line: "spec.memory.budget.hard: must be above 0"."""

    path: Path
    text: str
    about_key: bool = False
    """The key itself is wrong, and no value of it is of interest."""

    def __str__(self) -> str:
        return f"{words(self.path)}: {self.text}"


class DocumentError(ValueError):
    """A document that says something else than a policy: all that is wrong with it, one line each."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def words(path: Path) -> str:
    """A place as it is printed: "spec.ladder[0].when"."""
    if not path:
        return "document"
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in path)
    return text.removeprefix(".")


def near(word: str, known: Iterable[str]) -> str:
    """The word of `known` that may have been meant, as a question; or all of them."""
    known = list(known)
    lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word[:_SHOWN].lower(), list(lower), n=1)
    return f"did you mean `{lower[found[0]]}`?" if found else f"known: {', '.join(known)}"


def kind(value: object) -> str:
    """A wrong value, for an error's single line."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"`{shown(value)}`"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge number"
    return f"{value!r}" if isinstance(value, int | float) else f"a {type(value).__name__}"


def shown(text: str) -> str:
    """At most _SHOWN printable characters of it."""
    text = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

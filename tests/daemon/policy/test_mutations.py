"""Whatever is done to a policy's text, it is a policy or errors with places: never a traceback."""

from __future__ import annotations

import random
import re

import pytest
from equipoise.daemon.policy import BUILTINS, PolicyError, Text, builtin_text, policy_of
from equipoise.policies.policy import Policy

MUTATIONS = 500
JUNK = (
    *("", "~", "12", "-1", "1e999", "0x1F", "1:30", "2026-01-01", "true", "[]", "{}", "[[", "}", "'", '"', "*a", "&a"),
    *("<<", "|", ">", "%", "512", "512mb", "0s", "101%", ".nan", "*", "(", "? x", "- -", "a: b: c", "9" * 400),
    *("!!int ''", "!!timestamp x", "!!bool x", "!!float ''", "!!binary x", "\t", "\x00", "é", "\u2028"),
    *("99999999999TiB", "default: {weight: 1}"),
)


def mutated(text: str, chance: random.Random) -> str:
    """One to three changes such as a slip of the hand, a bad paste, or malice makes."""
    for _ in range(chance.randint(1, 3)):
        at, lines = chance.randrange(len(text) + 1), text.split("\n")
        one, two = chance.randrange(len(lines)), chance.randrange(len(lines))
        match chance.randrange(8):
            case 0:
                text = text[:at] + chance.choice(JUNK) + text[at:]
            case 1:
                text = text[:at] + text[at + chance.randint(1, 9) :]
            case 2:
                lines.insert(two, lines[one])
                text = "\n".join(lines)
            case 3:
                lines[one], lines[two] = lines[two], lines[one]
                text = "\n".join(lines)
            case 4:
                lines[one] = " " * chance.randint(0, 8) + lines[one].lstrip()
                text = "\n".join(lines)
            case 5:
                text = re.sub(r"(?<=: )[^\s,{}]+", lambda _: chance.choice(JUNK), text, count=chance.randint(1, 4))
            case 6:
                words = re.findall(r"\w+", text)
                if words:
                    text = text.replace(chance.choice(words), chance.choice(words), 1)
            case _:
                text = text[:at] + chr(chance.choice((chance.randrange(128), chance.randrange(0xD800)))) + text[at:]
    return text


@pytest.mark.parametrize("name", BUILTINS)
def test_a_mutated_policy_is_a_policy_or_errors_with_places(name: str) -> None:
    chance, refused = random.Random(name), 0
    for number in range(MUTATIONS):
        text = mutated(builtin_text(name), chance)
        try:
            made = policy_of([Text("p.yaml", text)])
        except PolicyError as error:
            refused += 1
            assert error.problems, text
            for problem in error.problems:
                assert problem.file == "p.yaml" and (problem.line or 0) >= 1 and (problem.column or 0) >= 1, text
                assert str(problem).isprintable() and len(str(problem)) < 300, (number, text)
                assert problem.path or "not YAML" in problem.problem, (number, text)
        else:
            assert isinstance(made, Policy)
    assert MUTATIONS // 4 < refused < MUTATIONS, "both happen"

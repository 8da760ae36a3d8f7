"""The scripted plans of the demo's agents: which tool calls each makes, in which order, and what it says about them.

Owns the scripts only. A model of 135 million parameters cannot choose tools reliably, so the choice is written down
here and everything else is real: the requests, the processes, the memory, the signals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....policies.model import ToolCallSource

ANY_EXIT = None


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of an agent and the tool call that follows it."""

    say: str
    """What the agent tells the model it is about to do."""
    command: tuple[str, ...]
    """argv; looked up on the agent's PATH, run in its working directory."""
    found_by: ToolCallSource = ToolCallSource.LINEAGE
    """HOOK: the agent announces the call; WRAPPER: it runs under `equipoise tool`; LINEAGE: nobody says anything."""
    accepts: tuple[int, ...] | Literal[None] = (0,)
    """Exit codes that are fine; None: any. Death by a signal is never the agent's failure."""


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    task: str
    """The first message, in the words of the person who gave the agent its work."""
    steps: tuple[Step, ...]


def _bash(script: str) -> tuple[str, ...]:
    return ("bash", "-c", script)


_HOOK = ToolCallSource.HOOK
_WRAPPER = ToolCallSource.WRAPPER

TESTS = Plan(
    "tests",
    "The shop's tests fail since the discount feature came in. Find out why and repair it.",
    (
        Step("I run the tests first.", ("python", "-m", "pytest", "-q", "--tb=line"), _HOOK, accepts=(1,)),
        Step("I read the function that fails.", ("grep", "-n", "discount", "shop/cart.py"), _HOOK),
        Step("I apply the repair.", _bash("git apply fix.patch && git diff --stat"), _HOOK, accepts=ANY_EXIT),
        Step("I run all tests again.", ("python", "-m", "pytest", "-q", "--tb=line"), _HOOK, accepts=(0, 1)),
        Step("I commit.", _bash("git commit -qam 'Subtract the discount' && git log --oneline | head -3"), _HOOK),
    ),
)

BUILD = Plan(
    "build",
    "Build the native kernels with optimisation, run them and report the checksum.",
    (
        Step("I look at the sources.", _bash("ls -l native && wc -l native/*.c")),
        Step("I compile.", ("cc", "-O2", "-o", "native/kernels", "native/kernels.c", "native/main.c")),
        Step("I run what I built.", ("native/kernels", "3")),
        Step(
            "I compile once more with debug information.",
            _bash("cc -O1 -g -o native/debug native/*.c && size native/debug"),
        ),
        Step("I run the debug build.", ("native/debug", "2")),
    ),
)

DATA = Plan(
    "data",
    "Load last month's orders, aggregate them by region and compare with the month before.",
    (
        Step("I look at the data.", ("python", "jobs/burst.py", "40", "1"), _WRAPPER),
        Step("I load the whole month.", ("python", "jobs/burst.py", "320", "6"), _WRAPPER),
        Step("I load the month before.", ("python", "jobs/burst.py", "220", "5"), _WRAPPER),
        Step("I compare the two.", ("python", "jobs/burst.py", "380", "4"), _WRAPPER),
    ),
)

HISTORY = Plan(
    "history",
    "Find out when the discount came in, who uses it, and wait for the review bot's answer.",
    (
        Step("I read the history.", _bash("git log --stat --oneline | head -12")),
        Step("I look for its users.", ("grep", "-rn", "discount", "shop", "tests")),
        Step("I wait for the review bot.", ("python", "jobs/review.py", "9")),
        Step("I index the repository.", ("python", "jobs/burst.py", "180", "4")),
        Step("I look at the last change.", ("git", "diff", "HEAD~1", "--stat")),
    ),
)

SERVER = Plan(
    "server",
    "Start the shop's development server in the background and check that it answers.",
    (
        Step(
            "I start the server in the background.",
            _bash("setsid python jobs/serve.py build.port 22 >/dev/null 2>&1 & sleep 0.5; echo started"),
        ),
        Step("I ask it for its state.", ("python", "jobs/fetch.py", "build.port"), accepts=ANY_EXIT),
        Step("I run its slow self test.", ("python", "jobs/review.py", "5")),
        Step("I ask it again.", ("python", "jobs/fetch.py", "build.port"), accepts=ANY_EXIT),
        Step("I count the exits of its functions.", ("grep", "-rnc", "return", "shop")),
    ),
)

RUNAWAY = Plan(
    "runaway",
    "Join the order table with itself and write the result.",
    (
        Step("I check the sources.", ("git", "status", "--short", "--branch")),
        Step("I join the tables in memory.", ("python", "jobs/runaway.py"), accepts=(0, 3)),
        Step("I do it in small pieces instead.", ("python", "jobs/burst.py", "60", "3")),
        Step("I check what I wrote.", _bash("git status --short && ls jobs")),
    ),
)

PLANS = (TESTS, BUILD, DATA, HISTORY, SERVER, RUNAWAY)


def plan_named(name: str) -> Plan:
    """The plan of this name. Raises ValueError naming those that exist."""
    for plan in PLANS:
        if plan.name == name:
            return plan
    raise ValueError(f"--plan {name}: no such plan: choose one of {', '.join(p.name for p in PLANS)}")

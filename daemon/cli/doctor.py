"""`equipoise doctor`: what works on this machine, found by trying each thing.

Owns the rows, the guard around every check, and how they are shown. What is tried is in doctor_checks.py. A check that
throws is a row that says so; no check leaves anything behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ... import __version__
from ..rpc import client
from .finding import Check, Row, Status

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # the type of what add_subparsers() answers

_WIDTH_WITHOUT_TERMINAL = 150


def examine(checks: Sequence[tuple[str, Check]]) -> tuple[Row, ...]:
    """Run every check; one that throws becomes an absent row of its own name."""
    rows: list[Row] = []
    for name, check in checks:
        try:
            rows.extend(check())
        except Exception as error:
            problem = f"the check itself failed: {type(error).__name__}: {error}"
            rows.append(Row(name, Status.ABSENT, problem, "please report this with `equipoise doctor --json`"))
    return tuple(rows)


def fit(rows: Iterable[Row]) -> bool:
    """Whether the daemon can run: nothing required is absent."""
    return not any(row.required and row.status is Status.ABSENT for row in rows)


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="find out by trying what works on this machine",
        description="Tries everything the daemon uses and says what works, what is missing and what to do about it.\n"
        "Exit code 1 where the daemon cannot run here.",
        epilog="examples:\n  equipoise doctor\n  equipoise doctor --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    client.add_socket_argument(parser)
    parser.add_argument("--model", default="default", metavar="GGUF", help="the model to look at")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from .doctor_checks import all_checks

    rows = examine(all_checks(arguments.socket, arguments.model))
    if arguments.json:
        print(json.dumps({"version": __version__, "fit": fit(rows), "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=_WIDTH_WITHOUT_TERMINAL)
        show(rows, console)
    return 0 if fit(rows) else 1


_STYLES = {Status.OK: "green", Status.DEGRADED: "yellow", Status.ABSENT: "red"}


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("what", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", ratio=3, overflow="fold")
    table.add_column("what to do", ratio=2, overflow="fold")
    for row in rows:
        # An optional thing that is absent is no alarm.
        style = "dim" if row.status is Status.ABSENT and not row.required else _STYLES[row.status]
        table.add_row(escape(row.name), f"[{style}]{row.status.value}[/]", escape(row.detail), escape(row.remedy))
    console.print(table)
    missing = [row.name for row in rows if row.required and row.status is Status.ABSENT]
    verdict = f"the daemon cannot run here: {', '.join(missing)}" if missing else "the daemon can run here"
    console.print(verdict, style="bold red" if missing else "bold green", highlight=False)

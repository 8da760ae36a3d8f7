"""`equipoise demo` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from . import scenario

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # the type of what add_subparsers() answers

DEFAULT_OUT = Path("build/demo")


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="run six real agents for a minute and report what was done",
        description="Starts a daemon with its embedded engine and six agents of three tenants, lets them work,\n"
        "and reports every tool call, the KV cache its session held, what was decided and how fairly.",
        epilog="examples:\n  equipoise demo\n  DEMO_SECONDS=30 equipoise demo --out report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, help="how long the agents work (default: $DEMO_SECONDS, else 60)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of its files (default: %(default)s)")
    parser.add_argument(
        "--model", default="default", metavar="GGUF", help="model of the engine (default: SmolLM2-135M)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from .main import run as run_demo

    try:
        seconds = scenario.seconds_from_environment() if arguments.seconds is None else float(arguments.seconds)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not scenario.SHORTEST_SECONDS <= seconds <= scenario.LONGEST_SECONDS:
        raise CommandError(f"--seconds {seconds:g}: give a number from 5 to 3600")
    return run_demo(arguments.out, seconds, arguments.model)

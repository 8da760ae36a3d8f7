"""One way to add a command: help, description, examples, and what runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

# The type of what add_subparsers() answers has no public name.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Command = Callable[[argparse.Namespace], int]


def add(
    commands: Commands, name: str, run: Command, text: str, *examples: str, more: str = ""
) -> argparse.ArgumentParser:
    """`text` is the help, and the description's first line; `more` follows it there. Each example is a line."""
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}." + (f"\n\n{more}" if more else ""),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser

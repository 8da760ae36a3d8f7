"""`equipoise why-not`: which rules looked at a call or a session that was not helped. Owns parsing."""

from __future__ import annotations

import argparse
import json

from ..rpc import client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "why-not",
        help="say what stopped each rule that looked at a tool call or a session",
        description="Say which rules look at a tool call or a session now, and what stops each: what was measured "
        "against its threshold. `equipoise explain` says what was decided.",
        epilog="examples:\n"
        "  equipoise why-not 8000000a            a tool call (ids from `equipoise ps`; the end will do)\n"
        "  equipoise why-not gold/ada            a session (`equipoise ps --sessions`)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    parser.add_argument("id", help="of a tool call or a session")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    client.add_socket_argument(parser)


def _run(arguments: argparse.Namespace) -> int:
    from . import printing

    answered = client.why_not(arguments.socket, arguments.id)
    if arguments.json:
        looks = [printing.as_dict(look) for look in answered.looks]
        print(json.dumps({"subject": answered.subject, "looks": looks}, indent=1))
    else:
        printing.why_not(answered)
    return 0

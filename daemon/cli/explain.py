"""`equipoise explain`: what was decided, why, and what came of it. Owns parsing and what an id may mean."""

from __future__ import annotations

import argparse
import json
import re

from ..rpc import client

_DECISION = re.compile(r"d[0-9a-f]+-\d+")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "explain",
        help="say what was decided, why, and what came of it",
        description="Say what was decided, why, and what came of it: five lines a decision, newest first, repeats "
        "folded; of earlier runs of the daemon too. Of a tool call first what else is known of it: who sent the signal "
        "that ended it, by which id its agent's own log has it. `equipoise why-not` says why nothing was done.",
        epilog="examples:\n"
        "  equipoise explain                     the newest decisions\n"
        "  equipoise explain 8000000a            one tool call (ids from `equipoise ps`; the end will do)\n"
        "  equipoise explain gold/ada            one session\n"
        "  equipoise explain d4190ab00-0         one decision",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    parser.add_argument("id", nargs="?", default="", help="of a tool call, a session or a decision")
    parser.add_argument("--session", default="")
    parser.add_argument("--tenant", default="")
    parser.add_argument("--limit", type=int, default=20, help="decisions shown, repeats counted once (default: 20)")
    parser.add_argument("--json", action="store_true", help="one JSON array, repeats not folded")
    client.add_socket_argument(parser)


_REPEATS = 20
"""Asked for per decision shown, so that what repeats fills no page."""


def _run(arguments: argparse.Namespace) -> int:
    from . import printing

    asked, session = arguments.id, arguments.session
    decision = asked if _DECISION.fullmatch(asked) else ""
    if "/" in asked:
        session, asked = asked, ""
    limit = arguments.limit if arguments.json else arguments.limit * _REPEATS
    call = "" if decision else asked
    found = client.explain(arguments.socket, call, session, arguments.tenant, limit, decision)
    if arguments.json:
        print(json.dumps([printing.as_dict(d) for d in found], indent=1))
        return 0
    if call:
        for known in client.list_tool_calls(arguments.socket):
            if known.tool_call_id.endswith(call):
                printing.facts(known)
    printing.decisions(found, limit=arguments.limit)
    return 0

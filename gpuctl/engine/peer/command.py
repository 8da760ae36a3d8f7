"""`hand-over`: asks the engine that has a session to hand it over to another engine of this host.

Owns: the command and its one line of result. Exit code 1 and one line on stderr where it did not work.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from ...api.v1 import peer_pb2 as pb
from ...api.v1 import peer_pb2_grpc

_SLACK_S = 5.0  # the engine's own deadline comes first and says more


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "hand-over",
        help="hand a session of a running engine over to another one",
        description="Hand a session of a running engine over to another one, the turn under way included.",
    )
    add = parser.add_argument
    add("--peer", required=True, metavar="unix:PATH", help="the engine that has the session: its --peer")
    add("--session", required=True, help="its id: what clients send as X-Equipoise-Session")
    add("--to", required=True, metavar="unix:PATH", help="the engine that shall have it: its --peer")
    add("--timeout-s", type=float, default=30.0, help="give up after (default: %(default)g)")
    add("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    request = pb.HandOverRequest(
        session_id=options.session, to=options.to, timeout_ms=max(1, int(options.timeout_s * 1e3))
    )
    with grpc.insecure_channel(options.peer) as channel:
        stub = peer_pb2_grpc.EnginePeerServiceStub(channel)
        try:
            answer = stub.HandOver(request, timeout=options.timeout_s + _SLACK_S)
        except grpc.RpcError as error:
            print(f"error: {_reason(options.peer, error)}", file=sys.stderr)
            return 1
    print(json.dumps(_plain(answer)) if options.json else _line(options.session, answer))
    return 0


def _reason(peer: str, error: Any) -> str:
    """`error`: a grpc.RpcError, which is also the grpc.Call that failed."""
    details = str(error.details() or error.code().name)
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return f"{peer}: no engine answers there: is one started with --peer {peer}?"
    return details


def _plain(answer: pb.HandOverResponse) -> dict[str, Any]:
    """Every field, zeros too, under the proto's names; its 64-bit numbers as numbers."""
    told = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {name: value if isinstance(value, bool) else getattr(answer, name) for name, value in told.items()}


def _line(session: str, answer: pb.HandOverResponse) -> str:
    turn = f"its turn paused {answer.paused_ns / 1e6:.0f} ms" if answer.has_turn else "idle"
    return (
        f"session {session}: {answer.context_tokens} tokens, {answer.held_tokens} with KV "
        f"({answer.moved_bytes / (1 << 20):.1f} MiB), now at {answer.engine_id} "
        f"after {answer.duration_ns / 1e9:.2f} s, {turn}"
    )

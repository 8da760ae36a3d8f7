"""Tables and JSON of what the daemon answers, for the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...policies.model import MIB, NS_PER_S
from ...policies.shown import printable
from ..api.v1 import policy_pb2 as pb


def as_dict(message: Message) -> dict[str, Any]:
    """With the names of the .proto file; numbers stay numbers."""
    plain = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    numbers = ("_ns", "_bytes", "_tokens")
    return {name: int(v) if isinstance(v, str) and name.endswith(numbers) else v for name, v in plain.items()}


def session_dict(session: pb.SessionView) -> dict[str, Any]:
    """As as_dict; what was not measured or is not known is there, and None."""
    return {field.name: None for field in session.DESCRIPTOR.fields} | as_dict(session)


_WIDTH_WITHOUT_TERMINAL = 180


def _console() -> Console:
    """As wide as the terminal; into a pipe or a file, wide enough that nothing is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def tool_calls(calls: list[pb.ToolCallView], console: Console | None = None) -> None:
    """One row a tool call; a line where there are none. "left behind": it has ended, and not all of its processes.

    "would be": in a dry run.
    """
    console = console or _console()
    if not calls:
        console.print("no tool calls")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("ID", "SANDBOX", "COMMAND", "FOUND", "STATE"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=44)
    for name in ("SECONDS", "NOW MiB", "PEAK MiB", "BUDGET MiB", "KV MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("VERDICT", no_wrap=True)
    for call in calls:
        seconds = f"{(call.end_ns - call.start_ns) / NS_PER_S:.2f}" if call.end_ns else "-"
        table.add_row(
            call.tool_call_id,
            escape(f"{call.tenant_id}/{call.sandbox}"),
            escape(_one_line(call.command)),
            f"{call.source} {call.confidence:.2f}",
            _state(call),
            seconds,
            f"{call.used_bytes / MIB:.0f}",
            f"{call.peak_bytes / MIB:.0f}",
            f"{call.hard_bytes / MIB:.0f}" if call.hard_bytes else "-",
            f"{call.kv_held_bytes / MIB:.1f}",
            call.verdict or "-",
        )
    console.print(table)


def _state(call: pb.ToolCallView) -> str:
    if call.end_ns and call.used_bytes:
        return "left behind"
    return f"{call.phase} (would be {call.would_be})" if call.would_be else call.phase


def processes(found: list[pb.ProcessView], console: Console | None = None) -> None:
    """One row a process that is no tool call; a line where there are none."""
    console = console or _console()
    if not found:
        console.print("no other processes are followed")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("PID", "SANDBOX", "COMMAND", "ROLE", "WHY"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=60)
    for process in found:
        table.add_row(
            str(process.pid),
            escape(f"{process.tenant_id}/{process.sandbox}"),
            escape(_one_line(process.command)),
            f"{process.role} {process.confidence:.2f}",
            escape(process.why),
        )
    console.print(table)


def sessions(found: list[pb.SessionView], console: Console | None = None) -> None:
    """One row a session; a line where there are none."""
    console = console or _console()
    if not found:
        console.print("no sessions")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("SESSION", "TENANT", "SANDBOX", "STATE", "KV"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=44)
    for name in ("TOKENS", "TURNS", "PTE", "WASTED", "JOULES", "SLOWDOWN"):
        table.add_column(name, justify="right", no_wrap=True)
    for session in found:
        table.add_row(
            escape(session.session_id),
            escape(session.tenant_id),
            escape(session.sandbox),
            session.phase,
            session.tier,
            f"{session.held_tokens}/{session.context_tokens}",
            str(session.ended_turn_count),
            f"{session.pte:.0f}" if session.HasField("pte") else "not known",
            f"{session.wasted_pte:.0f}",
            f"{session.energy_joules:.1f}" if session.HasField("energy_joules") else "not measured",
            f"{session.slowdown_ratio:.2f}" if session.HasField("slowdown_ratio") else "not known",
        )
    console.print(table)


def decisions(
    found: list[pb.DecisionView], console: Console | None = None, *, now_unix_ns: int | None = None, limit: int = 1000
) -> None:
    """Five lines a decision, newest first: what and when, because, measured, weighed, outcome. Repeats are folded."""
    console = console or _console()
    if not found:
        console.print("nothing was decided: `equipoise why-not` says what looked at a call or a session")
        return
    now_ns = time.time_ns() if now_unix_ns is None else now_unix_ns
    for alike in folded(found)[:limit]:
        _decision(alike, now_ns, console)


def facts(call: pb.ToolCallView, console: Console | None = None) -> None:
    """What the kernel and its conversation have told of a call besides its life and memory, a line each."""
    console = console or _console()
    named = [f"its agent knows it as {call.agent_call_id}"] if call.agent_call_id else []
    for said in (*call.facts, *named):
        console.print(_one_line(f"{call.tenant_id}/{call.sandbox} {call.kind}: {said}"), markup=False, highlight=False)


def folded(found: Sequence[pb.DecisionView]) -> list[list[pb.DecisionView]]:
    """Decisions in the order given, each with the like ones of its subject that follow with nothing else between."""
    groups: list[list[pb.DecisionView]] = []
    last: dict[str, list[pb.DecisionView]] = {}
    for decision in found:
        group = last.get(decision.subject)
        if group is not None and _likeness(group[0]) == _likeness(decision):
            group.append(decision)
            continue
        groups.append([decision])
        last[decision.subject] = groups[-1]
    return groups


def _likeness(decision: pb.DecisionView) -> tuple[str, ...]:
    return (decision.action, decision.rule, decision.outcome, decision.tool_call_id, decision.session_id)


def _decision(alike: list[pb.DecisionView], now_ns: int, console: Console) -> None:
    newest, oldest = alike[0], alike[-1]
    at = f"at {clock(newest.at_unix_ns, now_ns)}, {ago(newest.at_unix_ns, now_ns)}"
    repeats = f"; {len(alike)} times since {clock(oldest.at_unix_ns, now_ns)}" if len(alike) > 1 else ""
    would = "would " if newest.outcome == "dry-run" else ""
    console.print(
        f"[bold]{would}{escape(newest.action)}[/bold]  {escape(newest.subject)}  {at}{repeats}", soft_wrap=True
    )
    unit = f" {newest.unit}" if newest.unit else ""
    lines = (
        ("because", f"{newest.rule}: {newest.evidence}"),
        ("measured", f"{newest.measurement:.4g} against {newest.threshold:.4g}{unit}"),
        ("weighed", _weighed(newest)),
        ("outcome", _outcome(newest, now_ns)),
    )
    for name, text in lines:
        console.print(f"  {name:<8} {_one_line(text)}", markup=False, soft_wrap=True)


def _weighed(decision: pb.DecisionView) -> str:
    if not decision.candidates:
        return "nothing else"
    chosen, *others = (f"{c.name} {c.cost:.4g}" for c in decision.candidates)
    return f"{chosen} (chosen)" + "".join(f", {other}" for other in others)


def _outcome(decision: pb.DecisionView, now_ns: int) -> str:
    latency = f" after {decision.latency_ms:.1f} ms" if decision.HasField("latency_ms") else ""
    detail = f": {decision.detail}" if decision.detail else ""
    expiry = ""
    if decision.HasField("expires_ns"):
        expires_ns = decision.at_unix_ns + decision.expires_ns - decision.at_ns
        expiry = f"; {'expired' if expires_ns <= now_ns else 'expires'} at {clock(expires_ns, now_ns)}"
    outcome = decision.outcome or "none yet"
    return f"{outcome}{latency} by {decision.tier or '-'}{detail}{expiry} [{decision.decision_id}]"


_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def clock(at_unix_ns: int, now_ns: int) -> str:
    """The local time of day, with the date where that is another day's."""
    at, now = time.localtime(at_unix_ns / NS_PER_S), time.localtime(now_ns / NS_PER_S)
    return time.strftime("%H:%M:%S" if at[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", at)


def ago(at_unix_ns: int, now_ns: int) -> str:
    """ "4.2 s ago", "3 min ago", "2 days ago"."""
    passed_s = max(0, now_ns - at_unix_ns) / NS_PER_S
    if passed_s < _MINUTE_S:
        return f"{passed_s:.1f} s ago"
    if passed_s < _HOUR_S:
        return f"{passed_s / _MINUTE_S:.0f} min ago"
    return f"{passed_s / _HOUR_S:.1f} h ago" if passed_s < 2 * _DAY_S else f"{passed_s / _DAY_S:.0f} days ago"


def why_not(answered: pb.WhyNotResponse, console: Console | None = None) -> None:
    """Who it is, then one line a rule."""
    console = console or _console()
    console.print(f"[bold]{escape(_one_line(answered.subject))}[/bold]", soft_wrap=True)
    width = max((len(look.rule) for look in answered.looks), default=0)
    for look in answered.looks:
        figures = ""
        if look.HasField("measurement") and look.HasField("threshold"):
            figures = f"{look.measurement:.4g} against {look.threshold:.4g} {look.unit}: "
        console.print(f"  {look.rule:<{width}}  {figures}{look.why}", markup=False, soft_wrap=True)

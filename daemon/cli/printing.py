"""Tables and JSON of what the daemon answers, for the command line."""

from __future__ import annotations

import sys
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


def decisions(found: list[pb.DecisionView], console: Console | None = None) -> None:
    """A paragraph a decision, newest first."""
    console = console or _console()
    if not found:
        console.print("nothing was decided")
        return
    newest = found[0].at_ns
    for decision in found:
        ago = (newest - decision.at_ns) / NS_PER_S
        latency = f" after {decision.latency_ms:.1f} ms" if decision.HasField("latency_ms") else ""
        console.print(f"[bold]{escape(decision.action)}[/bold]  {escape(decision.subject)}  (-{ago:.1f} s)")
        console.print(f"  because  {decision.rule}: {decision.evidence}", markup=False)
        if len(decision.candidates) > 1:
            weighed = ", ".join(f"{c.name} {c.cost:.4g}" for c in decision.candidates)
            console.print(f"  weighed  {weighed}", markup=False)
        detail = f": {decision.detail}" if decision.detail else ""
        console.print(
            f"  outcome  {decision.outcome or 'none yet'}{latency} by {decision.tier or '-'}{detail}", markup=False
        )

"""The demo's report on the screen: tool calls, decisions in words, fairness, agents, and what to take from it.

Owns the tables' columns. Every sentence is made from figures of the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import Report, ReportedDecision, ReportedToolCall
from .words import DASH, byte_seconds, ending, seconds, shortened, size

TENANT_STYLES = {"gold": "yellow", "silver": "bright_white", "bronze": "dark_orange3"}
_VERDICT_STYLES = {"keep": "green", "swap": "cyan", "swap-disk": "blue", "drop": "red"}
_MAX_DECISIONS = 24


def tenant_markup(tenant: str, text: str) -> str:
    return f"[{TENANT_STYLES.get(tenant, 'magenta')}]{escape(text)}[/]"


def print_report(report: Report, console: Console) -> None:
    console.print(_tool_calls(report))
    console.print("What was done to them, and why", style="bold")
    for call in report.tool_calls:
        if call.actions:
            at = f"{(call.start_ns - report.start_ns) / 1e9:5.1f}"
            who = f"{tenant_markup(call.tenant, call.label)} {escape(shortened(call.command, 40))}"
            console.print(f"[dim]{at}[/]  {who}: {escape('; '.join(_merged(call.actions)))}", highlight=False)
    console.print()
    console.print(_decisions(report))
    console.print(_fairness(report))
    console.print(_agents(report))
    for line in highlights(report):
        console.print(f"• {escape(line)}", highlight=False, soft_wrap=False)


def _merged(actions: Sequence[str]) -> list[str]:
    """What was done more than once in a row, once with its count."""
    merged: list[str] = []
    for what, group in groupby(actions, key=lambda action: action.partition(":")[0]):
        same = list(group)
        merged.append(same[0] if len(same) == 1 else f"{what} ({len(same)} times)")
    return merged


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _tool_calls(report: Report) -> Table:
    table = _table("Tool calls, and the KV cache their sessions held meanwhile")
    table.add_column("at", justify="right", style="dim", no_wrap=True)
    table.add_column("agent", no_wrap=True)
    table.add_column("command", max_width=34, no_wrap=True, overflow="ellipsis")
    table.add_column("found by", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("KV held", justify="right", no_wrap=True)
    table.add_column("KV idle", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    for call in report.tool_calls:
        table.add_row(
            f"{(call.start_ns - report.start_ns) / 1e9:.1f}",
            tenant_markup(call.tenant, call.label),
            escape(shortened(call.command, 60)),
            f"{call.source} {call.confidence:.0%}",
            seconds(call.end_ns - call.start_ns) if call.end_ns else "running",
            size(call.peak_bytes),
            size(call.kv_held_bytes) if call.kv_held_bytes else DASH,
            byte_seconds(call.kv_idle_byte_seconds),
            f"[{_VERDICT_STYLES.get(call.verdict, 'dim')}]{call.verdict or DASH}[/]",
            _ended(call),
        )
    return table


def _ended(call: ReportedToolCall) -> str:
    text = ending(call.exit_code, call.signal)
    if call.signal is not None:
        text = f"[bold red]{text}[/]"
    if call.escaped_count:
        text += f" [magenta]+{call.escaped_count} escaped[/]"
    return text


def _decisions(report: Report) -> Table:
    shown = _telling(report.decisions)
    more = len(report.decisions) - len(shown)
    table = _table(f"Decisions ({len(report.decisions)}{f', the {len(shown)} most telling' if more else ''})")
    table.add_column("at", justify="right", style="dim", no_wrap=True)
    table.add_column("about", no_wrap=True)
    table.add_column("done", max_width=44)
    table.add_column("because", ratio=1)
    table.add_column("outcome", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    for decision in shown:
        failed = decision.outcome in ("failed", "rejected", "expired")
        table.add_row(
            f"{(decision.at_ns - report.start_ns) / 1e9:.1f}",
            tenant_markup(decision.tenant, shortened(decision.subject, 28)),
            escape(decision.action),
            escape(decision.evidence or decision.rule),
            f"[red]{decision.outcome}[/]" if failed else decision.outcome or DASH,
            DASH if decision.latency_ms is None else f"{decision.latency_ms:.1f} ms",
        )
    return table


def _telling(decisions: tuple[ReportedDecision, ...]) -> list[ReportedDecision]:
    """At most _MAX_DECISIONS in the order they were made: of each kind of action the first ones, rare kinds first."""
    if len(decisions) <= _MAX_DECISIONS:
        return list(decisions)
    seen: Counter[str] = Counter()
    ranked = []
    for index, decision in enumerate(decisions):
        kind = " ".join(word for word in decision.action.split()[:3] if not word.isdigit())
        ranked.append((seen[kind], index))
        seen[kind] += 1
    kept = sorted(index for _, index in sorted(ranked)[:_MAX_DECISIONS])
    return [decisions[index] for index in kept]


def _fairness(report: Report) -> Table:
    table = _table("Fairness per tenant (shares are divided by weight: equal is fair)")
    for heading in ("tenant", "weight", "share mean", "share max", "mostly of"):
        table.add_column(heading, justify="left" if heading in ("tenant", "mostly of") else "right")
    for heading in ("tokens served", "per weight", "first token", "held back", "killed"):
        table.add_column(heading, justify="right")
    for row in report.fairness:
        table.add_row(
            tenant_markup(row.tenant, row.tenant),
            f"{row.weight:g}",
            f"{row.dominant_share_mean:.3f}",
            f"{row.dominant_share_max:.3f}",
            row.dominant_resource or DASH,
            str(row.service_tokens),
            f"{row.service_per_weight:.0f}",
            DASH if row.ttft_mean_seconds is None else f"{row.ttft_mean_seconds:.2f} s",
            f"{row.stalled_seconds:.1f} s",
            str(row.killed_count),
        )
    return table


def _agents(report: Report) -> Table:
    table = _table("Agents")
    table.add_column("agent", no_wrap=True)
    table.add_column("plan")
    for heading in ("turns", "tools", "tokens in", "cached", "out"):
        table.add_column(heading, justify="right")
    table.add_column("ended", no_wrap=True)
    table.add_column("its last words", max_width=60, style="dim", no_wrap=True, overflow="ellipsis")
    for agent in report.agents:
        style = "green" if agent.exit_code == 0 else "bold red"
        table.add_row(
            tenant_markup(agent.tenant, agent.label),
            agent.plan,
            str(agent.turn_count),
            str(agent.tool_count),
            str(agent.prompt_tokens),
            str(agent.cached_tokens),
            str(agent.output_tokens),
            f"[{style}]{escape(agent.ended)}[/]",
            escape(shortened(agent.last_answer, 120)),
        )
    return table


def highlights(report: Report) -> list[str]:
    """What to take from the report, one sentence each; only what really happened is said."""
    lines = []
    for call in report.tool_calls:
        if call.overshoot_bytes is not None:
            end = ", then ended" if call.signal == 9 else ""
            where = "in the kernel " if report.probe_backend.startswith("libbpf") else ""
            lines.append(
                f"{call.tenant}'s `{shortened(call.command, 40)}` was stopped {where}at its budget "
                f"({size(call.overshoot_bytes)} above it at most){end}; it peaked at {size(call.peak_bytes)}."
            )
    lines.extend(f"{a.label} was told: {a.notices[-1]}" for a in report.agents if a.killed_count and a.notices)
    for call in report.tool_calls:
        if call.escaped_count:
            processes = "process" if call.escaped_count == 1 else "processes"
            lines.append(
                f"{call.escaped_count} {processes} of {call.tenant}'s `{shortened(call.command, 40)}` outlived it and "
                "stayed accounted to it."
            )
    if report.engine and report.engine.swap_out_count:
        e = report.engine
        lines.append(
            f"KV moved out to host RAM {e.swap_out_count} times ({size(e.swap_out_bytes)} in {e.swap_out_ms:.0f} ms) "
            f"and back {e.swap_in_count} times ({size(e.swap_in_bytes)} in {e.swap_in_ms:.0f} ms); "
            f"{e.recomputed_tokens} tokens were computed twice, {e.cached_tokens} were not computed again."
        )
    idle = sum(c.kv_idle_byte_seconds for c in report.tool_calls)
    lines.append(
        f"{len(report.correlated)} of {len(report.tool_calls)} tool calls were correlated with KV of their session; "
        f"together it lay idle on the device for {byte_seconds(idle)}."
    )
    lines.append(
        f"Probes: {report.probe_backend}; cgroups: {report.cgroup_layout}; lost: {report.losses.ring_drops} ring "
        f"events, {report.losses.late_events} late, {report.losses.failed_actions} failed actions."
    )
    lines.extend(f"This host lacks: {lack}" for lack in report.lacks)
    return lines

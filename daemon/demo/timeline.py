"""Draws `timeline.png`: memory of the sandboxes, their tool calls and what was done to them, KV by tenant and tier, on
one clock.

Owns the picture. Needs matplotlib (extra `demo`), drawn without a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .record import Sample
from .report import Report, ReportedDecision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 1 << 20
_INK = "#22303c"
_FAINT = "#8795a1"
_ALARM = "#c0392b"
# Two shades per tenant, one per agent: warm gold, cool silver, brown bronze, then spare hues for other policies.
_SHADES = {
    "gold": ("#d9a514", "#f0d078", "#b07f00"),
    "silver": ("#6b86a3", "#aebfd0", "#4a6078"),
    "bronze": ("#b06a3b", "#dbab86", "#8a4a20"),
}
_SPARE_SHADES = (("#4b8b6f", "#96c4ae"), ("#7d5ba6", "#bba6d3"), ("#3f8fb5", "#93c6dd"))


@dataclass(frozen=True, slots=True)
class _Mark:
    """How a decision is marked on the lane of its agent."""

    begins: str
    """How its action begins in words (see daemon/words.py)."""
    marker: str
    size: int
    colour: str
    meaning: str


_MARKS = (
    _Mark("kill", "X", 110, _ALARM, "tool call killed"),
    _Mark("grant", "P", 55, "#1e8449", "granted memory"),
    _Mark("wait", "s", 36, "#d68910", "waited at its budget"),
    _Mark("throttle", "D", 34, "#8e44ad", "throttled"),
    _Mark("freeze", "D", 34, "#5b2c6f", "frozen"),
    _Mark("swap KV out", "v", 48, "#1f618d", "KV swapped out"),
    _Mark("swap KV in", "^", 48, "#2e86c1", "KV brought back"),
    _Mark("drop KV", "x", 34, "#7b241c", "KV dropped"),
    _Mark("keep KV", "o", 22, "#a6acaf", "KV retained"),
)


def draw(report: Report, samples: Sequence[Sample], path: Path) -> None:
    """Write the picture to `path` (about 1900 x 1400 pixels). Raises ImportError without matplotlib and ValueError
    where there is nothing to draw."""
    if not samples:
        raise ValueError("no samples: the daemon was never heard")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = _labels(report, samples)
    colours = _colours(labels)
    with mpl.rc_context({"font.size": 9, "axes.edgecolor": _FAINT, "text.color": _INK, "axes.labelcolor": _INK}):
        figure, axes = plt.subplots(
            3, 1, figsize=(14.5, 10.5), sharex=True, height_ratios=(3.2, 0.52 * max(3, len(labels)), 2.8)
        )
        memory, lanes, kv = axes
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", color="#e5e9ec", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(colors=_FAINT, labelcolor=_INK)
        start = samples[0].at_ns
        times = [(s.at_ns - start) / 1e9 for s in samples]
        _draw_memory(memory, times, samples, labels, colours)
        _draw_lanes(lanes, report, start, labels, colours)
        _draw_kv(kv, times, samples)
        kv.set_xlim(0, max(times[-1], 1.0))
        kv.set_xlabel("seconds since the daemon was ready")
        figure.suptitle(
            f"Tool calls and KV cache on one clock: {len(report.tool_calls)} tool calls, "
            f"{len(report.decisions)} decisions",
            x=0.065,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        figure.subplots_adjust(left=0.065, right=0.86, top=0.945, bottom=0.055, hspace=0.10)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _labels(report: Report, samples: Sequence[Sample]) -> list[str]:
    """The sandboxes, heaviest tenant first: the order of lanes, layers and legends."""
    weights = {t.tenant: t.weight for sample in samples for t in sample.tenants}
    found = {s.label for sample in samples for s in sample.sandboxes} | {c.label for c in report.tool_calls}
    return sorted(found, key=lambda label: (-weights.get(label.partition("/")[0], 0.0), label))


def _colours(labels: Sequence[str]) -> dict[str, str]:
    shades = dict(_SHADES)
    spare = iter(_SPARE_SHADES * 8)
    count: dict[str, int] = {}
    colours = {}
    for label in labels:
        tenant = label.partition("/")[0]
        if tenant not in shades:
            shades[tenant] = (*next(spare), _FAINT)
        number = count.get(tenant, 0)
        colours[label] = shades[tenant][number % len(shades[tenant])]
        count[tenant] = number + 1
    return colours


def _draw_memory(
    axis: Axes, times: Sequence[float], samples: Sequence[Sample], labels: Sequence[str], colours: dict[str, str]
) -> None:
    layers: list[list[float]] = []
    for label in labels:
        layers.append([sum(b.memory_bytes for b in s.sandboxes if b.label == label) / _MIB for s in samples])
    axis.stackplot(
        times, layers, colors=[colours[name] for name in labels], labels=labels, edgecolor="white", linewidth=0.4
    )
    pool = max(s.tool_pool_bytes for s in samples) / _MIB
    top = max((sum(column) for column in zip(*layers, strict=True)), default=0.0)
    if 0 < pool < 4 * max(top, 1.0):
        axis.axhline(pool, color=_ALARM, linewidth=1.1, linestyle=(0, (5, 3)))
        axis.annotate(
            f"pool of the tool calls {pool:.0f} MiB",
            (1, pool),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=_ALARM,
        )
        axis.plot(
            times, [s.tool_used_bytes / _MIB for s in samples], color=_INK, linewidth=1.0, label="tool calls alone"
        )
    axis.set_ylim(0, max(top, pool if pool < 4 * max(top, 1.0) else 0.0) * 1.12 + 1)
    axis.set_ylabel("RAM of the sandboxes, MiB")
    axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False, reverse=True)


def _draw_lanes(axis: Axes, report: Report, start_ns: int, labels: Sequence[str], colours: dict[str, str]) -> None:
    lanes = {label: len(labels) - 1 - row for row, label in enumerate(labels)}
    end_of_all = max(report.end_ns, start_ns + 1)
    for call in report.tool_calls:
        lane = lanes[call.label]
        left = (call.start_ns - start_ns) / 1e9
        width = ((call.end_ns or end_of_all) - call.start_ns) / 1e9
        killed = call.signal is not None
        axis.barh(
            lane,
            max(width, 0.002 * (end_of_all - start_ns) / 1e9),  # a call of some milliseconds is still to be seen
            left=left,
            height=0.62,
            color=colours[call.label],
            edgecolor=_ALARM if killed else colours[call.label],
            linewidth=1.6 if killed else 0.5,
        )
        if width > 0.0058 * (end_of_all - start_ns) / 1e9 * len(call.kind):
            axis.text(left + width / 2, lane, call.kind, ha="center", va="center", fontsize=8, clip_on=True)
    used: dict[str, Any] = {}
    for decision in report.decisions:
        mark = _mark(decision)
        lane_label = _lane_of(decision, report, lanes)
        if mark is None or lane_label is None:
            continue
        used[mark.meaning] = axis.scatter(
            (decision.at_ns - start_ns) / 1e9,
            lanes[lane_label] + 0.36,
            marker=mark.marker,
            s=mark.size,
            color=mark.colour,
            linewidths=0.6 if mark.marker != "x" else 1.6,
            edgecolors=None if mark.marker == "x" else "white",
            zorder=3,
        )
    axis.set_yticks(list(lanes.values()), list(lanes))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.6, len(labels) - 0.2)
    if used:
        axis.legend(used.values(), used.keys(), loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False)


def _mark(decision: ReportedDecision) -> _Mark | None:
    return next((mark for mark in _MARKS if decision.action.startswith(mark.begins)), None)


def _lane_of(decision: ReportedDecision, report: Report, lanes: dict[str, int]) -> str | None:
    for call in report.tool_calls:
        if decision.tool_call and call.id == decision.tool_call:
            return call.label
        if decision.session and call.session == decision.session:
            return call.label
    subject = decision.subject.partition(" ")[0]
    return subject if subject in lanes else None


def _draw_kv(axis: Axes, times: Sequence[float], samples: Sequence[Sample]) -> None:
    weights = {t.tenant: t.weight for sample in samples for t in sample.tenants}
    tenants = sorted(weights, key=lambda name: (-weights[name], name))
    colours = _colours([f"{t}/" for t in tenants])
    shades = [colours[f"{t}/"] for t in tenants]
    device = [[_kv(sample, tenant, host=False) for sample in samples] for tenant in tenants]
    host = [[-_kv(sample, tenant, host=True) for sample in samples] for tenant in tenants]
    if tenants:
        axis.stackplot(times, device, colors=shades, labels=tenants, edgecolor="white", linewidth=0.4)
        below = axis.stackplot(times, host, colors=shades, alpha=0.55, edgecolor="white", linewidth=0.4)
        for layer in below:
            layer.set_hatch("////")
    axis.axhline(0, color=_INK, linewidth=0.9)
    capacity = max(s.device_capacity_bytes for s in samples) / _MIB
    if capacity:
        axis.axhline(capacity, color=_ALARM, linewidth=1.1, linestyle=(0, (5, 3)))
        axis.annotate(
            f"device capacity {capacity:.0f} MiB",
            (1, capacity),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=_ALARM,
        )
    deepest = max((-sum(column) for column in zip(*host, strict=True)), default=0.0)
    axis.set_ylim(-max(deepest * 1.2, capacity * 0.15, 1.0), max(capacity * 1.15, 1.0))
    axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.set_ylabel("KV cache, MiB\nhost RAM  |  device", labelpad=8)
    axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False, title="KV of tenant", reverse=True)
    axis.annotate(
        "hatched, below 0:\nswapped out\nto host RAM",
        (1.012, 0.12),
        xycoords="axes fraction",
        color=_FAINT,
        fontsize=8.5,
    )


def _kv(sample: Sample, tenant: str, *, host: bool) -> float:
    held = sum((t.host_bytes if host else t.device_bytes) for t in sample.tenants if t.tenant == tenant)
    return held / _MIB

"""Host RAM, the tool calls' pool, pressure and GPU memory, in one line."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widgets import Static

from ...daemon.api.v1.policy_pb2 import HostView
from ..text import BAD, WARN, bar, size

_BAR_WIDTH = 14


class HostLine(Static):
    host: reactive[HostView | None] = reactive(None)

    def watch_host(self, host: HostView | None) -> None:
        self.update(describe(host) if host else Text("waiting for the daemon", "dim"))


def describe(host: HostView) -> Text:
    used = host.memory_total_bytes - host.memory_available_bytes
    text = Text()
    text.append(" host ", "bold")
    text.append_text(bar(used, host.memory_total_bytes, _BAR_WIDTH))
    text.append(f" {size(used)} of {size(host.memory_total_bytes)}")
    text.append("   tool calls ", "bold")
    text.append_text(bar(host.tool_used_bytes, host.tool_pool_bytes, _BAR_WIDTH))
    text.append(f" {size(host.tool_used_bytes)} of {size(host.tool_pool_bytes)}")
    text.append("   PSI ", "bold")
    if host.HasField("psi_some_ratio"):
        style = BAD if host.psi_some_ratio > 0.1 else WARN if host.psi_some_ratio > 0.01 else ""
        text.append(f"{host.psi_some_ratio:.1%}", style)
    else:
        text.append("not available", "dim")
    if host.HasField("gpu_total_bytes"):
        text.append("   GPU ", "bold")
        text.append_text(bar(host.gpu_used_bytes, host.gpu_total_bytes, _BAR_WIDTH))
        text.append(f" {size(host.gpu_used_bytes)} of {size(host.gpu_total_bytes)}")
    return text

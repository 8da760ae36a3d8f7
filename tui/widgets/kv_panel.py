"""KV by tier: each engine's tiers against their capacity, then each tenant's part of them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.reactive import reactive
from textual.widgets import Static

from ...daemon.api.v1.policy_pb2 import EngineView, TenantView, WatchResponse
from ..text import bar, size, tenant

_BAR_WIDTH = 12


class KvPanel(Static):
    BORDER_TITLE = "KV cache by tier and tenant"

    response: reactive[WatchResponse | None] = reactive(None, always_update=True)

    def watch_response(self, response: WatchResponse | None) -> None:
        if response is not None:
            self.update(describe(response))


def describe(response: WatchResponse) -> RenderableType:
    attached = [engine for engine in response.engines if engine.attached]
    if not attached:
        return Text("no engine is attached: start the daemon with --engine embedded,\nor attach one", "dim")
    device = sum(e.device_capacity_tokens * e.bytes_per_token for e in attached)
    host = sum(e.host_capacity_bytes for e in attached)
    return Group(*(_engine(engine) for engine in attached), Text(), _tenants(response.tenants, device, host))


def _engine(engine: EngineView) -> Text:
    text = Text()
    text.append(f"{engine.kind} ", "bold")
    text.append(f"{engine.model}  {engine.running_count} running, {engine.waiting_count} waiting\n", "dim")
    text.append_text(bar(engine.device_used_tokens, engine.device_capacity_tokens, _BAR_WIDTH))
    text.append(f" device {engine.device_used_tokens} of {engine.device_capacity_tokens} tokens")
    text.append(f" ({size(engine.device_used_tokens * engine.bytes_per_token)})", "dim")
    if engine.recomputed_tokens:
        text.append(f"  recomputed {engine.recomputed_tokens}", "dim")
    text.append("\n")
    text.append_text(bar(engine.host_used_bytes, engine.host_capacity_bytes, _BAR_WIDTH))
    text.append(f" host   {size(engine.host_used_bytes)} of {size(engine.host_capacity_bytes)}")
    text.append(f"  out {engine.swap_out_count}, in {engine.swap_in_count}", "dim")
    return text


def _tenants(tenants: Iterable[TenantView], device_bytes: int, host_bytes: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("tenant")
    table.add_column("weight", justify="right")
    table.add_column("device")
    table.add_column("host")
    table.add_column("share", justify="right")
    for row in sorted(tenants, key=lambda t: (-t.weight, t.tenant_id)):
        on_device = bar(row.kv_device_bytes, device_bytes, _BAR_WIDTH)
        on_device.append(f" {size(row.kv_device_bytes)}")
        in_host = bar(row.kv_host_bytes, host_bytes, _BAR_WIDTH // 2)
        in_host.append(f" {size(row.kv_host_bytes)}")
        share = Text(f"{row.dominant_share:.2f}")
        share.append(f" {row.dominant_resource}", "dim")
        table.add_row(tenant(row.tenant_id), f"{row.weight:g}", on_device, in_host, share)
    return table

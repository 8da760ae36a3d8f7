"""The keys and the words."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

_HELP = """\
[b]Keys[/b]
  q        leave
  p        pause; again: go on with the newest
  s        sort tool calls: newest, memory, KV held, tenant
  tab      from one table to the other
  up down  move; [b]enter[/b] says everything about the row
  ?        this; [b]esc[/b] closes it

[b]Words[/b]
  tool call   the processes that descend from one command of an agent
  phase       running, throttled, frozen, stopped (at its budget), killed, or how it ended
  memory      what it uses now, shaded up to its peak, of its hard budget
  KV held     KV cache its session holds in any tier meanwhile
  verdict     what is done with that KV: keep, swap (to host RAM), swap-disk, drop
  found by    hook (the agent said so), wrapper (`equipoise tool`), lineage (the kernel saw it)
  share       weighted dominant share: under contention equal ones are fair
  PSI         share of the last 10 s in which some task waited for memory
"""


class Help(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q,question_mark", "dismiss", "Back")]

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help") as box:
            box.border_title = "equipoise top"
            box.border_subtitle = "esc: back"
            yield Static(Text.from_markup(_HELP))

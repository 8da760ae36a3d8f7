"""`equipoise top`: the dashboard's application and its command.

Owns the worker that feeds the dashboard and the opening of screens. Talks to the daemon through connection.py only.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import App
from textual.binding import Binding, BindingType

from .connection import Connection, Lost, NoDaemon, check, default_socket
from .screens.dashboard import Dashboard
from .screens.detail import Detail
from .screens.help import Help

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # the type of what add_subparsers() answers

INTERVAL_MS = 1000


class TopApp(App[None]):
    """The dashboard of one daemon."""

    CSS_PATH = "app.tcss"
    TITLE = "equipoise top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("question_mark", "help", "Help", key_display="?"),
    ]

    def __init__(self, socket: str, interval_ms: int = INTERVAL_MS) -> None:
        super().__init__()
        self._socket = socket
        self._interval_ms = interval_ms
        self._connection: Connection | None = None
        self.dashboard = Dashboard()

    async def on_mount(self) -> None:
        await self.push_screen(self.dashboard)

    @on(Dashboard.Ready)
    def _begin(self) -> None:
        self._connection = Connection(self._socket)
        self._watch(self._connection)

    async def on_unmount(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    @work(exclusive=True)
    async def _watch(self, connection: Connection) -> None:
        async for heard in connection.watch(self._interval_ms):
            if isinstance(heard, Lost):
                self.dashboard.lost = heard.reason
            else:
                self.dashboard.take(heard)

    @on(Dashboard.ToolCallChosen)
    def _open_call(self, chosen: Dashboard.ToolCallChosen) -> None:
        call = chosen.call
        screen = Detail(f"{call.tenant_id}/{call.sandbox}: {call.command}", chosen.now_ns, call)
        self.push_screen(screen)
        self._explain(screen, call.tool_call_id)

    @on(Dashboard.DecisionChosen)
    async def _open_decision(self, chosen: Dashboard.DecisionChosen) -> None:
        screen = Detail(f"{chosen.decision.subject}: {chosen.decision.action}", chosen.now_ns)
        await self.push_screen(screen)
        screen.decisions = [chosen.decision]

    @work
    async def _explain(self, screen: Detail, tool_call_id: str) -> None:
        if self._connection is None:
            return
        try:
            screen.decisions = await self._connection.explain(tool_call_id)
        except NoDaemon as error:
            screen.problem = str(error)

    def action_help(self) -> None:
        self.push_screen(Help())


def run(socket_path: str) -> int:
    """Show the dashboard until the person leaves. 1, and one line, where no daemon answers to begin with."""
    try:
        check(socket_path)
    except NoDaemon as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return 1
    if not sys.stdout.isatty():
        print("equipoise: top needs a terminal: `equipoise ps` prints a table", file=sys.stderr)
        return 1
    TopApp(socket_path).run()
    return 0


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "top",
        help="watch tool calls, KV cache and decisions",
        description="Watch tool calls, KV cache and decisions of a running daemon. Press ? for the keys.",
        epilog="examples:\n  equipoise top\n  equipoise top --socket /run/equipoise/equipoise.sock",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--socket",
        default=default_socket(),
        metavar="PATH",
        help="the daemon's socket (default: $EQUIPOISE_SOCKET, else %(default)s)",
    )
    parser.set_defaults(run=lambda arguments: run(arguments.socket))

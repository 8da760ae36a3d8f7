"""`equipoise hooks claude-code`: print, install or remove the hooks; `run` is the hook itself."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import hook, settings

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # the type of what add_subparsers() answers


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("hooks", help="connect agents to the daemon", description="Connect agents.")
    agents = parser.add_subparsers(metavar="AGENT", required=True)
    claude = agents.add_parser(
        "claude-code",
        help="hooks for Claude Code",
        description="Hooks that announce each tool call of Claude Code to the daemon, and tell the agent what was\n"
        "done to it. They hold the agent up for at most 0.3 s and never fail it.",
        epilog="examples:\n"
        "  equipoise hooks claude-code --print\n"
        "  equipoise hooks claude-code --install ~/.claude/settings.json\n"
        "  equipoise hooks claude-code --install .claude/settings.json --tenant gold\n"
        "  equipoise hooks claude-code --remove ~/.claude/settings.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    claude.add_argument("action", nargs="?", choices=("run",), help="run: be the hook (JSON on standard input)")
    where = claude.add_mutually_exclusive_group()
    where.add_argument("--print", action="store_true", help="print the settings (default)")
    where.add_argument("--install", type=Path, metavar="PATH", help="merge them into a settings file")
    where.add_argument("--remove", type=Path, metavar="PATH", help="take them out of a settings file")
    claude.add_argument("--matcher", default=settings.DEFAULT_MATCHER, help="tools to announce (default: %(default)s)")
    claude.add_argument("--tenant", default="", help="give sessions not started by `equipoise run` a sandbox of it")
    claude.add_argument("--socket", default="", metavar="PATH", help="the daemon's socket, if not the default")
    claude.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "run":
        return hook.main([*_pair("--socket", arguments.socket), *_pair("--tenant", arguments.tenant)])
    ours = settings.hooks(arguments.matcher, arguments.tenant, arguments.socket)
    try:
        if arguments.install:
            changed = settings.install(arguments.install, ours)
            print(f"{arguments.install}: {'hooks installed' if changed else 'hooks are there already'}")
        elif arguments.remove:
            changed = settings.remove(arguments.remove)
            print(f"{arguments.remove}: {'hooks removed' if changed else 'no hooks of ours'}")
        else:
            print(json.dumps(ours, indent=2))
    except settings.SettingsError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return 1
    return 0


def _pair(option: str, value: str) -> list[str]:
    return [option, value] if value else []

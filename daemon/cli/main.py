"""The command line: `equipoise COMMAND`. Owns parsing and printing; the work is done elsewhere.

Every command that fails prints one line, "equipoise: what: remedy", on standard error and exits with a code other
than 0. This module and service.py are the composition root: they alone may import from every folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ..errors import DaemonError

if sys.argv[1:2] == ["engine"] and "hand-over" not in sys.argv:  # as in the engine's own __main__
    from ...gpuctl.engine.ending import ending

    ending()

if sys.argv[1:2] == ["daemon"]:
    # Read by gRPC when it is imported: engine and guardian are forked beside its threads and exec at once, so its fork
    # handlers only complain. Not for other commands: an agent would inherit it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from ..rpc import client
from .adding import Command, Commands, add

# (module, what it needs). Each offers add_parser(subparsers), which sets `run`; imported when asked for, so that
# `equipoise version` does not pay for the dashboard.
_ELSEWHERE = {
    "doctor": ("equipoise.daemon.cli.doctor", ""),
    "explain": ("equipoise.daemon.cli.explain", ""),
    "policy": ("equipoise.daemon.cli.policy", ""),
    "replay": ("equipoise.daemon.cli.replay", ""),
    "why-not": ("equipoise.daemon.cli.why_not", ""),
    "top": ("equipoise.tui.app", ""),
    "hooks": ("equipoise.integrations.claude_code.command", ""),
    "demo": ("equipoise.daemon.demo.command", "equipoise[demo]"),
    "engine": ("equipoise.gpuctl.engine.__main__", "equipoise[engine]"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Answers the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser(argv).parse_args(argv)
        run: Command = arguments.run
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except DaemonError as error:
        for line in str(error).splitlines():
            print(f"equipoise: {line}", file=sys.stderr)
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="equipoise",
        description="Resource controller and observability daemon for hosts that run AI agents beside their model.",
        epilog="examples:\n"
        "  equipoise daemon --engine embedded            start the daemon with a model of its own\n"
        "  equipoise run --tenant default --name ada -- my-agent\n"
        "  equipoise top                                 watch\n"
        "  equipoise explain                             what was decided, and why\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_daemon(commands)
    _add_run(commands)
    _add_tool(commands)
    _add_ps(commands)
    _add_release(commands)
    _add_version(commands)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, needs) in _ELSEWHERE.items():
        if name == asked or asked is None:
            _add_elsewhere(commands, name, module, needs)
    return parser


def _add_elsewhere(commands: Commands, name: str, module: str, needs: str) -> None:
    try:
        importlib.import_module(module).add_parser(commands)
    except ModuleNotFoundError as error:
        if not needs or (error.name or "").startswith("equipoise"):
            raise
        raise DaemonError(f"{name} needs the package {error.name}: pip install '{needs}'") from error


def _add(commands: Commands, name: str, run: Command, text: str, *examples: str) -> argparse.ArgumentParser:
    parser = add(commands, name, run, text, *examples)
    if name not in ("version", "daemon"):
        client.add_socket_argument(parser)
    return parser


# -- daemon


def _add_daemon(commands: Commands) -> None:
    parser = _add(
        commands,
        "daemon",
        _daemon,
        "run the daemon in the foreground",
        "equipoise daemon",
        "equipoise daemon --policy policy.yaml --engine embedded --engine-listen 127.0.0.1:8800",
    )
    parser.add_argument("--socket", type=Path, help="where to listen (default: STATE_DIR/equipoise.sock)")
    parser.add_argument("--state-dir", type=Path, help="socket, journal (default: /run/equipoise as root, else "
                        "$XDG_RUNTIME_DIR/equipoise)")  # fmt: skip
    parser.add_argument("--journal", type=Path, help="SQLite journal (default: STATE_DIR/journal.sqlite)")
    parser.add_argument("--policy", action="append", default=[], metavar="POLICY", help="a file (with the policies.d "
                        "beside it), a folder, or a built-in name, see `equipoise policy --help`; again: said over the "
                        "ones before (default: default)")  # fmt: skip
    parser.add_argument("--metrics-listen", default="127.0.0.1:9464", metavar="HOST:PORT", help="Prometheus endpoint; "
                        "port 0: any; empty: none (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cgroup-base", help="cgroup under which sandboxes are made (default: equipoise, or the "
                        "delegated cgroup under systemd)")  # fmt: skip
    parser.add_argument("--no-ebpf", action="store_true", help="do without probes in the kernel")
    parser.add_argument("--ring-bytes", type=_quantity, default="4MiB", metavar="4MiB", help="what may wait to be read "
                        "of the kernel's events; a power of two (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tool-records", type=int, default=8192, metavar="N", help="tool calls and agents that can be "
                        "followed at once (default: %(default)s)")  # fmt: skip
    parser.add_argument("--engine", choices=("embedded", "none"), default="none", help="start an engine of our own; "
                        "others attach by themselves (default: %(default)s)")  # fmt: skip
    parser.add_argument("--engine-listen", default="127.0.0.1:8800", metavar="HOST:PORT", help="its OpenAI endpoint")
    parser.add_argument("--model", default="default", metavar="GGUF", help="its model (default: SmolLM2-135M)")
    parser.add_argument("--kv-tokens", type=int, default=8192, help="KV its device tier holds (default: %(default)s)")
    parser.add_argument("--host-bytes", type=_quantity, default="256MiB", help="RAM for swapped KV (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="log what is usually not worth a line")


def _quantity(text: str) -> int:
    from ...policies.document import DocumentError, parse_bytes

    if text.isdigit():
        return int(text)
    try:
        return parse_bytes(text, "value")
    except DocumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _daemon(arguments: argparse.Namespace) -> int:
    from ...ebpf.probes import Tuning
    from .. import log, service
    from ..engine_process import EngineConfig

    ring, records = arguments.ring_bytes, arguments.tool_records
    if ring & (ring - 1) or not mmap.PAGESIZE <= ring <= 1 << 30:
        raise DaemonError(f"--ring-bytes {ring}: give a power of two from {mmap.PAGESIZE} to 1GiB")
    if not 1 <= records <= 1 << 20:
        raise DaemonError(f"--tool-records {records}: give a number from 1 to 1048576")
    log.configure(10 if arguments.verbose else 20)
    state_dir: Path = arguments.state_dir or client.default_state_dir()
    engine = None
    if arguments.engine == "embedded":
        engine = EngineConfig(
            listen=arguments.engine_listen,
            model=arguments.model,
            kv_tokens=arguments.kv_tokens,
            host_bytes=arguments.host_bytes,
            threads=arguments.threads,
        )
    config = service.Config(
        socket=arguments.socket or state_dir / client.SOCKET_NAME,
        journal=arguments.journal or state_dir / "journal.sqlite",
        policy=tuple(arguments.policy),
        metrics_listen=arguments.metrics_listen,
        cgroup_base=arguments.cgroup_base,
        ebpf=not arguments.no_ebpf,
        tuning=Tuning(ring_bytes=ring, tool_slots=records),
        engine=engine,
    )
    return service.run(config)


# -- sandboxes and tool calls


def _add_run(commands: Commands) -> None:
    parser = _add(
        commands,
        "run",
        _run,
        "run an agent in a sandbox of its own",
        "equipoise run --tenant gold --name ada -- python agent.py",
    )
    parser.add_argument("--tenant", default="default", help="a tenant of the policy (default: %(default)s)")
    parser.add_argument("--name", help="unique within the tenant (default: the command's name and our pid)")
    parser.add_argument("--session", help="session of its requests to the engine (default: TENANT/NAME)")
    parser.add_argument("--direct", action="store_true", help="CMD is the agent itself and no launcher of it: whatever "
                        "it starts is a tool call at once (default: when somebody has spoken to a model)")  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="what to run")


def _run(arguments: argparse.Namespace) -> int:
    command = _after_dashes(arguments.command, "run")
    name = arguments.name or f"{Path(command[0]).name}-{os.getpid()}"
    tenant, session, direct = arguments.tenant, arguments.session, arguments.direct
    return client.run_agent(arguments.socket, tenant, name, session, command, direct=direct)


def _add_tool(commands: Commands) -> None:
    parser = _add(
        commands,
        "tool",
        _tool,
        "run one tool call of an agent, with exact boundaries",
        "equipoise tool -- pytest -q",
        "equipoise tool --tenant gold --name ada -- make test",
    )
    parser.add_argument("--tenant", default=os.environ.get("EQUIPOISE_TENANT", ""), help="the sandbox; default: the "
                        "one we are in")  # fmt: skip
    parser.add_argument("--name", default=os.environ.get("EQUIPOISE_SANDBOX", ""))
    parser.add_argument("--expect-memory", type=_quantity, default=0, metavar="512MiB", help="what it will need")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="what to run")


def _tool(arguments: argparse.Namespace) -> int:
    command = _after_dashes(arguments.command, "tool")
    return client.run_tool(arguments.socket, arguments.tenant, arguments.name, command, arguments.expect_memory)


def _after_dashes(words: list[str], command: str) -> list[str]:
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise DaemonError(f"nothing to run: equipoise {command} [options] -- CMD [ARG ...]")
    return words


# -- looking


def _add_ps(commands: Commands) -> None:
    parser = _add(
        commands,
        "ps",
        _ps,
        "list tool calls, sessions, or what else the agents run",
        "equipoise ps",
        "equipoise ps --all --json",
        "equipoise ps --sessions",
        "equipoise ps --processes              who is the runtime, a service, housekeeping, and why",
    )
    parser.add_argument("--all", action="store_true", help="finished ones too, whose processes are all gone")
    parser.add_argument("--sessions", action="store_true", help="the engines' sessions instead, and what they cost")
    parser.add_argument("--processes", action="store_true", help="what else runs below the agents, by its role")
    parser.add_argument("--tenant", default="", help="of one tenant only")
    parser.add_argument("--json", action="store_true", help="one JSON array")


def _ps(arguments: argparse.Namespace) -> int:
    from . import printing

    if arguments.sessions:
        sessions = client.list_sessions(arguments.socket, arguments.tenant)
        if arguments.json:
            print(json.dumps([printing.session_dict(s) for s in sessions], indent=1))
        else:
            printing.sessions(sessions)
        return 0
    if arguments.processes:
        processes = client.list_processes(arguments.socket, arguments.tenant)
        if arguments.json:
            print(json.dumps([printing.as_dict(p) for p in processes], indent=1))
        else:
            printing.processes(processes)
        return 0
    calls = client.list_tool_calls(arguments.socket, arguments.tenant)
    # What has outlived its call is no less there while it holds memory.
    shown = [c for c in calls if arguments.all or not c.end_ns or c.used_bytes]
    if arguments.json:
        print(json.dumps([printing.as_dict(c) for c in shown], indent=1))
    else:
        printing.tool_calls(shown)
    return 0


def _add_release(commands: Commands) -> None:
    parser = _add(
        commands,
        "release",
        _release,
        "undo everything that holds something back, whoever died before",
        "equipoise release",
        "equipoise release --state-dir /run/equipoise",
    )
    parser.add_argument("--state-dir", type=Path, help="of the daemon, where it no longer answers")
    parser.add_argument("--cgroup-base", help="as given to the daemon")


def _release(arguments: argparse.Namespace) -> int:
    from . import release

    for line in release.release(arguments.socket, arguments.state_dir, arguments.cgroup_base):
        print(line)
    return 0


def _add_version(commands: Commands) -> None:
    _add(commands, "version", _version, "print the version")


def _version(_: argparse.Namespace) -> int:
    print(f"equipoise {__version__}")
    return 0

"""The hook that Claude Code runs around each tool call: `python -m equipoise.integrations.claude_code.hook`.

Reads the hook's JSON on standard input, tells the daemon, and prints what Claude Code should add to the conversation.
Owns the time limit: the agent waits for at most BUDGET_S, whatever the daemon does, and the exit code is 0 whatever
fails. The daemon is asked by a forked child (daemon_call.py) that may take longer; a notice that comes too late is
kept and told at the session's next hook.

Standard library only, and little of it: this module's imports are time that the agent waits.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

BUDGET_S = 0.3
"""From the start of this process to its end."""
_EXIT_MARGIN_S = 0.03
_LEAST_WAIT_S = 0.02
_LONGEST_INPUT_BYTES = 4 << 20
_SHELLS = (b"sh", b"bash", b"dash", b"zsh", b"fish", b"env")
_TOLD_EVENTS = ("PostToolUse", "PostToolUseFailure")
_KNOWN_EVENTS = ("PreToolUse", *_TOLD_EVENTS, "SessionStart", "SessionEnd")


def main(argv: list[str]) -> int:
    """Always 0: an agent must not fail because we do."""
    try:
        deadline = time.monotonic() + max(_LEAST_WAIT_S, BUDGET_S - _age_s() - _EXIT_MARGIN_S)
        socket, tenant = _options(argv)
        event = json.loads(_read_input(deadline))
        name = event.get("hook_event_name") if isinstance(event, dict) else None
        if name not in _KNOWN_EVENTS or not os.path.exists(socket):  # noqa: PTH110 - pathlib costs 10 ms of import
            return 0
        notice = _ask(event, socket, tenant, deadline)
        if notice and name in _TOLD_EVENTS:
            told = {"hookSpecificOutput": {"hookEventName": name, "additionalContext": notice}}
            sys.stdout.write(json.dumps(told))
    except (OSError, ValueError, TypeError, KeyError):
        pass  # a hook that is not understood, or a machine out of processes: the agent goes on as without us
    return 0


def _options(argv: list[str]) -> tuple[str, str]:
    """(socket, tenant): `--socket PATH --tenant T`, else the environment that `equipoise run` gives its agents."""
    values = dict(zip(argv[::2], argv[1::2], strict=False))
    socket = values.get("--socket") or os.environ.get("EQUIPOISE_SOCKET") or _default_socket()
    return socket, values.get("--tenant", "")


def _default_socket() -> str:
    if os.geteuid() == 0:
        return "/run/equipoise/equipoise.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = f"{runtime}/equipoise" if runtime else os.path.expanduser("~/.local/state/equipoise")  # noqa: PTH111
    return f"{folder}/equipoise.sock"


def _age_s() -> float:
    """How long this process has existed: starting the interpreter counts. 0 where /proc does not say."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): field 22, in ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, IndexError):
        return 0.0


def _read_input(deadline: float) -> bytes:
    """Standard input to its end. Raises ValueError where it does not end in time."""
    parts: list[bytes] = []
    total = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select((0,), (), (), left)[0]:
            raise ValueError("the hook's input does not end")
        part = os.read(0, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
        total += len(part)
        if total > _LONGEST_INPUT_BYTES:
            raise ValueError("the hook's input is too long")


def _ask(event: dict[str, object], socket: str, tenant: str, deadline: float) -> str:
    """Let a child tell the daemon; its answer if it comes in time."""
    read_end, write_end = os.pipe()
    # Before the fork: once this process has ended, the child's parent is init.
    agent_pid = _agent_pid() if event["hook_event_name"] == "SessionStart" else None
    if os.fork() == 0:
        os.close(read_end)
        _be_the_child(event, socket, tenant, agent_pid, write_end)
    os.close(write_end)
    answer = b""
    while (left := deadline - time.monotonic()) > 0 and select.select((read_end,), (), (), left)[0]:
        part = os.read(read_end, 65536)
        if not part:
            break
        answer += part
    os.close(read_end)
    return answer.decode(errors="replace")


def _agent_pid() -> int | None:
    """The nearest ancestor that is no shell: Claude Code starts its hooks through one. None where it cannot be told."""
    pid = os.getppid()
    while pid > 1:
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _, tail = file.read().rpartition(b")")
        if head.partition(b"(")[2] not in _SHELLS:
            return pid
        pid = int(tail.split()[1])  # proc(5): field 4, the parent
    return None


def _be_the_child(event: dict[str, object], socket: str, tenant: str, agent_pid: int | None, write_end: int) -> None:
    """Never returns. Our standard streams are Claude Code's pipes: held open they would keep it waiting."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        from . import daemon_call

        daemon_call.tell(event, socket, tenant, agent_pid, write_end)
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

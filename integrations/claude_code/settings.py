"""Claude Code's settings file: our hooks in it, everybody else's left alone.

Owns the shape of the entries and how they are told from others (by the module they run).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

_MODULE = "equipoise.integrations.claude_code.hook"
_TOOL_EVENTS = ("PreToolUse", "PostToolUse", "PostToolUseFailure")
_SESSION_EVENTS = ("SessionStart", "SessionEnd")
_TIMEOUT_S = 5
"""Claude Code's own limit; the hook ends long before."""
DEFAULT_MATCHER = "Bash"

Settings = dict[str, Any]
"""The parsed file: its schema is Claude Code's, not ours, and unknown keys are kept."""


class SettingsError(Exception):
    """The file cannot be used: path, reason, remedy in one line."""


def hooks(matcher: str = DEFAULT_MATCHER, tenant: str = "", socket: str = "") -> Settings:
    """The settings that install our hooks. With a `tenant`, sessions not started by `equipoise run` get a sandbox."""
    command = [sys.executable, "-m", _MODULE]
    if socket:
        command += ["--socket", socket]
    if tenant:
        command += ["--tenant", tenant]
    # `|| true`: also an environment that was removed since must not disturb the agent.
    hook = {"type": "command", "command": f"{shlex.join(command)} || true", "timeout": _TIMEOUT_S}
    entries: Settings = {event: [{"matcher": matcher, "hooks": [hook]}] for event in _TOOL_EVENTS}
    if tenant:
        entries |= {event: [{"hooks": [hook]}] for event in _SESSION_EVENTS}
    return {"hooks": entries}


def install(path: Path, ours: Settings) -> bool:
    """Put our hooks into the file (made where it is missing); True where that changed it. Raises SettingsError."""
    settings = _read(path)
    merged = _without_ours(settings)
    target = merged.setdefault("hooks", {})
    for event, entries in ours["hooks"].items():
        target[event] = [*target.get(event, []), *entries]
    return _write(path, settings, merged)


def remove(path: Path) -> bool:
    """Take our hooks out again; True where there were any. Raises SettingsError."""
    if not path.exists():
        return False
    settings = _read(path)
    return _write(path, settings, _without_ours(settings))


def _read(path: Path) -> Settings:
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: give the path of a settings file that is yours") from None
    except ValueError as error:
        raise SettingsError(f"{path}: not JSON ({error}): repair it first; nothing was changed") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("hooks", {}), dict):
        raise SettingsError(f"{path}: not a settings file of Claude Code; nothing was changed")
    if not all(isinstance(entries, list) for entries in settings.get("hooks", {}).values()):
        raise SettingsError(f"{path}: `hooks` holds something else than lists; nothing was changed")
    return settings


def _without_ours(settings: Settings) -> Settings:
    """A copy without our entries and without what they leave empty."""
    copy: Settings = json.loads(json.dumps(settings))
    events = copy.get("hooks", {})
    for event in list(events):
        kept = [entry for entry in events[event] if not _is_ours(entry)]
        if kept or not events[event]:
            events[event] = kept
        else:
            del events[event]
    if not events and settings.get("hooks"):
        copy.pop("hooks", None)
    return copy


def _is_ours(entry: object) -> bool:
    return isinstance(entry, dict) and _MODULE in json.dumps(entry.get("hooks", []))


def _write(path: Path, before: Settings, after: Settings) -> bool:
    """Replace the file in one step, keeping its mode."""
    if before == after:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        real = path.resolve()
        with tempfile.NamedTemporaryFile("w", dir=real.parent, prefix=".settings-", delete=False) as scratch:
            scratch.write(json.dumps(after, indent=2) + "\n")
        os.chmod(scratch.name, real.stat().st_mode & 0o777 if real.exists() else 0o600)  # noqa: PTH101
        Path(scratch.name).replace(real)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written: {error.strerror}; nothing was changed") from None
    return True

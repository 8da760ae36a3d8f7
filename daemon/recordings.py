"""Recorded runs of agents as scripts of a what-if world: the trace files, and the daemon's own journal.

Owns reading them. What the fields mean is policies/world/traces.py's; a journal is put into the same form, one run of
an agent for each session.
"""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..policies.model import NS_PER_S
from ..policies.world.script import Script
from ..policies.world.traces import script_of
from .errors import CommandError
from .observe.journal import JournalReader, Series

_SQLITE = b"SQLite format 3\0"
_GZIP = b"\x1f\x8b"


def read(paths: Sequence[Path], scale: float = 1.0, tool_factor: float = 1.0) -> list[Script]:
    """Scripts of every run in the files; runs without a turn are left out.

    Args:
        scale: of all token counts.
        tool_factor: of the tools' memory.

    Raises:
        CommandError: a file can not be read or is no recording (with its line), or no file has a run in it.
    """
    scripts: list[Script] = []
    for path in paths:
        for place, line in _lines(path):
            if not line.strip() or _empty(line):
                continue
            try:
                scripts.append(script_of(line, f"a{len(scripts)}", scale=scale, tool_factor=tool_factor))
            except ValueError as error:
                raise CommandError(f"{place}: {error}: give recorded runs, one JSON object a line") from error
    if not scripts:
        raise CommandError(f"{', '.join(map(str, paths))}: no run with a turn in it: give other recordings")
    return scripts


def _empty(line: str) -> bool:
    """A run that ended before its first turn: recorded, and nothing to play."""
    try:
        run = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(run, dict) and run.get("turns") == []


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            head = file.read(len(_SQLITE))
        if head == _SQLITE:
            return [(str(path), json.dumps(run)) for run in _of_journal(path)]
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw.startswith(_GZIP) else raw).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: {getattr(error, 'strerror', None) or error}: give a trace file") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not text: give a trace file (JSON lines, gzip or not) or a journal") from error
    return [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]


def _of_journal(path: Path) -> list[dict[str, Any]]:
    """Every session of the journal's newest run, in the recorded form; what had not ended is left out."""
    with JournalReader(path) as journal:
        turns, calls, boxes = journal.turns(), journal.tool_calls(), journal.sandboxes()
        samples = journal.samples()
    memory: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for sample in samples:
        if sample.series is Series.SANDBOX_MEMORY:
            memory[sample.key].append((sample.at_ns, sample.value_bytes))
    label_of = {box.cgroup_id: box.label for box in boxes}
    runs = []
    for session in sorted({turn.session for turn in turns}):
        own = [t for t in turns if t.session == session and t.started_ns is not None and t.ended_ns is not None]
        made = [c for c in calls if c.session == session and c.end_ns is not None]
        labels = sorted({label_of[c.sandbox] for c in made if c.sandbox in label_of})
        curve = sorted(point for label in labels[:1] for point in memory[label])
        begin = min((t.started_ns for t in own if t.started_ns is not None), default=0)
        # The last sample before the first turn holds at its start.
        curve = curve[max(0, bisect_left(curve, (begin, 0)) - 1) :]
        runs.append(
            {
                "task": str(session),
                "memory": [[_seconds(at, begin), size, 0.0] for at, size in curve],
                "turns": [
                    {
                        "start_s": _seconds(turn.started_ns or 0, begin),
                        "end_s": _seconds(turn.ended_ns or 0, begin),
                        "prompt_tokens": turn.prompt_tokens,
                        "output_tokens": turn.output_tokens,
                    }
                    for turn in own
                ],
                "tool_calls": [
                    {
                        "start_s": _seconds(call.start_ns, begin),
                        "end_s": _seconds(call.end_ns or 0, begin),
                        "tool": call.kind,
                        "command": call.command or None,
                    }
                    for call in made
                ],
            }
        )
    return runs


def _seconds(at_ns: int, begin_ns: int) -> float:
    return (at_ns - begin_ns) / NS_PER_S

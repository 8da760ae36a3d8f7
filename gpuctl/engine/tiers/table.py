"""The tiers below the device, in the order of the way down: the one place that names them.

Owns: what each is called, what the daemon takes it for, its options and how it is opened. A new tier is a line here,
and a Store where none of those there are will do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....policies.model import KvTier
from ..schedule.sequence import Tier
from .disk_tier import DiskTier, remove_own_folder
from .store import HostTier, Store

HOST = Tier("host", KvTier.HOST)
DISK = Tier("disk", KvTier.DISK)


@dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier of a running engine."""

    tier: Tier
    capacity_bytes: int
    store: Store
    folder: Path | None = None
    """Where it is written; None: in memory."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. Its options are --NAME-bytes and, where it is in a folder, --NAME-folder."""

    tier: Tier
    default: str
    """Of --NAME-bytes; "0": there is no such tier unless asked for."""
    help: str
    open: Callable[[Path, str], Store]
    """From a folder and the fingerprint of the model and build that the KV belongs to. Raises SwapError."""
    in_folder: bool


TABLE = (
    Line(HOST, "256MiB", "host RAM for swapped KV", lambda folder, fingerprint: HostTier(), in_folder=False),
    Line(DISK, "0", "disk for swapped KV, e.g. 4GiB; 0: no such tier", DiskTier, in_folder=True),
)


def add_options(add: Callable[..., Any], to_bytes: Callable[[str], int]) -> None:
    """The options of every tier, by `add_argument` of a group."""
    for line in TABLE:
        name = f"--{line.tier.value}"
        add(f"{name}-bytes", type=to_bytes, default=line.default, metavar="BYTES", help=line.help + " (default: "
            "%(default)s)")  # fmt: skip
        if line.in_folder:
            add(f"{name}-folder", type=Path, metavar="FOLDER", help="where it lives (default: a folder of the cache)")


def open_tiers(
    options: argparse.Namespace, cache: Path, fingerprint: str, cleaning: Callable[[Callable[[], None]], None]
) -> tuple[OpenTier, ...]:
    """The tiers that were asked for, and what is in memory in any case: a directive may give it room.

    `cleaning` is told what removes a folder of ours should the process end at once. Raises SwapError.
    """
    opened = []
    for line in TABLE:
        name = line.tier.value
        capacity_bytes: int = getattr(options, f"{name}_bytes")
        if not line.in_folder:
            opened.append(OpenTier(line.tier, capacity_bytes, line.open(cache, fingerprint)))
        elif capacity_bytes:
            folder: Path = getattr(options, f"{name}_folder") or cache / f"kv-{name}"
            cleaning(_removal(folder))
            store = line.open(folder, fingerprint)
            opened.append(OpenTier(line.tier, capacity_bytes, store, folder))
    return tuple(opened)


def folder_of_disk(tiers: Iterable[OpenTier]) -> Path | None:
    """A folder on what the daemon takes for a disk, to measure its speed in; None where there is none."""
    return next((each.folder for each in tiers if each.tier.told_as is KvTier.DISK), None)


def in_memory(capacity_bytes: int = 256 << 20) -> tuple[OpenTier, ...]:
    """Host RAM alone: what an engine has that is told nothing else."""
    return (OpenTier(HOST, capacity_bytes, HostTier()),)


def _removal(folder: Path) -> Callable[[], None]:
    return lambda: remove_own_folder(folder)

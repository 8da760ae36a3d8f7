"""Cgroups of either layout: detect, make, limit, freeze, kill, measure. `CgroupDriver.open()` is the way in.

Owns: the paths and files of each hierarchy. Must not: know what a tool call is worth, or record what it does.

Seen from outside: `Applied`, `CgroupDriver`, `Effect`, `Hierarchy`, `LayoutKind`, `Limit`, `OWN_LEAF`, `RUNTIME`,
`SandboxCgroup`, `TOOLS`, `checked_path`, `current_path`, `files`, `parse_pressure`, `sweep`.
"""

from __future__ import annotations

from .base import sweep
from .driver import CgroupDriver, Limit, MemoryEvents, Stall, parse_pressure
from .files import Applied, Effect
from .layout import Hierarchy, Layout, LayoutKind, current_path, detect
from .tree import DEFAULT_BASE, OWN_LEAF, RUNTIME, TOOLS, CgroupTree, SandboxCgroup, checked_path

__all__ = [
    "DEFAULT_BASE",
    "OWN_LEAF",
    "RUNTIME",
    "TOOLS",
    "Applied",
    "CgroupDriver",
    "CgroupTree",
    "Effect",
    "Hierarchy",
    "Layout",
    "LayoutKind",
    "Limit",
    "MemoryEvents",
    "SandboxCgroup",
    "Stall",
    "checked_path",
    "current_path",
    "detect",
    "parse_pressure",
    "sweep",
]

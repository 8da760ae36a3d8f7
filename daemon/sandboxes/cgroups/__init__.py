"""Cgroups of either layout: detect, make, limit, freeze, kill, measure. `CgroupDriver.open()` is the way in."""

from __future__ import annotations

from .base import sweep
from .driver import CgroupDriver, Limit, MemoryEvents, Stall, parse_pressure
from .files import Applied, Effect
from .layout import Hierarchy, Layout, LayoutKind, detect
from .tree import DEFAULT_BASE, CgroupTree, SandboxCgroup

__all__ = [
    "DEFAULT_BASE",
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
    "detect",
    "parse_pressure",
    "sweep",
]

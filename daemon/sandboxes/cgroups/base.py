"""The folder of the hierarchies under which all our sandboxes lie: opened once, swept of what earlier runs left."""

from __future__ import annotations

from .driver import CgroupDriver


def sweep(driver: CgroupDriver) -> None:
    """Remove what is empty below our base: sandboxes that an earlier run left, tenants without any.

    The base itself stays: the daemon's lock is on it (alone.py), and goes with it.
    """
    for path in reversed(driver.below(driver.base)):
        if path != driver.base:
            driver.remove(path, patience_s=0.0)

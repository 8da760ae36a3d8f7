"""The folder of the hierarchies under which all our sandboxes lie: opened once, swept of what earlier runs left."""

from __future__ import annotations

from collections.abc import Collection

from .driver import CgroupDriver
from .tree import OWN_LEAF


def sweep(driver: CgroupDriver, keep: Collection[str] = ()) -> None:
    """Remove sandboxes in which nothing runs, but for those in `keep`, whole or not at all; tenants without any.

    The base itself stays: the daemon's lock is on it (alone.py), and goes with it.
    """
    for tenant in driver.children(driver.base):
        for path in driver.children(tenant):
            if path not in keep and tenant != f"{driver.base}/{OWN_LEAF}":
                driver.remove(path, patience_s=0.0)
        driver.remove_where_empty(tenant)

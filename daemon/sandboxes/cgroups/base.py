"""The folder of the hierarchies under which all our sandboxes lie: opened once, swept of what earlier runs left."""

from __future__ import annotations

from .driver import CgroupDriver


def sweep(driver: CgroupDriver) -> None:
    """Remove what is empty below our base, and the base: sandboxes that an earlier run left, tenants without any."""
    for path in reversed(driver.below(driver.base)):
        driver.remove(path, patience_s=0.0)

"""`pytest -n 3`: which tests go together, and which begin first.

Owns that order and nothing else. A file's tests stay on one worker, since they share what it sets up (a daemon, an
engine); the guest's are one unit, since it boots once. The long lanes begin first and the pure core fills the gaps.
Without `-n` nothing here is loaded.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

GUEST = "tests/vm/guest"
FIRST = (
    GUEST,
    "tests/agents",
    "tests/daemon/demo",
    "tests/daemon/whole",
    "tests/gpuctl/engine/test_",
    "tests/daemon",
    "tests/gpuctl",
    "tests/kernel",
)
"""By what their node ids begin with; what is not named comes last."""


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist publishes no types
    """Units of one file, handed out in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(node_id: str) -> str:
    """What a test shares a worker with."""
    path = PurePosixPath(node_id.partition("::")[0])
    return GUEST if path.is_relative_to(GUEST) else str(path)


def place_of(node_id: str) -> int:
    """Where its unit stands in the order."""
    return next((at for at, prefix in enumerate(FIRST) if node_id.startswith(prefix)), len(FIRST))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place_of(item.nodeid))

"""The compiled object, built once; the tests of this folder skip where it cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest
from equipoise.ebpf import build
from equipoise.ebpf.errors import BuildFailed


@pytest.fixture(scope="session")
def object_file() -> Path:
    try:
        build.build()
    except BuildFailed as error:
        pytest.skip(str(error))
    return build.object_path("equipoise")

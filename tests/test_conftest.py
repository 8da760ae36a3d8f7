"""The summary of tiers says what ran and why the rest did not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_pure(): pass

@pytest.mark.kernel
def test_kernel(): pass

@pytest.mark.kernel
@pytest.mark.skip(reason="needs root")
def test_kernel_skipped(): pass

@pytest.mark.engine
def test_engine():
    pytest.skip("no model here")

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.kernel
@pytest.mark.xfail(reason="known")
def test_known_failure(): assert False
"""


@pytest.fixture(scope="module", params=[(), ("-n", "2")], ids=["one process", "side by side"])
def output(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> str:
    root = tmp_path_factory.mktemp("suite")
    for folder in ("vm", "engine"):
        (root / folder).mkdir()
    (root / "engine" / "test_ledger.py").write_text("def test_pure_arithmetic_of_the_engine(): pass\n")
    (root / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n  kernel: k\n  engine: e\n  vm: v\n  slow: s\n")
    (root / "test_all.py").write_text(TESTS)
    (root / "vm" / "test_boot.py").write_text(
        "import pytest\npytest.skip('no qemu', allow_module_level=True)\ndef test_boot(): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *request.param,
        str(root),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "pure: 2 ran, 1 not run",
        "  1 x deselected on the command line (slow)",
        "kernel: 2 ran, 1 not run",
        "  1 x needs root",
        "engine: 0 ran, 1 not run",
        "  1 x no model here",
        "vm: 0 ran, 1 not run",
        "  1 x whole file: no qemu",
    ],
)
def test_every_tier_is_counted_with_the_reason_for_what_was_left_out(output: str, line: str) -> None:
    assert line in output.splitlines()


def test_a_tier_without_tests_says_so(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "vm: none collected" in done.stdout
    assert "pure: 1 ran, 0 not run" in done.stdout

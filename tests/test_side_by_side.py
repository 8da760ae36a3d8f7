"""The suite side by side: what stays together, and that a failure there is looked at once more, alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from equipoise.tests.side_by_side import GUEST, place_of, unit_of


def test_a_file_is_a_unit_and_the_guest_is_one_whole() -> None:
    assert unit_of("tests/daemon/test_loop.py::test_a[x/y]") == "tests/daemon/test_loop.py"
    assert unit_of(f"{GUEST}/test_ebpf.py::test_a") == unit_of(f"{GUEST}/test_service.py::test_b") == GUEST


def test_the_guest_begins_first_and_the_pure_core_last() -> None:
    ids = ["tests/policies/test_model.py::a", "tests/daemon/whole/test_x.py::a", f"{GUEST}/test_ebpf.py::a"]
    assert sorted(ids, key=place_of) == list(reversed(ids))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Two files: in one a test that passes when it runs again, in the other whatever a test adds."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_leans.py").write_text(
        "from pathlib import Path\n"
        "def test_leans():\n"
        "    seen = Path(__file__).with_name('seen')\n"
        "    again = seen.exists()\n"
        "    seen.touch()\n"
        "    assert again\n"
        "def test_well(): pass\n"
    )
    return tmp_path


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "equipoise.tests"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_what_fails_beside_others_and_passes_alone_is_passed_and_named(suite: Path) -> None:
    done = run(suite)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[-2:] == [
        "== LEANS ON THE MACHINE: 1 failed beside others and passed alone",
        "test_leans.py::test_leans",
    ]


def test_what_fails_alone_as_well_has_failed(suite: Path) -> None:
    (suite / "test_wrong.py").write_text("def test_wrong(): assert 0\n")
    done = run(suite)
    assert done.returncode == 1
    assert "== LEANS ON THE MACHINE: 1 failed" in done.stdout and done.stdout.endswith("test_leans.py::test_leans\n")


def test_many_failures_are_no_accident(suite: Path) -> None:
    (suite / "test_wrong.py").write_text("\n".join(f"def test_{n}(): assert 0" for n in range(9)))
    done = run(suite)
    assert done.returncode == 1 and "LEANS" not in done.stdout


def test_a_suite_that_cannot_be_collected_has_failed(suite: Path) -> None:
    (suite / "test_wrong.py").write_text("import nothing_of_this_name\n")
    assert run(suite).returncode not in (0, 1)

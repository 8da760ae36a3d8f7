"""What a wheel would hold is what the tree holds, and the root stays as small as it is meant to be."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import equipoise
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]
PACKAGE_DATA: dict[str, list[str]] = SETUPTOOLS["package-data"]

FOLDERS = {"policies", "ebpf", "gpuctl", "daemon", "tui", "integrations", "tests"}
TOP_LEVEL = FOLDERS | {"__init__.py", "Makefile", "LICENSE", "README.md", "pyproject.toml", "constraints.txt"}
DOT_FILES = {".ci", ".gitignore", ".gitattributes", ".editorconfig", ".github", ".dockerignore"}

GENERATED = {"objects/*.o", "*.pyi"}
"""Built by `make ebpf` and `make proto`."""
NOT_SHIPPED = {".md"}


def package_folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def code_files() -> list[Path]:
    """Every file below the folders that are shipped, caches and build outputs left out."""
    found = []
    for folder in FOLDERS - {"tests"}:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return found


def test_every_folder_with_python_in_it_is_a_package() -> None:
    folders = {path.parent for path in code_files() if path.suffix == ".py"}
    without = sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists())
    assert without == [], "add an __init__.py, or a wheel will not hold them"


def test_the_package_list_equals_the_tree() -> None:
    inits = [path.parent.relative_to(ROOT) for path in code_files() if path.name == "__init__.py"]
    in_tree = {"equipoise"} | {".".join(("equipoise", *folder.parts)) for folder in inits}
    assert set(PACKAGES) == in_tree
    assert sorted(set(PACKAGES)) == PACKAGES, "sorted, each once"


@pytest.mark.parametrize(("package", "pattern"), [(p, g) for p, globs in PACKAGE_DATA.items() for g in globs])
def test_each_package_data_pattern_matches_a_file(package: str, pattern: str) -> None:
    assert package in PACKAGES
    if pattern in GENERATED and not (ROOT / "build").exists():
        pytest.skip("nothing has been built here")
    assert list(package_folder(package).glob(pattern)), f"{package}: {pattern} matches nothing"


def test_every_file_that_is_not_python_is_package_data() -> None:
    shipped = {
        path for package, globs in PACKAGE_DATA.items() for glob in globs for path in package_folder(package).glob(glob)
    }
    data = {path for path in code_files() if path.suffix not in (".py", ".pyc") and path.suffix not in NOT_SHIPPED}
    assert sorted(str(path.relative_to(ROOT)) for path in data - shipped) == []


def test_the_version_is_said_once_and_twice_the_same() -> None:
    assert equipoise.__version__ == PROJECT["project"]["version"]


def test_the_top_level_holds_only_what_the_design_allows() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    top = {PurePosixPath(line).parts[0] for line in listed.stdout.splitlines()}
    assert top - TOP_LEVEL - DOT_FILES == set()
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py"}


def test_every_dependency_is_pinned() -> None:
    project = PROJECT["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    names = {_normal(re.split(r"[\[<>=!~;\s]", requirement)[0]) for requirement in wanted} - {"equipoise"}
    pins = (ROOT / "constraints.txt").read_text().split()
    pinned = {_normal(pin.split("==", maxsplit=1)[0]) for pin in pins if "==" in pin}
    assert sorted(names - pinned) == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

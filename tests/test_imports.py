"""The import law: imports point inwards. Read from the sources, so that a lazy import counts as well."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("policies", "ebpf", "gpuctl", "daemon", "tui", "integrations")
GENERATED_APIS = ("daemon.api", "gpuctl.api")
ALLOWED: dict[str, tuple[str, ...]] = {
    "policies": ("policies",),
    "ebpf": ("ebpf", "policies"),
    "gpuctl": ("gpuctl", "policies"),
    "daemon": ("daemon", "policies", "ebpf", "gpuctl"),
    "tui": ("tui", "policies", *GENERATED_APIS),
    "integrations": ("integrations", "policies", *GENERATED_APIS),
}
LAZILY = {"daemon/cli.py": ("tui", "integrations")}
"""The command line hands over to the parts that are clients of the daemon, inside the function that needs them."""
PURE = sys.stdlib_module_names - {
    "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "glob", "http", "importlib", "io", "locale", "logging",
    "mmap", "multiprocessing", "os", "pickle", "platform", "queue", "random", "resource", "sched", "secrets", "select",
    "selectors", "shelve", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys",
    "tempfile", "threading", "time", "urllib", "uuid", "pathlib",
}  # fmt: skip
PURE_PATHS = {"PurePath", "PurePosixPath"}
IMPURE_CALLS = {"open", "input", "print", "exec", "eval", "__import__"}


@dataclass(frozen=True, slots=True)
class Import:
    module: str
    """Absolute: "equipoise.policies.model", "os"."""
    names: frozenset[str]
    """Of `from module import names`; empty for `import module`."""
    line: int
    lazy: bool
    """Inside a function."""
    relative: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lives in `package` ("equipoise.daemon")."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    in_functions = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        lazy = id(node) in in_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, frozenset(), node.lineno, lazy, relative=False)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = frozenset(alias.name for alias in node.names)
            yield Import(module, names, node.lineno, lazy, relative=bool(node.level))


def targets(found: Import) -> list[str]:
    """What an import reaches inside the package, without "equipoise.": `from .. import tui` reaches "tui"."""
    if found.module == "equipoise":
        return sorted(name for name in found.names if (ROOT / name).exists())
    if found.module.startswith("equipoise."):
        return [found.module.removeprefix("equipoise.")]
    return []


def within(target: str, allowed: tuple[str, ...]) -> bool:
    return any(target == each or target.startswith(each + ".") for each in allowed)


def breaches(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the root) imports against the law."""
    folder = path.split("/", maxsplit=1)[0]
    package = ".".join(("equipoise", *path.split("/")[:-1]))
    found = []
    for each in imports(source, package):
        where = f"{path}:{each.line}: {each.module}"
        if each.module.split(".")[0] == "equipoise" and not each.relative:
            found.append(f"{where} (inside the package imports are relative)")
        for target in targets(each):
            if not within(target, ALLOWED[folder]) and not (each.lazy and within(target, LAZILY.get(path, ()))):
                found.append(f"{where} ({folder} must not import {target})")
        if folder == "policies" and not each.relative and not _pure(each):
            found.append(f"{where} (the pure core has no I/O, clock, chance or threads)")
    return found


def _pure(found: Import) -> bool:
    if found.module == "pathlib":
        return bool(found.names) and found.names <= PURE_PATHS
    return found.module.split(".")[0] in PURE


def modules() -> list[str]:
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(p.relative_to(ROOT)) for p in paths if "_pb2" not in p.name)


@pytest.mark.parametrize("path", modules())
def test_imports_point_inwards(path: str) -> None:
    assert breaches(path, (ROOT / path).read_text()) == []


def engines_reached(source: str) -> list[str]:
    """Packages of gpuctl that a module of gpuctl/ itself imports: engines, all but the generated API."""
    reached = []
    for each in imports(source, "equipoise.gpuctl"):
        names = each.names if each.module == "equipoise.gpuctl" else {each.module.removeprefix("equipoise.gpuctl.")}
        inside = each.module == "equipoise.gpuctl" or each.module.startswith("equipoise.gpuctl.")
        packages = {name.split(".")[0] for name in names if inside}
        reached += sorted(name for name in packages - {"api"} if (ROOT / "gpuctl" / name).is_dir())
    return reached


@pytest.mark.parametrize("path", [path for path in modules() if path.startswith("gpuctl/") and path.count("/") == 1])
def test_what_engine_adapters_share_knows_no_engine(path: str) -> None:
    assert engines_reached((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "source", ["from .engine.engine import Engine", "from . import engine", "def f():\n    from .engine import live"]
)
def test_an_engine_among_what_adapters_share_is_found(source: str) -> None:
    assert engines_reached(source) == ["engine"]


@pytest.mark.parametrize("path", [path for path in modules() if path.startswith("policies/")])
def test_the_pure_core_calls_nothing_that_touches_the_world(path: str) -> None:
    calls = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert names & IMPURE_CALLS == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("policies/x.py", "import time"),
        ("policies/x.py", "from os import path"),
        ("policies/x.py", "from pathlib import Path"),
        ("policies/x.py", "import yaml"),
        ("policies/x.py", "def f():\n    import random"),
        ("policies/x.py", "from ..daemon import loop"),
        ("ebpf/x.py", "from ..gpuctl.nvml import facts"),
        ("gpuctl/engine/x.py", "from ...ebpf import abi"),
        ("gpuctl/x.py", "from .. import daemon"),
        ("daemon/loop.py", "def f():\n    from ..tui.app import App"),
        ("daemon/cli.py", "from ..tui.app import App"),
        ("tui/x.py", "from ..daemon.loop import tick"),
        ("integrations/vllm/x.py", "from ...gpuctl.client import Client"),
        ("daemon/x.py", "from equipoise.policies import model"),
        ("daemon/x.py", "from ..tests.policies import facts"),
    ],
)
def test_the_law_refuses(path: str, source: str) -> None:
    assert breaches(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("policies/x.py", "from pathlib import PurePosixPath\nimport math\nfrom .model import Sandbox"),
        ("policies/builtin/x.py", "from ..model import Sandbox"),
        ("daemon/cli.py", "def f():\n    from ..tui.app import App"),
        ("daemon/cgroups/x.py", "from ...policies.model import Sandbox\nfrom ..errors import CgroupError"),
        ("tui/x.py", "from ..daemon.api.v1 import policy_pb2\nfrom .. import __version__"),
        ("gpuctl/engine/x.py", "import numpy\nfrom ..api.v1 import engine_pb2"),
    ],
)
def test_the_law_allows(path: str, source: str) -> None:
    assert breaches(path, source) == []

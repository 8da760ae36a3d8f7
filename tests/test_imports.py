"""The import law: imports point inwards, and only what a wing exports is imported from outside it.

Read from the sources, so that a lazy import counts as well. A wing is a package inside a folder; the line "Seen from
outside:" of its docstring names what others may import: names, or modules of it.
"""

from __future__ import annotations

import ast
import graphlib
import re
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
WINGS: dict[str, tuple[str, ...]] = {
    "policies.state": ("policies",),
    "policies.document": ("policies",),
    "policies.kv": ("policies",),
    "policies.memory": ("policies",),
    "policies.world.engine": ("policies", "policies.world"),
    "policies.world": ("policies", "policies.kv", "policies.state", "policies.world.engine"),
    "gpuctl.engine.schedule": ("gpuctl.reports", "gpuctl.directives", "gpuctl.engine.errors"),
    "gpuctl.engine.compute": ("gpuctl.engine.schedule", "gpuctl.engine.errors"),
    "gpuctl.engine.tiers": (
        "gpuctl.reports", "gpuctl.directives", "gpuctl.engine.schedule", "gpuctl.engine.compute",
        "gpuctl.engine.reporter", "gpuctl.engine.totals", "gpuctl.engine.errors",
    ),
    "gpuctl.engine.openai": ("gpuctl", "gpuctl.engine", "gpuctl.engine.schedule", "gpuctl.engine.compute"),
    "gpuctl.engine.peer": (
        "gpuctl", "gpuctl.api", "gpuctl.engine", "gpuctl.engine.schedule", "gpuctl.engine.compute",
    ),
    "gpuctl.engine": (
        "gpuctl", "gpuctl.api", "gpuctl.engine.schedule", "gpuctl.engine.compute", "gpuctl.engine.tiers",
        "gpuctl.engine.openai", "gpuctl.engine.peer",
    ),
    "gpuctl": ("gpuctl.api",),
    "daemon.sandboxes.cgroups": ("daemon.errors",),
    "daemon.sandboxes": ("daemon.sandboxes.cgroups", "daemon.errors", "daemon.log"),
    "daemon.observe.journal": ("daemon.sandboxes", "daemon.errors", "daemon.log"),
    "daemon.observe": (
        "daemon.observe.journal", "daemon.sandboxes", "daemon.sandboxes.cgroups", "daemon.errors", "daemon.log",
    ),
    "daemon.enforce": (
        "daemon.observe.journal", "daemon.sandboxes", "daemon.sandboxes.cgroups", "daemon.errors", "daemon.log",
    ),
    "daemon.policy": ("daemon.errors", "daemon.log"),
    "daemon.rpc": (
        "daemon.policy", "daemon.observe", "daemon.sandboxes", "daemon.loop", "daemon.errors", "daemon.log",
        "daemon.api",
    ),
    "daemon.demo.agents": ("daemon.api",),
    "daemon.demo": (
        "daemon.demo.agents", "daemon.rpc", "daemon.sandboxes", "daemon.sandboxes.cgroups", "daemon.errors",
        "daemon.api",
    ),
    "daemon.cli": (
        "daemon", "daemon.policy", "daemon.rpc", "daemon.enforce", "daemon.demo", "daemon.sandboxes",
        "daemon.sandboxes.cgroups", "daemon.api",
    ),
    "daemon": (
        "daemon.policy", "daemon.rpc", "daemon.enforce", "daemon.observe", "daemon.observe.journal", "daemon.sandboxes",
        "daemon.sandboxes.cgroups", "daemon.api",
    ),
}  # fmt: skip
"""Which wing may see which others of its own folder; a module of no other wing belongs to its folder's own line.
A wing sees itself. "daemon" alone means its own modules (daemon.loop), not its wings."""
APART = ("policies.world",)
"""Rooms beside their folder: seen from other folders, by no module of their own."""
LAZILY = {"daemon/cli/main.py": ("tui", "integrations")}
"""The command line hands over to the parts that are clients of the daemon, inside the function that needs them."""
PURE = sys.stdlib_module_names - {
    "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "glob", "http", "importlib", "io", "locale", "logging",
    "mmap", "multiprocessing", "os", "pickle", "platform", "queue", "random", "resource", "sched", "secrets", "select",
    "selectors", "shelve", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys",
    "tempfile", "threading", "time", "urllib", "uuid", "pathlib",
}  # fmt: skip
PURE_PATHS = {"PurePath", "PurePosixPath"}
ALSO = {
    "policies/world/traces.py": {"random"},
    "policies/world/bound.py": {"scipy"},
}
"""What a file of the world around the core may import besides: chance by a seed, and, in a function, a solver."""
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
    annotations_only: bool
    """Under `if TYPE_CHECKING:`: no dependency when it runs."""


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lives in `package` ("equipoise.daemon")."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    in_functions = {id(inner) for function in functions for inner in ast.walk(function)}
    typing = {id(inner) for node in ast.walk(tree) if _asks_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        lazy = id(node) in in_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, frozenset(), node.lineno, lazy, False, id(node) in typing)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = frozenset(alias.name for alias in node.names)
            yield Import(module, names, node.lineno, lazy, bool(node.level), id(node) in typing)


def _asks_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def targets(found: Import) -> list[str]:
    """What an import reaches inside the package, without "equipoise.": `from .. import tui` reaches "tui"."""
    if found.module == "equipoise":
        return sorted(name for name in found.names if (ROOT / name).exists())
    if found.module.startswith("equipoise."):
        return [found.module.removeprefix("equipoise.")]
    return []


def within(target: str, allowed: tuple[str, ...]) -> bool:
    return any(target == each or target.startswith(each + ".") for each in allowed)


def wing_of(module: str) -> str | None:
    """The longest entry of WINGS that a module ("daemon.rpc.views") is in."""
    names = module.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in WINGS), None)


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()


def exported(wing: str) -> frozenset[str]:
    """What the wing's docstring lets be seen from outside."""
    source = (ROOT / wing.replace(".", "/") / "__init__.py").read_text()
    found = re.search(r"Seen from outside: ([^.]+)\.", ast.get_docstring(ast.parse(source)) or "")
    return frozenset(found[1].replace("\n", " ").replace("`", "").split(", ")) if found else frozenset()


def wing_breaches(path: str, found: Import) -> Iterator[str]:
    """What an import of the module at `path` reaches in another wing against the law."""
    own = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    home = wing_of(own)
    base = found.module.removeprefix("equipoise.")
    if not found.module.startswith("equipoise."):
        return
    for name in found.names:
        reached = f"{base}.{name}" if is_package(base) else base
        wing = wing_of(reached)
        if wing is None or wing == home or (found.annotations_only and wing == "gpuctl.engine.compute"):
            continue
        if wing in APART and not within(own, (wing,)) and own.split(".")[0] == wing.split(".")[0]:
            yield f"{reached} is a room apart"
        same_folder = home is not None and wing.split(".")[0] == home.split(".")[0]
        if same_folder and wing not in WINGS[home or ""] and not within(reached, _single_modules(home or "")):
            yield f"{home} must not see {reached}"
        inside = reached.removeprefix(f"{wing}.") if reached != wing else name
        if wing.count(".") and inside not in exported(wing) and not within(home or "", (wing,)):
            yield f"{inside} is inside {wing}: not among what its docstring lets be seen"


def _single_modules(wing: str) -> tuple[str, ...]:
    return tuple(each for each in WINGS[wing] if each not in WINGS)


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
        found += [f"{where} ({why})" for why in wing_breaches(path, each)]
        if folder == "policies" and not each.relative and not _pure(each) and not _also(path, each):
            found.append(f"{where} (the pure core has no I/O, clock, chance or threads)")
    return found


def _also(path: str, found: Import) -> bool:
    base = found.module.split(".")[0]
    return base in ALSO.get(path, ()) and (found.lazy or base in sys.stdlib_module_names)


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
        ("policies/x.py", "from .world.world import World"),
        ("policies/world/bound.py", "import scipy"),
        ("policies/world/world.py", "import random"),
        ("policies/x.py", "from ..daemon import loop"),
        ("ebpf/x.py", "from ..gpuctl.nvml import facts"),
        ("gpuctl/engine/x.py", "from ...ebpf import abi"),
        ("gpuctl/x.py", "from .. import daemon"),
        ("daemon/loop.py", "def f():\n    from ..tui.app import App"),
        ("daemon/cli/main.py", "from ...tui.app import App"),
        ("daemon/rpc/x.py", "from ..enforce.holds import Holds"),
        ("daemon/sandboxes/x.py", "from ..observe.history import History"),
        ("daemon/x.py", "from .cli.printing import table"),
        ("daemon/x.py", "from .sandboxes.leaves import Leaves"),
        ("daemon/x.py", "from .sandboxes import leaves"),
        ("gpuctl/client.py", "from .engine.engine import Engine"),
        ("gpuctl/engine/schedule/x.py", "from ..compute.llama import library"),
        ("gpuctl/engine/x.py", "def f():\n    from .peer.giving import Giver"),
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
        ("policies/world/bound.py", "def f():\n    from scipy.optimize import linprog"),
        ("policies/world/traces.py", "import random\nfrom ..state import State"),
        ("daemon/cli/main.py", "def f():\n    from ...tui.app import App"),
        ("daemon/sandboxes/x.py", "from ...policies.model import Sandbox\nfrom ..errors import CgroupError"),
        ("daemon/x.py", "from .sandboxes.keeper import SandboxKeeper\nfrom .observe.journal import Journal"),
        ("tui/x.py", "from ..daemon.api.v1 import policy_pb2\nfrom .. import __version__"),
        ("gpuctl/engine/x.py", "import numpy\nfrom ..api.v1 import engine_pb2"),
    ],
)
def test_the_law_allows(path: str, source: str) -> None:
    assert breaches(path, source) == []


@pytest.mark.parametrize("wing", [wing for wing in WINGS if "." in wing])
def test_a_wing_says_what_it_owns_and_what_is_seen_of_it(wing: str) -> None:
    folder = ROOT / wing.replace(".", "/")
    words = " ".join((ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split())
    assert "Must not: " in words, "its docstring says what it must not do"
    for name in exported(wing):
        there = (folder / f"{name}.py").exists() or (folder / name).is_dir()
        assert there or name in (folder / "__init__.py").read_text().split('"""', 2)[2], f"{name}: there is none"
    readme = next(path / "README.md" for path in (folder, *folder.parents) if (path / "README.md").exists())
    assert f"{folder.name}/" in readme.read_text() or readme.parent == folder, f"{readme} has no line about it"


def test_no_module_imports_itself_round_a_circle() -> None:
    known = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in modules()}
    graph: dict[str, set[str]] = {}
    for path in modules():
        package = ".".join(("equipoise", *path.split("/")[:-1]))
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        reached = set()
        for each in imports((ROOT / path).read_text(), package):
            base = each.module.removeprefix("equipoise.")
            if not each.annotations_only and base in known:
                reached |= {f"{base}.{n}" if f"{base}.{n}" in known else base for n in each.names}
        graph[name] = reached - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))

"""The package's bytecode, made on the host: compiling in the guest takes a third of the suite's time.

Owns the `__pycache__` folders of the checkout that would be there anyway, did not many containers set
PYTHONDONTWRITEBYTECODE. Must not fail a run: whatever is missing here, the guest compiles for itself.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Everything that the tests, the command line and the daemon import; other folders hold virtual environments.
FOLDERS = ("daemon", "ebpf", "gpuctl", "integrations", "policies", "tests", "tui")


def compile_for_guest(repository: Path, node_ids: Sequence[str]) -> None:
    """Compiles the package, and the test files of `node_ids` as pytest rewrites them. A second when nothing changed."""
    files = sorted({node_id.partition("::")[0] for node_id in node_ids})
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "EQUIPOISE_VM": "0"}
    for unwanted in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTEST_ADDOPTS"):
        environment.pop(unwanted, None)
    for command in (
        ["compileall", "-q", "__init__.py", *(name for name in FOLDERS if (repository / name).is_dir())],
        ["pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *files],
    ):
        subprocess.run(
            [sys.executable, "-m", *command], cwd=repository, env=environment, capture_output=True, check=False
        )

"""The agents themselves: pinned versions, in the cache folder that models lie in too, installed once.

Owns that folder: npm/ (1.1 GB), a Python environment for each agent from PyPI (aider/ 690 MB, mini/ 400 MB), and bin/
with links to what those are started by. Uses npm and pip as they are; what is missing on this machine becomes a reason
to skip, in words.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from equipoise.gpuctl.engine.compute.model import cache_folder

FOLDER = cache_folder() / "agents"
NPM_FOLDER = FOLDER / "npm"
NODE_MAJOR = 20
"""The oldest that Gemini CLI 0.61 runs on."""
NPM_PACKAGES = {
    "@anthropic-ai/claude-code": "2.1.197",
    "@openai/codex": "0.169.0",
    "@google/gemini-cli": "0.61.0",
    "opencode-ai": "1.18.33",
}
MINI_PACKAGES = {"mini-swe-agent": "2.4.6"}
MINI_NEEDS = (
    "pyyaml", "requests", "jinja2", "pydantic", "litellm", "tenacity", "rich", "python-dotenv", "typer", "platformdirs",
    "textual", "prompt_toolkit", "openai",
)  # fmt: skip
"""All that it declares but datasets (pyarrow and pandas: 300 MB), which its benchmarks alone import."""
AIDER_PACKAGES = {"aider-chat": "0.86.2"}
_SCRIPTS = (("@anthropic-ai/claude-code", "install.cjs"), ("opencode-ai", "postinstall.mjs"))
"""What npm may leave out (`ignore-scripts`), and what then fetches the binary's place."""
_STAMP = ".installed.json"


class CannotInstall(Exception):
    """This machine cannot have the agents; the message says what is missing."""


def install_npm_agents() -> Path:
    """Back with the folder; does nothing where these very versions are there. CannotInstall says what is missing."""
    stamp = NPM_FOLDER / _STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == NPM_PACKAGES:
        return NPM_FOLDER
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise CannotInstall(
                f"{tool} is missing: install Debian's packages nodejs and npm (node {NODE_MAJOR} or newer)"
            )
    version = _run(["node", "--version"]).removeprefix("v")
    if int(version.partition(".")[0]) < NODE_MAJOR:
        raise CannotInstall(f"node {version} is too old: {NODE_MAJOR} or newer is needed")
    NPM_FOLDER.mkdir(parents=True, exist_ok=True)
    (NPM_FOLDER / "package.json").write_text(json.dumps({"private": True}))
    wanted = [f"{name}@{version}" for name, version in NPM_PACKAGES.items()]
    _run(["npm", "install", "--no-audit", "--no-fund", "--no-progress", *wanted], NPM_FOLDER)
    for package, script in _SCRIPTS:
        _run(["node", script], NPM_FOLDER / "node_modules" / package)
    stamp.write_text(json.dumps(NPM_PACKAGES))
    return NPM_FOLDER


def install_mini() -> Path:
    """mini-swe-agent; back with its environment."""
    return _install_from_pypi("mini", MINI_PACKAGES, MINI_NEEDS)


def install_aider() -> Path:
    """aider; back with its environment."""
    return _install_from_pypi("aider", AIDER_PACKAGES)


def _install_from_pypi(name: str, packages: dict[str, str], needs: tuple[str, ...] | None = None) -> Path:
    """Into an environment of its own. `needs`: install these instead of what the package declares."""
    folder, stamp = FOLDER / name, FOLDER / name / _STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == packages:
        return folder
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = [f"{package}=={version}" for package, version in packages.items()]
    _run([sys.executable, "-m", "venv", str(folder)])
    if needs is None:
        _run([*pip, *wanted])
    else:
        _run([*pip, "--no-deps", *wanted])
        _run([*pip, *needs])
    link = FOLDER / "bin" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "bin" / name)
    stamp.write_text(json.dumps(packages))
    return folder


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "CI": "1"}, check=False
    )
    if done.returncode:
        raise CannotInstall(f"`{' '.join(command[:3])}` failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout.strip()

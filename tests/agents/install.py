"""The agents themselves: pinned versions, in build/agents, installed once.

Owns that folder. Uses npm as it is; what is missing on this machine becomes a reason to skip, in words.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "agents"
NPM_FOLDER = FOLDER / "npm"
NODE_MAJOR = 20
"""The oldest that Gemini CLI 0.61 runs on."""
NPM_PACKAGES = {
    "@anthropic-ai/claude-code": "2.1.197",
    "@openai/codex": "0.169.0",
    "@google/gemini-cli": "0.61.0",
    "opencode-ai": "1.18.33",
}
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


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "CI": "1"}, check=False
    )
    if done.returncode:
        raise CannotInstall(f"`{' '.join(command[:3])}` failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout.strip()

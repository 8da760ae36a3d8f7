"""How each agent is started against a model endpoint: command line, environment, settings in a home of its own.

Owns those recipes and the workspace an agent works in. Knows neither our daemon nor what the model says.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise.tests.agents.install import (
    FOLDER,
    NPM_FOLDER,
    install_aider,
    install_mini,
    install_npm_agents,
)
from equipoise.tests.agents.script import Command, Script

PATH = f"{NPM_FOLDER}/node_modules/.bin:{FOLDER}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Client:
    """An agent's recipe."""

    name: str
    argv: Callable[[str], list[str]]
    """From the prompt."""
    environment: Callable[[str], dict[str, str]]
    """From the endpoint's URL; what is beside HOME and PATH."""
    settings: Callable[[str, Path], dict[str, str]]
    """From the endpoint's URL and the workspace: files below HOME, by relative path."""
    install: Callable[[], Path] = install_npm_agents
    """Makes it be there; CannotInstall says why not."""
    fit: Callable[[Script], Script] = lambda script: script
    """What it can follow of a script, and what it needs on top to end."""
    in_words: bool = False
    """It has no tools; see Book.expect()."""
    typing: tuple[tuple[str, str], ...] = ()
    """It asks its user: what it prints, as a regular expression, and what is typed then. () asks nobody."""
    screen: bool = False
    """It draws a screen and stays until its terminal is closed."""
    names_session: bool = False
    """It puts its conversation's id into the environment of its tool calls."""


@dataclass(frozen=True, slots=True)
class Launch:
    """An agent that is ready to start: what Popen wants, and the label by which the model knows its conversation."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    workspace: Path
    label: str
    typing: tuple[tuple[str, str], ...] = ()
    screen: bool = False


def _claude_environment(url: str) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "none",
        "IS_SANDBOX": "1",
        "DISABLE_TELEMETRY": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


def _claude_settings(url: str, workspace: Path) -> dict[str, str]:
    """What its screen would ask first: a theme, the key, the folder, the permissions."""
    known = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "bypassPermissionsModeAccepted": True,
        "customApiKeyResponses": {"approved": ["none"], "rejected": []},
        "projects": {str(workspace): {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}},
    }
    return {
        ".claude.json": json.dumps(known),
        ".claude/settings.json": json.dumps({"skipDangerousModePermissionPrompt": True}),
    }


def _codex_settings(url: str, workspace: Path) -> dict[str, str]:
    text = f"""model = "m"
model_provider = "scripted"
[model_providers.scripted]
name = "scripted"
base_url = "{url}/v1"
env_key = "SCRIPTED_KEY"
wire_api = "responses"
[projects."{workspace}"]
trust_level = "trusted"
"""
    return {".codex/config.toml": text}


def _opencode_settings(url: str, workspace: Path) -> dict[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "scripted",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {"m": {"name": "m", "limit": {"context": 32768, "output": 1024}}},
    }
    settings = {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "model": "scripted/m",
        "small_model": "scripted/m",
        "provider": {"scripted": provider},
        "permission": {"edit": "allow", "bash": "allow", "webfetch": "allow"},
    }
    return {".config/opencode/opencode.json": json.dumps(settings)}


def _gemini_settings(url: str, workspace: Path) -> dict[str, str]:
    settings = {
        "security": {"auth": {"selectedType": "gemini-api-key"}},
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"disableAutoUpdate": True},
    }
    return {".gemini/settings.json": json.dumps(settings)}


SUBMIT = Command("submit", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", ends_agent=True)
"""mini-swe-agent ends by this command alone; words without a tool call are an error to it."""
_AIDER_OPTIONS = (
    "--model", "openai/m", "--edit-format", "diff", "--no-git", "--map-tokens", "0", "--no-stream", "--no-pretty",
    "--no-fancy-input", "--no-check-update", "--analytics-disable", "--no-show-model-warnings",
    "--no-show-release-notes", "--no-detect-urls", "--no-auto-lint",
)  # fmt: skip
"""With --yes-always it would say no to every shell command: those want an explicit yes."""

CLAUDE = Client(
    "claude",
    lambda prompt: ["claude", "-p", prompt, "--dangerously-skip-permissions", "--model", "m"],
    _claude_environment,
    lambda url, workspace: {},
    names_session=True,
)
CODEX = Client(
    "codex",
    lambda prompt: ["codex", "exec", "--dangerously-bypass-approvals-and-sandbox", prompt],
    lambda url: {"SCRIPTED_KEY": "none"},
    _codex_settings,
    names_session=True,
)
OPENCODE = Client("opencode", lambda prompt: ["opencode", "run", prompt], lambda url: {}, _opencode_settings)
GEMINI = Client(
    "gemini",
    lambda prompt: ["gemini", "--yolo", "--skip-trust", "-m", "gemini-2.5-pro", "-p", prompt],
    lambda url: {"GEMINI_API_KEY": "none", "GOOGLE_GEMINI_BASE_URL": url},
    _gemini_settings,
)
MINI = Client(
    "mini",
    lambda prompt: ["mini", "--yolo", "--exit-immediately", "--cost-limit", "0", "-m", "openai/m", "-t", prompt],
    lambda url: {
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "MSWEA_CONFIGURED": "true",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    },
    lambda url, workspace: {},
    install=install_mini,
    fit=lambda script: script.then(SUBMIT),
)
AIDER = Client(
    "aider",
    lambda prompt: ["aider", *_AIDER_OPTIONS],
    lambda url: {
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    },
    lambda url, workspace: {},
    install=install_aider,
    fit=lambda script: script.of_lines(),
    in_words=True,
    typing=(
        (r"All done\.[\s\S]*diff> $", "/exit\r"),
        (r"\(Y\)es/\(N\)o[^\n]*: $", "y\r"),
        (r"(?m)^diff> $", "Go on, please ({label}).\r"),
    ),
)
SCREENS = (
    replace(
        CLAUDE,
        name="claude-screen",
        argv=lambda prompt: ["claude", prompt, "--dangerously-skip-permissions", "--model", "m"],
        settings=_claude_settings,
        screen=True,
    ),
    replace(
        CODEX,
        name="codex-screen",
        argv=lambda prompt: ["codex", "--dangerously-bypass-approvals-and-sandbox", prompt],
        screen=True,
    ),
    replace(OPENCODE, name="opencode-screen", argv=lambda prompt: ["opencode", "--prompt", prompt], screen=True),
    replace(
        GEMINI,
        name="gemini-screen",
        argv=lambda prompt: ["gemini", "--yolo", "--skip-trust", "-m", "gemini-2.5-pro", "-i", prompt],
        screen=True,
    ),
)
"""The same four as their users see them. Codex is another program then: a daemon of its own runs the tool calls."""
CLIENTS = {client.name: client for client in (CLAUDE, CODEX, OPENCODE, GEMINI, MINI, AIDER, *SCREENS)}

LAUNCHERS: dict[str, Callable[[list[str]], list[str]]] = {
    "plain": lambda argv: argv,
    "timeout": lambda argv: ["timeout", "300", *argv],
    "env": lambda argv: ["env", "-u", "NOT_SET", *argv],
    "sh": lambda argv: ["sh", "-c", shlex.join(argv)],
    # What `sh -c` alone does not show: a shell that stays, with the agent as its child.
    "script": lambda argv: ["sh", "-c", f"cd . && {shlex.join(argv)}; code=$?; echo left with $code; exit $code"],
    "npx": lambda argv: ["npx", "--no-install", "--prefix", str(NPM_FOLDER), "--", *argv],
    "npm-exec": lambda argv: ["npm", "exec", "--offline", "--prefix", str(NPM_FOLDER), "--", *argv],
}


def launchers_of(client: Client) -> list[str]:
    """Those that can start it: npx and npm exec know what npm installed."""
    from_npm = client.install is install_npm_agents
    return [launcher for launcher in LAUNCHERS if from_npm or not launcher.startswith("np")]


def prepare(client: Client, url: str, folder: Path, launcher: str = "plain") -> Launch:
    """Make a home and a workspace below `folder`, which must not exist."""
    home, workspace = folder / "home", folder / "work"
    for path, text in client.settings(url, workspace).items():
        file = home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    home.mkdir(parents=True, exist_ok=True)
    make_workspace(workspace)
    label = f"run {uuid.uuid4().hex[:8]}"
    environment = {
        "HOME": str(home),
        "PATH": PATH,
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "SHELL": "/bin/bash",
        "USER": os.environ.get("USER", "root"),
        "NPM_CONFIG_UPDATE_NOTIFIER": "false",
        **client.environment(url),
    }
    argv = LAUNCHERS[launcher](client.argv(f"Run the tools, please ({label})."))
    typing = tuple((pattern, reply.replace("{label}", label)) for pattern, reply in client.typing)
    return Launch(tuple(argv), environment, workspace, label, typing, client.screen)


def make_workspace(folder: Path) -> None:
    """A small git repository with a change that is not committed."""
    (folder / "sub").mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / "sub" / f"part-{number}.txt").write_text(f"part {number}\n")
    (folder / "README.md").write_text("# A workspace\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "gc.auto=0"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    (folder / "README.md").write_text("# A workspace\n\nA change.\n")

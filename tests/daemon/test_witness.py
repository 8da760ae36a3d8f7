"""The conversation is the best witness: what the model asks for is that call, with its id; the rest is housekeeping.

A real daemon with the embedded engine; the model is held to the commands that the test wants by the schema of its tool.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon, eventually, with_probes

pytestmark = [pytest.mark.engine, pytest.mark.kernel]

# Nobody's profile: asks for what it is told to, runs it in its own way, and looks after itself in between.
AGENT = """
import json, os, subprocess, sys
import httpx
url = os.environ["OPENAI_BASE_URL"]
messages = [{"role": "user", "content": "Run the tools."}]
told = []
with httpx.Client(timeout=120) as client:
    for command in json.loads(sys.argv[1]):
        parameters = {"type": "object", "properties": {"command": {"enum": [command]}}, "required": ["command"],
                      "additionalProperties": False}
        answered = client.post(f"{url}/chat/completions", json={
            "messages": messages, "max_tokens": 120,
            "tools": [{"type": "function", "function": {"name": "shell", "parameters": parameters}}],
            "tool_choice": {"type": "function", "function": {"name": "shell"}},
        })
        message = answered.raise_for_status().json()["choices"][0]["message"]
        (call,) = message["tool_calls"]
        subprocess.run(["git", "--version"], stdout=subprocess.DEVNULL)
        asked = json.loads(call["function"]["arguments"])["command"]
        assert asked == command, asked
        done = subprocess.run(["/bin/bash", "-c", f"cd / && {asked}"], stdout=subprocess.PIPE, text=True)
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": done.stdout[:200]}]
        told.append([call["id"], command])
print(json.dumps(told), flush=True)
sys.stdin.readline()
"""
COMMANDS = ["echo one", "ls -d / | wc -l", "true"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> Iterator[RunningDaemon]:
    with with_probes(
        tmp_path_factory.mktemp("witness"),
        "--engine",
        "embedded",
        "--engine-listen",
        "127.0.0.1:0",
        "--kv-tokens",
        "8192",
    ) as running:
        eventually(lambda: running.status().engine_url, within_s=90)
        eventually(lambda: running.watch().engines)
        yield running


def test_what_the_conversation_asks_for_is_the_call_and_the_rest_is_housekeeping(daemon):
    agents = [
        subprocess.Popen(
            [*CLI, "run", "--tenant", "gold", "--name", name, "--", sys.executable, "-c", AGENT, json.dumps(COMMANDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "EQUIPOISE_SOCKET": str(daemon.socket)},
        )
        for name in ("ann", "ben")
    ]
    try:
        told = [json.loads(agent.stdout.readline()) for agent in agents if agent.stdout]
        for name, asked in zip(("ann", "ben"), told, strict=True):
            calls = [c for c in daemon.tool_calls() if c.sandbox == name]
            assert [[c.agent_call_id, c.command] for c in calls] == asked
            assert min(c.confidence for c in calls) > 0.98
            own = {s.session_id for s in daemon.watch().sessions if s.sandbox == f"gold/{name}"}
            assert {c.session_id for c in calls} <= own, "of its own conversation"
    finally:
        for agent in agents:
            agent.communicate("\n", timeout=20)

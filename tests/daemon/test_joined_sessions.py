"""Sessions joined to sandboxes without the agent's help: plain clients, a real engine, a real kernel.

No client here names a tenant or a session unless the test is about that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from equipoise.daemon.api.v1 import policy_pb2
from equipoise.tests.fixtures.network_namespace import Elsewhere, elsewhere
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon, eventually, with_probes

pytestmark = [pytest.mark.kernel, pytest.mark.engine, pytest.mark.slow]
READY_S = 180.0
TURNS = 10 if "EQUIPOISE_FULL" in os.environ else 2
"""Of each of 20 clients: 200 take a minute and a half."""

_ASK = """
import json, os, subprocess, sys, time
URL, WHO = sys.argv[1:3]
def body(*said):
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(said)]
    return {"model": "default", "messages": messages, "max_tokens": 1, "temperature": 0}
TURNS = int(sys.argv[3])
def talk(post):
    said = [f"I am {WHO}."]
    for turn in range(TURNS):
        said += [post(body(*said))["choices"][0]["message"]["content"], "Go on."]
def stay():
    print("done", flush=True)
    sys.stdin.read()
"""
CLIENTS = {
    "httpx, one connection": """
import httpx
with httpx.Client(timeout=120) as client:
    talk(lambda body: client.post(f"{URL}/v1/chat/completions", json=body).raise_for_status().json())
""",
    "httpx, a connection a request": """
import httpx
talk(lambda body: httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=120).raise_for_status().json())
""",
    "openai": """
import openai
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)
talk(lambda body: client.chat.completions.create(**body).model_dump())
""",
    "openai, told by the environment": """
import openai
assert os.environ["OPENAI_BASE_URL"] == os.environ["OPENAI_API_BASE"] == os.environ["EQUIPOISE_ENGINE_URL"] + "/v1"
os.environ["OPENAI_BASE_URL"] = f"{URL}/v1"
client = openai.OpenAI(api_key="none", max_retries=0, timeout=120)
talk(lambda body: client.chat.completions.create(**body).model_dump())
""",
    "curl, as a tool call": """
def post(body):
    command = ["curl", "-sSf", "-m", "120", "-H", "content-type: application/json", "-d", json.dumps(body)]
    return json.loads(subprocess.run([*command, f"{URL}/v1/chat/completions"], capture_output=True, check=True).stdout)
talk(post)
""",
    "node": """
SCRIPT = '''
const [url, ...bodies] = process.argv.slice(1);
(async () => { for (const body of bodies) {
  const answered = await fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body});
  if (!answered.ok) throw new Error(await answered.text());
  await answered.json();
} })();
'''
again = [json.dumps(body(f"I am {WHO}.", *["Yes.", "Go on."] * turn)) for turn in range(TURNS)]
subprocess.run(["node", "-e", SCRIPT, f"{URL}/v1/chat/completions", *again], check=True)
""",
}
PROGRAMS = {"curl, as a tool call": "curl", "node": "node"}


class Client:
    """An agent in a sandbox that asks the engine and then stays, so that its sandbox does."""

    def __init__(self, daemon: RunningDaemon, url: str, tenant: str, name: str, code: str, *via: str) -> None:
        self.tenant, self.label = tenant, f"{tenant}/{name}"
        command = [*CLI, "run", "--tenant", tenant, "--name", name, "--", *via]
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", f"{_ASK}{code}\nstay()", url, self.label, str(TURNS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EQUIPOISE_SOCKET": str(daemon.socket)},
        )

    def said(self) -> list[str]:
        """What it printed before it was done."""
        assert self.process.stdout is not None and self.process.stderr is not None
        lines = []
        while (line := self.process.stdout.readline().strip()) != "done":
            assert line or self.process.poll() is None, self.process.stderr.read()[-2000:]
            lines.append(line)
        return lines

    def leave(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(
        tmp_path_factory.mktemp("daemon"),
        "--engine",
        "embedded",
        "--engine-listen",
        "0.0.0.0:0",
        "--kv-tokens",
        "16384",
        "--verbose",
    ) as running:
        eventually(lambda: running.status().engine_url, within_s=READY_S)
        eventually(lambda: running.watch().engines)
        yield running


@pytest.fixture
def url(daemon: RunningDaemon) -> str:
    return f"http://127.0.0.1:{daemon.status().engine_url.rpartition(':')[2]}"


@pytest.fixture(scope="module")
def other() -> Iterator[Elsewhere]:
    with elsewhere() as made:
        yield made


def untold_count(daemon: RunningDaemon) -> int:
    """Connections whose peer was not told within 100 ms, and whose clients were believed therefore: on a machine with
    more work than processors the daemon may have to wait as long for its turn."""
    return daemon.log.read_text(errors="replace").count("peer_not_told")


def sessions(daemon: RunningDaemon, label: str) -> list[policy_pb2.SessionView]:
    """Those of one sandbox, as its connections show."""
    return [session for session in daemon.watch().sessions if session.sandbox == label]


def test_every_plain_client_is_joined_to_its_sandbox_and_tenant(daemon, url, other):
    there = url.replace("127.0.0.1", other.here)
    kinds = [kind for kind in CLIENTS if shutil.which(PROGRAMS.get(kind, "sh"))]
    clients = []
    for number in range(20):
        kind, tenant = kinds[number % len(kinds)], ("gold", "silver")[number % 2]
        away = number % 5 in (3, 4)
        via = other.command() if away else ()
        clients.append(Client(daemon, there if away else url, tenant, f"plain-{number}", CLIENTS[kind], *via))
        if number % 2:
            for client in clients[-2:]:
                client.said()
    eventually(lambda: {s.sandbox for s in daemon.watch().sessions} >= {client.label for client in clients})
    for client in clients:
        found = sessions(daemon, client.label)
        assert {s.tenant_id for s in found} == {client.tenant}
        assert {s.session_id.startswith("anonymous-") for s in found} == {True}
    nobodys = [s for s in daemon.watch().sessions if not s.sandbox]
    print(f"joined {len(clients)} clients, {TURNS} turns each; {len(nobodys)} of their sessions nobody's")
    assert len(nobodys) <= min(2, untold_count(daemon)), nobodys
    for client in clients:
        client.leave()


FORGE = """
import httpx
def status(**headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    answered = httpx.post(f"{URL}/v1/chat/completions", json=body("Hi."), headers=headers, timeout=120)
    print(answered.status_code, answered.json().get("error", {}).get("message", ""), flush=True)
"""


def forged(daemon: RunningDaemon, url: str, name: str, code: str, *via: str) -> list[tuple[int, str]]:
    client = Client(daemon, url, "silver", name, FORGE + code, *via)
    said = [line.partition(" ") for line in client.said()]
    client.leave()
    return [(int(status), message) for status, _, message in said]


def test_a_forged_tenant_is_refused_in_one_line(daemon, url, other):
    code = """
for n in range(5): status(x_equipoise_tenant="gold")
with httpx.Client() as client:
    for n in range(5):
        headers = {"X-Equipoise-Tenant": "gold", "X-Forwarded-For": f"10.9.9.{n}", "X-Real-IP": "10.9.9.9"}
        answered = client.post(f"{URL}/v1/chat/completions", json=body("Hi."), headers=headers)
        print(answered.status_code, answered.json()["error"]["message"], flush=True)
"""
    there = url.replace("127.0.0.1", other.here)
    untold_before = untold_count(daemon)
    answered = forged(daemon, url, "forger", code) + forged(daemon, there, "forger-2", code, *other.command())
    assert len(answered) == 20
    refused = [message for status, message in answered if status == 403]
    assert 20 - len(refused) <= min(2, untold_count(daemon) - untold_before)
    assert {message.partition("/")[0] for message in refused} == {
        "x-equipoise-tenant: 'gold': this request is from sandbox silver"
    }
    assert refused[0].endswith("silver/forger: leave the header out")
    print(f"refused {len(refused)} of {len(answered)} forged headers")


def test_its_own_tenants_name_does_no_harm_and_nor_does_a_forwarded_address(daemon, url):
    code = """
status(x_equipoise_tenant="silver")
status(x_forwarded_for="10.9.9.9")
"""
    assert [status for status, _ in forged(daemon, url, "honest", code)] == [200, 200]


def test_a_session_name_is_its_tenants_own_whoever_said_it_first(daemon, url):
    """A name that another says first, and one that begins with another tenant's, lead to no session of his."""
    say = 'status(x_equipoise_session="private"); status(x_equipoise_session="gold/private")'
    squatter = Client(daemon, url, "silver", "squatter", FORGE + say)
    assert [line[:3] for line in squatter.said()] == ["200", "200"]
    owner = Client(daemon, url, "gold", "owner", FORGE + say)
    assert [line[:3] for line in owner.said()] == ["200", "200"]
    told = forged(daemon, url, "thief", 'status(x_equipoise_session="private", x_equipoise_tenant="gold")')
    assert told[0][0] == 403

    def owners() -> dict[str, set[str]]:
        return {c.label: {s.session_id for s in sessions(daemon, c.label)} for c in (squatter, owner)}

    expected = {squatter.label: {"silver/private", "silver/gold/private"}, owner.label: {"gold/private"}}
    eventually(lambda: owners() == expected)
    squatter.leave()
    owner.leave()


def test_a_session_of_another_tenant_is_refused_to_who_is_believed(daemon, url):
    """Outside of every sandbox the tenant is as the client says, and the session's first one stands."""
    assert ask(url, {"x-equipoise-tenant": "gold", "x-equipoise-session": "first"})["choices"]
    refused = ask(url, {"x-equipoise-tenant": "silver", "x-equipoise-session": "first"})
    assert refused["error"]["message"] == "session first belongs to another tenant"


LOCAL = """
import httpx
with httpx.Client(transport=httpx.HTTPTransport(uds=URL), base_url="http://local", timeout=120) as client:
    talk(lambda body: client.post("/v1/chat/completions", json=body).raise_for_status().json())
    answered = client.post("/v1/chat/completions", json=body("Hi."), headers={"X-Equipoise-Tenant": "gold"})
    print(answered.status_code, flush=True)
"""


def test_a_client_of_a_unix_socket_is_known_by_its_process(daemon, tmp_path):
    path = tmp_path / "engine.sock"
    command = [sys.executable, "-m", "equipoise.gpuctl.engine", "--listen", f"unix:{path}", "--attach"]
    command += [f"unix:{daemon.socket}", "--kv-tokens", "2048"]
    engine = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert engine.stdout is not None
        assert engine.stdout.readline() == f"listening unix:{path}\n"
        eventually(lambda: len([e for e in daemon.watch().engines if e.attached]) == 2)
        client = Client(daemon, str(path), "silver", "local", LOCAL)
        assert client.said() == ["403"], "a forged tenant"
        eventually(lambda: {s.tenant_id for s in sessions(daemon, client.label)} == {"silver"})
        client.leave()
    finally:
        engine.terminate()
        assert engine.wait(20) == 0
        engine.communicate()
    assert not path.exists()


def test_who_is_in_no_sandbox_is_believed_as_before(daemon, url):
    done = ask(url, {"x-equipoise-tenant": "gold", "x-equipoise-session": "outside"})
    assert done["choices"]
    eventually(lambda: [s for s in daemon.watch().sessions if s.session_id == "outside"])
    (outside,) = [s for s in daemon.watch().sessions if s.session_id == "outside"]
    assert (outside.tenant_id, outside.sandbox) == ("gold", "")


def ask(url: str, headers: dict[str, str]) -> dict[str, Any]:
    import httpx

    body = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
    answer: dict[str, Any] = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120).json()
    return answer


def test_a_tool_call_is_of_the_conversation_that_asked_for_it(daemon, url):
    code = """
import httpx
with httpx.Client(timeout=120) as client:
    def post(text, **headers):
        client.post(f"{URL}/v1/chat/completions", json=body(text), headers=headers).raise_for_status()
    post("Give this conversation a title.")
    post("Run the tests, please.", **{"x-equipoise-awaits-tool": "1"})
    subprocess.run(["sh", "-c", "sleep 0.7; exit 3 # asked-for"])
    post("Another title.")
"""
    client = Client(daemon, url, "gold", "works", code)
    client.said()
    eventually(lambda: len(sessions(daemon, client.label)) == 3)
    (call,) = daemon.tool_calls("asked-for")
    assert call.session_id in {s.session_id for s in sessions(daemon, client.label)}
    assert call.session_id.startswith("anonymous-") and call.exit_code == 3
    assert call.kv_held_bytes > 0, "the KV of that conversation lay idle meanwhile"
    client.leave()
    eventually(lambda: not sessions(daemon, client.label))


def test_the_agent_finds_the_engine_by_the_variables_its_libraries_read(daemon):
    def variables(**more: str) -> dict[str, str]:
        code = "import json, os; print(json.dumps(dict(os.environ)))"
        done = daemon.cli("run", "--tenant", "gold", "--name", "env", "--", sys.executable, "-c", code, **more)
        found: dict[str, str] = json.loads(done.stdout)
        return found

    engine = daemon.status().engine_url
    told = variables()
    assert told["EQUIPOISE_ENGINE_URL"] == engine
    assert told["OPENAI_BASE_URL"] == told["OPENAI_API_BASE"] == f"{engine}/v1"
    assert "ANTHROPIC_BASE_URL" not in told, "the engine does not speak it"
    own = variables(OPENAI_BASE_URL="https://example.org/v1")
    assert own["OPENAI_BASE_URL"] == "https://example.org/v1" and own["OPENAI_API_BASE"] == f"{engine}/v1"

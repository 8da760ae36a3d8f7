"""Who opened a TCP connection, and what leads its own session, on the running kernel."""

from __future__ import annotations

import ctypes
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from equipoise.ebpf import build
from equipoise.ebpf.probes import ProgramState, Tuning
from equipoise.policies.events import ConnectionOpened
from equipoise.tests.fixtures.network_namespace import elsewhere
from equipoise.tests.kernel.ebpf.conftest import PYTHON, SANDBOX

pytestmark = pytest.mark.kernel

CONNECT = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); print(s.getsockname()[1])"


class Server:
    """Listens here and keeps what it accepts."""

    def __init__(self, family: socket.AddressFamily, address: str) -> None:
        self.socket = socket.create_server((address, 0), family=family)
        self.socket.settimeout(10)
        self.address, self.port = self.socket.getsockname()[:2]

    def peer(self) -> tuple[str, int]:
        """Address and port of the next peer, as this end sees them."""
        connection, peer = self.socket.accept()
        connection.close()
        return peer[0], peer[1]


@pytest.fixture
def listen() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(family: socket.AddressFamily = socket.AF_INET, address: str = "127.0.0.1") -> Server:
        made.append(Server(family, address))
        return made[-1]

    yield make
    for server in made:
        server.socket.close()


@pytest.fixture
def server(listen: Callable[..., Server]) -> Server:
    return listen()


def opened(bench, count: int = 1) -> list[ConnectionOpened]:
    """Wait for that many connections and see that no more come."""

    def seen() -> list[ConnectionOpened]:
        return [event for event in bench.events if isinstance(event, ConnectionOpened)]

    bench.wait(lambda: len(seen()) >= count, f"{count} connections")
    bench.tick()
    assert len(seen()) == count
    return seen()


def network_namespace(pid: int | str = "self") -> int:
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def test_a_tool_calls_connection_names_both_ends_and_the_tool_call(bench, server):
    agent, tag = bench.agent(f"run({CONNECT!r}, '127.0.0.1', '{server.port}')")
    bench.finish(agent)
    (call,), (event,) = bench.started(), opened(bench)
    assert (event.sandbox, event.id, event.pid, event.is_agent) == (SANDBOX, call.id, call.pid, False)
    assert (event.local_address, event.local_port) == server.peer()
    assert (event.remote_address, event.remote_port) == ("127.0.0.1", server.port)
    assert event.network_namespace == network_namespace()
    assert event.id != tag
    assert call.at_ns < event.at_ns <= bench.ended(call.id).at_ns


def test_an_agents_own_connection_carries_the_agents_tag(bench, server):
    agent, tag = bench.agent(f"import socket; socket.create_connection(('127.0.0.1', {server.port}))")
    bench.finish(agent)
    (event,) = opened(bench)
    assert (event.sandbox, event.id, event.pid, event.is_agent) == (SANDBOX, tag, agent.pid, True)
    assert (event.local_address, event.local_port) == server.peer()


def test_ipv6_by_its_own_name(bench, listen):
    server = listen(socket.AF_INET6, "::1")
    agent, _ = bench.agent(f"import socket; socket.create_connection(('::1', {server.port}))")
    bench.finish(agent)
    (event,) = opened(bench)
    assert (event.local_address, event.local_port) == server.peer()
    assert (event.local_address, event.remote_address, event.remote_port) == ("::1", "::1", server.port)


def test_ipv4_through_an_ipv6_socket_is_an_ipv4_address(bench, server):
    code = f"import socket; socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', {server.port}))"
    agent, _ = bench.agent(code)
    bench.finish(agent)
    (event,) = opened(bench)
    assert (event.local_address, event.local_port) == server.peer()


def test_a_threads_connection_is_its_processs(bench, server):
    agent, tag = bench.agent(
        f"""
        import socket, threading
        thread = threading.Thread(target=socket.create_connection, args=(('127.0.0.1', {server.port}),))
        thread.start(); thread.join()
        """
    )
    bench.finish(agent)
    (event,) = opened(bench)
    assert (event.id, event.pid) == (tag, agent.pid)


def test_a_refused_connection_is_no_event(bench, server):
    code = f"""
    import socket
    with socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        for _ in range(20):
            assert socket.socket().connect_ex(nobody.getsockname())
    socket.create_connection(('127.0.0.1', {server.port}))
    """
    agent, _ = bench.agent(code)
    bench.finish(agent)
    (event,) = opened(bench)
    assert event.remote_port == server.port, "the one after the refused ones"
    waiting = bench.tools._probes.object.maps["connecting"]
    assert not list(waiting.keys(ctypes.c_uint64)), "nothing waits for an answer that will not come"


def test_a_connection_that_does_not_block_is_an_event_when_it_stands(bench, server):
    code = f"""
    import select, socket
    s = socket.socket(); s.setblocking(False)
    s.connect_ex(('127.0.0.1', {server.port}))
    select.select([], [s], [])
    print(s.getsockname()[1])
    """
    agent, tag = bench.agent(code)
    port = int(bench.finish(agent))
    (event,) = opened(bench)
    assert (event.id, event.local_port) == (tag, port)


def test_what_a_child_does_on_its_parents_connection_is_no_connection_of_its_own(bench, server):
    code = f"""
    import socket
    s = socket.create_connection(('127.0.0.1', {server.port}))
    os.set_inheritable(s.fileno(), True)
    if os.fork() == 0:
        s.sendall(b'hello'); os._exit(0)
    os.wait()
    subprocess.run([PYTHON, '-S', '-c', f'import os; os.write({{s.fileno()}}, b"again")'], close_fds=False)
    """
    agent, tag = bench.agent(code)
    bench.finish(agent)
    (event,) = opened(bench)
    assert (event.id, event.is_agent) == (tag, True)
    assert len(bench.started()) == 1, "the tool call that wrote to it"


def test_a_process_that_nobody_registered_is_no_event(bench, server):
    subprocess.run([PYTHON, "-S", "-c", CONNECT, "127.0.0.1", str(server.port)], stdout=subprocess.PIPE, check=True)
    agent, tag = bench.agent(f"import socket; socket.create_connection(('127.0.0.1', {server.port}))")
    bench.finish(agent)
    assert [event.id for event in opened(bench)] == [tag]


def test_a_connection_that_is_accepted_is_no_event(bench, server):
    code = f"""
    import socket
    mine = socket.create_server(('127.0.0.1', 0))
    print(mine.getsockname()[1], flush=True)
    mine.accept()
    socket.create_connection(('127.0.0.1', {server.port}))
    """
    agent, _ = bench.agent(code)
    socket.create_connection(("127.0.0.1", int(agent.stdout.readline()))).close()
    bench.finish(agent)
    assert [event.remote_port for event in opened(bench)] == [server.port]


def test_hundreds_of_connections_are_all_seen(bench, server):
    code = f"""
    import socket
    for _ in range(300):
        with socket.create_connection(('127.0.0.1', {server.port})) as s:
            print(s.getsockname()[1]); s.recv(1)
    """
    agent, tag = bench.agent(code)
    peers = [server.peer()[1] for _ in range(300)]
    bench.finish(agent)
    events = opened(bench, 300)
    assert [event.local_port for event in events] == peers
    assert {event.id for event in events} == {tag}


def test_another_network_namespace_is_named(bench, listen):
    with elsewhere() as other:
        server = listen(address=other.here)
        command = [*other.command(), PYTHON, "-S", "-c", CONNECT, other.here, str(server.port)]
        agent, _ = bench.agent(f"subprocess.run({command!r})")
        bench.finish(agent)
        (call,), (event,) = bench.started(), opened(bench)
        assert event.id == call.id
        assert (event.local_address, event.local_port) == server.peer()
        assert (event.local_address, event.remote_address) == (other.there, other.here)
        assert event.network_namespace == other.inode != network_namespace()


@pytest.mark.parametrize(
    ("how", "flags"),
    [
        ("", (False, False)),
        (", start_new_session=True", (True, True)),
        (", preexec_fn=os.setsid", (True, True)),
        (", preexec_fn=os.setpgrp", (False, True)),
    ],
)
def test_a_tool_call_that_leads_its_session_or_group_says_so(bench, how, flags):
    agent, _ = bench.agent(f"subprocess.run([PYTHON, '-S', '-c', 'pass']{how})")
    bench.finish(agent)
    (call,) = bench.started()
    assert (call.session_leader, call.group_leader) == flags


def test_a_long_command_line_is_whole_up_to_the_buffer(bench):
    agent, _ = bench.agent("subprocess.run(['true', 'a' * 900]); subprocess.run(['true', 'b' * 2000])")
    bench.finish(agent)
    whole, cut = bench.started()
    assert whole.command == "true " + "a" * 900
    assert cut.command.startswith("true bbb") and cut.command.endswith("b…")


def test_without_the_program_everything_else_works(bench, server, tmp_path, monkeypatch):
    sources = tmp_path / "src"
    sources.mkdir()
    for path in build.SOURCES.glob("*.[ch]"):
        text = path.read_text().replace('SEC("tp_btf/inet_sock_set_state")', 'SEC("tp_btf/no_such_tracepoint")')
        (sources / path.name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    partial = type(bench)(Tuning())
    try:
        report = partial.tools.report
        refused = {p.name: p.reason for p in report.programs if p.state is ProgramState.REFUSED}
        assert refused.keys() == {"on_connect", "on_connect_again"}
        assert "no_such_tracepoint" in refused["on_connect"]
        assert not report.sees_connections and report.counts_memory
        agent, _ = partial.agent(f"run({CONNECT!r}, '127.0.0.1', '{server.port}')")
        partial.finish(agent)
        assert len(partial.started()) == 1
        assert not [event for event in partial.events if isinstance(event, ConnectionOpened)]
    finally:
        partial.close()

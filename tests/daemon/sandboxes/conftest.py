"""A daemon, a model and agents that are told what to do, for what runs below an agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from equipoise.tests.fixtures.running_daemon import RunningDaemon, eventually, with_probes
from equipoise.tests.fixtures.scripted_agent import POLICY, Conversation, Model, Scripted


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("roles"), policy=POLICY) as running:
        yield running


@pytest.fixture
def model() -> Iterator[Model]:
    answering = Model()
    answering.start()
    yield answering
    answering.close()


@pytest.fixture
def agent(daemon, model, request) -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(*launcher: str) -> Scripted:
        started.append(Scripted(daemon, model, f"a{len(started)}-{abs(hash(request.node.nodeid)) % 10**8}", *launcher))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


@pytest.fixture
def spoken(agent, model) -> Iterator[tuple[Scripted, Conversation]]:
    """An agent that has spoken, and its conversation."""
    ada = agent()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    conversation = Conversation(ada.daemon, model)
    yield ada, conversation
    conversation.close()

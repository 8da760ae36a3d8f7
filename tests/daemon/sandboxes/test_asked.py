"""What conversations of one sandbox ask for at once, and whose child is whose call."""

from __future__ import annotations

from dataclasses import replace

from equipoise.daemon.sandboxes.witness import Owner, Witness
from equipoise.policies import roles
from equipoise.policies.events import EngineAttached, SandboxRegistered
from equipoise.policies.model import AskedToolCall, CgroupId, SessionId
from equipoise.policies.state import State
from equipoise.tests.policies.facts import engine, ns, policy, sandbox, turn_ended, turn_started

BOX = CgroupId(1)
LEFT, RIGHT, PROXY = 41, 42, 99
"""Processes."""


def hearing(*turns: tuple[str, int | None, str]) -> Witness:
    """Of each turn: the call's id, which is its session's too, the process at the connection, the command."""
    state = State(policy()).apply(SandboxRegistered(0, sandbox())).apply(EngineAttached(0, engine()))
    pids = {SessionId(name): pid for name, pid, _ in turns}
    witness = Witness(state, lambda turn: Owner(BOX, pids[turn.session]))
    for at_s, (name, _, command) in enumerate(turns):
        witness.hear(turn_started(at_s, session=SessionId(name)))
        asked = (AskedToolCall(name, "shell", command),)
        witness.hear(replace(turn_ended(at_s + 0.5, session=SessionId(name)), asked=asked))
    return witness


def id_of(witness: Witness, command: str, runtime: int | None) -> str | None:
    found = roles.matching(command, witness.asked(BOX, ns(9), runtime))
    return found.id if found is not None else None


def test_the_same_words_asked_for_twice_are_the_call_of_the_process_whose_conversation_asked():
    witness = hearing(("l", LEFT, "git status"), ("r", RIGHT, "git status"))
    assert id_of(witness, "bash -c git status", RIGHT) == "r"
    assert id_of(witness, "bash -c git status", LEFT) == "l"
    assert id_of(witness, "bash -c git status", None) == "l", "the oldest, where nobody knows"


def test_what_only_another_process_has_heard_counts_all_the_same():
    witness = hearing(("one", PROXY, "git status"), ("two", None, "make all"))
    assert id_of(witness, "bash -c git status", LEFT) == "one"
    assert id_of(witness, "bash -c make all", LEFT) == "two"

"""An agent of the demo: asks the engine, runs a tool call, feeds the output into its next turn, until its plan is done.

    python -m equipoise.daemon.demo.agents.agent --plan NAME --engine-url URL --workdir DIR
        --deadline SECONDS --log FILE

It runs inside a sandbox (`equipoise run`), which gives it EQUIPOISE_TENANT, EQUIPOISE_SESSION and EQUIPOISE_SOCKET.
Which tool calls it makes is scripted (see plan.py): a model of 135 million parameters cannot choose them reliably. Its
answers are real, recorded and shown, and its context grows with what the tools really printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

from .chat import ChatError, Message, Turn, ask
from .hearsay import Identity
from .plan import Plan, Step, plan_named
from .toolcall import ToolResult, ToolRunner

MAX_OUTPUT_TOKENS = 24
_OUTPUT_CHARS = 340
_SYSTEM = "You are {name}, a coding agent. Say in one short sentence what the output means and what you do next."


class AgentLog:
    """JSON lines of what the agent did, flushed line by line so that a killed agent leaves what it had."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def turn(self, number: int, turn: Turn) -> None:
        self._write(
            "turn",
            number=number,
            prompt_tokens=turn.prompt_tokens,
            cached_tokens=turn.cached_tokens,
            output_tokens=turn.output_tokens,
            ttft_seconds=round(turn.ttft_ns / 1e9, 4),
            seconds=round(turn.duration_ns / 1e9, 4),
            answer=turn.answer,
        )

    def tool(self, step: Step, result: ToolResult) -> None:
        self._write(
            "tool",
            command=" ".join(step.command),
            found_by=step.found_by.value,
            exit_code=result.exit_code,
            signal=result.signal,
            start_ns=result.start_ns,
            end_ns=result.end_ns,
            accepted=result.accepted_by(step),
            output=result.output[-_OUTPUT_CHARS:],
            notice=result.notice,
        )

    def end(self, reason: str, failed: bool) -> None:
        self._write("end", reason=reason, failed=failed)

    def _write(self, kind: str, **fields: object) -> None:
        self._file.write(json.dumps({"kind": kind, "at_ns": time.monotonic_ns(), **fields}) + "\n")
        self._file.flush()


def observation(step: Step, result: ToolResult) -> str:
    """What the agent tells the model about a call that has ended: outcome, notice, the output cut to its two ends."""
    output = result.output.strip()
    if len(output) > _OUTPUT_CHARS:
        half = _OUTPUT_CHARS // 2
        output = f"{output[:half]} ... {output[-half:]}"
    text = f"`{' '.join(step.command)[:80]}`: {result.outcome()}\n{output}"
    if result.signal is not None:
        text = f"Your last tool call was killed: {result.notice or 'nobody says why'}\n{text}"
    elif result.notice:
        text = f"{result.notice}\n{text}"
    return text


class Conversation:
    """The agent's messages so far, and the turns it takes with the engine."""

    def __init__(self, identity: Identity, engine_url: str, log: AgentLog) -> None:
        self._identity = identity
        self._engine_url = engine_url
        self._log = log
        self._messages = [Message("system", _SYSTEM.format(name=identity.name))]
        self._turn_count = 0

    def say(self, content: str, *, awaits_tool: bool = True) -> None:
        """One turn: `content` goes in, the answer is recorded and kept. Raises ChatError where the engine fails.

        `awaits_tool` stands for the tool call that a larger model would have asked for in its answer.
        """
        self._messages.append(Message("user", content))
        turn = ask(
            self._engine_url,
            session=self._identity.session,
            tenant=self._identity.tenant,
            messages=self._messages,
            max_tokens=MAX_OUTPUT_TOKENS,
            awaits_tool=awaits_tool,
        )
        self._messages.append(Message("assistant", turn.answer))
        self._turn_count += 1
        self._log.turn(self._turn_count, turn)
        print(f"turn {self._turn_count}: {turn.answer.strip()!r}", flush=True)


def run_plan(plan: Plan, conversation: Conversation, runner: ToolRunner, log: AgentLog, deadline_s: float) -> bool:
    """Work through the plan; True where every step that was begun ended as it may. Begins no step after the deadline,
    but always the first. Raises ChatError where the engine fails."""
    deadline = time.monotonic() + deadline_s
    said = plan.task
    accepted = True
    for step in plan.steps:
        if time.monotonic() >= deadline and step is not plan.steps[0]:
            log.end("deadline", failed=not accepted)
            return accepted
        conversation.say(f"{said}\n{step.say}")
        result = runner.run(step)
        log.tool(step, result)
        accepted = accepted and result.accepted_by(step)
        print(f"tool: {' '.join(step.command)}: {result.outcome()} {result.notice}".rstrip(), flush=True)
        said = observation(step, result)
    conversation.say(f"{said}\nThat was the last step. Sum up.", awaits_tool=False)
    log.end("plan done", failed=not accepted)
    return accepted


def _end_on_signal(number: int, frame: object) -> None:
    """Unwind like any other end, so that a running tool call is ended too."""
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m equipoise.daemon.demo.agents.agent", description=__doc__)
    parser.add_argument("--plan", required=True, help="name of a plan in plan.py")
    parser.add_argument("--engine-url", required=True, help="http://HOST:PORT of an OpenAI-compatible engine")
    parser.add_argument("--workdir", required=True, type=Path, help="a sample project, as sample.py lays it out")
    parser.add_argument("--deadline", required=True, type=float, metavar="SECONDS", help="begin no step after this")
    parser.add_argument("--log", required=True, type=Path, help="JSON lines of what was done")
    parser.add_argument("--name", default="agent")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _end_on_signal)
    tenant = os.environ.get("EQUIPOISE_TENANT", "default")
    session = os.environ.get("EQUIPOISE_SESSION", f"{tenant}/{options.name}")
    identity = Identity(tenant, options.name, session, os.environ.get("EQUIPOISE_SOCKET") or None)
    try:
        plan = plan_named(options.plan)
        with options.log.open("w") as file:
            log = AgentLog(file)
            runner = ToolRunner(identity, options.workdir)
            try:
                conversation = Conversation(identity, options.engine_url, log)
                return 0 if run_plan(plan, conversation, runner, log, options.deadline) else 1
            except ChatError as error:
                log.end(str(error), failed=True)
                raise
    except (ChatError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Says of each process below an agent what it is, and keeps what is no tool call out of the loop's way.

Stands between the kernel's events and the loop: a lineage event goes on as a ToolCallStarted only where the rules
(policies/roles.py) say so; everything else is observed under its role. Owns who is the runtime of each sandbox, and
therefore whose children have budgets: until somebody below the sandbox's first program has spoken to a model nobody
has. Applies no policy of memory. Long for its rules, which share every field: each corrects what another one said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies import roles
from ...policies.events import (
    BudgetReached,
    ConnectionOpened,
    Event,
    ProcessesGone,
    ProcessExeced,
    RoleObserved,
    SandboxRemoved,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallFact,
    ToolCallMemoryStepped,
    ToolCallStarted,
    TurnEnded,
    TurnStarted,
)
from ...policies.model import NS_PER_S, CgroupId, ProcessRole, Role, SessionId, ToolCallId, ToolCallSource
from ...policies.roles import Asked, Exec
from ...policies.state import State
from .. import log
from . import evidence, processes
from .kept import Book, Kept

STAYS_NS = 20 * NS_PER_S
"""What still runs so long after it began, and is no tool call, is a service."""
_ONE_LINE_NS = NS_PER_S // 10
"""Programs that a persistent shell starts so close together, while the first still runs, are one command line."""
_MOST_ASKED = 64
_OF_ONE = (ToolCallEnded, ToolCallMemoryStepped, BudgetReached, ProcessesGone, ToolCallFact)
"""What the kernel tells of one call, or of what is none."""
_SURVEY_NS = NS_PER_S
_SURVEY_PAUSE_MAX_NS = 30 * NS_PER_S


@dataclass(slots=True)
class _Helper:
    """A process that is followed and is no tool call."""

    fact: ProcessRole
    agent: ToolCallId | None
    """The record its parent belonged to."""


class RoleKeeper:
    """`sift(event)` answers what the loop shall hear instead."""

    def __init__(self, book: Book, probes: ToolMemory | None, state: State, now_ns: Callable[[], int]) -> None:
        self._book = book
        self._probes = probes
        self._state = state
        self._now_ns = now_ns
        self._helpers: dict[ToolCallId, _Helper] = {}
        self._calls: dict[ToolCallId, ToolCallStarted] = {}
        """Tool calls that run, as they were told: the state hears of one only at the loop's next turn."""
        self._asked: dict[CgroupId, list[Asked]] = {}
        """Of every sandbox whose conversation an engine of ours has told, what it asks for now."""
        self._looked_ns = 0

    # -- what the rest of the daemon asks

    def uses(self, sandbox: CgroupId) -> bool:
        """Whether something that is no tool call still runs in it."""
        return any(h.fact.sandbox == sandbox for h in self._helpers.values())

    def hear(self, event: Event) -> None:
        """What engines report, before the loop has it: an exec that was asked for follows within milliseconds."""
        match event:
            case TurnEnded(asked=calls) if calls and (sandbox := self._sandbox_of(event.session)) is not None:
                waiting = self._asked.setdefault(sandbox, [])
                waiting += [Asked(call.call_id, event.session, call.command) for call in calls]
                del waiting[:-_MOST_ASKED]
            case TurnStarted(session=session):
                # Its results are in, or nobody wants them any more.
                for sandbox, waiting in self._asked.items():
                    self._asked[sandbox] = [asked for asked in waiting if asked.session != session]
            case _:
                pass

    def _sandbox_of(self, session: SessionId) -> CgroupId | None:
        if (joined := self._state.sandbox_of(session)) is not None:
            return joined
        return next((s.cgroup_id for s in self._state.sandboxes.values() if s.session == session), None)

    # -- events

    def sift(self, event: Event) -> Iterable[Event]:
        match event:
            case ToolCallStarted(source=ToolCallSource.LINEAGE) if event.sandbox in self._book:
                return tuple(self._started(event, self._book[event.sandbox]))
            case ConnectionOpened() if event.sandbox in self._book:
                return (*self._connected(event.pid, event.id, event.is_agent, self._book[event.sandbox]), event)
            case ProcessExeced():
                return tuple(self._execed(event))
            case _ if isinstance(event, _OF_ONE):
                if isinstance(event, ToolCallEnded | ProcessesGone):
                    self._calls.pop(event.id, None)
                helper = self._helpers.get(event.id)
                if helper is None:
                    return (event,)
                return self._of_helper(event, helper)
            case _:
                return (event,)

    def __call__(self, event: Event, state: State) -> None:
        """As a sink: forget what goes with its sandbox."""
        if isinstance(event, SandboxRemoved):
            self._helpers = {i: h for i, h in self._helpers.items() if h.fact.sandbox != event.cgroup_id}
            self._calls = {i: c for i, c in self._calls.items() if c.sandbox != event.cgroup_id}
            self._asked.pop(event.cgroup_id, None)

    def at_turn(self) -> tuple[Event, ...]:
        """Now and then: look for runtimes whose connection no event told of, and call what stays a service.

        One sandbox a turn, and less and less often: a look takes some 10 ms, in which the loop answers nobody.
        """
        now_ns = self._now_ns()
        if self._probes is None:
            return ()
        found: list[Event] = []
        waiting = (k for k in self._book.values() if not k.runtimes and k.survey_due_ns <= now_ns)
        if (kept := min(waiting, key=lambda k: k.survey_due_ns, default=None)) is not None:
            kept.survey_due_ns = now_ns + kept.survey_pause_ns
            kept.survey_pause_ns = min(_SURVEY_PAUSE_MAX_NS, 2 * kept.survey_pause_ns)
            found += self.survey(kept)
        if now_ns - self._looked_ns < _SURVEY_NS:
            return tuple(found)
        self._looked_ns = now_ns
        for tag, helper in list(self._helpers.items()):
            fact = helper.fact
            if fact.role in (Role.RUNTIME, Role.SHELL) and self._probes.usage(tag) is None:
                found.append(self._parent_gone(tag, fact))  # of a parent of calls no event tells the end
                continue
            if fact.role in (Role.HOUSEKEEPING, Role.START_UP) and now_ns - fact.since_ns > STAYS_NS:
                kept_of = self._book.get(fact.sandbox)
                if fact.role is Role.HOUSEKEEPING or (kept_of is not None and kept_of.runtimes):
                    found.append(self._observe(tag, replace(fact, role=Role.SERVICE, confidence=0.8, why="it stays")))
        return tuple(found)

    def _parent_gone(self, tag: ToolCallId, fact: ProcessRole) -> RoleObserved:
        del self._helpers[tag]
        if (kept := self._book.get(fact.sandbox)) is not None:
            kept.runtimes.pop(tag, None)
            kept.shells.pop(tag, None)
        return RoleObserved(self._now_ns(), replace(fact, gone=True))

    def survey(self, kept: Kept) -> Iterator[Event]:
        """Runtimes among the processes that run already: those that hold a connection."""
        assert self._probes is not None
        tags = {tag for tag, h in self._helpers.items() if h.fact.sandbox == kept.cgroup.cgroup_id}
        for tag in (*([kept.agent_tag] if kept.agent_tag is not None else []), *tags):
            for pid in self._probes.processes(tag):
                if roles.may_be_agent(evidence.command_line(pid)) and evidence.has_connection(pid):
                    yield from self._connected(pid, tag, tag == kept.agent_tag, kept)

    def take_up(self, root: int, pids: Sequence[int], kept: Kept) -> Iterator[Event]:
        """Processes that ran before anybody followed them, `root` above the others: they may be the agent yet."""
        assert self._probes is not None
        sandbox = kept.cgroup.cgroup_id
        try:
            tag = self._probes.begin_tool(root, sandbox)
            self._probes.set_starting(tag, True)
        except (LookupError, ProcessLookupError, EbpfError):
            return  # it has ended meanwhile
        for pid in pids:
            if pid != root:
                try:
                    self._probes.adopt(pid, tag)
                except (LookupError, ProcessLookupError, EbpfError):
                    continue  # likewise
        why = "it ran before the daemon did, and may be the agent"
        command = evidence.command_line(root)
        fact = ProcessRole(tag, sandbox, root, command, Role.START_UP, 0.9, why, self._now_ns())
        yield self._observe(tag, fact)

    # -- an exec

    def _started(self, event: ToolCallStarted, kept: Kept) -> Iterator[Event]:
        pid, now = event.pid, event.at_ns
        if pid is None or self._probes is None:
            yield event
            return
        parent = self._state.resolve(event.agent) if event.agent is not None else None
        if parent is not None and (parent in self._calls or parent in self._state.tool_calls):
            yield from self._join(event, parent, "forked by it before it was known for a call")
            return
        shell = parent is not None and parent in kept.shells
        runtime = self._runtime_of(parent, kept)
        first = kept.agent_pid
        full = evidence.command_line(pid)
        seen = Exec(
            command=full if len(full) > len(event.command) and full.startswith(event.command[:64]) else event.command,
            session_leader=event.session_leader,
            below_runtime=runtime is not None or shell,
            environment=evidence.environment(pid),
            shares_output=bool(first) and _same(evidence.output_of(pid), evidence.output_of(first or 0)),
        )
        if shell and (line := self._line_of(event)) is not None:
            yield from self._join(event, line, "of the same command line")
            return
        runtime_command = evidence.command_line(runtime) if runtime is not None else ""
        asked = self._asked.get(event.sandbox, [])
        ruling = roles.rule(
            seen,
            None if shell else kept.profile,
            runtime_command,
            asked,
            self._state.policy.roles,
            witnessed=event.sandbox in self._asked and not shell,
        )
        if kept.direct and ruling.role is Role.TOOL_CALL and not shell:
            ruling = replace(ruling, budgeted=True)  # its first program is the agent: nothing below can be
        log.debug("role", pid=pid, role=ruling.role.value, why=ruling.why, command=seen.command[:80])
        if asked and ruling.call_id is not None:
            self._asked[event.sandbox] = [a for a in asked if a.id != ruling.call_id]
        if ruling.role is not Role.START_UP:
            self._settled(event.id)
        if ruling.role is Role.TOOL_CALL:
            if not ruling.budgeted:
                self._exempt(event.id)
            self._calls[event.id] = event
            yield replace(
                event,
                command=ruling.command,
                confidence=ruling.confidence,
                session=ruling.session or event.session,
                call_id=ruling.call_id,
                exempt=not ruling.budgeted,
                soft_bytes=event.soft_bytes if ruling.budgeted else 0,
                hard_bytes=event.hard_bytes if ruling.budgeted else 0,
            )
            return
        self._exempt(event.id)
        fact = ProcessRole(event.id, event.sandbox, pid, seen.command, ruling.role, ruling.confidence, ruling.why, now)
        if ruling.role is Role.SHELL:
            try:
                tag = self._follow(pid, kept)
            except (ProcessLookupError, EbpfError):
                tag = None
            if tag is not None:
                kept.shells[tag] = pid
                # Its exec's own record empties and goes; what it is known by from now on is its record as a parent.
                self._helpers[event.id] = _Helper(fact, event.agent)
                yield self._observe(tag, replace(fact, id=tag), event.agent)
                return
        yield self._observe(event.id, fact, event.agent)

    def _line_of(self, event: ToolCallStarted) -> ToolCallId | None:
        """The call of the same command line of a persistent shell: begun just before, and still running."""
        for call in self._calls.values():
            if call.agent == event.agent and 0 <= event.at_ns - call.at_ns < _ONE_LINE_NS:
                return call.id
        return None

    def _join(self, event: ToolCallStarted, call: ToolCallId, why: str) -> Iterator[Event]:
        """The process belongs to a call that is known already."""
        assert self._probes is not None and event.pid is not None
        fact = ProcessRole(event.id, event.sandbox, event.pid, event.command, Role.TOOL_CALL, 0.9, why, event.at_ns)
        self._helpers[event.id] = _Helper(fact, event.agent)
        try:
            self._probes.adopt(event.pid, call)
        except (LookupError, ProcessLookupError, EbpfError):
            # The call has ended, or the process has: it stays outside, with the budget of nobody.
            self._exempt(event.id)
        yield from ()

    def _runtime_of(self, parent: ToolCallId | None, kept: Kept) -> int | None:
        """The runtime's process, where the record that forked is a runtime's, or was before it spoke to a model."""
        if parent is None:
            return None
        helper = self._helpers.get(parent)
        if helper is not None and helper.fact.pid in kept.runtimes.values():
            return helper.fact.pid
        return kept.runtimes.get(parent)

    def _execed(self, event: ProcessExeced) -> Iterator[Event]:
        """A call's first process became another program: some agents say only then what was asked for."""
        call = self._calls.get(event.id)
        kept = self._book.get(call.sandbox) if call is not None else None
        if call is None or kept is None or kept.profile is None or call.pid != event.pid:
            return
        profile = kept.profile
        command = event.command
        if event.command.endswith("…"):
            command = evidence.command_line(event.pid) or command
        text = roles.asked_text(command, profile)
        named = evidence.environment(event.pid).get(profile.call_key) if profile.call_key else None
        if text != command or named:
            told = text if text != command else None
            yield ToolCallAttributed(event.at_ns, call.id, call.source, call.confidence, told, call_id=named)

    # -- a connection

    def _connected(self, pid: int, tag: ToolCallId, is_agent: bool, kept: Kept) -> Iterator[Event]:
        """Whoever speaks to a model is the agent: its children have budgets from now on, itself never."""
        if self._probes is None or pid in kept.runtimes.values():
            return
        command = evidence.command_line(pid)
        helper = self._helpers.get(tag)
        known = helper.fact.role.value if helper is not None else "none"
        log.debug("connected", pid=pid, tag=f"{tag:x}", is_agent=is_agent, role=known, command=command[:80])
        if not command or not roles.may_be_agent(command):
            return
        if is_agent and tag == kept.agent_tag and pid == kept.agent_pid:
            kept.runtimes[tag] = pid
            self._settled(tag)
            self._give_budgets(tag)
        elif helper is not None and (helper.fact.role is Role.START_UP or roles.is_agent(command)):
            try:
                tag = self._follow(pid, kept)
            except (ProcessLookupError, EbpfError) as error:
                log.warning("runtime_not_followed", pid=pid, error=str(error))
                return
            kept.runtimes[tag] = pid
        else:
            return  # a tool call, a service: they may speak to whom they like
        launched = [h.fact.command for h in self._helpers.values() if h.fact.sandbox == kept.cgroup.cgroup_id]
        first = evidence.command_line(kept.agent_pid) if kept.agent_pid else ""
        kept.profile = roles.profile_of([command, first, *self._ancestry(pid, kept), *launched])
        named = kept.profile.name if kept.profile else "unknown"
        log.event("runtime_found", pid=pid, sandbox=kept.cgroup.path, agent=named, command=command[:80])
        why = "it has a connection" + (f", as {named}" if kept.profile else "")
        fact = ProcessRole(tag, kept.cgroup.cgroup_id, pid, command, Role.RUNTIME, 0.95, why, self._now_ns())
        yield self._observe(tag, fact)

    def _ancestry(self, pid: int, kept: Kept) -> Iterator[str]:
        """Command lines of the processes between it and the sandbox's first program."""
        for _ in range(32):
            found = processes.stat(pid)
            if found is None or pid in (kept.agent_pid, 0, 1):
                return
            pid = found.parent_pid
            yield evidence.command_line(pid)

    def _follow(self, pid: int, kept: Kept) -> ToolCallId:
        """A record of its own as a parent of tool calls. Raises ProcessLookupError, EbpfError."""
        assert self._probes is not None
        budget = self._state.policy.memory.budget if self._state.policy.enforce else None
        return self._probes.register_agent(
            pid,
            kept.cgroup.cgroup_id,
            soft_bytes=budget.soft_bytes if budget else 0,
            hard_bytes=budget.hard_bytes if budget else 0,
        )

    def _give_budgets(self, agent: ToolCallId) -> None:
        assert self._probes is not None
        budget = self._state.policy.memory.budget if self._state.policy.enforce else None
        if budget is not None:
            try:
                self._probes.set_child_budget(agent, soft_bytes=budget.soft_bytes, hard_bytes=budget.hard_bytes)
            except LookupError:
                pass  # it has gone

    def _settled(self, tag: ToolCallId) -> None:
        """It is known what it is: what its processes exec belongs to it from now on."""
        assert self._probes is not None
        try:
            self._probes.set_starting(tag, False)
        except LookupError:
            pass  # it has ended meanwhile

    # -- those that are no tool calls

    def _exempt(self, tag: ToolCallId) -> None:
        """No budget; and it goes on where the budget it began with has stopped it already."""
        assert self._probes is not None
        try:
            self._probes.set_budget(tag, soft_bytes=0, hard_bytes=0)
            usage = self._probes.usage(tag)
            if usage is not None and usage.stalled_since_ns is not None:
                self._probes.resume(tag)
        except LookupError:
            pass  # it has ended meanwhile

    def _observe(self, tag: ToolCallId, fact: ProcessRole, agent: ToolCallId | None = None) -> RoleObserved:
        known = self._helpers.get(tag)
        self._helpers[tag] = _Helper(fact, agent if agent is not None else (known.agent if known else None))
        return RoleObserved(self._now_ns(), fact)

    def _of_helper(self, event: Event, helper: _Helper) -> Iterable[Event]:
        match event:
            case BudgetReached():
                self._exempt(event.id)
            case ProcessesGone():
                del self._helpers[event.id]
                return (RoleObserved(event.at_ns, replace(helper.fact, gone=True)),)
            case _:
                pass
        return ()


def _same(one: str, other: str) -> bool:
    return bool(one) and one == other and one != "/dev/null"

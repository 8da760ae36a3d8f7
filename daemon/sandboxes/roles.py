"""Says of each process below an agent what it is, and keeps what is no tool call out of the loop's way.

Stands between the kernel's events and the loop: a lineage event goes on as a ToolCallStarted only where the rules
(policies/roles.py) say so; everything else is observed under its role. Owns who is the runtime of each sandbox, and
therefore whose children have budgets: until somebody below the sandbox's first program has spoken to a model nobody
has. Applies no policy of memory.
"""

from __future__ import annotations

from collections import OrderedDict
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
    ToolCallMemoryStepped,
    ToolCallStarted,
    ToolCallWithdrawn,
    TurnStarted,
)
from ...policies.model import NS_PER_S, CgroupId, ProcessRole, Role, ToolCallId, ToolCallPhase, ToolCallSource
from ...policies.roles import Exec, Profile, Ruling
from ...policies.state import State
from .. import log
from . import evidence, processes
from .kept import Book, Kept
from .lines import Lines
from .records import Records
from .sub_agents import SubAgents
from .witness import Witness

STAYS_NS = 20 * NS_PER_S
"""What still runs so long after it began, and is no tool call, is a service."""
_LATE_NS = 5 * NS_PER_S
"""An exec that is so long ago waits for no witness any more."""
_LATE_COUNT = 256
_SURVEY_NS = NS_PER_S
_SURVEY_PAUSE_MAX_NS = 30 * NS_PER_S


@dataclass(slots=True)
class _Helper:
    """A process that is followed and is no tool call."""

    fact: ProcessRole
    agent: ToolCallId | None
    """The record its parent belonged to."""


@dataclass(slots=True)
class _Ruled:
    """An exec that was ruled on without a word from the conversation, which may be on its way."""

    event: ToolCallStarted
    seen: Exec
    profile: Profile | None
    runtime: str
    ruling: Ruling
    since: list[Event]
    """Its end and its last process's, once they are known."""


class RoleKeeper:
    """`sift(event)` answers what the loop shall hear instead."""

    def __init__(
        self, book: Book, probes: ToolMemory | None, state: State, witness: Witness, now_ns: Callable[[], int]
    ) -> None:
        self._book = book
        self._probes = probes
        self._state = state
        self._witness = witness
        self._now_ns = now_ns
        self._helpers: dict[ToolCallId, _Helper] = {}
        self._calls: dict[ToolCallId, ToolCallStarted] = {}
        """Tool calls that run, as they were told: the state hears of one only at the loop's next turn."""
        self._unwitnessed: OrderedDict[ToolCallId, _Ruled] = OrderedDict()
        self._looked_ns = 0
        self._records = Records(probes, state)
        self._lines = Lines(probes, self._records, state, now_ns)
        self._sub_agents = SubAgents(probes, self._records, now_ns)

    # -- what the rest of the daemon asks

    def uses(self, sandbox: CgroupId) -> bool:
        """Whether something that is no tool call still runs in it."""
        return any(h.fact.sandbox == sandbox for h in self._helpers.values())

    def hear(self, event: Event) -> Iterable[Event]:
        """What engines report, before the loop has it: an exec that was asked for follows within milliseconds, and on
        a busy host it may be here before the report. Answers what has to be told anew of such execs."""
        unseen = tuple(self._without_program(event)) if isinstance(event, TurnStarted) else ()
        sandbox = self._witness.hear(event)
        return unseen if sandbox is None else tuple(self._ruled_anew(sandbox, event.at_ns))

    def _without_program(self, event: TurnStarted) -> Iterator[Event]:
        """Command lines of a persistent shell that were asked for and answered, and started no program: `cd`, `export`.

        When each began and ended is not known better than by its turns.
        """
        for sandbox, asked in self._witness.open_of(event.session):
            kept = self._book.get(sandbox)
            if self._probes is None or kept is None or not kept.shells or kept.announced or not asked.command:
                continue
            call, ended_ns = self._probes.new_tag(), max(event.at_ns, asked.at_ns)
            yield ToolCallStarted(
                at_ns=asked.at_ns,
                id=call,
                sandbox=sandbox,
                command=asked.command,
                source=ToolCallSource.HOOK,
                confidence=0.9,
                session=asked.session,
                call_id=asked.id,
            )
            yield ToolCallEnded(ended_ns, call, None, None)
            yield ProcessesGone(ended_ns, call)

    # -- events

    def sift(self, event: Event) -> Iterable[Event]:
        told = self._lines.sift(event)
        if told is None:
            return self._sift(event)
        self._ended(told)
        return told

    def _ended(self, told: Iterable[Event]) -> None:
        for event in told:
            if not isinstance(event, ToolCallEnded | ProcessesGone):
                continue
            call = self._calls.pop(event.id, None)
            if call is not None and (kept := self._book.get(call.sandbox)) is not None:
                self._sub_agents.ended(event.id, kept)

    def _sift(self, event: Event) -> Iterable[Event]:
        match event:
            case ToolCallStarted(source=ToolCallSource.LINEAGE) if event.sandbox in self._book:
                return tuple(self._started(event, self._book[event.sandbox]))
            case ConnectionOpened() if event.sandbox in self._book:
                kept, at = self._book[event.sandbox], (event.remote_address, event.remote_port)
                ours = any(engine.attached and engine.listens_at(*at) for engine in self._state.engines.values())
                return (*self._connected(event.pid, event.id, event.is_agent, kept, to_engine=ours), event)
            case BudgetReached() if event.id in self._calls and not self._sub_agents.has(event.id):
                return tuple(self._at_budget(event, self._calls[event.id]))
            case ProcessExeced():
                return tuple(self._execed(event))
            case ToolCallEnded() | ToolCallMemoryStepped() | BudgetReached() | ProcessesGone():
                self._ended((event,))
                if isinstance(event, ToolCallEnded | ProcessesGone) and event.id in self._unwitnessed:
                    self._unwitnessed[event.id].since.append(event)
                helper = self._helpers.get(event.id)
                if helper is None:
                    return (event,)
                return self._of_helper(event, helper)
            case _:
                return (event,)

    def _at_budget(self, event: BudgetReached, call: ToolCallStarted) -> Iterator[Event]:
        """An agent in the call is let go before anything is done to the call."""
        assert self._probes is not None
        kept = self._book.get(call.sandbox)
        found = tuple(self._found(self._sub_agents.at_budget(call, kept))) if kept is not None else ()
        yield from found
        usage = self._probes.usage(event.id)
        if not found or (usage is not None and usage.hard_bytes and usage.used_bytes > usage.hard_bytes):
            yield event

    def __call__(self, event: Event, state: State) -> None:
        """As a sink: forget what goes with its sandbox."""
        if isinstance(event, SandboxRemoved):
            self._helpers = {i: h for i, h in self._helpers.items() if h.fact.sandbox != event.cgroup_id}
            self._calls = {i: c for i, c in self._calls.items() if c.sandbox != event.cgroup_id}
            self._witness.forget(event.cgroup_id)
            for tag in [t for t, r in self._unwitnessed.items() if r.event.sandbox == event.cgroup_id]:
                del self._unwitnessed[tag]

    def at_turn(self) -> tuple[Event, ...]:
        """Now and then: look for runtimes whose connection no event told of, and call what stays a service.

        One sandbox a turn, and less and less often: a look takes some 10 ms, in which the loop answers nobody.
        """
        now_ns = self._now_ns()
        if self._probes is None:
            return ()
        found: list[Event] = list(self._lines.at_turn())
        self._ended(found)
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
                found += self._parent_gone(tag, fact)  # of a parent of calls no event tells the end
                continue
            if fact.role in (Role.HOUSEKEEPING, Role.START_UP) and now_ns - fact.since_ns > STAYS_NS:
                kept_of = self._book.get(fact.sandbox)
                if fact.role is Role.HOUSEKEEPING or (kept_of is not None and kept_of.runtimes):
                    found.append(self._observe(tag, replace(fact, role=Role.SERVICE, confidence=0.8, why="it stays")))
        return tuple(found)

    def _parent_gone(self, tag: ToolCallId, fact: ProcessRole) -> Iterator[Event]:
        del self._helpers[tag]
        yield from self._lines.shell_gone(tag)
        if (kept := self._book.get(fact.sandbox)) is not None:
            self._sub_agents.ended(tag, kept)
            kept.runtimes.pop(tag, None)
            kept.shells.pop(tag, None)
        yield RoleObserved(self._now_ns(), replace(fact, gone=True))

    def look_again(self) -> None:
        """Events were lost, who speaks to a model perhaps among them: look soon, and as often as at the start."""
        for kept in self._book.values():
            kept.survey_due_ns, kept.survey_pause_ns = 0, _SURVEY_NS

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
        pid = event.pid
        if pid is None or self._probes is None:
            yield event
            return
        parent = self._state.resolve(event.agent) if event.agent is not None else None
        if (joined := self._of_known_call(event, parent, kept)) is not None:
            yield from joined
            return
        shell = kept.shells.get(parent) if parent is not None else None
        runtime = self._runtime_of(parent, kept)
        seen = _look_at(event, pid, kept, below_runtime=runtime is not None, in_shell=shell is not None)
        runtime_command = evidence.command_line(runtime) if runtime is not None else ""
        sub_agent = self._sub_agents.of(parent)
        profile = None if shell is not None else sub_agent.profile if sub_agent is not None else kept.profile
        witnessed = self._witness.hears(event.sandbox) and (sub_agent is None or sub_agent.heard)
        ruling = self._rule(event.sandbox, seen, profile, runtime_command, witnessed=witnessed)
        if kept.direct and ruling.role is Role.TOOL_CALL:
            ruling = replace(ruling, budgeted=True)  # its first program is the agent: nothing below can be
        log.debug("role", pid=pid, role=ruling.role.value, why=ruling.why, command=seen.command[:80])
        if ruling.call_id is not None:
            self._witness.answered(event.sandbox, ruling.call_id)
        elif ruling.role in (Role.TOOL_CALL, Role.HOUSEKEEPING) and (sub_agent is None or sub_agent.heard):
            self._wait_for_witness(_Ruled(event, seen, profile, runtime_command, ruling, []))
        if ruling.role is not Role.START_UP:
            self._records.settled(event.id)
        is_call = ruling.role is Role.TOOL_CALL
        if is_call:
            self._calls[event.id] = event
        if not ruling.budgeted:
            self._records.exempt(event.id)
        if shell is not None and (is_call or ruling.role is Role.HOUSEKEEPING):
            yield from self._lines.begin(_as_call(event, ruling) if is_call else event, shell, told=is_call)
        elif is_call:
            yield _as_call(event, ruling)
        if not is_call:
            yield from self._no_call(event, _fact(event, seen, ruling), kept)

    def _no_call(self, event: ToolCallStarted, fact: ProcessRole, kept: Kept) -> Iterator[Event]:
        if fact.role is Role.SHELL:
            try:
                tag = self._records.follow(fact.pid, kept.cgroup.cgroup_id)
            except (ProcessLookupError, EbpfError):
                tag = None
            if tag is not None:
                kept.shells[tag] = fact.pid
                # Its exec's own record empties and goes; what it is known by from now on is its record as a parent.
                self._helpers[event.id] = _Helper(fact, event.agent)
                yield self._observe(tag, replace(fact, id=tag), event.agent)
                return
        yield self._observe(event.id, fact, event.agent)

    def _rule(self, sandbox: CgroupId, seen: Exec, profile: Profile | None, runtime: str, *, witnessed: bool) -> Ruling:
        asked, rules = self._witness.asked(sandbox), self._state.policy.roles
        return roles.rule(seen, profile, runtime, asked, rules, witnessed=witnessed)

    def _wait_for_witness(self, ruled: _Ruled) -> None:
        self._unwitnessed[ruled.event.id] = ruled
        while len(self._unwitnessed) > _LATE_COUNT or self._oldest_unwitnessed_ns() < ruled.event.at_ns - _LATE_NS:
            self._unwitnessed.popitem(last=False)

    def _oldest_unwitnessed_ns(self) -> int:
        return next(iter(self._unwitnessed.values())).event.at_ns

    def _ruled_anew(self, sandbox: CgroupId, asked_ns: int) -> Iterator[Event]:
        """The conversation's word of `asked_ns` came after execs that followed it."""
        for ruled in [r for r in self._unwitnessed.values() if r.event.sandbox == sandbox]:
            event = ruled.event
            if event.at_ns < asked_ns or self._is_held(event.id):
                continue
            ruling = self._rule(sandbox, ruled.seen, ruled.profile, ruled.runtime, witnessed=True)
            if ruling.call_id is not None:
                self._witness.answered(sandbox, ruling.call_id)
                del self._unwitnessed[event.id]
            elif ruling.role is ruled.ruling.role:
                continue
            log.debug("role_anew", pid=event.pid, role=ruling.role.value, why=ruling.why, command=event.command[:80])
            yield from self._changed(ruled, ruling)
            ruled.ruling = ruling

    def _is_held(self, call: ToolCallId) -> bool:
        """Somebody has announced it, or something was done to it: it stays what it was told to be."""
        known = self._state.tool_calls.get(self._state.resolve(call))
        free = (ToolCallPhase.RUNNING, ToolCallPhase.ENDED)
        return known is not None and (
            known.id != call
            or known.source is not ToolCallSource.LINEAGE
            or known.phase not in free
            or known.granted_ns is not None
        )

    def _changed(self, ruled: _Ruled, ruling: Ruling) -> Iterator[Event]:
        """Of a process that is in the picture as `ruled` says already."""
        event, now_ns = ruled.event, self._now_ns()
        was_call, is_call = (each.role is Role.TOOL_CALL for each in (ruled.ruling, ruling))
        if was_call and is_call:
            said = (ruling.confidence, ruling.command, ruling.session, ruling.call_id)
            yield ToolCallAttributed(now_ns, event.id, event.source, *said)
        elif is_call:
            if (helper := self._helpers.pop(event.id, None)) is not None:
                yield RoleObserved(now_ns, replace(helper.fact, gone=True))
            of_line = self._lines.tell(event.id)
            if of_line or not ruled.since:
                self._calls[event.id] = event
            # What it may use is set as for a call whose kind has a budget of its own: the kernel has none for it now.
            yield replace(_as_call(event, ruling), soft_bytes=0, hard_bytes=0)
            if not of_line:  # else its end is told when the line is over
                yield from ruled.since
        elif was_call:
            self._calls.pop(event.id, None)
            yield ToolCallWithdrawn(now_ns, event.id)
            if ruled.since and isinstance(ruled.since[-1], ProcessesGone):
                return
            self._records.exempt(event.id)
            yield self._observe(event.id, _fact(event, ruled.seen, ruling), event.agent)

    def _of_known_call(self, event: ToolCallStarted, parent: ToolCallId | None, kept: Kept) -> Iterator[Event] | None:
        """Where the process belongs to a call that is known already; None: it does not."""
        if parent is None:
            return None
        if self._sub_agents.of(parent) is None and (parent in self._calls or parent in self._state.tool_calls):
            return self._join(event, parent, "forked by it before it was known for a call")
        if parent in kept.shells and (line := self._lines.under_way(event)) is not None:
            return self._lines.add(event, line) if line.told else None
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
            self._records.exempt(event.id)
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
        if call is None or kept is None or call.pid != event.pid:
            return
        sub_agent = self._sub_agents.of(call.agent)
        profile = sub_agent.profile if sub_agent is not None else kept.profile
        if profile is None:
            return
        command = event.command
        if event.command.endswith("…"):
            command = evidence.command_line(event.pid) or command
        text = roles.asked_text(command, profile)
        named = evidence.environment(event.pid).get(profile.call_key) if profile.call_key else None
        if text != command or named:
            told = text if text != command else None
            yield ToolCallAttributed(event.at_ns, call.id, call.source, call.confidence, told, call_id=named)

    # -- a connection

    def _connected(
        self, pid: int, tag: ToolCallId, is_agent: bool, kept: Kept, *, to_engine: bool = False
    ) -> Iterator[Event]:
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
            self._records.settled(tag)
            self._records.give_budgets(tag)
        elif helper is not None and (helper.fact.role is Role.START_UP or roles.is_agent(command)):
            try:
                tag = self._records.follow(pid, kept.cgroup.cgroup_id)
            except (ProcessLookupError, EbpfError) as error:
                log.warning("runtime_not_followed", pid=pid, error=str(error))
                return
            kept.runtimes[tag] = pid
        elif helper is None and tag in self._calls and (to_engine or roles.is_agent(command)):
            yield from self._found(self._sub_agents.found(pid, self._calls[tag], kept, heard=to_engine))
            return
        else:
            return  # a tool call, a service: they may speak to whom they like
        launched = [h.fact.command for h in self._helpers.values() if h.fact.sandbox == kept.cgroup.cgroup_id]
        first = evidence.command_line(kept.agent_pid) if kept.agent_pid else ""
        profile = roles.profile_of([command, first, *self._ancestry(pid, kept), *launched])
        if len(kept.runtimes) == 1:
            kept.profile = profile
        else:
            self._sub_agents.apart(tag, roles.profile_of([command]) or kept.profile)
        named = profile.name if profile else "unknown"
        log.event("runtime_found", pid=pid, sandbox=kept.cgroup.path, agent=named, command=command[:80])
        why = "it has a connection" + (f", as {named}" if profile else "")
        fact = ProcessRole(tag, kept.cgroup.cgroup_id, pid, command, Role.RUNTIME, 0.95, why, self._now_ns())
        yield self._observe(tag, fact)

    def _found(self, sub_agents: Iterable[Event]) -> Iterator[Event]:
        for event in sub_agents:
            if isinstance(event, RoleObserved):
                self._helpers[event.process.id] = _Helper(event.process, None)
            yield event

    def _ancestry(self, pid: int, kept: Kept) -> Iterator[str]:
        """Command lines of the processes between it and the sandbox's first program."""
        for _ in range(32):
            found = processes.stat(pid)
            if found is None or pid in (kept.agent_pid, 0, 1):
                return
            pid = found.parent_pid
            yield evidence.command_line(pid)

    # -- those that are no tool calls

    def _observe(self, tag: ToolCallId, fact: ProcessRole, agent: ToolCallId | None = None) -> RoleObserved:
        known = self._helpers.get(tag)
        self._helpers[tag] = _Helper(fact, agent if agent is not None else (known.agent if known else None))
        return RoleObserved(self._now_ns(), fact)

    def _of_helper(self, event: Event, helper: _Helper) -> Iterable[Event]:
        match event:
            case BudgetReached():
                self._records.exempt(event.id)
            case ProcessesGone():
                del self._helpers[event.id]
                return (RoleObserved(event.at_ns, replace(helper.fact, gone=True)),)
            case _:
                pass
        return ()


def _look_at(event: ToolCallStarted, pid: int, kept: Kept, *, below_runtime: bool, in_shell: bool) -> Exec:
    full, first = evidence.command_line(pid), kept.agent_pid
    return Exec(
        command=full if len(full) > len(event.command) and full.startswith(event.command[:64]) else event.command,
        session_leader=event.session_leader,
        below_runtime=below_runtime or in_shell,
        environment=evidence.environment(pid),
        fed=evidence.can_be_fed(pid),
        in_shell=in_shell,
        shares_output=bool(first) and _same(evidence.output_of(pid), evidence.output_of(first or 0)),
    )


def _fact(event: ToolCallStarted, seen: Exec, ruling: Ruling) -> ProcessRole:
    said = (ruling.role, ruling.confidence, ruling.why, event.at_ns)
    return ProcessRole(event.id, event.sandbox, event.pid or 0, seen.command, *said)


def _as_call(event: ToolCallStarted, ruling: Ruling) -> ToolCallStarted:
    return replace(
        event,
        command=ruling.command,
        confidence=ruling.confidence,
        session=ruling.session or event.session,
        call_id=ruling.call_id,
        exempt=not ruling.budgeted,
        soft_bytes=event.soft_bytes if ruling.budgeted else 0,
        hard_bytes=event.hard_bytes if ruling.budgeted else 0,
    )


def _same(one: str, other: str) -> bool:
    return bool(one) and one == other and one != "/dev/null"

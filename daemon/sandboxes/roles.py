"""Says of each process below an agent what it is, and keeps what is no tool call out of the loop's way.

Stands between the kernel's events and the loop: a lineage event goes on as a ToolCallStarted only where the rules
(policies/roles.py) say so; everything else is observed under its role. Owns who is the runtime of each sandbox, and
therefore whose children have budgets: until somebody below the sandbox's first program has spoken to a model nobody
has. Applies no policy of memory. Long for its rules, which share every field: each corrects what another one said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

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
    ToolCallWithdrawn,
    TurnStarted,
)
from ...policies.model import NS_PER_S, CgroupId, ProcessRole, Role, ToolCallId, ToolCallPhase, ToolCallSource
from ...policies.roles import Asked, Exec, Profile, Ruling
from ...policies.state import State
from .. import log
from . import evidence
from .entry import EntryBudgets
from .kept import Book, Kept
from .who.helpers import Helpers
from .who.lines import Line, Lines
from .who.records import Records
from .who.rulings import LATER_COUNT, Later, Ruled, Unwitnessed, as_call, fact_of
from .who.runtimes import Runtimes
from .who.sub_agents import SubAgents
from .witness import Witness

STAYS_NS = 20 * NS_PER_S
"""What still runs so long after it began, and is no tool call, is a service."""
_OF_ONE = (ToolCallEnded, ToolCallMemoryStepped, BudgetReached, ProcessesGone, ToolCallFact)
"""What the kernel tells of one call, or of what is none."""
_SURVEY_NS = NS_PER_S
_SURVEY_PAUSE_MAX_NS = 30 * NS_PER_S


class RoleKeeper:
    """`sift(event)` answers what the loop shall hear instead."""

    def __init__(
        self,
        book: Book,
        entry: EntryBudgets,
        probes: ToolMemory | None,
        state: State,
        witness: Witness,
        now_ns: Callable[[], int],
    ) -> None:
        self._book = book
        self._probes = probes
        self._state = state
        self._witness = witness
        self._now_ns = now_ns
        self._calls: dict[ToolCallId, ToolCallStarted] = {}
        """Tool calls that run, as they were told: the state hears of one only at the loop's next turn."""
        self._unwitnessed = Unwitnessed()
        self._looked_ns = 0
        self._records = Records(probes, entry)
        self._lines = Lines(probes, self._records, state, now_ns)
        self._helpers = Helpers(self._records, now_ns)
        self._sub_agents = SubAgents(probes, self._records, now_ns)
        self._runtimes = Runtimes(probes, self._records, self._helpers, self._sub_agents, self._calls, now_ns)
        self.survey, self.take_up = self._runtimes.survey, self._runtimes.take_up

    # -- what the rest of the daemon asks

    def uses(self, sandbox: CgroupId) -> bool:
        """Whether something that is no tool call still runs in it."""
        return bool(self._helpers.of(sandbox))

    def hear(self, event: Event) -> Iterable[Event]:
        """What engines report, before the loop has it: an exec that was asked for follows within milliseconds, and on
        a busy host it may be here before the report. Answers what has to be told anew of such execs."""
        sandbox = self._witness.hear(event)
        if isinstance(event, TurnStarted):
            return tuple(told for each in self._witness.answered(event.session) for told in self._by_time(*each))
        return () if sandbox is None else tuple(self._ruled_anew(sandbox, event.at_ns))

    def _by_time(self, sandbox: CgroupId, asked: Asked) -> Iterator[Event]:
        """The line of a shell that began while it was asked for is it, where its words did not tell."""
        if (ruled := self._unwitnessed.in_time(sandbox, asked)) is not None:
            event = ruled.event
            self._witness.started(sandbox, asked.id)
            self._unwitnessed.drop(event.id)
            said = (0.9, asked.command, asked.session, asked.id)
            yield ToolCallAttributed(self._now_ns(), event.id, event.source, *said)

    def _without_program(self, now_ns: int) -> Iterator[Event]:
        """Command lines of a persistent shell that were asked for and answered, and started no program: `cd`, `export`.

        When each began and ended is not known better than by its turns.
        """
        for sandbox, asked in self._witness.never_started(now_ns):
            if (ruled := self._unwitnessed.left_behind(sandbox, asked)) is not None:
                yield from self._becomes(ruled, roles.by_its_line(asked))
                continue
            kept = self._book.get(sandbox)
            if self._probes is None or kept is None or not kept.shells or kept.announced or not asked.command:
                continue
            call, ended_ns = self._probes.new_tag(), asked.answered_ns or now_ns
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
                return (*self._runtimes.connected(event.pid, event.id, event.is_agent, kept, to_engine=ours), event)
            case BudgetReached() if event.id in self._calls and not self._sub_agents.has(event.id):
                return tuple(self._at_budget(event, self._calls[event.id]))
            case ProcessExeced():
                return tuple(self._execed(event))
            case _ if isinstance(event, _OF_ONE):
                self._ended((event,))
                if isinstance(event, ToolCallEnded | ProcessesGone):
                    self._unwitnessed.note(event)
                helper = self._helpers.get(event.id)
                return (event,) if helper is None else self._helpers.sift(event, event.id, helper)
            case _:
                return (event,)

    def _at_budget(self, event: BudgetReached, call: ToolCallStarted) -> Iterator[Event]:
        """An agent in the call is let go before anything is done to the call."""
        assert self._probes is not None
        kept = self._book.get(call.sandbox)
        found = tuple(self._runtimes.at_sub_agents(self._sub_agents.at_budget(call, kept))) if kept is not None else ()
        yield from found
        usage = self._probes.usage(event.id)
        if not found or (usage is not None and usage.hard_bytes and usage.used_bytes > usage.hard_bytes):
            yield event

    def __call__(self, event: Event, state: State) -> None:
        """As a sink: forget what goes with its sandbox, and know calls that an earlier run of the daemon knew."""
        if isinstance(event, ToolCallStarted) and event.earlier is not None and event.pid is not None:
            self._calls[event.id] = event
            if event.earlier.exempt:
                self._runtimes.take_up_call(event)
        if isinstance(event, SandboxRemoved):
            for forgets in (self._helpers, self._witness, self._unwitnessed):
                forgets.forget(event.cgroup_id)
            for tag in [i for i, c in self._calls.items() if c.sandbox == event.cgroup_id]:
                del self._calls[tag]

    def at_turn(self) -> tuple[Event, ...]:
        """Now and then: look for runtimes whose connection no event told of, and call what stays a service.

        One sandbox a turn, and less and less often: a look takes some 10 ms, in which the loop answers nobody.
        """
        now_ns = self._now_ns()
        if self._probes is None:
            return ()
        found: list[Event] = list(self._lines.at_turn())
        self._ended(found)
        found += self._without_program(now_ns)
        waiting = (k for k in self._book.values() if not k.runtimes and k.survey_due_ns <= now_ns)
        if (kept := min(waiting, key=lambda k: k.survey_due_ns, default=None)) is not None:
            kept.survey_due_ns = now_ns + kept.survey_pause_ns
            kept.survey_pause_ns = min(_SURVEY_PAUSE_MAX_NS, 2 * kept.survey_pause_ns)
            found += self.survey(kept)
        found += self._runtimes.in_calls(self._book, self._witness.hears)
        if now_ns - self._looked_ns < _SURVEY_NS:
            return tuple(found)
        self._looked_ns = now_ns
        for told in self._runtimes.below_runtimes():
            found += self._of_earlier(*told)
        for tag, helper in self._helpers.all():
            fact = helper.fact
            if fact.role in (Role.RUNTIME, Role.SHELL) and self._probes.usage(tag) is None:
                found += self._parent_gone(tag, fact)  # of a parent of calls no event tells the end
                continue
            if fact.role in (Role.HOUSEKEEPING, Role.START_UP) and now_ns - fact.since_ns > STAYS_NS:
                kept_of = self._book.get(fact.sandbox)
                if fact.role is Role.HOUSEKEEPING or (kept_of is not None and kept_of.runtimes):
                    stays = replace(fact, role=Role.SERVICE, confidence=0.8, why="it stays")
                    found.append(self._helpers.observe(tag, stays))
        return tuple(found)

    def _parent_gone(self, tag: ToolCallId, fact: ProcessRole) -> Iterator[Event]:
        self._helpers.drop(tag)
        self._records.forget_budgets(tag)
        yield from self._lines.shell_gone(tag)
        if (kept := self._book.get(fact.sandbox)) is not None:
            self._sub_agents.ended(tag, kept)
            kept.runtimes.pop(tag, None)
            kept.shells.pop(tag, None)
            kept.conversations.forget(fact.pid)
        yield RoleObserved(self._now_ns(), replace(fact, gone=True))

    def look_again(self) -> None:
        """Events were lost, who speaks to a model perhaps among them: look soon, and as often as at the start."""
        for kept in self._book.values():
            kept.survey_due_ns, kept.survey_pause_ns = 0, _SURVEY_NS

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
        runtime = self._runtimes.of(parent, kept)
        below, first = runtime is not None, kept.agent_pid
        seen = evidence.of_exec(event, pid, first, below_runtime=below, in_shell=shell is not None)
        runtime_command = evidence.command_line(runtime) if runtime is not None else ""
        sub_agent = self._sub_agents.of(parent)
        profile = None if shell is not None else sub_agent.profile if sub_agent is not None else kept.profile
        witnessed = self._witness.hears(event.sandbox) and (sub_agent is None or sub_agent.heard)
        ruling = self._rule(event, seen, profile, runtime_command, witnessed=witnessed)
        if kept.direct and ruling.role is Role.TOOL_CALL:
            ruling = replace(ruling, budgeted=True)  # its first program is the agent: nothing below can be
        log.debug("role", pid=pid, role=ruling.role.value, why=ruling.why, command=seen.command[:80])
        if ruling.call_id is not None:
            self._witness.started(event.sandbox, ruling.call_id)
        elif ruling.role in (Role.TOOL_CALL, Role.HOUSEKEEPING) and (sub_agent is None or sub_agent.heard):
            self._unwitnessed.wait(Ruled(event, seen, profile, runtime_command, ruling, []))
        if ruling.role is not Role.START_UP:
            self._records.settled(event.id)
        is_call = ruling.role is Role.TOOL_CALL
        if is_call:
            self._calls[event.id] = event
        if not ruling.budgeted:
            self._records.exempt(event.id)
        if shell is not None and (is_call or ruling.role is Role.HOUSEKEEPING):
            yield from self._lines.begin(as_call(event, ruling) if is_call else event, shell, told=is_call)
        elif is_call:
            yield as_call(event, ruling)
        if not is_call:
            yield from self._no_call(event, fact_of(event, seen, ruling), kept)
        elif ruling.session is None:
            yield from self._of_conversation(event.at_ns, event, ruling.conversation, kept, profile)

    def _no_call(self, event: ToolCallStarted, fact: ProcessRole, kept: Kept) -> Iterator[Event]:
        if fact.role is Role.SHELL:
            try:
                tag = self._records.follow(fact.pid, kept.cgroup.cgroup_id)
            except (ProcessLookupError, EbpfError):
                tag = None
            if tag is not None:
                kept.shells[tag] = fact.pid
                # Its exec's own record empties and goes; what it is known by from now on is its record as a parent.
                self._helpers.note(event.id, fact, event.agent)
                yield self._helpers.observe(tag, replace(fact, id=tag), event.agent)
                return
        yield self._helpers.observe(event.id, fact, event.agent)

    def _of_earlier(self, event: ToolCallStarted, runtime: int, kept: Kept) -> Iterator[Event]:
        """What ran below a runtime before anybody followed it. What was asked for then is lost: its shape tells."""
        if roles.is_agent(event.command):
            yield from self._runtimes.connected(event.pid or 0, event.id, False, kept)
            return
        seen = evidence.of_exec(event, event.pid or 0, kept.agent_pid, below_runtime=True, in_shell=False)
        runtime_command = evidence.command_line(runtime)
        ruling = self._rule(event, seen, kept.profile, runtime_command, witnessed=False)
        log.debug("role_of_earlier", pid=event.pid, role=ruling.role.value, why=ruling.why, command=seen.command[:80])
        self._records.settled(event.id)
        if ruling.role is Role.TOOL_CALL:
            was = Ruling(Role.START_UP, 0.9, "it ran before", seen.command)
            ruled = Ruled(event, seen, kept.profile, runtime_command, was, [])
            yield from self._changed(ruled, replace(ruling, confidence=min(ruling.confidence, event.confidence)))
        else:
            yield from self._no_call(event, fact_of(event, seen, ruling), kept)

    def _of_conversation(
        self, at_ns: int, call: ToolCallStarted, name: str | None, kept: Kept, profile: Profile | None
    ) -> Iterator[Event]:
        sandbox = self._state.sandboxes.get(kept.cgroup.cgroup_id)
        pid = self._runtime_of(call)
        if sandbox is None or pid is None:
            return
        if profile is not None and profile.session_key:
            yield from kept.conversations.heard(at_ns, call.id, pid, name, sandbox, self._state)
        elif not self._witness.hears(call.sandbox):
            session = kept.conversations.of_process(pid, sandbox, self._state)
            if session is not None:
                yield ToolCallAttributed(at_ns, call.id, call.source, 0.0, session=session)

    def _runtime_of(self, event: ToolCallStarted) -> int | None:
        kept = self._book.get(event.sandbox)
        if kept is None or event.agent is None:
            return None
        return self._runtimes.above(self._state.resolve(event.agent), kept)

    def _rule(
        self, event: ToolCallStarted, seen: Exec, profile: Profile | None, runtime: str, *, witnessed: bool
    ) -> Ruling:
        asked = self._witness.asked(event.sandbox, event.at_ns, self._runtime_of(event))
        return roles.rule(seen, profile, runtime, asked, self._state.policy.roles, witnessed=witnessed)

    def _ruled_anew(self, sandbox: CgroupId, asked_ns: int) -> Iterator[Event]:
        """The conversation's word of `asked_ns` came after execs that followed it."""
        for ruled in self._unwitnessed.of(sandbox):
            event = ruled.event
            if event.at_ns < asked_ns or self._is_held(event.id):
                continue
            ruling = self._rule(event, ruled.seen, ruled.profile, ruled.runtime, witnessed=True)
            if ruling.call_id is None:
                ruling = next(filter(None, (self._told_since(ruled, later) for later in ruled.later)), ruling)
            stays = ruling.role is ruled.ruling.role
            of_line = ruled.seen.in_shell and ruling.role is Role.HOUSEKEEPING  # the word on it may still be on its way
            if ruling.call_id is not None or not (stays or of_line):
                said = {"role": ruling.role.value, "why": ruling.why, "command": event.command[:80]}
                log.debug("role_anew", pid=event.pid, **said)
                yield from self._becomes(ruled, ruling)

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

    def _changed(self, ruled: Ruled, ruling: Ruling) -> Iterator[Event]:
        """Of a process that is in the picture as `ruled` says already."""
        event, now_ns = ruled.event, self._now_ns()
        was_call, is_call = (each.role is Role.TOOL_CALL for each in (ruled.ruling, ruling))
        if was_call and is_call:
            said = (ruling.confidence, ruling.command, ruling.session, ruling.call_id)
            yield ToolCallAttributed(now_ns, event.id, event.source, *said)
        elif is_call:
            if (helper := self._helpers.drop(event.id)) is not None:
                yield RoleObserved(now_ns, replace(helper.fact, gone=True))
            follows = self._lines.tell(event.id)
            if follows is None:
                follows = tuple(ruled.since)
            if not follows:
                self._calls[event.id] = event
            # What it may use is set as for a call whose kind has a budget of its own: the kernel has none for it now.
            yield replace(as_call(event, ruling), soft_bytes=0, hard_bytes=0)
            yield from follows
        elif was_call:
            self._calls.pop(event.id, None)
            yield ToolCallWithdrawn(now_ns, event.id)
            if ruled.since and isinstance(ruled.since[-1], ProcessesGone):
                return
            self._records.exempt(event.id)
            yield self._helpers.observe(event.id, fact_of(event, ruled.seen, ruling), event.agent)

    def _of_known_call(self, event: ToolCallStarted, parent: ToolCallId | None, kept: Kept) -> Iterator[Event] | None:
        """Where the process belongs to a call that is known already; None: it does not."""
        if parent is None:
            return None
        if self._sub_agents.of(parent) is None and (parent in self._calls or parent in self._state.tool_calls):
            return self._join(event, parent, "forked by it before it was known for a call")
        if parent in kept.shells and (line := self._lines.under_way(event)) is not None:
            return self._of_line(event, line)
        return None

    def _of_line(self, event: ToolCallStarted, line: Line) -> Iterator[Event]:
        """One more program of a line that is under way: what its first is, it is."""
        ruled = self._unwitnessed.get(line.call)
        if not line.told and ruled is not None:
            # Its conversation may have been heard since.
            ruling = self._rule(ruled.event, ruled.seen, ruled.profile, ruled.runtime, witnessed=True)
            if ruling.role is Role.TOOL_CALL:
                yield from self._becomes(ruled, ruling)
        if line.told:
            yield from self._lines.add(event, line)
            return
        why = "of a command line that nobody asked for"
        said = (event.command, Role.HOUSEKEEPING, 0.7, why, event.at_ns)
        self._records.settled(event.id)
        self._records.exempt(event.id)
        yield self._helpers.observe(event.id, ProcessRole(event.id, event.sandbox, event.pid or 0, *said), event.agent)

    def _becomes(self, ruled: Ruled, ruling: Ruling) -> Iterator[Event]:
        if ruling.call_id is not None:
            self._witness.started(ruled.event.sandbox, ruling.call_id)
            self._unwitnessed.drop(ruled.event.id)
        yield from self._changed(ruled, ruling)
        ruled.ruling = ruling

    def _join(self, event: ToolCallStarted, call: ToolCallId, why: str) -> Iterator[Event]:
        """The process belongs to a call that is known already."""
        assert self._probes is not None and event.pid is not None
        fact = ProcessRole(event.id, event.sandbox, event.pid, event.command, Role.TOOL_CALL, 0.9, why, event.at_ns)
        self._helpers.note(event.id, fact, event.agent)
        try:
            self._probes.adopt(event.pid, call)
        except (LookupError, ProcessLookupError, EbpfError):
            # The call has ended, or the process has: it stays outside, with the budget of nobody.
            self._records.exempt(event.id)
        yield from ()

    def _command(self, event: ProcessExeced) -> str:
        cut = event.command.endswith(roles.CUT)
        return (evidence.command_line(event.pid) if cut else "") or event.command

    def _told_since(self, ruled: Ruled, later: Later) -> Ruling | None:
        """What a call is of which the first exec was cut short before it told, and a later one does; None: neither."""
        event = ruled.event
        asked = self._witness.asked(event.sandbox, event.at_ns, self._runtime_of(event))
        wanted = roles.by_its_id(later.environment, ruled.profile, asked) or roles.matching(later.command, asked)
        if wanted is None or ruled.seen.in_shell:
            return None
        why = "a later exec of it tells what the conversation asked for"
        return Ruling(Role.TOOL_CALL, 0.99, why, wanted.command, wanted.id, wanted.session, budgeted=True)

    def _execed(self, event: ProcessExeced) -> Iterator[Event]:
        """A call's first process became another program: some agents say only then what was asked for."""
        ruled = self._unwitnessed.get(event.id)
        if ruled is not None and ruled.cut and ruled.event.pid == event.pid:
            later = Later(self._command(event), evidence.environment(event.pid))
            if (ruling := self._told_since(ruled, later)) is not None:
                yield from self._becomes(ruled, ruling)
                return
            ruled.later = [*ruled.later[1 - LATER_COUNT :], later]
        call = self._calls.get(event.id)
        kept = self._book.get(call.sandbox) if call is not None else None
        if call is None or kept is None or call.pid != event.pid:
            return
        sub_agent = self._sub_agents.of(call.agent)
        profile = sub_agent.profile if sub_agent is not None else kept.profile
        if profile is None:
            return
        command, environment = self._command(event), evidence.environment(event.pid)
        text = roles.asked_text(command, profile)
        named = environment.get(profile.call_key) if profile.call_key else None
        if text != command or named:
            told = text if text != command else None
            yield ToolCallAttributed(event.at_ns, call.id, call.source, call.confidence, told, call_id=named)
        if profile.session_key and (conversation := environment.get(profile.session_key)):
            yield from self._of_conversation(event.at_ns, call, conversation, kept, profile)

"""Who is who below an agent: runtime, start-up, housekeeping, tool call, shell, service, wrapper.

Owns the rules, one table of known agents and one of known programs, so that all of it can be read here. Decides nothing
about memory. What the world looks like (argv, session, who spoke to a model) comes in as an Exec; what it means comes
out as a Ruling with a confidence and the reason.

The order of evidence: our own programs; the command that the conversation just asked for; an id that the agent put into
its tool's environment; the policy's own rules; whether anybody has spoken to a model yet; the agent's profile; and what
holds for agents that nobody knows. Before somebody below the sandbox's first program has spoken to a model, everything
may still be the agent: nothing of it has a budget.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .model import Role, RoleRule, SessionId

OWN = re.compile(r"equipoise\.integrations\.|(^|/| )equipoise (run|hooks)( |$)|equipoise\.daemon\.cli (run|hooks)")
"""Our own hooks and nested runs, as they stand in a command line. `equipoise tool` is the call that it announces, and
is on record as such if the daemon is killed before it has announced it."""
HOOK = re.compile(r"equipoise\.integrations\.")
"""Of these the hooks: no call is below one."""
_SHELL = re.compile(r"^(\S*/)?(ba|da|z|k|a|fi)?sh( |$)")
_SHELL_COMMAND = re.compile(r"^(\S*/)?(ba|da|z|k|a|fi)?sh( -\S+| --\S+)*? -\w*c ")
_SHELL_FOR_GOOD = re.compile(
    r"^-?(\S*/)?(ba|da|z|k|a|fi)?sh( (-[fils]+|--(rcfile|init-file|init-command) \S+|--[\w-]+|[-+][oO] \w+))*$"
)
"""A shell without a command and without a script: it is fed line by line."""
_LAUNCHER = re.compile(
    r"^(\S*/)?(env|timeout|nohup|nice|ionice|setsid|stdbuf|sudo|doas|su|chrt|taskset|unshare|nsenter|script|xargs|time"
    r"|strace|ltrace|catchsegv|tini|dumb-init|gosu|npx|npm|pnpm|yarn|bunx|uv|uvx|pipx|poetry|pdm|hatch|conda|mamba"
    r"|micromamba|pyenv|asdf|mise|volta|nvm|direnv|systemd-run|firejail|bwrap)( |$)"
    r"|^(\S*/)?node (\S*/)?(npx|npm|pnpm|yarn)(-cli\.js)?( |$)|^npm (exec|run|x) "
    r"|^(\S*/)?python[\d.]* -m (uv|pipx|poetry) "
)
"""Programs that start another and are never the agent themselves, whatever they connect to."""
_TOOL = re.compile(
    r"^(\S*/)?(git|git-\S+|curl|wget|ssh|scp|rsync|pip[\d.]*|apt|apt-get|dpkg|make|cargo|go|rustc|gcc|cc|tar|ping|dig|nc"
    r"|lsb_release|ps|rg|docker|podman|kubectl)( |$)|^(\S*/)?python[\d.]* -m pip( |$)"
)
"""Programs that may connect to anything and are no agent for it."""
_SERVICE = re.compile(
    r"multiprocessing\.(resource_tracker|forkserver|spawn)( |$)"
    r"|(^|[/ @_.-])mcp([-_ /.]|$)|model-?context-?protocol"
    r"|(^|/| )(\S*language-?server\S*|\S*-ls|\S*langserver|gopls|rust-analyzer|clangd|tsserver(\.js)?|pylsp|jdtls)( |$)"
)
"""Children that stay and are spoken to: their memory is the sandbox's, they take no part in any wait."""
CUT = "…"
"""Ends a command line that the kernel copied no further."""
_CODE = frozenset(("-c", "-e", "-p", "-m", "--eval", "--print"))
"""Options of interpreters that are followed by code, or by a module, and no script."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How one agent program looks from outside. Versions seen: tests/agents/README.md."""

    name: str
    program: re.Pattern[str]
    """In the command line of its runtime, shims and relaunches included."""
    call: re.Pattern[str]
    """In the command line of a tool call's first exec."""
    own_session: bool = True
    """Its tool calls, and no shells of its housekeeping, begin a session of their own (setsid)."""
    asked: re.Pattern[str] | None = None
    """Finds the asked-for text in a call's command line: group 1."""
    call_key: str | None = None
    """Environment key that holds the conversation's id of the call."""
    session_key: str | None = None
    """Environment key that holds the conversation's own id, in tool calls only."""


PROFILES = (
    Profile(
        "claude-code",
        re.compile(r"^(\S*/)?claude(\.exe)?( |$)|@anthropic-ai/claude-code"),
        _SHELL_COMMAND,
        asked=re.compile(r"&& eval '(.*?)'(?: < /dev/null)? && pwd -P|&& eval '(.*)", re.DOTALL),
        session_key="CLAUDE_CODE_SESSION_ID",
    ),
    Profile(
        "codex",
        re.compile(r"(^|/| )codex(\.js)?( |$)|@openai/codex"),
        re.compile(r"--codex-run-as-process-setup"),
        own_session=False,
        asked=re.compile(r"\bexec '/\S*sh' -c '(.*)'\s*$|^\S*sh -l?c ((?!set -e).*)$", re.DOTALL),
        call_key="CODEX_TOOL_CALL_ID",
        session_key="CODEX_THREAD_ID",
    ),
    Profile(
        "opencode",
        re.compile(r"(^|/| )opencode( |$)|opencode-ai"),
        _SHELL_COMMAND,
        asked=re.compile(r"^\S*sh -c (.*)$", re.DOTALL),
    ),
    Profile(
        "gemini-cli",
        re.compile(r"(^|/| )gemini( |$)|@google/gemini-cli"),
        _SHELL_COMMAND,
        asked=re.compile(
            r"trap 'jobs -p > \"\$_bgpids_file\"' EXIT\n(.*?)\n\)\n__code="
            r"|trap 'jobs -p > \"\$_bgpids_file\"' EXIT\n(.*)",
            re.DOTALL,
        ),
    ),
)
ENVIRONMENT_KEYS = frozenset(key for p in PROFILES for key in (p.call_key, p.session_key) if key)
"""Of a process's environment only these are ever looked at."""


@dataclass(frozen=True, slots=True)
class Exec:
    """One exec by a fork of the sandbox's agent, as the kernel and /proc tell it."""

    command: str
    """argv joined by blanks; may be cut short."""
    session_leader: bool = False
    """It called setsid before the exec."""
    below_runtime: bool = False
    """Forked by a process that is known to be the agent's runtime."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of ENVIRONMENT_KEYS only."""
    fed: bool = True
    """Somebody can feed its standard input while it runs: it is a pipe, a socket or a terminal, and no file."""
    in_shell: bool = False
    """A persistent shell started it: the first program of one of its command lines."""
    shares_output: bool = False
    """Its standard output is that of the sandbox's first program: a shim passes it through, a tool call is captured."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A command that a conversation's model has asked for."""

    id: str
    session: SessionId
    command: str
    at_ns: int = 0
    """When it was asked for."""
    answered_ns: int | None = None
    """When the conversation went on, its result in; None: it has not."""
    pid: int | None = None
    """The process whose connection the conversation came by; None: not known."""

    def waits_at(self, at_ns: int) -> bool:
        """Whether what began then can be it."""
        return self.at_ns <= at_ns and (self.answered_ns is None or at_ns <= self.answered_ns)


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a process is taken for."""

    role: Role
    confidence: float
    """0..1."""
    why: str
    command: str
    """What was asked for, where that could be told; else the command line."""
    call_id: str | None = None
    """By which the agent's own log, and the conversation, know the call."""
    session: SessionId | None = None
    """Of the conversation that asked, where an engine told of it."""
    conversation: str | None = None
    """By which the agent itself knows it."""
    budgeted: bool = False
    """Whether a tool call's budget may stop it."""


def profile_of(commands: Sequence[str]) -> Profile | None:
    """The known agent that one of these command lines starts: the first program's, its runtime's."""
    return next((p for p in PROFILES if any(p.program.search(command) for command in commands)), None)


def is_agent(command: str) -> bool:
    """Whether the program itself, or the script its interpreter runs, is that of a known agent."""
    words = command.split(" ")
    options = list(itertools.takewhile(lambda word: word.startswith("-"), words[1:]))
    script = [] if _CODE.intersection(options) else words[1 + len(options) : 2 + len(options)]
    program = " ".join([words[0], *script])
    return not _SHELL.search(command) and not _LAUNCHER.search(command) and profile_of([program]) is not None


def may_be_agent(command: str) -> bool:
    """Whether a process with a connection may be an agent: it is no launcher, and no program known to be a tool."""
    shell = _SHELL.search(command)
    return not (shell or _LAUNCHER.search(command) or _TOOL.search(command) or OWN.search(command))


def is_launcher(command: str) -> bool:
    return bool(_LAUNCHER.search(command) or _SHELL_COMMAND.search(command))


def rule(
    seen: Exec,
    profile: Profile | None = None,
    runtime: str = "",
    asked: Sequence[Asked] = (),
    rules: Sequence[RoleRule] = (),
    *,
    witnessed: bool = False,
) -> Ruling:
    """What the process is. `runtime` is the command line of the runtime that forked it, `rules` are the policy's.

    `witnessed`: an engine of ours hears this agent's conversation, so that `asked` holds all that is asked for now.
    """
    if (told := _told(seen, profile, asked, rules)) is not None:
        return told
    if witnessed and seen.below_runtime and _cut_before_told(seen, profile, asked):
        why = "cut short before it tells which of the commands that are asked for it is"
        return Ruling(Role.TOOL_CALL, 0.9, why, seen.command, budgeted=True)
    if not seen.below_runtime:
        return Ruling(Role.START_UP, 0.9, "nobody above it has spoken to a model yet", seen.command)
    if profile is not None and not witnessed and _looks_like_call(seen, profile):
        why = f"looks as tool calls of {profile.name} do"
        text, named = asked_text(seen.command, profile), conversation_of(seen, profile)
        return Ruling(Role.TOOL_CALL, 0.97, why, text, conversation=named, budgeted=True)
    if (other := _besides(seen, profile, runtime)) is not None:
        return other
    if seen.in_shell and any(each.command for each in asked):
        why = "begins a command line of a shell while one is asked for"
        return Ruling(Role.TOOL_CALL, 0.8, why, seen.command, budgeted=True)
    # A call without a command in its arguments may start any program: then the shape decides.
    if witnessed and all(each.command for each in asked):
        return Ruling(Role.HOUSEKEEPING, 0.7, "nothing of the kind was asked for in the conversation", seen.command)
    if profile is not None:
        if _looks_like_call(seen, profile):
            why = f"looks as tool calls of {profile.name} do"
            text, named = asked_text(seen.command, profile), conversation_of(seen, profile)
            return Ruling(Role.TOOL_CALL, 0.97, why, text, conversation=named, budgeted=True)
        return Ruling(Role.HOUSEKEEPING, 0.95, f"no tool call of {profile.name} looks so", seen.command)
    if seen.shares_output and not _SHELL_COMMAND.search(seen.command):
        return Ruling(Role.TOOL_CALL, 0.6, "writes where the agent itself does: it may be the agent", seen.command)
    why = "begins a command line of a shell" if seen.in_shell else "exec'd by the agent's runtime"
    return Ruling(Role.TOOL_CALL, 0.9, why, seen.command, budgeted=True)


def _told(seen: Exec, profile: Profile | None, asked: Sequence[Asked], rules: Sequence[RoleRule]) -> Ruling | None:
    """What somebody has said of it: ourselves, the conversation, the agent, the policy. None: nobody has."""
    if OWN.search(seen.command):
        return Ruling(Role.WRAPPER, 1.0, "a program of ours", seen.command)
    wanted = by_its_id(seen.environment, profile, asked)
    if wanted is not None and profile is not None:
        why = f"{profile.call_key} in its environment is the id of what the conversation asked for"
        return Ruling(Role.TOOL_CALL, 0.99, why, wanted.command, wanted.id, wanted.session, budgeted=True)
    wanted = of_line(seen.command, asked) if seen.in_shell else matching(seen.command, asked)
    if wanted is not None and seen.in_shell:
        return by_its_line(wanted)
    if wanted is not None:
        why = "its arguments hold the command that the conversation asked for"
        return Ruling(Role.TOOL_CALL, 0.99, why, wanted.command, wanted.id, wanted.session, budgeted=True)
    if profile is not None and profile.call_key and (call := seen.environment.get(profile.call_key)):
        why = f"{profile.call_key} is set in its environment"
        text, named = asked_text(seen.command, profile), conversation_of(seen, profile)
        return Ruling(Role.TOOL_CALL, 0.98, why, text, call, conversation=named, budgeted=True)
    for each in rules:
        if re.search(each.match, seen.command):
            called = each.role is Role.TOOL_CALL
            return Ruling(each.role, 0.99, f"the policy's rule {each.match!r}", seen.command, budgeted=called)
    return None


def _cut_before_told(seen: Exec, profile: Profile | None, asked: Sequence[Asked]) -> bool:
    """It may be one of several that are asked for, or looks as calls of its agent do while something is."""
    if not seen.command.endswith(CUT) or not asked or seen.in_shell:
        return False
    return (profile is not None and _looks_like_call(seen, profile)) or len(_cut_within(seen.command, asked)) > 1


def by_its_id(environment: Mapping[str, str], profile: Profile | None, asked: Sequence[Asked]) -> Asked | None:
    """The asked-for call whose id its agent has put into this environment."""
    said = environment.get(profile.call_key) if profile is not None and profile.call_key else None
    return next((each for each in asked if each.id == said), None) if said else None


def by_its_line(asked: Asked) -> Ruling:
    """Of a program of a shell that stands in this line as it is."""
    why = "begins the command line that the conversation asked for"
    return Ruling(Role.TOOL_CALL, 0.99, why, asked.command, asked.id, asked.session, budgeted=True)


def conversation_of(seen: Exec, profile: Profile) -> str | None:
    """The id of the conversation that asked for it, as the agent puts it into the environment of its tool calls."""
    return seen.environment.get(profile.session_key) if profile.session_key else None


def _looks_like_call(seen: Exec, profile: Profile) -> bool:
    return bool(profile.call.search(seen.command)) and (seen.session_leader or not profile.own_session)


def _besides(seen: Exec, profile: Profile | None, runtime: str) -> Ruling | None:
    """What is neither a call nor housekeeping, whatever was asked for; None: it is one of these."""
    command = seen.command
    if same_program(command, runtime):
        return Ruling(Role.START_UP, 0.9, "a relaunch of the agent itself", command)
    if is_agent(command):
        other = profile_of([command])
        if profile is not None and other is not None and other.name != profile.name:
            # Its own calls are told apart once it speaks to its model (RoleKeeper._connected).
            return Ruling(Role.TOOL_CALL, 0.8, f"{profile.name} starts {other.name}: a call that is an agent", command)
        # Codex's screen starts a server of its own that speaks to the model and runs the calls.
        return Ruling(Role.START_UP, 0.85, "an agent's program: it is one once it speaks to a model", command)
    if _SERVICE.search(command):
        return Ruling(Role.SERVICE, 0.9, "a server by its name", command)
    if seen.fed and _SHELL_FOR_GOOD.search(command):
        return Ruling(Role.SHELL, 0.85, "a shell that is fed line by line", command)
    return None


def same_program(command: str, runtime: str) -> bool:
    """Whether it is the runtime once more: the same last arguments, perhaps with other options of its interpreter."""
    ours, theirs = runtime.split(), command.split()
    if len(ours) < 2 or len(theirs) < 2:
        return bool(ours) and ours == theirs
    return theirs[-len(ours) + 1 :] == ours[1:] and _name(theirs[0]) == _name(ours[0])


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def asked_text(command: str, profile: Profile) -> str:
    """The command a tool call of this agent was asked for, freed of the agent's wrapping; else the command line."""
    found = profile.asked.search(command) if profile.asked is not None else None
    if found is None:
        return command
    text = next((group for group in found.groups() if group), "")
    return text.replace("'\"'\"'", "'").replace("'\\''", "'") or command


_SHORTEST = 3
"""Characters of an asked-for command that must be seen, blanks and quotes aside, to tell it from any other."""
_QUOTING = re.compile(r"[\s'\"\\]")
_BEFORE = re.compile(r"(^|[^\w.=-])$")
_WORDS_BEFORE = re.compile(r"(^|[;&|({\n]|(^|\s)-\w*c|\beval|\bdo|\bthen)[ \t'\"\\]*$")
_AFTER = re.compile(r"[ \t'\"\\]*($|[\n;&|<>(){}#]|\d+[<>])")
"""What may follow a whole command: the shell's own words, and no argument."""


def matching(command: str, asked: Sequence[Asked]) -> Asked | None:
    """The asked-for command that a command line holds; None for none. Of several the longest, of equal ones the oldest.

    Blanks, quotes and backslashes are left out on both sides, since every agent quotes in its own way. It must stand
    there whole: `git status --porcelain` is not the `git status` that was asked for. A command line that was cut short
    must end in the beginning of what was asked for, and of nothing else that was.
    """
    whole = command.rstrip(CUT)
    seen = _QUOTING.sub("", whole)
    best, length = None, 0
    for each in asked:
        wanted = _QUOTING.sub("", each.command)
        if len(wanted) > length and wanted in seen and _stands_whole(wanted, whole):
            best, length = each, len(wanted)
    begun = _cut_within(command, asked)
    if all(len(_QUOTING.sub("", each.command)) <= length for each in begun):
        return best
    return begun[0] if len({each.command for each in begun}) == 1 else None


def _cut_within(command: str, asked: Sequence[Asked]) -> list[Asked]:
    """Those in whose beginning this command line was cut short."""
    if not command.endswith(CUT):
        return []
    seen = _QUOTING.sub("", command.rstrip(CUT))
    words = [(each, _QUOTING.sub("", each.command)) for each in asked]
    return [each for each, wanted in words if len(wanted) >= _SHORTEST and _ends_in_beginning(seen, wanted)]


def of_line(command: str, asked: Sequence[Asked]) -> Asked | None:
    """The asked-for command line that this program of a shell stands in as it is; None for none.

    Its arguments may have been expanded, or a function may have started it: then the time tells, once it is over.
    """
    seen = _QUOTING.sub("", command)
    return next((each for each in asked if seen and seen in _QUOTING.sub("", each.command)), None)


def _stands_whole(wanted: str, command: str) -> bool:
    """Whether one occurrence of what is wanted is no part of a longer word, and no other word follows it."""
    places = [at for at, character in enumerate(command) if not _QUOTING.match(character)]
    seen = "".join(command[at] for at in places)
    before = _WORDS_BEFORE if len(wanted) < _SHORTEST else _BEFORE
    start = seen.find(wanted)
    while start >= 0:
        first, last = places[start], places[start + len(wanted) - 1]
        if before.search(command[max(0, first - 32) : first]) and _AFTER.match(command, last + 1):
            return True
        start = seen.find(wanted, start + 1)
    return False


def _ends_in_beginning(seen: str, wanted: str) -> bool:
    start = seen.find(wanted[:12])
    return start >= 0 and wanted.startswith(seen[start:])

"""The words of the engine: ids, what a client asks (TurnRequest), what it gets back, sessions and turns.

Owns: plain state of one session and one turn. Must not: decide anything (scheduler.py) or touch llama.cpp (runner.py).
A session's KV is always that of a prefix of `Session.tokens`; how long a prefix, and where, is the ledger's to know.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType

from ...policies import model as core
from .errors import RequestError

if TYPE_CHECKING:  # a name in annotations only: these words need no library
    from .constraint import Constraint

SessionId = NewType("SessionId", str)
TenantId = NewType("TenantId", str)
TurnId = NewType("TurnId", str)
Slot = NewType("Slot", int)  # a sequence id of the llama.cpp context
Token = int

# The daemon's words are ours.
Tier = core.KvTier
SessionPhase = core.SessionPhase
FinishReason = core.FinishReason


class IdlePolicy(enum.Enum):
    """What becomes of a session's KV when its turn has ended and nobody directs otherwise."""

    RETAIN = "retain"
    SWAP = "swap"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    seed: int | None = None
    """None: drawn at random for the turn."""
    logit_bias: tuple[tuple[Token, float], ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token of the output so far: as often as it is there, and once if it is."""
    constraint: Constraint | None = None
    """What the output is held to, compiled: a JSON schema, a tool's parameters, a grammar."""
    logprobs: int | None = None
    """Report the log probability of each token and of this many alternatives."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a client wants of its turn's timing, counted from its arrival. None: no wish."""

    ttft_ns: int | None = None
    deadline_ns: int | None = None


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn a client asks for."""

    session_id: SessionId
    tenant_id: TenantId
    prompt: str
    """The whole conversation, rendered by the chat template, the assistant's header last."""
    max_tokens: int | None = None
    """None: the engine's default (EngineConfig.default_max_tokens)."""
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()
    slo: Slo = Slo()
    """A turn with a wished time to first token may interrupt another's long prefill."""
    ephemeral: bool = False
    """The session is of this turn only: its KV is dropped when the turn ends."""
    peer_port: int | None = None
    """The client's TCP port: lets the daemon join the session to a sandbox."""
    may_call_tools: bool = False
    """Tool calls are looked for in the output."""
    awaits_tool: bool = False
    """Told by the client: whatever the output looks like, a tool will run before the session's next turn."""
    ignore_end_of_text: bool = False
    """Benches only: go on to max_tokens whatever the model says."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: Token
    logprob: float
    top: tuple[tuple[Token, float], ...]


@dataclass(frozen=True, slots=True)
class TurnAccepted:
    """The first event of a turn that will be served."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TurnRefused:
    """The only event of a turn that will not be served."""

    error: RequestError


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of one or more output tokens; may be empty while a character or a stop string is incomplete."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnFinished:
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    output_tokens: int
    queued_ns: int
    ttft_ns: int | None
    slowdown_ratio: float | None = None
    """Its time from arrival to end over what it takes alone with its KV in place, by the cost model."""
    awaits_tool: bool = False
    error: str | None = None


TurnEvent = TurnAccepted | TurnRefused | TextDelta | TurnFinished
Sink = Callable[[TurnEvent], None]
"""Called on the engine's thread for each event of a turn; must not block."""


@dataclass(slots=True)
class Turn:
    """One turn on its way: the scheduler computes its session's tokens up to the last, then one output at a time."""

    id: TurnId
    session_id: SessionId
    tenant_id: TenantId
    arrival_ns: int
    prompt_tokens: int
    max_output_tokens: int
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    preempted_count: int = 0
    due_ns: int | None = None
    """When it must begin to be computed to meet its SLO, as far as the cost model knows; None: no SLO."""
    admitted_ns: int | None = None
    """When it first entered the batch."""
    first_token_ns: int | None = None


@dataclass(slots=True)
class Session:
    """One conversation. `tokens` is all of it, the prompt of a waiting turn included."""

    id: SessionId
    tenant_id: TenantId
    tokens: list[Token] = field(default_factory=list)
    text: str | None = ""
    """The text of `tokens`; None where they do not decode to clean UTF-8."""
    ephemeral: bool = False
    turn: Turn | None = None
    computed_high_tokens: int = 0
    """The longest prefix of `tokens` ever computed: what lies below and is computed again had been dropped."""
    retain_until_ns: int = 0
    """The engine's own retention: orders the idle sessions when room is needed; it is no promise."""
    pinned_until_ns: int | None = None
    """A directed retention: kept on the device even under pressure."""
    held_until_ns: int | None = None
    last_used_ns: int = 0


def common_prefix(left: Sequence[Token], right: Sequence[Token]) -> int:
    """Length of the longest common prefix."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))

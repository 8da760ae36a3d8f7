"""The words of the engine: ids, what a client asks (TurnRequest), what it gets back, sessions and turns.

Owns: plain state of one session and one turn. Must not: decide anything (scheduler.py) or touch llama.cpp (runner.py).
A session's KV is always that of a prefix of `Session.tokens`; how long a prefix, and where, is the ledger's to know.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NewType

from ....policies import model as core
from ....policies.accounting import SessionCost, TurnCost
from ..errors import RequestError

if TYPE_CHECKING:  # a name in annotations only: these words need no library
    from ..compute.constraint import Constraint

Slot = NewType("Slot", int)  # a sequence id of the llama.cpp context
Token = int
_RANDOM_SEED = 0xFFFFFFFF  # to llama.cpp: draw one yourself

# The core's words are ours.
SessionId = core.SessionId
TenantId = core.TenantId
TurnId = core.TurnId
SessionPhase = core.SessionPhase
FinishReason = core.FinishReason


@dataclass(frozen=True, slots=True, eq=False)
class Tier:
    """A place for KV. Each exists once: two are the same place only where they are the same object.

    The device, and nowhere, are here; those below the device are lines of a table (tiers/table.py), which the ledger is
    given from the nearest down. None of our code names one of them, but where it is made.
    """

    value: str
    """What options and messages call it."""
    told_as: core.KvTier
    """What the daemon takes it for: it weighs whose memory is used (host RAM, a disk), not how an engine divides it."""
    DEVICE: ClassVar[Tier]
    NONE: ClassVar[Tier]


Tier.DEVICE = Tier("device", core.KvTier.DEVICE)
Tier.NONE = Tier("none", core.KvTier.NONE)


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

    def seeded(self) -> SamplingParams:
        """With the seed that will be used: the one given, as 32 bits, or one drawn now. Greedy needs none."""
        if self.temperature <= 0:
            return self
        seed = None if self.seed is None else self.seed & 0xFFFFFFFF
        if seed is None or seed == _RANDOM_SEED:
            seed = random.randrange(_RANDOM_SEED)
        return replace(self, seed=seed)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a client wants of its turn's timing, counted from its arrival. None: no wish."""

    ttft_ns: int | None = None
    deadline_ns: int | None = None
    tpot_ns: int | None = None
    """Time per output token, on average from the first token on."""


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn a client asks for."""

    session_id: SessionId
    """With `anonymous` only the name of a session begun anew."""
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
    anonymous: bool = False
    """The client names no session: the turn goes on with the one whose whole conversation its prompt continues."""
    peer_port: int | None = None
    """The client's TCP port: lets the daemon join the session to a sandbox."""
    peer_address: str | None = None
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
    session_id: SessionId
    """The request's, or that of the anonymous session it continues."""


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
    cost: TurnCost
    session_cost: SessionCost
    """Of all turns of its session so far, this one included."""
    awaits_tool: bool = False
    error: str | None = None
    engine_id: str = ""
    """The engine that computed its last token: another one than it was asked of where it was handed over."""


TurnEvent = TurnAccepted | TurnRefused | TextDelta | TurnFinished
Sink = Callable[[TurnEvent], None]
"""Called for each event of a turn, one at a time; must not block. On the engine's thread, or on that of the event loop
while another engine computes the turn."""


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
    """When it must begin to be computed for its first token or its deadline; None: no such wish. See slo.py."""
    slo: Slo = Slo()
    group_waits: int = 0
    """Steps it was passed over because another turn computes a prefix it will share."""
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
    anonymous: bool = False
    """No client has named it: found again by its text only (session_index.py), and the first to give way."""
    turn: Turn | None = None
    computed_high_tokens: int = 0
    """The longest prefix of `tokens` ever computed: what lies below and is computed again had been dropped."""
    retain_until_ns: int = 0
    """The engine's own retention: orders the idle sessions when room is needed; it is no promise."""
    pinned_until_ns: int | None = None
    """A directed retention: kept on the device even under pressure."""
    held_until_ns: int | None = None
    last_used_ns: int = 0
    cost: SessionCost = field(default_factory=SessionCost)


def finished(
    turn: Turn,
    reason: FinishReason,
    cost: TurnCost,
    session_cost: SessionCost,
    *,
    now_ns: int,
    engine_id: str,
    awaits_tool: bool = False,
    error: str | None = None,
) -> TurnFinished:
    """What the turn's client is told as the last."""
    return TurnFinished(
        reason=reason,
        prompt_tokens=turn.prompt_tokens,
        cached_tokens=turn.cached_tokens,
        recomputed_tokens=turn.recomputed_tokens,
        output_tokens=turn.output_tokens,
        queued_ns=(turn.admitted_ns or now_ns) - turn.arrival_ns,
        ttft_ns=None if turn.first_token_ns is None else turn.first_token_ns - turn.arrival_ns,
        cost=cost,
        session_cost=session_cost,
        awaits_tool=awaits_tool,
        error=error,
        engine_id=engine_id,
    )


_COMPARED_AT_ONCE = 128


def common_prefix(left: Sequence[Token], right: Sequence[Token]) -> int:
    """Length of the longest common prefix; long equal stretches are compared as slices, some 10 times as fast."""
    length = min(len(left), len(right))
    start = 0
    while start < length and left[start : start + _COMPARED_AT_ONCE] == right[start : start + _COMPARED_AT_ONCE]:
        start += _COMPARED_AT_ONCE
    for index in range(start, min(start + _COMPARED_AT_ONCE, length)):
        if left[index] != right[index]:
            return index
    return length

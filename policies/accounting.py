"""What a turn and a session cost: prefill-token equivalents (PTE), energy, slowdown.

Owns the arithmetic and what each figure means; the engine counts the work, the daemon adds up what engines report.

PTE states all work of a turn in one unit, the computing of one prompt token without context:

    PTE = prefill tokens + gamma x sum over decode steps of the tokens of context each step reads

Source: Su et al., "Beyond Accuracy: Unveiling Inefficiency Patterns in Tool-Integrated Reasoning" (2026, arXiv
2604.05404): PTE = sum over turns of D_prefill + gamma L_seq D_decode. Here D_prefill is what was really computed
(tokens found in the cache are not, tokens computed again because their KV was dropped are), and L_seq x D_decode is
summed step by step, so that a turn cut in two costs what it costs whole. A step computes the KV of the output drawn
before it; that of the last output, if ever, is a prompt token's of the next turn: nothing is counted twice.

gamma is what one token of context adds to a decode step, in prefill tokens: bytes of KV to be read against
multiplications to be done. On known GPUs it follows from the model's shape and the GPU; elsewhere it is measured.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

FLOPS_PER_BYTE = {"H100": 756.5, "H200": 348.1, "A100": 322.5}
"""Operational intensity a GPU needs to be busy: peak FLOP/s over memory bandwidth, by what NVML's name of it contains.

The paper's figures. They agree with the data sheets' 16-bit peak with sparsity on the PCIe and NVL boards (1513
TFLOP/s over 2.0 TB/s, 1671 over 4.8, 624 over 1.935); an SXM board of the same name differs by up to a fifth.
"""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides gamma: a dense decoder's attention cache and weights."""

    layer_count: int
    kv_head_count: int
    key_dimension: int
    """Of one head."""
    value_dimension: int
    kv_element_bytes: int
    parameter_count: int

    @property
    def kv_bytes_per_token(self) -> int:
        return (
            self.layer_count * self.kv_head_count * (self.key_dimension + self.value_dimension) * self.kv_element_bytes
        )


class GammaSource(enum.Enum):
    TABLE = "table"
    """From the model's shape and FLOPS_PER_BYTE."""
    MEASURED = "measured"
    """From times on this machine."""


@dataclass(frozen=True, slots=True)
class Gamma:
    prefill_tokens: float
    """What reading one token of context in one decode step costs, in prefill tokens; above 0."""
    source: GammaSource


def gamma_from_table(shape: ModelShape, gpu_names: Sequence[str]) -> Gamma | None:
    """gamma of a model that lies whole on these GPUs; None where one is not in the table or they differ.

    One token of context is `kv_bytes_per_token` to read; a prefill token is 2 FLOP a parameter:
    gamma = (bytes / bandwidth) / (2 parameters / peak FLOP/s) = bytes x FLOPS_PER_BYTE / (2 parameters).
    """
    known = {next((flops for name, flops in FLOPS_PER_BYTE.items() if name in gpu), None) for gpu in gpu_names}
    if len(known) != 1 or (flops_per_byte := known.pop()) is None:
        return None
    return Gamma(shape.kv_bytes_per_token * flops_per_byte / (2 * shape.parameter_count), GammaSource.TABLE)


def gamma_from_times(decode_seconds_per_context_token: float, prefill_seconds_per_token: float) -> Gamma | None:
    """gamma as the ratio of two measured times; None where either was not measured (0)."""
    if decode_seconds_per_context_token <= 0 or prefill_seconds_per_token <= 0:
        return None
    return Gamma(decode_seconds_per_context_token / prefill_seconds_per_token, GammaSource.MEASURED)


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed, in tokens. Add pieces with `+`."""

    prefill_tokens: int = 0
    """Computed with others of their sequence, or anew: cache hits are not among them."""
    wasted_tokens: int = 0
    """Of prefill_tokens, those that had been computed before and whose KV had been dropped."""
    decode_tokens: int = 0
    """Computed one by one, each to draw the next."""
    decode_context_tokens: int = 0
    """Tokens of context read, summed over the decode steps, the step's own token included."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.prefill_tokens + other.prefill_tokens,
            self.wasted_tokens + other.wasted_tokens,
            self.decode_tokens + other.decode_tokens,
            self.decode_context_tokens + other.decode_context_tokens,
        )


def work_of(start: int, count: int, *, prompt_tokens: int, again_tokens: int) -> Work:
    """The work of computing positions [start, start + count) of a turn whose prompt ends at `prompt_tokens`.

    The first `again_tokens` of them had been computed before: outputs among them are computed in bulk, as prefill.
    """
    end = start + count
    decode_from = min(end, max(start + again_tokens, prompt_tokens))
    decoded = end - decode_from
    context = decoded * (decode_from + 1 + end) // 2  # position p reads p + 1 tokens
    return Work(count - decoded, again_tokens, decoded, context)


def pte(work: Work, gamma: Gamma) -> float:
    """Prefill-token equivalents of `work`: see the module."""
    return work.prefill_tokens + gamma.prefill_tokens * work.decode_context_tokens


@dataclass(frozen=True, slots=True)
class TurnCost:
    """What one turn cost. None: not known, which is never 0."""

    pte: float | None = None
    """None: no gamma."""
    wasted_pte: float = 0.0
    """Of `pte`, what recomputing dropped KV cost: wasted prefill tokens, one each."""
    energy_joules: float | None = None
    """None: no energy counter, or one that failed while the turn ran."""
    duration_ns: int = 0
    """From arrival to end, waiting included."""
    ideal_ns: int | None = None
    """What the cost model says the turn takes alone on this machine with its KV in place: the new part of its prompt
    and its outputs, no queue, no neighbours, no swap, nothing computed twice. None: no cost model, or no output."""

    @property
    def slowdown_ratio(self) -> float | None:
        """duration over ideal: 1 alone and undisturbed, 3 for thrice as long; below 1 where the model asks too much,
        as one fitted while the machine was busy does."""
        return self.duration_ns / self.ideal_ns if self.ideal_ns else None


@dataclass(frozen=True, slots=True)
class SessionCost:
    """Running sums over the turns of one session that have ended."""

    turn_count: int = 0
    pte: float | None = None
    """None: no turn yet, or the PTE of one of them is not known. The same for energy_joules."""
    wasted_pte: float = 0.0
    energy_joules: float | None = None
    duration_ns: int = 0
    """Over the turns whose ideal is known; so is ideal_ns."""
    ideal_ns: int = 0

    def plus(self, turn: TurnCost) -> SessionCost:
        """These sums with one more turn."""
        timed = turn.ideal_ns is not None
        return SessionCost(
            turn_count=self.turn_count + 1,
            pte=self._sum(self.pte, turn.pte),
            wasted_pte=self.wasted_pte + turn.wasted_pte,
            energy_joules=self._sum(self.energy_joules, turn.energy_joules),
            duration_ns=self.duration_ns + (turn.duration_ns if timed else 0),
            ideal_ns=self.ideal_ns + (turn.ideal_ns or 0),
        )

    def _sum(self, so_far: float | None, more: float | None) -> float | None:
        if self.turn_count == 0:
            return more
        return None if so_far is None or more is None else so_far + more

    @property
    def slowdown_ratio(self) -> float | None:
        """Time of all turns over their ideal time: long turns weigh more than short ones."""
        return self.duration_ns / self.ideal_ns if self.ideal_ns else None

"""The rivals: what an engine does by itself with KV that must make room, and with turns that wait.

Owns the rules by which published systems choose a victim, the parts that can be added to each, and the grammar of
their names. Rules look and rank; the engine moves.

  drop      least recently used, computed again (vLLM's prefix cache, arXiv 2309.06180)
  swap      least recently used, to the host tier, then to disk
  ttl       the same, but nobody within two seconds of its last turn (a fixed time to live)
  minwaste  InferCept's minimum of preserve, swap and discard (Abhyankar et al., ICML 2024)
  worth     seconds that its loss costs, over the bytes and the time they will stand there; least first
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..model import KvTier
from .seat import Seat, Stage

TTL_S = 2.0
SWAP_FIXED_S = 1e-3
"""A swap costs its border too: without it an empty link would make every session equally worthless."""
WAIT_FIXED_S = 0.3
"""Added to each expected wait: nobody is evicted for the last tenth of a second of a call."""
WAITING_WORTH = 1e18
PREFILL_WEIGHT = 4.0
"""A second of prefill holds up whoever decodes, a second of the disk does not; with nobody decoding they are equal."""


class Look(Protocol):
    """What a rule may see of the engine."""

    @property
    def now_s(self) -> float: ...
    @property
    def device_tokens(self) -> int:
        """In use."""

    @property
    def disk_present(self) -> bool: ...
    def restore_s(self, seat: Seat, tier: KvTier) -> float: ...
    def wait_s(self, seat: Seat) -> float: ...
    def age_rank(self, seat: Seat) -> float: ...


Worth = Callable[[Look, Seat, KvTier], float]
"""Of a session's KV, were it in this tier."""


@dataclass(frozen=True, slots=True)
class Rule:
    """An engine's own behaviour. Each field but the first two is a part that can be given or taken away by name."""

    name: str
    worth: Worth
    """What a session's KV is worth where it is: the least goes first."""
    swaps: bool = True
    """False: what must go is dropped."""
    host_share: float | None = 0.5
    """Of host RAM, fixed; None: the host tier is what the tools leave (part `follow`)."""
    append: bool = False
    """Copies in lower tiers stay valid: only what was appended is written again."""
    behind: bool = False
    """Copies are written while the disk has nothing else to do, before room is needed (write-behind)."""
    near_s: float | None = None
    """The turn cheapest to bring back goes first, unless one has waited so long; None: in order of arrival."""
    meet: bool = False
    """Compute or load: a restore from disk reads the tail while the head is computed again."""
    door: float | None = None
    """The awake may need so much of device and host tier together; None: everybody is let in."""
    prefetch: bool = False
    """KV comes back before its tool call is expected to end, where room and link are free."""
    fair: bool = False
    """Between tenants: least service by weight first (VTC)."""


def _last_used(_: Look, seat: Seat, _tier: KvTier) -> float:
    return seat.ended_s


def _time_to_live(look: Look, seat: Seat, _tier: KvTier) -> float:
    return seat.ended_s + (1e6 if look.now_s - seat.ended_s < TTL_S else 0.0)


def _minimum_waste(look: Look, seat: Seat, _tier: KvTier) -> float:
    """Minus what keeping it saves: preserve T_wait C, swap 2 T_swap C_batch, discard T_fwd C_batch (C: tokens)."""
    preserve = look.wait_s(seat) * seat.context_tokens
    swap = 2 * look.restore_s(seat, KvTier.HOST) * look.device_tokens
    discard = look.restore_s(seat, KvTier.NONE) * look.device_tokens
    return -min(preserve, swap, discard)


def value(look: Look, seat: Seat, tier: KvTier) -> float:
    """Seconds that its loss would cost in the next lower tier, per token and second of its expected stay."""
    if seat.stage is Stage.WAITING:
        return WAITING_WORTH - seat.asked_s
    if tier is KvTier.DEVICE:
        lost = look.restore_s(seat, KvTier.HOST) + SWAP_FIXED_S
    else:
        below = KvTier.DISK if look.disk_present else KvTier.NONE
        lost = look.restore_s(seat, below) - look.restore_s(seat, KvTier.HOST)
    return lost / (max(1, seat.context_tokens) * (WAIT_FIXED_S + look.wait_s(seat)))


BASES: dict[str, Rule] = {
    "drop": Rule("drop", _last_used, swaps=False),
    "swap": Rule("swap", _last_used),
    "ttl": Rule("ttl", _time_to_live),
    "minwaste": Rule("minwaste", _minimum_waste),
    "worth": Rule("worth", value),
}


@dataclass(slots=True)
class Service:
    """Tokens each tenant was served, by weight: VTC's counters (Sheng et al., OSDI 2024), p_in : p_out = 1 : 2."""

    served: dict[str, float] = field(default_factory=dict)

    def active(self, tenant: str, active: set[str]) -> None:
        """A tenant that asks for something re-enters at the least counter of those that are active."""
        if tenant not in active and active:
            least = min(self.served.get(other, 0.0) for other in active)
            self.served[tenant] = max(self.served.get(tenant, 0.0), least)

    def serve(self, seat: Seat, prompt_tokens: int, output_tokens: int) -> None:
        amount = (prompt_tokens + 2 * output_tokens) / seat.weight
        self.served[seat.tenant] = self.served.get(seat.tenant, 0.0) + amount


def waiting_order(rule: Rule, look: Look, seat: Seat) -> tuple[float, ...]:
    """Sort key of a turn that waits: the least is served first."""
    tenant = look.age_rank(seat) if rule.fair else 0.0
    if rule.near_s is None:
        return (tenant, seat.asked_s, seat.number)
    if look.now_s - seat.asked_s > rule.near_s:
        return (tenant, 0.0, seat.asked_s, seat.number)
    return (tenant, 1.0, look.restore_s(seat, seat.tier), seat.asked_s, seat.number)

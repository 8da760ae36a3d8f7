"""The books of KV memory: how many tokens of each session are held in each tier, and in which slot.

Owns: capacities, use, slots, and the invariants below. Must not: choose who leaves (scheduler.py) or move bytes
(swapper.py). llama.cpp shows no public view of its cells, so these books are the only account; tests hold them against
llama_memory_seq_pos_max.

Invariants (`check_integrity`):
- a slot belongs to at most one session; a session has a slot exactly when it holds device tokens or is being computed;
- device use is the sum of the sessions' device tokens, a shared prefix counted once, and never negative; the same for
  each tier below, where nothing is shared;
- sessions that share cells form the tree of shared_cells.py, and each holds the whole prefix it shares;
- room set aside in the nearest tier for a copy still on its way from another engine counts as used;
- every copy is a prefix of the conversation: one below the device may be shorter or longer than what the device holds,
  never of other tokens (`truncate` shortens all copies at once).

The tiers below the device are a table, `Ledger.lower`, the nearest first: nothing here names any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ....policies.model import KvTier
from .sequence import SessionId, Slot, Tier
from .shared_cells import SharedCells


@dataclass(slots=True)
class LowerTier:
    """A tier below the device, as booked."""

    tier: Tier
    capacity_bytes: int
    used_tokens: int = 0


@dataclass(slots=True)
class Holding:
    """What one session holds. Token counts are prefix lengths of its conversation."""

    lower: tuple[LowerTier, ...]
    """The ledger's."""
    copies: list[int]
    """Tokens of the copy in each of `lower`."""
    slot: Slot | None = None
    device_tokens: int = 0

    def longest(self) -> tuple[Tier, int]:
        """The tier of the longest copy, the nearest one where several are as long, and its length."""
        best, longest = Tier.NONE, 0
        if self.device_tokens > 0:
            best, longest = Tier.DEVICE, self.device_tokens
        for place, tokens in enumerate(self.copies):
            if tokens > longest:
                best, longest = self.lower[place].tier, tokens
        return best, longest

    def copy_tokens(self, tier: Tier) -> int:
        """Tokens of the copy in a tier below the device; 0 where there is no such tier."""
        for place, each in enumerate(self.lower):
            if each.tier is tier:
                return self.copies[place]
        return 0


class Ledger:
    def __init__(
        self,
        *,
        device_capacity_tokens: int,
        slot_count: int,
        bytes_per_token: int,
        lower: Sequence[tuple[Tier, int]] = (),
    ) -> None:
        """`lower`: the tiers below the device and their bytes, in the order of the way down."""
        self.device_capacity_tokens = device_capacity_tokens
        self.lower = tuple(LowerTier(tier, capacity_bytes) for tier, capacity_bytes in lower)
        self._places = {tier: place for place, (tier, _) in enumerate(lower)}
        self._nothing = Holding(self.lower, [0] * len(self.lower))
        self.bytes_per_token = bytes_per_token
        self.slot_count = slot_count
        self._device_tokens = 0  # shared cells counted for each of their users
        self._shared = SharedCells()
        self._holdings: dict[SessionId, Holding] = {}
        self._in_slots: dict[Slot, SessionId] = {}
        self._reserved_tokens: dict[SessionId, int] = {}
        # Lowest first: in split mode llama.cpp batches only neighbouring slots together.
        self._free_slots: list[Slot] = [Slot(number) for number in reversed(range(slot_count))]

    def __contains__(self, session_id: SessionId) -> bool:
        return session_id in self._holdings

    def __iter__(self) -> Iterator[SessionId]:
        return iter(self._holdings)

    def on_device(self) -> list[SessionId]:
        """The sessions that have a slot, by slot: at most `slot_count`, however many are known."""
        return [session_id for _, session_id in sorted(self._in_slots.items())]

    def holding(self, session_id: SessionId) -> Holding:
        """The session's holding, an empty one where the books know nothing of it."""
        return self._holdings.get(session_id, self._nothing)

    # Capacity

    @property
    def device_used_tokens(self) -> int:
        return self._device_tokens - self._shared.saved_tokens

    @property
    def device_free_tokens(self) -> int:
        """Negative while a lowered capacity has not been honoured yet."""
        return self.device_capacity_tokens - self.device_used_tokens

    def used_bytes(self, told_as: KvTier) -> int:
        """Of the tiers below the device that the daemon takes for this one, together."""
        return sum(each.used_tokens for each in self.lower if each.tier.told_as is told_as) * self.bytes_per_token

    def capacity_bytes(self, told_as: KvTier) -> int:
        """Likewise."""
        return sum(each.capacity_bytes for each in self.lower if each.tier.told_as is told_as)

    @property
    def free_slot_count(self) -> int:
        return len(self._free_slots)

    def room(self, tier: Tier, appended_tokens: int) -> bool:
        """Whether `appended_tokens` more fit into a tier below the device; False where there is no such tier."""
        if (place := self._places.get(tier)) is None:
            return tier is Tier.NONE
        each = self.lower[place]
        return (each.used_tokens + appended_tokens) * self.bytes_per_token <= each.capacity_bytes

    # Device

    def open(self, session_id: SessionId) -> Slot:
        """Give the session a slot; the one it has, if it has one. Call only while `free_slot_count` is positive."""
        holding = self._held(session_id)
        if holding.slot is None:
            holding.slot = self._free_slots.pop()
            self._in_slots[holding.slot] = session_id
        return holding.slot

    def grow(self, session_id: SessionId, tokens: int) -> None:
        """`tokens` more of the conversation are now computed on the device."""
        self._holdings[session_id].device_tokens += tokens
        self._device_tokens += tokens

    def share(self, donor_id: SessionId, session_id: SessionId, tokens: int) -> None:
        """The session, which holds a slot and nothing in it, now has the donor's first `tokens` in the same cells.

        Raises AssertionError where the donor holds fewer; `tokens` must be above 0.
        """
        donor, holding = self._holdings[donor_id], self._holdings[session_id]
        assert not holding.device_tokens, f"{session_id}: holds {holding.device_tokens} tokens of its own"
        assert 0 < tokens <= donor.device_tokens, f"{donor_id}: holds {donor.device_tokens} tokens, not {tokens}"
        self._shared.share(donor_id, session_id, tokens)
        holding.device_tokens = tokens
        self._device_tokens += tokens

    def shared_tokens(self, session_id: SessionId) -> int:
        """Of the session's device tokens, those in cells shared with others: a prefix."""
        return self._shared.shared_tokens(session_id)

    def charged_tokens(self, session_id: SessionId) -> float:
        """Device cells the session answers for: those it alone uses, and 1/n of those it uses with n - 1 others.

        Over all sessions they add up to `device_used_tokens`.
        """
        own = self.holding(session_id).device_tokens - self.shared_tokens(session_id)
        return own + self._shared.charged_tokens(session_id)

    def freed_by_leaving(self, *leaving: SessionId) -> int:
        """Device tokens that are free once all these sessions have left: what others share with them stays."""
        own = sum(self.holding(s).device_tokens - self.shared_tokens(s) for s in leaving)
        return own + self._shared.freed_with(leaving)

    def leave_device(self, session_id: SessionId) -> None:
        """The device copy and the slot are gone. Safe where there is none."""
        holding = self._holdings.get(session_id)
        if holding is None:
            return
        self._shared.cut(session_id, 0)
        self._device_tokens -= holding.device_tokens
        holding.device_tokens = 0
        if holding.slot is not None:
            self._free_slots.append(holding.slot)
            self._free_slots.sort(reverse=True)
            del self._in_slots[holding.slot]
            holding.slot = None

    # Other tiers

    def copied(self, session_id: SessionId, tier: Tier, tokens: int) -> None:
        """A copy of the first `tokens` is now valid in a tier below the device (replacing a shorter or longer one).

        Raises ValueError where the table has no such tier.
        """
        if (place := self._places.get(tier)) is None:
            raise ValueError(f"copied() books copies below the device, not {tier.value}")
        holding = self._held(session_id)
        self.lower[place].used_tokens += tokens - holding.copies[place]
        holding.copies[place] = tokens

    def nearest(self) -> Tier:
        """The tier right below the device; NONE where there is none."""
        return self.lower[0].tier if self.lower else Tier.NONE

    def below(self, tier: Tier) -> tuple[LowerTier, ...]:
        """The tiers further down, the nearest first."""
        return self.lower[self._places[tier] + 1 :]

    def reserve(self, session_id: SessionId, tokens: int) -> None:
        """Set room aside in the nearest tier for a copy that arrives (0: give it back). The caller has seen to it."""
        reserved = self._reserved_tokens.pop(session_id, 0)
        if tokens != reserved:
            self.lower[0].used_tokens += tokens - reserved
        if tokens:
            self._reserved_tokens[session_id] = tokens

    def reserved_tokens(self, session_id: SessionId) -> int:
        """Room set aside for the session, in tokens."""
        return self._reserved_tokens.get(session_id, 0)

    def restored(self, session_id: SessionId, tokens: int) -> None:
        """The first `tokens` were copied back to the device; copies elsewhere stay valid."""
        self.grow(session_id, tokens - self._holdings[session_id].device_tokens)

    # All tiers

    def truncate(self, session_id: SessionId, to_tokens: int) -> None:
        """Forget what lies beyond the first `to_tokens`, in every tier. The slot stays. Safe no-op where shorter."""
        holding = self._holdings.get(session_id)
        if holding is None:
            return
        self._shared.cut(session_id, to_tokens)
        self._device_tokens -= max(0, holding.device_tokens - to_tokens)
        holding.device_tokens = min(holding.device_tokens, to_tokens)
        for place, tokens in enumerate(holding.copies):
            if tokens > to_tokens:
                self.lower[place].used_tokens -= tokens - to_tokens
                holding.copies[place] = to_tokens

    def _held(self, session_id: SessionId) -> Holding:
        holding = self._holdings.get(session_id)
        if holding is None:
            holding = self._holdings[session_id] = Holding(self.lower, [0] * len(self.lower))
        return holding

    def forget(self, session_id: SessionId) -> None:
        """Drop every copy and the entry itself. Safe where there is none."""
        self.truncate(session_id, 0)
        self.leave_device(session_id)
        self._holdings.pop(session_id, None)

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant of the module's docstring does not hold."""
        slots = [holding.slot for holding in self._holdings.values() if holding.slot is not None]
        assert len(set(slots)) == len(slots), f"slot used twice: {sorted(slots)}"
        assert sorted([*slots, *self._free_slots]) == list(range(self.slot_count)), "slot leaked"
        for session_id, holding in self._holdings.items():
            assert min(holding.device_tokens, *holding.copies, 0) >= 0, session_id
            assert holding.device_tokens == 0 or holding.slot is not None, f"{session_id}: device tokens without slot"
        assert not any(self._nothing.copies), "what nobody holds was written to"
        held = sum(h.device_tokens for h in self._holdings.values())
        assert self._device_tokens == held, f"device: books say {self._device_tokens}, sessions hold {held}"
        for place, each in enumerate(self.lower):
            held = sum(h.copies[place] for h in self._holdings.values())
            held += 0 if place else sum(self._reserved_tokens.values())
            assert each.used_tokens == held, f"{each.tier.value}: books say {each.used_tokens}, sessions hold {held}"
        assert self._in_slots == {h.slot: s for s, h in self._holdings.items() if h.slot is not None}
        self._shared.check_integrity({s: h.device_tokens for s, h in self._holdings.items()})
        charged = sum(self.charged_tokens(s) for s in self._holdings)
        assert abs(charged - self.device_used_tokens) < 1e-6, f"charged {charged}, used {self.device_used_tokens}"

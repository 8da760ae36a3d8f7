"""The books of KV memory: how many tokens of each session are held in each tier, and in which slot.

Owns: capacities, use, slots, and the invariants below. Must not: choose who leaves (scheduler.py) or move bytes
(swapper.py). llama.cpp shows no public view of its cells, so these books are the only account; tests hold them against
llama_memory_seq_pos_max.

Invariants (`check_integrity`):
- a slot belongs to at most one session; a session has a slot exactly when it holds device tokens or is being computed;
- device use is the sum of the sessions' device tokens, a shared prefix counted once, and never negative; the same for
  host and disk bytes, which share nothing;
- sessions that share cells form the tree of shared_cells.py, and each holds the whole prefix it shares;
- host room set aside for a copy still on its way from another engine counts as used;
- every copy is a prefix of the conversation: a host or disk copy may be shorter or longer than what the device holds,
  never of other tokens (`truncate` shortens all copies at once).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .sequence import SessionId, Slot, Tier
from .shared_cells import SharedCells


@dataclass(slots=True)
class Holding:
    """What one session holds. Token counts are prefix lengths of its conversation."""

    slot: Slot | None = None
    device_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0

    def longest(self) -> tuple[Tier, int]:
        """The tier of the longest copy, the nearest one where several are as long, and its length."""
        best = (Tier.NONE, 0)
        for tier, tokens in (
            (Tier.DEVICE, self.device_tokens),
            (Tier.HOST, self.host_tokens),
            (Tier.DISK, self.disk_tokens),
        ):
            if tokens > best[1]:
                best = (tier, tokens)
        return best


class Ledger:
    def __init__(
        self,
        *,
        device_capacity_tokens: int,
        slot_count: int,
        bytes_per_token: int,
        host_capacity_bytes: int = 0,
        disk_capacity_bytes: int = 0,
    ) -> None:
        self.device_capacity_tokens = device_capacity_tokens
        self.host_capacity_bytes = host_capacity_bytes
        self.disk_capacity_bytes = disk_capacity_bytes
        self.bytes_per_token = bytes_per_token
        self.slot_count = slot_count
        self._device_tokens = 0  # shared cells counted for each of their users
        self._shared = SharedCells()
        self.host_used_tokens = 0
        self.disk_used_tokens = 0
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
        return self._holdings.get(session_id) or Holding()

    # Capacity

    @property
    def device_used_tokens(self) -> int:
        return self._device_tokens - self._shared.saved_tokens

    @property
    def device_free_tokens(self) -> int:
        """Negative while a lowered capacity has not been honoured yet."""
        return self.device_capacity_tokens - self.device_used_tokens

    @property
    def host_used_bytes(self) -> int:
        return self.host_used_tokens * self.bytes_per_token

    @property
    def disk_used_bytes(self) -> int:
        return self.disk_used_tokens * self.bytes_per_token

    @property
    def free_slot_count(self) -> int:
        return len(self._free_slots)

    def room(self, tier: Tier, appended_tokens: int) -> bool:
        """Whether `appended_tokens` more fit into a host or disk tier."""
        grown = appended_tokens * self.bytes_per_token
        if tier is Tier.HOST:
            return self.host_used_bytes + grown <= self.host_capacity_bytes
        if tier is Tier.DISK:
            return self.disk_used_bytes + grown <= self.disk_capacity_bytes
        return tier is Tier.NONE

    # Device

    def open(self, session_id: SessionId) -> Slot:
        """Give the session a slot; the one it has, if it has one. Call only while `free_slot_count` is positive."""
        holding = self._holdings.setdefault(session_id, Holding())
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
        """A copy of the first `tokens` is now valid in the host or disk tier (replacing a shorter or longer one)."""
        holding = self._holdings.setdefault(session_id, Holding())
        if tier is Tier.HOST:
            self.host_used_tokens += tokens - holding.host_tokens
            holding.host_tokens = tokens
        elif tier is Tier.DISK:
            self.disk_used_tokens += tokens - holding.disk_tokens
            holding.disk_tokens = tokens
        else:
            raise ValueError(f"copied() books host and disk copies, not {tier}")

    def reserve_host(self, session_id: SessionId, tokens: int) -> None:
        """Set aside host room for a copy that arrives (0: give it back). The caller has seen to the room."""
        self.host_used_tokens += tokens - self._reserved_tokens.pop(session_id, 0)
        if tokens:
            self._reserved_tokens[session_id] = tokens

    def reserved_tokens(self, session_id: SessionId) -> int:
        """Host room set aside for the session, in tokens."""
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
        self.host_used_tokens -= max(0, holding.host_tokens - to_tokens)
        holding.host_tokens = min(holding.host_tokens, to_tokens)
        self.disk_used_tokens -= max(0, holding.disk_tokens - to_tokens)
        holding.disk_tokens = min(holding.disk_tokens, to_tokens)

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
            assert min(holding.device_tokens, holding.host_tokens, holding.disk_tokens) >= 0, session_id
            assert holding.device_tokens == 0 or holding.slot is not None, f"{session_id}: device tokens without slot"
        for name, used, total in (
            ("device", self._device_tokens, sum(h.device_tokens for h in self._holdings.values())),
            (
                "host",
                self.host_used_tokens,
                sum(h.host_tokens for h in self._holdings.values()) + sum(self._reserved_tokens.values()),
            ),
            ("disk", self.disk_used_tokens, sum(h.disk_tokens for h in self._holdings.values())),
        ):
            assert used == total, f"{name}: books say {used}, sessions hold {total}"
        assert self._in_slots == {h.slot: s for s, h in self._holdings.items() if h.slot is not None}
        self._shared.check_integrity({s: h.device_tokens for s, h in self._holdings.items()})
        charged = sum(self.charged_tokens(s) for s in self._holdings)
        assert abs(charged - self.device_used_tokens) < 1e-6, f"charged {charged}, used {self.device_used_tokens}"

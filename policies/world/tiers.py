"""The engine's three tiers in virtual time: who holds what where, one link and one disk with a queue each.

Owns the books of tokens per tier and every change of them, copies included; which session must move is asked of the
rule. A move takes effect in the books at once and takes its time on the link or the disk: whoever needs the room waits
for it. What lies on the host tier is demoted to disk before any of it is dropped.

Simplified: a demoted session's host RAM is free while its last bytes are still being written; a move between device
and disk does not use the link; sessions move whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..model import KvTier
from .machine import Machine
from .rules import Look, Rule
from .score import Tally
from .seat import COMPUTED, Seat, Stage


class Tiers:
    """Invariants: check_integrity()."""

    def __init__(
        self,
        machine: Machine,
        capacity_tokens: int,
        disk_capacity_bytes: float,
        host_capacity_bytes: Callable[[], float],
        rule: Rule,
        tally: Tally,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.device_tokens = 0
        self.booked_tokens = 0
        """Room that turns being computed have been given and do not fill yet."""
        self.host_tokens = 0
        self.disk_tokens = 0
        self.link_free_s = 0.0
        self.disk_free_s = 0.0
        self.disk_capacity_tokens = int(disk_capacity_bytes / machine.bytes_per_token) if self._disk(machine) else 0
        self.host_capacity_bytes = host_capacity_bytes
        self._machine = machine
        self._rule = rule
        self._tally = tally

    @staticmethod
    def _disk(machine: Machine) -> bool:
        return machine.cost.disk_bytes_per_second > 0

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.device_tokens - self.booked_tokens

    @property
    def host_bytes(self) -> int:
        return self.host_tokens * self._machine.bytes_per_token

    # -- the books

    def grow(self, seat: Seat, tokens: int) -> None:
        """What a turn computed is held on the device; it comes out of the room booked for it."""
        seat.held_tokens += tokens
        self.device_tokens += tokens

    def cut(self, seat: Seat, tokens: int) -> None:
        """The conversation was cut back to `tokens`: no copy is longer."""
        self._copies(seat, min(seat.host_tokens, tokens), min(seat.disk_tokens, tokens))
        gone = max(0, seat.held_tokens - tokens)
        seat.held_tokens -= gone
        if seat.tier is KvTier.DEVICE:
            self.device_tokens -= gone
        if not seat.held_tokens:
            seat.tier = KvTier.NONE

    def forget(self, seat: Seat) -> None:
        """Nothing is held for it any more, anywhere."""
        if seat.tier is KvTier.DEVICE:
            self.device_tokens -= seat.held_tokens
        self._copies(seat, 0, 0)
        seat.held_tokens, seat.tier = 0, KvTier.NONE

    def _copies(self, seat: Seat, host: int, disk: int) -> None:
        self.host_tokens += host - seat.host_tokens
        self.disk_tokens += disk - seat.disk_tokens
        seat.host_tokens, seat.disk_tokens = host, disk

    # -- moving

    def move(self, seat: Seat, to: KvTier, now_s: float) -> float:
        """Out of where it is, down to `to`; answers when the last byte has left. Down to NONE nothing takes time."""
        if to is KvTier.NONE:
            self.forget(seat)
            return now_s
        if seat.tier is KvTier.DEVICE:
            self.device_tokens -= seat.held_tokens
        if to is KvTier.HOST:
            done_s = self._over_link(seat.held_tokens - seat.host_tokens, now_s)
            self._copies(seat, seat.held_tokens, seat.disk_tokens)
        else:
            done_s = self.write(seat, now_s)
            self._copies(seat, 0, seat.disk_tokens)
        seat.tier = to
        return done_s

    def write(self, seat: Seat, now_s: float) -> float:
        """Copy to disk what it does not hold of the session yet; answers when that is done."""
        done_s = self._through_disk(seat.held_tokens - seat.disk_tokens, now_s)
        self._copies(seat, seat.host_tokens, seat.held_tokens)
        return done_s

    def load(self, seat: Seat, skipped_tokens: int, now_s: float) -> float:
        """Up to the device, less what is computed instead; answers when it is there. Room must have been made."""
        if seat.tier is KvTier.DEVICE:
            return now_s
        tokens = seat.held_tokens - skipped_tokens
        read = self._over_link if seat.tier is KvTier.HOST else self._through_disk
        done_s = read(tokens, now_s)
        if not self._rule.append:
            self._copies(seat, 0, 0)
        self.device_tokens += seat.held_tokens
        seat.tier = KvTier.DEVICE
        return done_s

    def _over_link(self, tokens: int, now_s: float) -> float:
        moved = max(0, tokens) * self._machine.bytes_per_token
        if moved:
            self.link_free_s = max(now_s, self.link_free_s) + moved / self._machine.cost.host_bytes_per_second
            self._tally.swapped_bytes += moved
            return self.link_free_s
        return now_s

    def _through_disk(self, tokens: int, now_s: float) -> float:
        moved = max(0, tokens) * self._machine.bytes_per_token
        if moved:
            self.disk_free_s = max(now_s, self.disk_free_s) + moved / self._machine.cost.disk_bytes_per_second
            self._tally.swapped_bytes += moved
            self._tally.disk_bytes += moved
            return self.disk_free_s
        return now_s

    # -- room below

    def place_below(self, seat: Seat, seats: Sequence[Seat], look: Look) -> KvTier:
        """Where a victim on the device goes: host, else disk, else nowhere. May demote others on the host tier."""
        if not self._rule.swaps:
            return KvTier.NONE
        if self._host_room(seat, seats, look):
            return KvTier.HOST
        return self._disk_or_none(seat, seats)

    def _disk_or_none(self, seat: Seat, seats: Sequence[Seat]) -> KvTier:
        return KvTier.DISK if self.disk_room(seat, seats) else KvTier.NONE

    def disk_room(self, seat: Seat, seats: Sequence[Seat]) -> bool:
        """Whether the disk can take all of it; copies that are nobody's only one give way, the oldest first."""
        need = seat.held_tokens - seat.disk_tokens
        if not self._rule.swaps or self.disk_capacity_tokens < seat.held_tokens:
            return False
        spare = [s for s in seats if s is not seat and s.disk_tokens and s.tier is not KvTier.DISK]
        for other in sorted(spare, key=lambda s: s.ended_s):
            if self.disk_tokens + need <= self.disk_capacity_tokens:
                break
            self._copies(other, other.host_tokens, 0)
        return self.disk_tokens + need <= self.disk_capacity_tokens

    def host_fits(self, seat: Seat, seats: Sequence[Seat]) -> bool:
        """Whether the host tier can take it with nobody demoted."""
        need = (seat.held_tokens - seat.host_tokens) * self._machine.bytes_per_token
        self._drop_spare(seats, self.host_capacity_bytes() - need, keep=seat)
        return self.host_bytes + need <= self.host_capacity_bytes()

    def _host_room(self, seat: Seat, seats: Sequence[Seat], look: Look) -> bool:
        """Whether the host tier can take it, spare copies and what is worth less there out of the way."""
        capacity = self.host_capacity_bytes()
        if seat.held_tokens * self._machine.bytes_per_token > capacity:
            return False
        if self.host_fits(seat, seats):
            return True
        need = (seat.held_tokens - seat.host_tokens) * self._machine.bytes_per_token
        own = self._rule.worth(look, seat, KvTier.HOST)
        for other in self._on_host(seats, look):
            if self._rule.worth(look, other, KvTier.HOST) >= own:
                return False
            self.move(other, self._disk_or_none(other, seats), look.now_s)
            if self.host_bytes + need <= capacity:
                return True
        return False

    def squeeze(self, seats: Sequence[Seat], look: Look) -> None:
        """The tools want their RAM: the host tier gives up what no longer fits, the least worth first."""
        capacity = self.host_capacity_bytes()
        if self.host_bytes <= capacity:
            return
        self._drop_spare(seats, capacity)
        for other in self._on_host(seats, look):
            if self.host_bytes <= capacity:
                return
            self.move(other, self._disk_or_none(other, seats), look.now_s)

    def _on_host(self, seats: Sequence[Seat], look: Look) -> list[Seat]:
        there = [s for s in seats if s.tier is KvTier.HOST]
        return sorted(there, key=lambda s: (self._rule.worth(look, s, KvTier.HOST), s.number))

    def _drop_spare(self, seats: Sequence[Seat], capacity: float, keep: Seat | None = None) -> None:
        """Host copies of what is on the device cost nothing to lose but the writing of them again."""
        if self.host_bytes <= capacity:
            return
        spare = [s for s in seats if s is not keep and s.host_tokens and s.tier is not KvTier.HOST]
        for other in sorted(spare, key=lambda s: (s.stage is Stage.IDLE, s.ended_s)):
            self._copies(other, 0, other.disk_tokens)
            if self.host_bytes <= capacity:
                return

    def check_integrity(self, seats: Sequence[Seat]) -> None:
        """Raise AssertionError where the books are wrong."""
        assert self.device_tokens == sum(s.held_tokens for s in seats if s.tier is KvTier.DEVICE)
        assert self.host_tokens == sum(s.host_tokens for s in seats)
        assert self.disk_tokens == sum(s.disk_tokens for s in seats)
        assert self.booked_tokens >= 0 and self.free_tokens >= 0, "the device is overdrawn"
        assert self.disk_tokens <= self.disk_capacity_tokens or not self.disk_tokens
        for seat in seats:
            assert (seat.held_tokens == 0) == (seat.tier is KvTier.NONE) or seat.stage in COMPUTED, seat
            assert max(seat.held_tokens, seat.host_tokens, seat.disk_tokens) <= seat.context_tokens, seat
            assert seat.tier is not KvTier.NONE or not seat.host_tokens + seat.disk_tokens, seat
            assert seat.tier is not KvTier.HOST or seat.host_tokens == seat.held_tokens, seat
            assert seat.tier is not KvTier.DISK or seat.disk_tokens == seat.held_tokens, seat

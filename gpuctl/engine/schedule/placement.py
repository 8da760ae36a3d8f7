"""Where each session's KV lives: who leaves the device, to which tier, and how it comes back.

Owns: eviction order, moves between tiers, retention marks, and every change of the ledger other than growth.
Pure, like the scheduler it serves. Must not: know of queues beyond who is computing, nor move bytes.

Order of leaving: idle sessions nobody named, then the other idle ones, each as their retention ends; then waiting turns
that still hold KV, from the back of the queue; sessions pinned by a directive last, and only where the caller allows
it. What nobody named takes no host room from what somebody did.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable
from dataclasses import dataclass

from .ledger import Ledger
from .plan import Discard, Move, MoveDown, MoveIn, MoveOut, Share
from .sequence import Session, SessionId, Slot, Tier, common_prefix
from .token_service import TokenService


class Reach(enum.Enum):
    """How far making room may go."""

    EXPIRED = 1
    """Idle sessions whose retention has ended."""
    UNPINNED = 2
    """Whatever no directive has pinned."""
    PINNED = 3


@dataclass(frozen=True, slots=True)
class Donor:
    """A session on the device whose first `tokens` another one may use."""

    session_id: SessionId
    slot: Slot
    tokens: int


class Placement:
    """Its decisions collect in `moves`, in the order they must be carried out, until the scheduler takes them."""

    def __init__(
        self, ledger: Ledger, sessions: dict[SessionId, Session], computing: Container[SessionId], service: TokenService
    ) -> None:
        self.ledger = ledger
        self.moves: list[Move] = []
        self._sessions = sessions
        self._computing = computing
        self._service = service

    def take_moves(self) -> list[Move]:
        taken, self.moves = self.moves, []
        return taken

    # Room

    def reclaimable(self, now_ns: int, reach: Reach, keep: Iterable[SessionId] = ()) -> int:
        """Device tokens `make_room` could free."""
        return self.ledger.freed_by_leaving(*(s.id for s in self._candidates(now_ns, reach, keep)))

    def make_room(self, tokens: int, now_ns: int, reach: Reach, keep: Iterable[SessionId] = ()) -> None:
        """Evict until `tokens` have been freed or nobody is left to evict. Zero or less is a safe no-op."""
        if tokens <= 0:
            return
        for session in self._candidates(now_ns, reach, keep):
            tokens -= self.ledger.freed_by_leaving(session.id)
            self.evict(session)
            if tokens <= 0:
                return

    def ensure_slot(self, session: Session, now_ns: int, reach: Reach, keep: Iterable[SessionId] = ()) -> bool:
        """Whether the session has a slot or a free one exists, evicting one other session if that helps."""
        if self.ledger.holding(session.id).slot is None and not self.ledger.free_slot_count:
            for other in self._candidates(now_ns, reach, {session.id, *keep})[:1]:
                self.evict(other)
        return self.ledger.holding(session.id).slot is not None or self.ledger.free_slot_count > 0

    def _candidates(self, now_ns: int, reach: Reach, keep: Iterable[SessionId]) -> list[Session]:
        """Sessions that hold a slot and are not computing, in the order they should leave."""
        spared = set(keep)
        found: list[tuple[tuple[int, float, int], Session]] = []
        for session_id in self.ledger.on_device():
            session = self._sessions[session_id]
            if session_id in spared or session_id in self._computing:
                continue
            pinned = session.pinned_until_ns is not None
            if pinned and reach is not Reach.PINNED:
                continue
            if session.turn is not None:
                if reach is Reach.EXPIRED:
                    continue
                # Its turn waits: the later it will run, the sooner it may leave.
                rank = (3 if pinned else 2, -self._service.counter(session.tenant_id), -session.turn.arrival_ns)
            else:
                if reach is Reach.EXPIRED and session.retain_until_ns > now_ns:
                    continue
                rank = (3 if pinned else 0 if session.anonymous else 1, float(session.retain_until_ns), 0)
            found.append((rank, session))
        return [session for _, session in sorted(found, key=lambda entry: entry[0])]

    # Down

    def evict(self, session: Session, tier: Tier | None = None, directive_id: str = "") -> Tier:
        """Free the session's device KV and slot; returns where its longest copy is then.

        `tier` None: the first with room on the way down, else nowhere. A tier without room means nowhere, too: ask
        `fits` first where that matters. What a tier already holds is not copied again.
        """
        holding = self.ledger.holding(session.id)
        slot, tokens = holding.slot, holding.device_tokens
        if slot is None:
            return holding.longest()[0]
        session.pinned_until_ns = None
        for wanted in (each.tier for each in self.ledger.lower) if tier is None else (tier,):
            if wanted is Tier.NONE or not tokens or not self.fits(session, wanted, tokens):
                continue
            valid = holding.copy_tokens(wanted)
            self.ledger.copied(session.id, wanted, max(tokens, valid))
            self.ledger.leave_device(session.id)
            self.moves.append(MoveOut(session.id, slot, wanted, tokens, min(valid, tokens), directive_id))
            return wanted
        self.ledger.leave_device(session.id)
        self.moves.append(Discard(session.id, slot, 0, Tier.DEVICE, directive_id))
        # An older, shorter copy elsewhere is still a true prefix and stays.
        return self.ledger.holding(session.id).longest()[0]

    def demote(self, session: Session, tier: Tier, *, to: Tier | None = None, directive_id: str = "") -> bool:
        """Move a session's copy in `tier` further down: to the next tier that can have room, or to the one given.

        False where that has no room, is not below, or there is nothing to move.
        """
        holding = self.ledger.holding(session.id)
        tokens = holding.copy_tokens(tier)
        for lower in self.ledger.below(tier) if tokens else ():
            if lower.tier is not (to or lower.tier) or not self.fits(session, lower.tier, tokens):
                continue
            valid = holding.copy_tokens(lower.tier)
            self.ledger.copied(session.id, lower.tier, max(tokens, valid))
            self.ledger.copied(session.id, tier, 0)
            self.moves.append(MoveDown(session.id, tier, lower.tier, tokens, min(valid, tokens), directive_id))
            return True
        return False

    def fits(self, session: Session, tier: Tier, tokens: int) -> bool:
        """Whether `tier` takes the session's first `tokens`, making room in it where that helps."""
        appended = max(0, tokens - self.ledger.holding(session.id).copy_tokens(tier))
        if not self.ledger.room(tier, appended):
            self.shed(tier, appended, keep=session)
        return self.ledger.room(tier, appended)

    def shed(self, tier: Tier, appended: int, keep: Session | None = None) -> None:
        """Make room for `appended` tokens in a tier below the device, for `keep` where given.

        Copies the device also holds go first (they cost nothing now), then idle sessions' copies move further down,
        longest unused first, where there is a tier; those of sessions nobody named go there first, or nowhere. The last
        tier keeps what it has, unless it is the only one. A no-op where the table has no such tier.
        """
        lower = next((each for each in self.ledger.lower if each.tier is tier), None)
        if lower is None or (lower is self.ledger.lower[-1] and lower is not self.ledger.lower[0]):
            return
        in_vain = appended * self.ledger.bytes_per_token > lower.capacity_bytes
        if in_vain or self.ledger.room(tier, appended):
            return
        only_anonymous = keep is not None and keep.anonymous
        holders = [
            session
            for session_id in self.ledger
            if self.ledger.holding(session_id).copy_tokens(tier)
            and (session := self._sessions[session_id]) is not keep
            and (session.anonymous or not only_anonymous)
        ]
        holders.sort(key=lambda s: (s.turn is not None, not s.anonymous, s.last_used_ns))
        for session in holders:
            holding = self.ledger.holding(session.id)
            if holding.copy_tokens(tier) <= holding.device_tokens:
                self.discard_copy(session, tier)
                if self.ledger.room(tier, appended):
                    return
        for session in holders:
            if session.turn is not None or not self.ledger.holding(session.id).copy_tokens(tier):
                continue
            if not self.demote(session, tier) and session.anonymous:
                self.discard_copy(session, tier)
            if self.ledger.room(tier, appended):
                return

    # Up

    def move_in(self, session: Session, directive_id: str = "") -> Slot:
        """Bring the longest copy back to the device. The caller has seen to room and a slot; a no-op if it is there."""
        tier, tokens = self.ledger.holding(session.id).longest()
        slot = self.ledger.open(session.id)
        if tier is not Tier.DEVICE and tier is not Tier.NONE:
            self.ledger.restored(session.id, tokens)
            self.moves.append(MoveIn(session.id, slot, tier, tokens, directive_id))
        return slot

    def find_donor(self, session: Session, least_tokens: int) -> Donor | None:
        """Who on the device holds the longest prefix of the session's conversation, `least_tokens` or more of it.

        At least one token of the prompt stays to be computed. Only within a tenant: across tenants the time to first
        token would tell what others have asked.
        """
        best: Donor | None = None
        least = least_tokens
        for other_id in self.ledger.on_device():
            other = self._sessions[other_id]
            if other_id == session.id or other.tenant_id != session.tenant_id:
                continue
            holding = self.ledger.holding(other_id)
            # The first tokens tell nearly all strangers apart, at the cost of one comparison of two slices.
            if holding.device_tokens < least or other.tokens[:least] != session.tokens[:least]:
                continue
            common = min(common_prefix(other.tokens, session.tokens), holding.device_tokens, len(session.tokens) - 1)
            if common >= least:
                assert holding.slot is not None
                best, least = Donor(other_id, holding.slot, common), common + 1
        return best

    def share(self, session: Session, donor: Donor) -> None:
        """Give a session that holds nothing the donor's cells: nothing is copied and nothing computed.

        The caller has seen to a slot.
        """
        slot = self.ledger.open(session.id)
        self.ledger.share(donor.session_id, session.id, donor.tokens)
        self.moves.append(Share(session.id, donor.slot, slot, donor.tokens))

    # Away

    def truncate(self, session: Session, to_tokens: int, directive_id: str = "") -> None:
        """Forget what lies beyond `to_tokens` in every tier; the store cuts its copies when it next uses them."""
        slot = self.ledger.holding(session.id).slot
        self.ledger.truncate(session.id, to_tokens)
        if slot is not None:
            self.moves.append(Discard(session.id, slot, to_tokens, Tier.DEVICE, directive_id))

    def discard_copy(self, session: Session, tier: Tier) -> None:
        self.ledger.copied(session.id, tier, 0)
        self.moves.append(Discard(session.id, None, 0, tier))

    def discard_all(self, session: Session, directive_id: str = "") -> None:
        holding = self.ledger.holding(session.id)
        slot = holding.slot
        for lower, tokens in zip(self.ledger.lower, holding.copies, strict=True):
            if tokens:
                self.discard_copy(session, lower.tier)
        self.ledger.leave_device(session.id)
        if slot is not None:
            self.moves.append(Discard(session.id, slot, 0, Tier.DEVICE, directive_id))

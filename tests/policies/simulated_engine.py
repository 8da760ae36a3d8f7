"""An engine in virtual time: KV in three tiers, a device that runs out, directives that take effect at once.

Owns where the KV of each session is and what the engine does by itself when the device is full: it drops idle
sessions, retained ones last. It knows no agents, no tools and no clock: `simulation.py` says when a turn begins and
ends and what time it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from equipoise.policies.actions import (
    Decision,
    Drop,
    EngineAction,
    OutcomeStatus,
    Retain,
    SetHostTierCapacity,
    SetTenantWeight,
    SwapIn,
    SwapOut,
)
from equipoise.policies.events import Event, KvObserved, SessionMoved, TurnEnded, TurnStarted
from equipoise.policies.model import (
    CostModel,
    DecisionId,
    Engine,
    EngineId,
    EngineTotals,
    FinishReason,
    KvTier,
    Session,
    SessionId,
    SessionPhase,
    TenantId,
)

ENGINE = EngineId("sim")
DIRECTIVES = frozenset({"set_tenant_weight", "swap_out", "swap_in", "retain", "drop"})


@dataclass(slots=True)
class _Kv:
    tokens: int = 0
    tier: KvTier = KvTier.NONE
    retain_until_ns: int = 0
    computes: bool = False
    """A turn of its session is being computed."""


class SimulatedEngine:
    """Appends what happens to `events`, in the order in which it happens."""

    def __init__(self, engine: Engine, tenants: Mapping[SessionId, TenantId], events: list[Event]) -> None:
        self.recomputed_tokens = 0
        self._engine = engine
        self._tenants = tenants
        self._events = events
        self._kv = {session: _Kv() for session in tenants}

    def begin_turn(self, session: SessionId, turn: int, context_tokens: int, now_ns: int) -> None:
        kv = self._kv[session]
        if kv.tier is not KvTier.DEVICE:
            self.recomputed_tokens += context_tokens if kv.tier is KvTier.NONE and turn else 0
            kv.tier = KvTier.DEVICE
        kv.tokens, kv.retain_until_ns, kv.computes = context_tokens, 0, True
        self._events.append(TurnStarted(now_ns, ENGINE, session, f"t{turn}", context_tokens, 0))
        self._make_room(session, now_ns)

    def end_turn(self, session: SessionId, turn: int, context_tokens: int, reason: FinishReason, now_ns: int) -> None:
        self._kv[session].computes = False
        self._events.append(TurnEnded(now_ns, ENGINE, session, f"t{turn}", reason, context_tokens, 0, 0, 0, 0, 0))

    def close(self, session: SessionId) -> None:
        """Its agent is done: nothing is held for it any more."""
        self._kv[session] = _Kv()

    def host_tier_bytes(self) -> int:
        return sum(kv.tokens for kv in self._kv.values() if kv.tier is KvTier.HOST) * self._engine.bytes_per_token

    def obey(self, action: EngineAction, decision: Decision, now_ns: int) -> OutcomeStatus:
        match action:
            case SwapOut(session=session, tier=tier):
                self._move(session, tier, decision.id, now_ns)
            case SwapIn(session=session):
                if self._device_tokens() + self._kv[session].tokens > self._engine.device_capacity_tokens:
                    return OutcomeStatus.REJECTED
                self._move(session, KvTier.DEVICE, decision.id, now_ns)
            case Drop(session=session):
                self._move(session, KvTier.NONE, decision.id, now_ns)
            case Retain(session=session, ttl_ns=ttl_ns):
                self._kv[session].retain_until_ns = now_ns + ttl_ns
            case SetTenantWeight():
                pass
            case SetHostTierCapacity():
                return OutcomeStatus.REJECTED
        return OutcomeStatus.COMPLETED

    def report(self, now_ns: int) -> None:
        """The full picture, as an engine tells it once a tick."""
        per_token = self._engine.bytes_per_token
        sessions = [
            Session(
                id=session,
                tenant=self._tenants[session],
                engine=ENGINE,
                phase=SessionPhase.RUNNING if kv.computes else SessionPhase.IDLE,
                tier=kv.tier,
                held_tokens=0 if kv.tier is KvTier.NONE else kv.tokens,
                context_tokens=kv.tokens,
                host_bytes=kv.tokens * per_token if kv.tier is KvTier.HOST else 0,
                retain_until_ns=kv.retain_until_ns,
            )
            for session, kv in self._kv.items()
            if kv.tokens
        ]
        self._events.append(
            KvObserved(
                at_ns=now_ns,
                engine=ENGINE,
                sessions=tuple(sessions),
                device_used_tokens=self._device_tokens(),
                host_used_bytes=self.host_tier_bytes(),
                disk_used_bytes=0,
                device_capacity_tokens=self._engine.device_capacity_tokens,
                host_capacity_bytes=self._engine.host_capacity_bytes,
                running_count=sum(1 for kv in self._kv.values() if kv.computes),
                waiting_count=1 if self._device_tokens() > self._engine.device_capacity_tokens else 0,
                totals=EngineTotals(recomputed_tokens=self.recomputed_tokens),
            )
        )

    def _device_tokens(self) -> int:
        return sum(kv.tokens for kv in self._kv.values() if kv.tier is KvTier.DEVICE)

    def _make_room(self, for_session: SessionId, now_ns: int) -> None:
        """The engine's own default: drop idle sessions, retained ones last, until the device fits."""
        idle = [s for s, kv in self._kv.items() if not kv.computes and s != for_session]
        for session in sorted(idle, key=lambda s: (self._kv[s].retain_until_ns > now_ns, -self._kv[s].tokens)):
            if self._device_tokens() <= self._engine.device_capacity_tokens:
                return
            if self._kv[session].tier is KvTier.DEVICE:
                self._move(session, KvTier.NONE, None, now_ns)

    def _move(self, session: SessionId, to: KvTier, directive: DecisionId | None, now_ns: int) -> None:
        kv = self._kv[session]
        moved_bytes = kv.tokens * self._engine.bytes_per_token
        self._events.append(SessionMoved(now_ns, ENGINE, session, kv.tier, to, kv.tokens, moved_bytes, 1, directive))
        kv.tier = to


def engine(device_tokens: int, bytes_per_token: int = 23_040, host_bytes: int = 1 << 30) -> Engine:
    """The embedded engine's figures, with as much device memory as asked."""
    return Engine(
        id=ENGINE,
        kind="simulated",
        model="simulated",
        pid=1,
        bytes_per_token=bytes_per_token,
        device_capacity_tokens=device_tokens,
        host_capacity_bytes=host_bytes,
        disk_capacity_bytes=0,
        cost=CostModel(prefill_seconds_per_token=6e-3, host_bytes_per_second=4e9),
        supported_directives=DIRECTIVES,
    )

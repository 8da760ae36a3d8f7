"""What KV costs where it is, and what to do with it while its agent runs a tool.

Owns prices and the keep / swap / drop verdict. Every byte pays rent in its tier: price(tier) x bytes x expected wait.
Moving and recomputing cost what InferCept (Abhyankar et al., ICML 2024) counts as waste: memory held while nothing
useful is computed with it. With the device at price 1 and the host at price 0 the choice is, but for the step border
that a transfer of ours waits for (STEP_BORDER_S), InferCept's minimum of
  preserve  T_wait x C          swap  2 T_swap x batch          discard  T_fwd(C) x (C + C_others)
All costs are in GiB-seconds of device memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..correlate import device_bytes
from ..model import NS_PER_S, STALLED, Engine, KvTier, Session, SessionPhase, ToolCall, ToolCallPhase, Verdict
from ..policy import KvPart, Policy
from ..snapshot import Snapshot

GIB = float(1 << 30)
UNIT = "GiB s"
PRICE_CAP = 10_000.0
_ASSUMED_HOST_BYTES_PER_S = 2e9
_ASSUMED_DISK_BYTES_PER_S = 2e8
_ASSUMED_PREFILL_S_PER_TOKEN = 5e-3
"""Used until the engine has reported what it measured."""
STEP_BORDER_S = 0.05
"""What each transfer waits for besides the copy itself: the engine moves KV between two steps. Without it, any price
above nothing would move sessions off an empty device."""
BURST_QUANTILE = 0.9
SCARCE_RATIO = 0.9
"""Of a tier in use: from here on somebody may soon ask for what is left of it."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Rent per byte and second, relative to a device byte at three quarters of its tier's capacity."""

    device: float
    host: float
    disk: float = 0.05
    """Disk is bounded by its size, not by competition: a flat small price."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """One thing that could be done with a session's KV, and what it would cost."""

    verdict: Verdict
    cost: float


def barrier(used_ratio: float) -> float:
    """Price of a tier by its occupancy: (u / (1-u) / 3)^3, capped.

    0 when empty, 0.04 at half, 1 (InferCept's price) at three quarters, 27 at nine tenths: memory that nobody else
    asks for is nearly free, and the last of it is not to be had.
    """
    if used_ratio <= 0.0:
        return 0.0
    if used_ratio >= 1.0:
        return PRICE_CAP
    return min(PRICE_CAP, (used_ratio / (1.0 - used_ratio) / 3.0) ** 3)


def predicted_burst_bytes(snapshot: Snapshot) -> int:
    """RAM that the tool calls now running may still grow by: each to its kind's mean peak, and the worst one beyond it.

    The worst is the largest gap between a kind's 0.9 quantile and its mean: bursts last a second or two and seldom
    meet, so the sum of all quantiles would keep free what is never used. Never past a hard budget: the kernel stops a
    call there until it is asked for more.
    """
    expected = worst = 0
    for call in snapshot.tool_calls:
        if not call.running or call.phase is ToolCallPhase.KILLED:
            continue
        mean = call.expected_bytes or snapshot.estimates.peak_mean_bytes(call.kind)
        peak = call.expected_bytes or snapshot.estimates.peak_quantile_bytes(call.kind, BURST_QUANTILE)
        most = call.hard_bytes or max(mean, peak)
        to_mean = max(0, min(mean, most) - call.used_bytes)
        expected += to_mean
        worst = max(worst, max(0, min(peak, most) - call.used_bytes) - to_mean)
    return expected + worst


@dataclass(slots=True)
class Books:
    """What is used of one engine's tiers and of the RAM beneath them, as the decisions of one moment change it.

    A price is the worth of the marginal byte: at one set of prices every session would be moved out of a full tier,
    although after the first few the need has passed.
    """

    bytes_per_token: int
    device_used_tokens: int
    device_capacity_tokens: int
    waiting_count: int
    host_free_bytes: int
    """Of the host tier."""
    disk_free_bytes: int
    ram_used_bytes: int
    """By tool calls, by what they are predicted to burst to, and by every engine's host tier."""
    ram_bytes: int
    """The pool that these share; 0: not known."""
    psi_some_ratio: float = 0.0
    need_only: bool = True
    """A byte costs nothing where there are others that nobody asks for."""

    @classmethod
    def of(cls, snapshot: Snapshot, policy: Policy, engine: Engine) -> Books:
        tiers = sum(e.host_used_bytes for e in snapshot.engines)
        return cls(
            bytes_per_token=engine.bytes_per_token,
            device_used_tokens=engine.device_used_tokens,
            device_capacity_tokens=engine.device_capacity_tokens,
            waiting_count=engine.waiting_count,
            host_free_bytes=engine.host_capacity_bytes - engine.host_used_bytes,
            disk_free_bytes=engine.disk_capacity_bytes - engine.disk_used_bytes,
            ram_used_bytes=snapshot.tool_used_bytes() + predicted_burst_bytes(snapshot) + tiers,
            ram_bytes=policy.memory.pool_bytes(snapshot.host.memory_total_bytes),
            psi_some_ratio=snapshot.host.psi_some_ratio or 0.0,
            need_only=KvPart.NEED not in policy.kv.without,
        )

    def takes_up(self, session: Session) -> bool:
        """Whether the device could hold it and still have what nobody asks for."""
        used = self.device_used_tokens + session.held_tokens
        return used <= SCARCE_RATIO * self.device_capacity_tokens and not self.waiting_count

    def prices(self) -> Prices:
        """What a byte costs now. Turns that wait for the device make it dearer; PSI makes host RAM dearer."""
        used = self.device_used_tokens / self.device_capacity_tokens if self.device_capacity_tokens else 0.0
        ram = self.ram_used_bytes / self.ram_bytes if self.ram_bytes else 1.0
        device = barrier(used) * (1.0 + self.waiting_count)
        host = barrier(ram) * (1.0 + 10.0 * self.psi_some_ratio)
        if self.need_only and used < SCARCE_RATIO and not self.waiting_count:
            device = 0.0
        if self.need_only and ram < SCARCE_RATIO and not self.psi_some_ratio:
            host = 0.0
        return Prices(min(PRICE_CAP, device), min(PRICE_CAP, host))

    def enter(self, verdict: Verdict, session: Session) -> None:
        """The session's KV will be where the verdict puts it."""
        held = session.held_tokens * self.bytes_per_token
        if session.tier is KvTier.DEVICE and verdict is not Verdict.KEEP:
            self.device_used_tokens -= session.held_tokens
        if session.tier is not KvTier.DEVICE and verdict is Verdict.KEEP:
            self.device_used_tokens += session.held_tokens
        if session.tier is KvTier.HOST and verdict in (Verdict.SWAP_DISK, Verdict.DROP, Verdict.KEEP):
            self.host_free_bytes += held
            self.ram_used_bytes -= held
        if verdict is Verdict.SWAP_HOST and session.tier is not KvTier.HOST:
            written = max(0, held - session.host_bytes)
            self.host_free_bytes -= written
            self.ram_used_bytes += written
        if verdict is Verdict.SWAP_DISK and session.tier is not KvTier.DISK:
            self.disk_free_bytes -= max(0, held - session.disk_bytes)


def prices(snapshot: Snapshot, policy: Policy, engine: Engine) -> Prices:
    """Before any decision of this moment."""
    return Books.of(snapshot, policy, engine).prices()


def expected_wait_s(snapshot: Snapshot, call: ToolCall) -> float:
    """Seconds until the tool call is expected to end, from what is known of its kind and of what the kernel does to it.

    A stopped or frozen call makes no progress: its wait is stretched to at least what it is told to wait.
    """
    stalled_ns = call.stalled_ns
    if call.phase in STALLED:
        stalled_ns += max(0, snapshot.now_ns - call.phase_since_ns)
    elapsed_ns = max(0, call.elapsed_ns(snapshot.now_ns) - stalled_ns)
    if call.expected_ns is not None and call.expected_ns > elapsed_ns:
        wait = (call.expected_ns - elapsed_ns) / NS_PER_S
    else:
        wait = snapshot.estimates.mean_residual_s(call.kind, elapsed_ns)
    if call.phase in (ToolCallPhase.STOPPED, ToolCallPhase.FROZEN):
        until = call.waiting_until_ns if call.waiting_until_ns is not None else snapshot.now_ns
        return wait + max(1.0, (until - snapshot.now_ns) / NS_PER_S)
    if call.phase is ToolCallPhase.THROTTLED:
        return 3.0 * wait
    return wait


def weigh(
    session: Session,
    engine: Engine,
    wait_s: float,
    price: Prices,
    running_bytes: int,
    host_room: bool,
    disk_room: bool | None = None,
    copies: bool = True,
    device_room: bool = False,
) -> list[Weighed]:
    """Every option for an idle session's KV, the cheapest first. Empty where it holds none.

    Where it is, it can always stay; anything else only where the engine supports the directive and the tier has room.

    Args:
        wait_s: expected seconds until its next turn.
        running_bytes: device bytes of the sessions computed now, which a transfer or a recompute delays.
        host_room: whether the host tier can take it.
        disk_room: whether the disk can; None: as the engine was last seen.
        copies: what the tier holds of the session already need not be written.
        device_room: whether what stands below may be brought back at once and wait on the device.
    """
    held = session.held_tokens * engine.bytes_per_token
    if held <= 0 or session.tier is KvTier.NONE:
        return []
    host_s = held / (engine.cost.host_bytes_per_second or _ASSUMED_HOST_BYTES_PER_S)
    disk_s = held / (engine.cost.disk_bytes_per_second or _ASSUMED_DISK_BYTES_PER_S)
    fitted = engine.cost.prefill_seconds(session.context_tokens)
    recompute_s = fitted or session.context_tokens * _ASSUMED_PREFILL_S_PER_TOKEN
    in_device, in_host, in_disk = (session.tier is t for t in (KvTier.DEVICE, KvTier.HOST, KvTier.DISK))
    can_swap = "swap_out" in engine.supported_directives
    options = []
    if "drop" in engine.supported_directives:
        options.append(Weighed(Verdict.DROP, recompute_s * (held + running_bytes) / GIB))
    if in_device:
        options.append(Weighed(Verdict.KEEP, price.device * held * wait_s / GIB))
    elif device_room and "swap_in" in engine.supported_directives:
        in_s = STEP_BORDER_S + (host_s if in_host else disk_s)
        options.append(Weighed(Verdict.KEEP, (price.device * held * wait_s + in_s * (held + running_bytes)) / GIB))
    if disk_room is None:
        disk_room = engine.disk_used_bytes + held <= engine.disk_capacity_bytes
    if in_host or (in_device and host_room and can_swap):
        out_s = 0.0 if in_host else STEP_BORDER_S + host_s * _unwritten(held, session.host_bytes, copies)
        cost = price.host * held * wait_s + (out_s + STEP_BORDER_S + host_s) * (held + running_bytes)
        options.append(Weighed(Verdict.SWAP_HOST, cost / GIB))
    if in_disk or (can_swap and disk_room):
        out_s = 0.0 if in_disk else STEP_BORDER_S + disk_s * _unwritten(held, session.disk_bytes, copies)
        cost = price.disk * held * wait_s + (out_s + STEP_BORDER_S + disk_s) * (held + running_bytes)
        options.append(Weighed(Verdict.SWAP_DISK, cost / GIB))
    return sorted(options, key=lambda o: (o.cost, o.verdict.value))


def _unwritten(held: int, copy_bytes: int, copies: bool) -> float:
    """Share of the KV that a lower tier does not hold yet: FastSwitch's reuse of copies."""
    return max(0.0, 1.0 - copy_bytes / held) if copies else 1.0


def standing(session: Session) -> Verdict:
    """The verdict that the session's present place amounts to."""
    by_tier = {KvTier.DEVICE: Verdict.KEEP, KvTier.HOST: Verdict.SWAP_HOST, KvTier.DISK: Verdict.SWAP_DISK}
    return session.verdict or by_tier.get(session.tier, Verdict.DROP)


def choose(options: list[Weighed], now: Verdict, hysteresis_ratio: float) -> Weighed:
    """The cheapest option, unless what is done now is within `hysteresis_ratio` of it. `options` must not be empty."""
    best = options[0]
    current = next((o for o in options if o.verdict is now), None)
    if current is not None and best.cost >= (1.0 - hysteresis_ratio) * current.cost:
        return current
    return best


def running_bytes(snapshot: Snapshot, engine: Engine) -> int:
    """Device bytes of the sessions whose turns are computed now."""
    busy = (s for s in snapshot.sessions if s.engine == engine.id and s.phase is SessionPhase.RUNNING)
    return sum(device_bytes(s, engine) for s in busy)

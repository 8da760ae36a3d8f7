"""What no policy can exceed: a linear programme over the gaps between turns.

Owns the programme and its duals. For each gap it asks which share of the context stays on the device, goes to the host
tier, goes to disk, or is computed again, and adds up what that takes of each resource over the whole run: the volume
relaxation of PFOO-L (Berger, Beckmann, Harchol-Balter, POMACS 2018, arXiv 1711.03709), here with costs and tiers. Rows:
the device's and the host's space-time (the tools' memory is in the host's), link and disk (what was written once is
not written again), the time of prefill and of decoding by batch (tangents of its concave rate), and the loop itself: no
session takes less than its own turns, tools and restores. Each row holds for every schedule, so the least time is below
every policy's, one that knows the future too.

scipy's HiGHS solves it; it is not among what the package needs otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .machine import TURN_S, Machine
from .script import Script
from .world import Room

TANGENTS = 6
"""Of the quadratic cost of computing a share of a context again."""
BATCHES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64, 96, 128)
"""At which the rate of decoding has a tangent."""


class BoundError(Exception):
    """The bound can not be computed: scipy is missing, or there is no feasible schedule."""


@dataclass(frozen=True, slots=True)
class Bound:
    seconds: float
    """Least time in which all scripts are played once."""
    turns: int
    rents: dict[str, float]
    """By resource (device, host, link, disk): by how much the time falls, relatively, for each relative bit more of it.
    0: there is enough of it."""
    shares: dict[str, float]
    """Of the gaps, kept on device, host, disk, and none (computed again)."""

    @property
    def turns_per_minute(self) -> float:
        return 60.0 * self.turns / self.seconds


class _Programme:
    """Minimise the first variable; all are at least 0; every row says sum(coefficient x variable) <= right side."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[tuple[dict[int, float], float]] = []

    def variable(self) -> int:
        self.count += 1
        return self.count - 1

    def at_most(self, row: dict[int, float], right: float) -> None:
        self.rows.append((row, right))

    def solve(self) -> tuple[list[float], list[float]]:
        """Variables and the rows' marginals."""
        try:
            from scipy.optimize import linprog
            from scipy.sparse import coo_matrix
        except ImportError as error:
            raise BoundError("the bound needs the package scipy: pip install 'equipoise[whatif]'") from error
        entries = [(v, k, j) for k, (row, _) in enumerate(self.rows) for j, v in row.items()]
        matrix = coo_matrix(
            ([e[0] for e in entries], ([e[1] for e in entries], [e[2] for e in entries])),
            shape=(len(self.rows), self.count),
        )
        costs = [1.0] + [0.0] * (self.count - 1)
        found: Any = linprog(costs, A_ub=matrix, b_ub=[right for _, right in self.rows], method="highs")
        if found.status != 0:
            raise BoundError(f"the bound was not found: {found.message}")
        return [float(x) for x in found.x], [float(-m) for m in found.ineqlin.marginals]


class _Use:
    """Of one resource: so much for each variable, and so much in any case."""

    def __init__(self) -> None:
        self.by: dict[int, float] = defaultdict(float)
        self.always = 0.0


def bound(scripts: Sequence[Script], machine: Machine, room: Room, steady: bool = True) -> Bound:
    """The bound for these scripts, one agent each.

    Args:
        steady: every agent takes the next script when one is over, and the rate is that of the mix; else each is
            played once, and the time is that until the last is over.

    Raises:
        BoundError: see there. Some 0.1 s for 24 scripts of 24 turns.
    """
    lp = _Programme()
    total = lp.variable()
    device, host, link, disk = _Use(), _Use(), _Use(), _Use()
    prefill, decode_tokens, decoding = _Use(), 0.0, []
    places: list[tuple[int, int, int, int]] = []
    paths = []
    for script in scripts:
        path = _Use()
        context, written, gap_s = 0, None, 0.0
        for number, turn in enumerate(script.turns):
            held = min(context, turn.prompt_tokens)
            new_s = TURN_S + machine.prefill_s(turn.prompt_tokens, held)
            step = lp.variable()
            decoding.append(step)
            lp.at_most({step: -1.0}, -turn.output_tokens * machine.decode_step_s(1))
            prefill.always += new_s
            decode_tokens += turn.output_tokens
            device.by[step] += turn.context_tokens
            device.always += turn.context_tokens * new_s
            path.by[step] += 1.0
            path.always += new_s
            if number:
                path.always += gap_s
                if written is None:
                    written = lp.variable()
                    disk.by[written] = 1.0
                gap = _Gap(lp, machine, held, gap_s, written)
                gap.charge(device, host, link, disk, prefill, path)
                places.append(gap.places)
            host.always += sum(tool.byte_seconds for tool in turn.tools)
            gap_s = max((tool.seconds for tool in turn.tools), default=0.0) + turn.pause_s
            context = turn.context_tokens
        path.always += gap_s
        paths.append(path)
        if not steady:
            lp.at_most({**path.by, total: -1.0}, -path.always)
    if steady:
        everybody: dict[int, float] = defaultdict(float)
        for path in paths:
            for variable, amount in path.by.items():
                everybody[variable] += amount
        lp.at_most({**everybody, total: -float(len(paths))}, -sum(path.always for path in paths))
    _decode_rows(lp, machine, total, prefill, decode_tokens, decoding, len(scripts))
    capacities = (
        ("device", device, float(room.device_tokens)),
        ("host", host, float(room.ram_bytes)),
        ("link", link, machine.cost.host_bytes_per_second),
        ("disk", disk, _disk_speed(machine, room) or 1.0),
    )
    for _, use, capacity in capacities:
        row = {variable: amount / capacity for variable, amount in use.by.items()}
        lp.at_most({**row, total: -1.0}, -use.always / capacity)
    found, marginals = lp.solve()
    rents = dict(zip((name for name, _, _ in capacities), marginals[-len(capacities) :], strict=True))
    names = ("device", "host", "disk", "none")
    shares = {name: sum(found[p[n]] for p in places) / max(1, len(places)) for n, name in enumerate(names)}
    return Bound(found[total], sum(len(script.turns) for script in scripts), rents, shares)


def _disk_speed(machine: Machine, room: Room) -> float:
    return machine.cost.disk_bytes_per_second if room.disk_bytes else 0.0


class _Gap:
    """One gap between two turns: the shares of the context by place, and the time of bringing it back."""

    def __init__(self, lp: _Programme, machine: Machine, tokens: int, seconds: float, written: int) -> None:
        self.places = (lp.variable(), lp.variable(), lp.variable(), lp.variable())
        self._back, self._again = lp.variable(), lp.variable()
        self._tokens, self._bytes, self._seconds = tokens, tokens * machine.bytes_per_token, seconds
        _, on_host, on_disk, nowhere = self.places
        lp.at_most(dict.fromkeys(self.places, -1.0), -1.0)
        lp.at_most({on_disk: self._bytes, written: -1.0}, 0.0)
        for point in range(TANGENTS):
            at = point / (TANGENTS - 1) * tokens
            slope = machine.cost.prefill_seconds_per_token + 2 * machine.cost.prefill_seconds_per_token2 * at
            lp.at_most({nowhere: slope * tokens, self._again: -1.0}, slope * at - _prefill_s(machine, at))
        lp.at_most({self._again: 1.0, self._back: -1.0}, 0.0)
        lp.at_most({on_host: self._bytes / machine.cost.host_bytes_per_second, self._back: -1.0}, 0.0)
        if machine.cost.disk_bytes_per_second:
            lp.at_most({on_disk: self._bytes / machine.cost.disk_bytes_per_second, self._back: -1.0}, 0.0)
        else:
            lp.at_most({on_disk: 1.0}, 0.0)

    def charge(self, device: _Use, host: _Use, link: _Use, disk: _Use, prefill: _Use, path: _Use) -> None:
        on_device, on_host, on_disk, _ = self.places
        device.by[on_device] += self._tokens * self._seconds
        host.by[on_host] += self._bytes * self._seconds
        link.by[on_host] += self._bytes
        disk.by[on_disk] += self._bytes
        prefill.by[self._again] += 1.0
        path.by[self._back] += 1.0


def _prefill_s(machine: Machine, tokens: float) -> float:
    cost = machine.cost
    return cost.prefill_seconds_per_token * tokens + cost.prefill_seconds_per_token2 * tokens * tokens


def _decode_rows(
    lp: _Programme, machine: Machine, total: int, prefill: _Use, tokens: float, decoding: list[int], agents: int
) -> None:
    """All tokens within the time that prefill leaves, at a rate that is concave in the batch.

    A batch of n draws g(n) = n / (base + n more) tokens a second; at most its tangent at any n0, so that
    tokens <= (T - P) (g(n0) - n0 g'(n0)) + g'(n0) x (seconds of decoding, summed over the sessions).
    """
    more = machine.cost.decode_seconds_per_sequence
    base = machine.cost.decode_step_seconds - more
    for batch in (n for n in BATCHES if n <= agents):
        square = (base + more * batch) ** 2
        slope, rest = base / square, more * batch * batch / square
        row: dict[int, float] = dict.fromkeys(decoding, -slope)
        row[total] = -rest
        for variable, amount in prefill.by.items():
            row[variable] = row.get(variable, 0.0) + rest * amount
        lp.at_most(row, -tokens - rest * prefill.always)
    lp.at_most({**prefill.by, total: -1.0}, -(prefill.always + tokens * (more + base / agents)))

"""The engine's compute in virtual time: prefill one after another, decoding in a batch, one step after another.

Owns what is being computed and when it is done. Prefill goes first and holds up whoever decodes, as in an engine
without chunks; a batch of n advances by one token each in Machine.decode_step_s(n). It knows no tiers.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import ceil, inf

from .machine import Machine
from .seat import Seat

_SLACK = 1e-9


class Compute:
    def __init__(self, machine: Machine) -> None:
        self.at_s = 0.0
        self.prefill_s = 0.0
        """Spent on prefill in all."""
        self.queue: deque[Seat] = deque()
        self._machine = machine
        self._batch: list[tuple[float, int, Seat]] = []
        self._steps = 0.0
        """Decode steps since the beginning, the running one in part."""
        self._batch_since_s = 0.0

    @property
    def batch_size(self) -> int:
        return len(self._batch)

    def prefill(self, seat: Seat) -> None:
        self.queue.append(seat)

    def decode(self, seat: Seat) -> None:
        seat.mark = self._steps + seat.output_tokens
        heappush(self._batch, (seat.mark, seat.number, seat))
        self._batch_since_s = self.at_s

    def backlog_s(self) -> float:
        return sum(seat.work_s for seat in self.queue)

    def next_s(self) -> float:
        """When the next turn's prefill or decoding is done; infinity where nothing is computed."""
        if self.queue:
            return self.at_s + self.queue[0].work_s
        if self._batch:
            return self.at_s + max(0.0, self._batch[0][0] - self._steps) * self._machine.decode_step_s(len(self._batch))
        return inf

    def advance(self, to_s: float) -> None:
        """Compute up to `to_s`, which must not lie beyond next_s()."""
        passed = to_s - self.at_s
        if self.queue:
            self.queue[0].work_s -= passed
            self.prefill_s += passed
        elif self._batch:
            self._steps += passed / self._machine.decode_step_s(len(self._batch))
        self.at_s = to_s

    def prefilled(self) -> list[Seat]:
        """Takes out whose prefill is done: at most one, since the next has not begun."""
        if self.queue and self.queue[0].work_s <= _SLACK:
            return [self.queue.popleft()]
        return []

    def decoded(self) -> list[Seat]:
        """Takes out whose last token is drawn, in a fixed order."""
        done = []
        while self._batch and self._batch[0][0] <= self._steps + _SLACK:
            done.append(heappop(self._batch)[2])
        if done:
            self._batch_since_s = self.at_s
        return done

    def border_s(self) -> float:
        """The next step border, where a directive takes effect; now, where nothing is computed."""
        if self.queue or not self._batch:
            return self.at_s
        step = self._machine.decode_step_s(len(self._batch))
        return self._batch_since_s + step * ceil((self.at_s - self._batch_since_s) / step - _SLACK)

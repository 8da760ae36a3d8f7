"""A runner and a model that only count: the scheduler, the swapper and the engine above them are the real ones.

The fake's KV of a token is the token itself, and what it samples depends on every token the slot holds: KV that was
lost, mixed up or put back in the wrong order changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from equipoise.gpuctl.engine.compute.kv_image import KvChunk, KvFormat, Plane, compose, parse
from equipoise.gpuctl.engine.compute.runner import BatchSlice, StepResult, StepStatus
from equipoise.gpuctl.engine.compute.template import ChatTemplate
from equipoise.gpuctl.engine.errors import SwapError
from equipoise.gpuctl.engine.schedule.sequence import SamplingParams, Slot

END = 0
VOCABULARY = 50


class FakeModel:
    """Tokens are characters: text and tokens map one to one."""

    name = "fake"
    chat_template = ChatTemplate(None)

    def tokenize(self, text: str, *, first: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"" if token == END and not special else chr(token).encode()

    def ends_text(self, token: int) -> bool:
        return token == END

    def constraint(self, kind: str, text: str) -> object:
        raise AssertionError("the fake runner holds no output to anything")


class FakeSampler:
    closed = False

    def close(self) -> None:
        self.closed = True


class FakeRunner:
    def __init__(self, *, physical_tokens: int = 1024, slot_count: int = 8, ends: bool = False) -> None:
        """`ends`: some turns end by themselves; else every turn goes on to its limit."""
        self.physical_tokens = physical_tokens
        self.slot_count = slot_count
        self.slot_tokens = physical_tokens
        self.bytes_per_token = 16
        self.kv_format = KvFormat(1, 1, ((1, 4), (1, 4)))
        self.slots: dict[int, list[int]] = {}
        self.taken_tokens = 0
        self.samplers: list[FakeSampler] = []
        self.fail_next_put = False
        self._ends = ends

    def sampler(self, params: SamplingParams, drawn: Sequence[int] = ()) -> FakeSampler:
        self.drawn = list(drawn)
        self.samplers.append(FakeSampler())
        return self.samplers[-1]

    def step(self, slices: Sequence[BatchSlice]) -> StepResult:
        if sum(map(len, self.slots.values())) + sum(len(item.tokens) for item in slices) > self.physical_tokens:
            return StepResult(StepStatus.NO_ROOM)
        sampled: list[Any] = []
        for item in slices:
            held = self.slots.setdefault(item.slot, [])
            assert len(held) == item.start, f"slot {item.slot} holds {len(held)}, the slice begins at {item.start}"
            held.extend(item.tokens)
            sampled.append(None if item.sampler is None else self.next_token(held))
        return StepResult(StepStatus.DONE, tuple(sampled))

    def next_token(self, held: Sequence[int]) -> int:
        value = zlib.crc32(np.array(held, np.int32).tobytes())
        if self._ends and value % 11 == 0:
            return END
        return 65 + value % VOCABULARY

    def share(self, source: Slot, slot: Slot, tokens: int) -> None:
        assert not self.slots.get(slot)
        self.slots[slot] = self.slots.get(source, [])[:tokens]

    def cut(self, slot: Slot, from_token: int) -> None:
        if slot in self.slots:
            self.slots[slot] = self.slots[slot][:from_token]

    def held_tokens(self, slot: Slot) -> int:
        return len(self.slots.get(slot, []))

    def take(self, slot: Slot, from_token: int) -> KvChunk:
        chunk = self.copy(slot, from_token)
        del self.slots[slot]
        return chunk

    def copy(self, slot: Slot, from_token: int) -> KvChunk:
        rows = np.array(self.slots[slot], np.int32)[from_token:].reshape(-1, 1).view(np.uint8)
        self.taken_tokens += len(rows)
        chunk = KvChunk(1, 2, 1, from_token, (Plane(1, rows), Plane(1, rows)), len(rows))
        return parse(compose([chunk]))

    def put(self, slot: Slot, chunks: Sequence[KvChunk]) -> None:
        whole = parse(compose(chunks))
        assert whole.first_token == 0
        tokens = whole.planes[0].rows.copy().view(np.int32).ravel().tolist()
        if self.fail_next_put:
            self.fail_next_put = False
            self.slots.pop(slot, None)
            raise SwapError("told to fail")
        self.slots[slot] = tokens

    def interrupt(self) -> None:
        pass

    def forget_interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass

    def expected_output(self, prompt: str, count: int) -> str:
        """What an undisturbed turn over `prompt` produces."""
        tokens = [ord(character) for character in prompt]
        text = ""
        while len(text) < count:
            token = self.next_token(tokens)
            if token == END:
                break
            tokens.append(token)
            text += chr(token)
        return text


def chunk_of(tokens: list[int], first: int = 0) -> KvChunk:
    """KV of these tokens, from position `first` on."""
    runner = FakeRunner()
    runner.slots[0] = [*range(first), *tokens]
    return runner.take(Slot(0), first)

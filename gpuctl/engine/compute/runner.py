"""Executes what the scheduler decided: batches through llama.cpp, sampling, and copies of a sequence's KV.

Owns: the llama_context. Must not: decide (scheduler.py) or account (ledger.py). One thread only.

`Runner` is the seam: tests drive the scheduler and the engine with a runner that only counts.

Cache modes
- split (kv_unified=False): each slot has its own cells, so what a sequence computes does not depend on its neighbours'
  cells and a resumed sequence is bit-exact. The context is divided evenly: a conversation is bounded by its share. Only
  neighbouring slots are batched together. A partial llama_memory_seq_cp aborts the process, so none is ever made.
- unified: one pool of cells; any turn may take all of it, prefixes can be shared, and any slots batch together. Where a
  sequence's cells lie depends on its neighbours, so a swap can change how sums round, here and next door.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConstraintError, ContextError, SwapError
from ..schedule.sequence import SamplingParams, Slot, Token, TokenLogprob
from . import llama
from .kv_image import Blob, KvChunk, KvFormat, compose, parse
from .language_model import LanguageModel
from .sampler import ChainSampler, Sampler

CELL_ALIGNMENT = 256  # llama.cpp pads n_ctx to this
_MOST_ROWS = 4096  # views of logits kept; llama.cpp gives as many addresses as a step has outputs


class ContextMode(enum.Enum):
    SPLIT = "split"
    UNIFIED = "unified"


class StepStatus(enum.Enum):
    DONE = "done"
    NO_ROOM = "no room"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """Tokens of one slot at consecutive positions from `start`. With a sampler, the next token is drawn."""

    slot: Slot
    start: int
    tokens: Sequence[Token]
    sampler: Sampler | None = None
    logprobs: int | None = None


Drawn = TokenLogprob | Token | ConstraintError
"""A TokenLogprob where log probabilities were asked; an error where this slice's constraint cannot be followed on."""


@dataclass(frozen=True, slots=True)
class StepResult:
    status: StepStatus
    sampled: tuple[Drawn | None, ...] = ()
    """One entry per slice: None without a sampler."""


class Runner(Protocol):
    """What the engine needs of a model that computes. Slots are 0 .. slot_count - 1."""

    physical_tokens: int
    slot_count: int
    slot_tokens: int
    bytes_per_token: int
    kv_format: KvFormat

    def sampler(self, params: SamplingParams, drawn: Sequence[Token] = ()) -> Sampler: ...
    def step(self, slices: Sequence[BatchSlice]) -> StepResult: ...
    def share(self, source: Slot, slot: Slot, tokens: int) -> None: ...
    def cut(self, slot: Slot, from_token: int) -> None: ...
    def held_tokens(self, slot: Slot) -> int: ...
    def take(self, slot: Slot, from_token: int) -> KvChunk: ...
    def copy(self, slot: Slot, from_token: int) -> KvChunk: ...
    def put(self, slot: Slot, chunks: Sequence[KvChunk]) -> None: ...
    def interrupt(self) -> None: ...
    def forget_interrupt(self) -> None: ...
    def close(self) -> None: ...


class LlamaRunner:
    """The real runner."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        kv_tokens: int,
        slot_count: int,
        mode: ContextMode,
        threads: int = 1,
        step_tokens: int = 512,
        ubatch_tokens: int = 128,
        slot_tokens: int | None = None,
    ) -> None:
        """Make a context with room for `kv_tokens`.

        `slot_tokens`: most tokens of one conversation, by default as many as the model was trained for and the room
        allows. In split mode every slot gets that many cells of its own, so memory is slot_count x slot_tokens.
        `ubatch_tokens`: what llama.cpp computes at once, so the most an interrupt can waste; 128 reaches 0.97 of the
        prefill speed of 512.
        """
        self._lib = llama.library()
        self._model = model
        self.mode = mode
        self.slot_count = min(slot_count, llama.MAX_SEQUENCES)
        longest = min(kv_tokens, model.trained_context_tokens)
        per_slot = _aligned(min(slot_tokens or longest, longest))
        params = self._lib.llama_context_default_params()
        params.n_ctx = per_slot * self.slot_count if mode is ContextMode.SPLIT else _aligned(kv_tokens)
        params.n_seq_max = self.slot_count
        params.kv_unified = mode is ContextMode.UNIFIED
        params.n_batch = step_tokens
        params.n_ubatch = min(ubatch_tokens, step_tokens)
        params.n_threads = params.n_threads_batch = threads
        # Fixed, not "auto": without it V is stored transposed and a blob could not be cut at a token.
        params.flash_attn_type = llama.FLASH_ATTENTION_ENABLED
        llama.clear_errors()
        context = self._lib.llama_init_from_model(model.handle, params)
        if not context:
            raise ContextError(
                f"no context of {params.n_ctx} tokens: {llama.last_error() or 'no reason given'}: lower --kv-tokens"
            )
        self._context: int = context
        self._memory = self._lib.llama_get_memory(context)
        self.slot_tokens = min(self._lib.llama_n_ctx_seq(context), per_slot, model.trained_context_tokens)
        self.physical_tokens = self._lib.llama_n_ctx(context)
        self._abort = llama.AbortFlag()
        self._lib.llama_set_abort_callback(context, llama.abort_predicate(), self._abort.address)
        self._vocabulary_size = model.vocabulary_size
        self._rows: dict[int, npt.NDArray[np.float32]] = {}
        self._allocate_batch(step_tokens)
        self.bytes_per_token = self._measure_bytes_per_token()

    def _allocate_batch(self, capacity: int) -> None:
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._n_seq = np.ones(capacity, np.int32)
        self._seq = np.zeros(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        int32 = ctypes.POINTER(ctypes.c_int32)
        base, width = self._seq.ctypes.data, self._seq.itemsize
        self._seq_pointers = (int32 * capacity)(
            *(ctypes.cast(base + index * width, int32) for index in range(capacity))
        )
        self._batch = llama.Batch(
            0,
            self._token.ctypes.data_as(int32),
            None,
            self._pos.ctypes.data_as(int32),
            self._n_seq.ctypes.data_as(int32),
            ctypes.cast(self._seq_pointers, ctypes.POINTER(int32)),
            self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._capacity = capacity

    def _measure_bytes_per_token(self) -> int:
        """Bytes a saved token takes, and a proof that saving, cutting and joining work as this binding believes."""
        probe = Slot(0)
        self.step([BatchSlice(probe, 0, [1, 1])])
        two = self._save(probe)
        self.step([BatchSlice(probe, 2, [1])])
        three = self._save(probe)
        try:
            chunk = parse(three)
            tail = self.take(probe, 2)
            self.put(probe, [chunk.head(2), tail])
            if not np.array_equal(self._save(probe), three):
                raise SwapError("a sequence saved in two pieces does not come back the same")
        except SwapError as error:
            raise ContextError(f"unexpected llama.cpp build or model: {error}") from None
        self.cut(probe, 0)
        self.kv_format = chunk.format
        return three.size - two.size

    def sampler(self, params: SamplingParams, drawn: Sequence[Token] = ()) -> ChainSampler:
        """A sampler, as it is after drawing `drawn`. Raises RequestError: see ChainSampler."""
        return ChainSampler(self._lib, self._model.vocab_handle, params, drawn)

    def step(self, slices: Sequence[BatchSlice]) -> StepResult:
        """Compute the slices as one batch.

        After NO_ROOM nothing was computed; after ABORTED ask `held_tokens` how far each slot got. Raises ContextError
        on any other refusal of llama.cpp.
        """
        filled = 0
        outputs: list[int | None] = []
        for item in slices:
            end = filled + len(item.tokens)
            if end > self._capacity:
                raise ContextError(f"a step of {end} tokens or more: at most {self._capacity}")
            self._fill(filled, end, item)
            outputs.append(end - 1 if item.sampler is not None else None)
            filled = end
        self._batch.n_tokens = filled
        code = self._lib.llama_decode(self._context, self._batch)
        if code == llama.DECODE_NO_ROOM:
            return StepResult(StepStatus.NO_ROOM)
        if code == llama.DECODE_ABORTED:
            return StepResult(StepStatus.ABORTED)
        if code != llama.DECODE_OK:
            raise ContextError(f"llama_decode answered {code}: {llama.last_error() or 'no reason given'}")
        sampled = tuple(
            None if at is None else self._sample(at, item) for at, item in zip(outputs, slices, strict=True)
        )
        return StepResult(StepStatus.DONE, sampled)

    def _fill(self, begin: int, end: int, item: BatchSlice) -> None:
        """Enter the slice in the batch from `begin` to `end`."""
        if end - begin == 1:  # most slices: a scalar is set in a third of the time of a range
            self._token[begin] = item.tokens[0]
            self._pos[begin] = item.start
            self._seq[begin] = item.slot
        else:
            self._token[begin:end] = item.tokens
            self._pos[begin:end] = np.arange(item.start, item.start + end - begin)
            self._seq[begin:end] = item.slot
            self._logits[begin:end] = 0
        self._logits[end - 1] = item.sampler is not None

    def _sample(self, at: int, item: BatchSlice) -> Drawn:
        sampler: Any = item.sampler
        row = self._row(self._lib.llama_get_logits_ith(self._context, at))
        unrestricted = row
        try:
            if sampler.matcher is not None:
                unrestricted = row if item.logprobs is None else row.copy()
                sampler.matcher.restrict(row)
            if sampler.chain:
                token = int(self._lib.llama_sampler_sample(sampler.chain, self._context, at))
            else:
                token = int(row.argmax())
            if sampler.matcher is not None:
                sampler.matcher.accept(token)
        except ConstraintError as error:
            return error
        if item.logprobs is None:
            return token
        return _with_logprobs(unrestricted, token, item.logprobs)

    def _row(self, logits: Any) -> npt.NDArray[np.float32]:
        """The vocabulary's logits at the pointer llama.cpp has just given. A view is made once for each address: one
        that llama.cpp has left is not looked at until it gives the address again."""
        address = ctypes.addressof(logits.contents)
        if (row := self._rows.get(address)) is None:
            if len(self._rows) >= _MOST_ROWS:
                self._rows.clear()
            row = self._rows[address] = np.ctypeslib.as_array(logits, shape=(self._vocabulary_size,))
        return row

    def cut(self, slot: Slot, from_token: int) -> None:
        """Forget the slot's KV from position `from_token` on. 0 empties it. Safe where there is none."""
        self._lib.llama_memory_seq_rm(self._memory, slot, from_token, -1)

    def share(self, source: Slot, slot: Slot, tokens: int) -> None:
        """Let the empty `slot` use the cells of `source`'s first `tokens`. Unified mode only.

        Raises ContextError in split mode, where llama.cpp would abort the process.
        """
        if self.mode is not ContextMode.UNIFIED:
            raise ContextError("prefixes cannot be shared with --ctx-mode split: use unified")
        self._lib.llama_memory_seq_cp(self._memory, source, slot, 0, tokens)

    def held_tokens(self, slot: Slot) -> int:
        """Tokens llama.cpp itself says the slot holds."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def take(self, slot: Slot, from_token: int) -> KvChunk:
        """Copy the slot's KV from `from_token` on and empty the slot.

        llama.cpp saves whole sequences only. As the slot is emptied anyway, what need not be copied is removed first:
        so a second swap-out costs what was appended. Raises SwapError; the slot is empty then, too.
        """
        self._lib.llama_memory_seq_rm(self._memory, slot, 0, from_token)
        try:
            return parse(self._save(slot))
        finally:
            self.cut(slot, 0)

    def copy(self, slot: Slot, from_token: int) -> KvChunk:
        """Copy the slot's KV from `from_token` on and leave the slot as it is. Raises SwapError.

        llama.cpp saves whole sequences only: what lies before `from_token` is saved and dropped again.
        """
        whole = parse(self._save(slot))
        # The tail is a view of the whole: joined into a form of its own, the rest is freed.
        return parse(compose([whole.tail(from_token)])) if from_token else whole

    def put(self, slot: Slot, chunks: Sequence[KvChunk]) -> None:
        """Replace the slot's KV by saved pieces that begin at token 0. Raises SwapError with the slot left empty."""
        if chunks and chunks[0].first_token:
            raise SwapError(f"slot {slot}: the saved KV begins at token {chunks[0].first_token}, not 0")
        blob = compose(chunks)
        read = self._lib.llama_state_seq_set_data(self._context, blob.ctypes.data, blob.size, slot)
        if read != blob.size or self.held_tokens(slot) != chunks[-1].end_token:
            self.cut(slot, 0)
            raise SwapError(f"slot {slot}: llama.cpp does not take the saved KV back: {llama.last_error()}")

    def _save(self, slot: Slot) -> Blob:
        size = self._lib.llama_state_seq_get_size(self._context, slot)
        blob = np.empty(size, np.uint8)
        written = self._lib.llama_state_seq_get_data(self._context, blob.ctypes.data, size, slot)
        if written != size:
            raise SwapError(f"slot {slot}: saved {written} of {size} bytes: {llama.last_error()}")
        return blob

    def interrupt(self) -> None:
        """Make the step under way end ABORTED at its next graph node. From any thread; CPU backend."""
        self._abort.raise_()

    def forget_interrupt(self) -> None:
        """An interrupt raised before this call no longer counts."""
        self._abort.clear()

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = 0


def _with_logprobs(row: npt.NDArray[np.float32], token: Token, count: int) -> TokenLogprob:
    """Log-softmax over the raw logits: what the model thinks, before temperature and masks."""
    logprobs = row - row.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best: list[int] = []
    if count:
        best = np.argpartition(logprobs, -count)[-count:].tolist()
        best.sort(key=lambda t: -logprobs[t])
    return TokenLogprob(token, float(logprobs[token]), tuple((t, float(logprobs[t])) for t in best))


def _aligned(tokens: int) -> int:
    return -(-tokens // CELL_ALIGNMENT) * CELL_ALIGNMENT

"""Raw speed: our step loop against a bare llama.cpp loop in one process, and our server against llama.cpp's own.

The bare loop is what anyone would write by hand over the same binding: fill a batch, decode, take the argmax. Rounds of
the two alternate, and in one process both are held to CPU seconds: what a busy neighbour takes away is in neither. An
engine with turns to compute never sleeps, so CPU seconds hide no idling of ours. A neighbour on the same core still
slows a round by a fifth, and nothing makes one faster than the machine: each side's best round is compared.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from statistics import median

import httpx
import numpy as np
from equipoise.gpuctl.engine.compute import llama
from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.gpuctl.engine.compute.runner import ContextMode, LlamaRunner
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.sequence import SessionId, TenantId, TurnEvent, TurnFinished, TurnRequest
from equipoise.tests.bench.engine_parts import servers
from equipoise.tests.bench.report import Baseline, Row

OUTPUT_TOKENS = 48
PROMPT = "The history of the lighthouse begins"


def rows(model: LanguageModel, rounds: int = 15) -> list[Row]:
    found = []
    for batch in (1, 8):
        bare, ours = _in_process(model, batch, rounds)
        found.append(
            Row(
                f"decode at batch {batch}, ratio to a bare loop",
                max(ours) / max(bare),
                "",
                0.97,
                "higher",
                Baseline("bare llama.cpp loop, tokens per CPU s", max(bare)),
                [round(o / b, 4) for o, b in zip(ours, bare, strict=True)],
                f"one thread; {_best_and_pairs(ours, bare)}",
            )
        )
    ours_served, theirs = asyncio.run(_served(rounds))
    found.append(
        Row(
            "8 parallel clients over HTTP, ratio to llama.cpp's server",
            max(ours_served) / max(theirs),
            "",
            1.0,
            "higher",
            Baseline("llama.cpp's server, tokens/s", max(theirs)),
            [round(o / t, 4) for o, t in zip(ours_served, theirs, strict=True)],
            f"one thread each, same wheel; {_best_and_pairs(ours_served, theirs)}",
        )
    )
    return found


def _best_and_pairs(ours: list[float], theirs: list[float]) -> str:
    pairs = median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return f"best of {len(ours)} rounds, ours {max(ours):.1f}; runs: each pair's ratio, median {pairs:.3f}"


def _in_process(model: LanguageModel, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    runner = LlamaRunner(model, kv_tokens=2048, slot_count=8, mode=ContextMode.UNIFIED, threads=1)
    bare_context = _BareLoop(model, batch)
    engine = Engine(model, runner, EngineConfig(kv_tokens=2048))
    engine.start()
    try:
        bare, ours = [], []
        for number in range(rounds + 1):
            a, b = bare_context.tokens_per_second(), _ours(engine, batch, number)
            if number:  # the first round warms both up
                bare.append(a)
                ours.append(b)
        return bare, ours
    finally:
        engine.stop()
        runner.close()
        bare_context.close()


def _ours(engine: Engine, batch: int, number: int) -> float:
    """Output tokens per CPU second, prompts included."""
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def sink(event: TurnEvent) -> None:
        if isinstance(event, TurnFinished):
            ended.put(None)

    began = time.process_time()
    for n in range(batch):
        request = TurnRequest(
            SessionId(f"{number}-{n}"),
            TenantId("t"),
            f"{PROMPT} {n}",
            max_tokens=OUTPUT_TOKENS,
            ephemeral=True,
            ignore_end_of_text=True,
        )
        engine.submit(request, sink)
    for _ in range(batch):
        ended.get(timeout=120)
    return OUTPUT_TOKENS * batch / (time.process_time() - began)


class _BareLoop:
    def __init__(self, model: LanguageModel, batch: int) -> None:
        self._lib = llama.library()
        self._model = model
        self._batch_size = batch
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = 2048, 8, True
        params.n_batch, params.n_ubatch = 512, 128
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama.FLASH_ATTENTION_ENABLED
        self._context = self._lib.llama_init_from_model(model.handle, params)
        self._memory = self._lib.llama_get_memory(self._context)

    def tokens_per_second(self) -> float:
        """Output tokens per CPU second, prompts included, all of them in one batch."""
        lib, width = self._lib, self._batch_size
        began = time.process_time()
        lib.llama_memory_clear(self._memory, True)
        prompts = [self._model.tokenize(f"{PROMPT} {n}") for n in range(width)]
        entries = [(token, at, n) for n, tokens in enumerate(prompts) for at, token in enumerate(tokens)]
        ends = list(itertools.accumulate(len(tokens) for tokens in prompts))
        last = self._decode(entries, [end - 1 for end in ends])
        for step in range(OUTPUT_TOKENS - 1):
            entries = [(last[n], len(prompts[n]) + step, n) for n in range(width)]
            last = self._decode(entries, list(range(width)))
        return OUTPUT_TOKENS * width / (time.process_time() - began)

    def _decode(self, entries: list[tuple[int, int, int]], outputs: list[int]) -> list[int]:
        lib = self._lib
        batch = lib.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for at, (token, position, sequence) in enumerate(entries):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = 1 if at in outputs else 0
        code = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        assert code == 0, code
        size = (self._model.vocabulary_size,)
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, at), shape=size) for at in outputs]
        return [int(row.argmax()) for row in rows]

    def close(self) -> None:
        self._lib.llama_free(self._context)


async def _served(rounds: int) -> tuple[list[float], list[float]]:
    ours, theirs = [], []
    with (
        # Raw speed: every round computes every prompt, none is kept from the last round or shared among the clients.
        servers.engine(
            "--kv-tokens", "8192", "--slots", "8", "--anonymous", "drop", "--share-prefix-tokens", "0"
        ) as our_url,
        servers.llama_server(slots=8, context_tokens=8192, cache_mib=0) as their_url,
    ):
        for number in range(rounds + 1):
            a, b = await _eight_clients(our_url), await _eight_clients(their_url)
            if number:
                ours.append(a)
                theirs.append(b)
    return ours, theirs


async def _eight_clients(url: str) -> float:
    """Output tokens per second of eight clients that stream at once, prompts included."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(n: int) -> None:
            body = {
                "prompt": f"{PROMPT} {n}",
                "max_tokens": OUTPUT_TOKENS,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "cache_prompt": False,  # to llama.cpp's server: compute every prompt, as our options say above
            }
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_lines():
                    pass

        began = time.perf_counter()
        await asyncio.gather(*(one(n) for n in range(8)))
        return 8 * OUTPUT_TOKENS / (time.perf_counter() - began)

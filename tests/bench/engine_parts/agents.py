"""Agents under pressure: 24 sessions with tool pauses, device KV for 8 of them, a host tier for 8 more.

Shapes come from the recorded coding agents where the data lies beside the checkout, else from a small trace of our own;
tokens are scaled down so that a small model on one core serves them. Every server gets the same model, thread, device
KV and host RAM. The static policies are our engine told to treat every session alike; the peer is llama.cpp's server.
Goodput counts the turns whose first token came in time.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import random
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.tests.bench.engine_parts import servers
from equipoise.tests.bench.report import Baseline, Row

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "agent_traces_glm.jsonl.gz"
SESSIONS = 24
TURNS = 4
SCALE = 120
"""Recorded tokens per token here."""
LONGEST_PAUSE_S = 12.0
IN_TIME_S = 3.0
LONGEST_ADDITION_TOKENS = 200
KV_TOKENS = 8 * 230
HOST_BYTES = 8 * 230 * 23_052


@dataclass(frozen=True, slots=True)
class Step:
    new_tokens: int
    output_tokens: int
    pause_s: float
    """The tool call after it."""


@dataclass(slots=True)
class Outcome:
    ttfts_s: list[float]
    resumed_s: list[float]
    """Times to first token of turns after a tool pause."""
    span_s: float
    recomputed_tokens: int
    failed_turns: int

    @property
    def goodput(self) -> float:
        """Turns per minute whose first token came within IN_TIME_S."""
        return 60 * sum(ttft <= IN_TIME_S for ttft in self.ttfts_s) / self.span_s


def rows(model: LanguageModel) -> list[Row]:
    plans = _recorded() if DATA.exists() else _invented()
    outcomes: dict[str, Outcome] = {}

    def measure(name: str, server: AbstractContextManager[str]) -> Outcome:
        print(f"  {name} ...", file=sys.stderr, flush=True)
        with server as url:
            return asyncio.run(_run(url, plans, name))

    device = ["--kv-tokens", str(KV_TOKENS), "--slots", "32", "--max-running", "8"]
    host = [*device, "--host-bytes", str(HOST_BYTES)]
    static = {
        "drop-always": [*device, "--host-bytes", "0", "--default-policy", "drop"],
        "keep-always": [*device, "--host-bytes", "0", "--default-policy", "retain"],
        "swap-always": [*host, "--default-policy", "swap"],
    }
    for name, options in static.items():
        outcomes[name] = measure(name, servers.engine(*options))
    peer = servers.llama_server(slots=8, context_tokens=KV_TOKENS, cache_mib=HOST_BYTES >> 20)
    outcomes["llama.cpp server"] = measure("llama.cpp server", peer)
    ours = measure("ours", servers.engine(*host, "--disk-bytes", "4GiB"))
    # To know, not to beat: with a tier for everything, swapping everything loses only the copies.
    with_disk = measure(
        "swap-always with disk", servers.engine(*host, "--disk-bytes", "4GiB", "--default-policy", "swap")
    )
    best = max(outcomes, key=lambda name: outcomes[name].goodput)
    found = [
        Row(
            "agents under pressure: goodput, ratio to the best static one",
            ours.goodput / max(outcomes[best].goodput, 1e-9),
            "",
            2.0,
            "higher",
            Baseline(f"{best}, turns/min in time", outcomes[best].goodput),
            [round(ours.goodput, 2)],
            f"{SESSIONS} sessions x {TURNS} turns; in time: first token in {IN_TIME_S:g} s; only ours has a disk tier",
        ),
        Row(
            "agents under pressure: p99 of a resumed turn's first token, ratio to the best static one",
            _quantile(ours.resumed_s, 0.99) / _quantile(outcomes[best].resumed_s, 0.99),
            "",
            1 / 3,
            "lower",
            Baseline(f"{best}, p99 s", _quantile(outcomes[best].resumed_s, 0.99)),
            [round(_quantile(ours.resumed_s, q), 3) for q in (0.5, 0.9, 0.99)],
            "the issue asks for either of these two rows",
        ),
    ]
    for name, outcome in {**outcomes, "swap-always with our disk tier": with_disk, "ours": ours}.items():
        found.append(
            Row(
                f"agents under pressure: {name}, goodput",
                outcome.goodput,
                "1/min",
                None,
                "higher",
                None,
                [round(_quantile(outcome.resumed_s, q), 3) for q in (0.5, 0.9, 0.99)],
                f"runs are p50, p90, p99 s of resumed turns; {outcome.span_s:.0f} s in all; "
                f"{outcome.recomputed_tokens} tokens recomputed, {outcome.failed_turns} turns failed",
            )
        )
    return found


def _recorded() -> list[list[Step]]:
    """The first turns of SESSIONS recorded agents, tokens scaled, pauses as they were (cut at LONGEST_PAUSE_S)."""
    plans = []
    with gzip.open(DATA, "rt") as lines:
        for line in lines:
            turns = _longest_pauses(json.loads(line)["turns"])
            if len(turns) <= TURNS:
                continue
            steps: list[Step] = []
            held = 0.0
            for turn, following in itertools.pairwise(turns):
                new = max(8, int(turn["prompt_tokens"] - held) // SCALE)
                held = turn["prompt_tokens"] + turn["output_tokens"]
                pause_s = min(LONGEST_PAUSE_S, max(0.0, following["start_s"] - turn["end_s"]))
                steps.append(
                    Step(min(new, LONGEST_ADDITION_TOKENS), max(6, min(48, int(turn["output_tokens"]) // 16)), pause_s)
                )
            plans.append(steps)
            if len(plans) == SESSIONS:
                break
    return plans


def _longest_pauses(turns: list[dict[str, float]]) -> list[dict[str, float]]:
    """The stretch of TURNS turns (and the one after) whose tool calls took longest, each counted up to the cut."""

    def pauses(start: int) -> float:
        pairs = itertools.pairwise(turns[start : start + TURNS + 1])
        return sum(min(LONGEST_PAUSE_S, max(0.0, after["start_s"] - turn["end_s"])) for turn, after in pairs)

    start = max(range(max(1, len(turns) - TURNS)), key=pauses)
    return turns[start : start + TURNS + 1]


def _invented() -> list[list[Step]]:
    """Of the same shape: a long first prompt, short additions, pauses from milliseconds to ten seconds."""
    rng = random.Random(7)
    return [
        [
            Step(170 if number == 0 else rng.randint(10, 60), rng.randint(6, 30), min(12.0, rng.lognormvariate(0, 1.5)))
            for number in range(TURNS)
        ]
        for _ in range(SESSIONS)
    ]


async def _run(url: str, plans: list[list[Step]], name: str) -> Outcome:
    ttfts: list[float] = []
    resumed: list[float] = []
    failures: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as client:
        began = time.perf_counter()

        async def agent(number: int) -> None:
            await asyncio.sleep(0.15 * number)
            text = f"{name} {number}:"
            for index, step in enumerate(plans[number]):
                text += " the" * step.new_tokens
                try:
                    ttft, output = await _turn(client, number, text, step.output_tokens)
                except httpx.HTTPError:
                    failures.append(number)  # a turn that failed was not in time; the agent goes on without it
                    ttft, output = float("inf"), ""
                text += output
                ttfts.append(ttft)
                if index:
                    resumed.append(ttft)
                await asyncio.sleep(step.pause_s)

        await asyncio.gather(*(agent(number) for number in range(len(plans))))
        span_s = time.perf_counter() - began
        metrics = await client.get("/metrics")
    recomputed = 0
    for line in metrics.text.splitlines():
        if line.startswith("equipoise_engine_recomputed_tokens_total"):
            recomputed = int(float(line.split()[1]))
    return Outcome(ttfts, resumed, span_s, recomputed, len(failures))


async def _turn(client: httpx.AsyncClient, number: int, prompt: str, tokens: int) -> tuple[float, str]:
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_prompt": True,
    }
    headers = {"X-Equipoise-Session": f"s{number}", "X-Equipoise-Tenant": f"t{number % 3}"}
    began, ttft, output = time.perf_counter(), None, ""
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if ttft is None:
                ttft = time.perf_counter() - began
            for choice in json.loads(line[6:]).get("choices", []):
                output += choice.get("text") or ""
    return ttft if ttft is not None else time.perf_counter() - began, output


def _quantile(values: list[float], ratio: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(ratio * len(ordered)))]

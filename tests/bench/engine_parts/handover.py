"""Handing a 2,048-token session over while its answer streams: the longest gap its client sees between two tokens.

Two engine processes, each on one thread. The baseline is the same in the same run without KV to hand over: the session
is dropped and computed again, which is what moving a session between engines costs otherwise.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import grpc
import httpx
from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.api.v1 import peer_pb2_grpc
from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.tests.bench.engine_parts import servers
from equipoise.tests.bench.report import Baseline, Row

CONTEXT_TOKENS = 2048
OUTPUT_TOKENS = 96
HANDED_AFTER_TOKENS = 32
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class _Run:
    """One streamed answer, times in seconds."""

    first_s: float
    """From the request to the first token."""
    longest_gap_s: float
    median_gap_s: float
    handed: pb.HandOverResponse | None


def rows(
    model: LanguageModel, rounds: int = ROUNDS, context_tokens: int = CONTEXT_TOKENS, output_tokens: int = OUTPUT_TOKENS
) -> list[Row]:
    words = " the" * context_tokens
    assert len(model.tokenize(words)) == context_tokens
    with _two_engines(context_tokens) as (engines, sockets):
        moved, calm, again = [], [], []
        for number in range(rounds):
            body = {"prompt": f"{number}:{words}", "max_tokens": output_tokens, "temperature": 0}
            calm.append(_stream(engines[0], f"calm-{number}", body, None))
            moved.append(_stream(engines[0], f"moved-{number}", body, sockets))
            # The other engine has never seen this one: all of it is computed, as if its answer had to go on there.
            again.append(_stream(engines[1], f"again-{number}", {**body, "prompt": f"again {number}:{words}"}, None))
    gap, undisturbed = median(run.longest_gap_s for run in moved), median(run.median_gap_s for run in calm)
    recompute = median(run.first_s for run in again)
    handed = [run.handed for run in moved if run.handed is not None]
    return [
        Row(
            "pause of a stream handed over, ratio to computing it again",
            gap / recompute,
            "",
            0.1,
            "lower",
            Baseline(f"computing {context_tokens} tokens again at the other engine, ms", recompute * 1e3),
            [round(run.longest_gap_s / recompute, 4) for run in moved],
            f"longest gap between two tokens {gap * 1e3:.0f} ms; {handed[0].moved_bytes / 1e6:.0f} MB copied; held "
            f"still {median(answer.paused_ns for answer in handed) / 1e6:.0f} ms",
        ),
        Row(
            "pause of a stream handed over, median gaps between tokens",
            gap / undisturbed,
            "",
            None,
            "lower",
            Baseline("undisturbed, ms between tokens", undisturbed * 1e3),
            [round(run.longest_gap_s * 1e3, 2) for run in moved],
            f"runs: longest gap, ms; undisturbed longest gap {median(run.longest_gap_s for run in calm) * 1e3:.0f} ms",
        ),
    ]


@contextmanager
def _two_engines(context_tokens: int) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Their URLs and their peer sockets."""
    kv_tokens = str(2 * (context_tokens + 512))
    with tempfile.TemporaryDirectory() as folder:
        sockets = (f"unix:{Path(folder) / 'a'}", f"unix:{Path(folder) / 'b'}")
        options = ("--kv-tokens", kv_tokens, "--host-bytes", "1GiB", "--peer")
        with servers.engine(*options, sockets[0]) as a, servers.engine(*options, sockets[1]) as b:
            yield (a, b), sockets


def _stream(url: str, session: str, body: dict[str, object], sockets: tuple[str, str] | None) -> _Run:
    """`sockets`: hand the session from the first to the second in the midst of the answer."""
    began, at = time.perf_counter(), []
    handed: list[pb.HandOverResponse] = []
    handing: threading.Thread | None = None
    headers = {"X-Equipoise-Session": session}
    asked = {**body, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=headers, timeout=600) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {") or not json.loads(line[6:])["choices"][0]["text"]:
                continue
            at.append(time.perf_counter())
            if len(at) == HANDED_AFTER_TOKENS and sockets is not None:
                handing = threading.Thread(target=lambda: handed.append(_hand_over(session, sockets)))
                handing.start()
    if handing is not None:
        handing.join()
        if not handed or not handed[0].has_turn:
            raise RuntimeError(f"{session}: its answer ended before it was handed over")
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    return _Run(at[0] - began, max(gaps), median(gaps), handed[0] if handed else None)


def _hand_over(session: str, sockets: tuple[str, str]) -> pb.HandOverResponse:
    with grpc.insecure_channel(sockets[0]) as channel:
        stub = peer_pb2_grpc.EnginePeerServiceStub(channel)
        answer: pb.HandOverResponse = stub.HandOver(pb.HandOverRequest(session_id=session, to=sockets[1]))
        return answer

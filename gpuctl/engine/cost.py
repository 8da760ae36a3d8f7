"""What computing and copying KV costs on this machine: fitted when the engine starts, kept per model and machine.

Owns: the measurements, the fit, the file that keeps it, and where gamma comes from (policies/accounting.py says what it
is). Must not: decide by it (policies/kv/economy.py does).

Prefill of C tokens is taken as a C + b C^2 (matrix products per token, attention per pair); a decode step of n
sequences as t_1 + (n - 1) t_more, t_1 growing with each token of context. Each figure is the least of its repetitions:
what disturbs one only adds time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...policies.accounting import Gamma, gamma_from_table
from ..nvml import NvmlAbsence, open_nvml
from ..tiers import disk_bytes_per_second
from .compute import llama
from .compute.language_model import LanguageModel
from .compute.model import scratch_file
from .compute.runner import BatchSlice, Runner
from .schedule.cost_figures import CostFigures
from .schedule.sequence import SamplingParams, Slot

_CHUNK_TOKENS = 96
_FILE_VERSION = 2
_SHORT_TOKENS = 8
_LEAST_ROUNDS, _MOST_ROUNDS = 12, 48


def fit(runner: Runner, disk_folder: Path | None = None) -> CostFigures:
    """Measure; takes a few seconds on a small model. The runner must be empty and is empty again afterwards.

    Figures that cannot be measured in a context this small stay 0.
    """
    first, chunk = Slot(0), min(_CHUNK_TOKENS, runner.slot_tokens // 4)
    tokens = [(7 * i) % 1000 + 3 for i in range(chunk)]
    greedy = runner.sampler(SamplingParams())
    runner.step([BatchSlice(first, 0, tokens)])  # warm: the first step of a shape also plans its graph
    runner.cut(first, 0)

    def prefill(start: int) -> float:
        return _least(3, lambda: runner.step([BatchSlice(first, start, tokens)]), lambda: runner.cut(first, start))

    near = prefill(0)
    reach = 0
    while reach + chunk <= min(4 * chunk, runner.slot_tokens - chunk):
        runner.step([BatchSlice(first, reach, tokens)])
        reach += chunk
    far = prefill(reach)
    per_token, per_pair = _solve(chunk, reach, near, far)

    def cut_back() -> None:
        for n in range(many):
            runner.cut(Slot(n), held[n])

    def decode(slots: int) -> float:
        batch = [BatchSlice(Slot(n), held[n], [5], greedy) for n in range(slots)]
        return _least(3, lambda: runner.step(batch), cut_back)

    many = min(8, runner.slot_count)
    held = [reach] + [0] * (many - 1)
    for n in range(1, many):
        runner.step([BatchSlice(Slot(n), 0, tokens[:_SHORT_TOKENS])])
        held[n] = _SHORT_TOKENS
    one = decode(1)
    more = max(0.0, (decode(many) - one) / (many - 1)) if many > 1 else 0.0
    per_context_token = _context_seconds(runner, held) if many > 1 else 0.0

    began = time.perf_counter()
    chunks = [runner.take(first, 0)]
    runner.put(first, chunks)
    host = 2 * chunks[0].nbytes / (time.perf_counter() - began)
    for n in range(many):
        runner.cut(Slot(n), 0)
    greedy.close()
    return CostFigures(
        prefill_seconds_per_token=per_token,
        prefill_seconds_per_token2=per_pair,
        decode_step_seconds=one,
        decode_seconds_per_sequence=more,
        decode_seconds_per_context_token=per_context_token,
        host_bytes_per_second=host,
        disk_bytes_per_second=(disk_bytes_per_second(disk_folder) or 0.0) if disk_folder else 0.0,
    )


def _least(times: int, work: Callable[[], object], undo: Callable[[], object]) -> float:
    """The least seconds of `work`; `undo` runs after each repetition, outside the clock."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        undo()
    return best


def _context_seconds(runner: Runner, held: Sequence[int]) -> float:
    """Seconds that one token of context adds to a decode step; 0 where slot 0 holds no more than slot 1.

    A small difference of two steps: they take turns, so that what slows the machine for a while slows both, and go on
    until the longer context takes longer.
    """
    best = [float("inf"), float("inf")]
    for taken in range(_MOST_ROUNDS):
        for n in range(2):
            began = time.perf_counter()
            runner.step([BatchSlice(Slot(n), held[n], [5])])
            best[n] = min(best[n], time.perf_counter() - began)
            runner.cut(Slot(n), held[n])
        if taken >= _LEAST_ROUNDS and best[0] > best[1]:
            break
    grown = held[0] - held[1]
    return max(0.0, best[0] - best[1]) / grown if grown > 0 else 0.0


def _solve(chunk: int, reach: int, near: float, far: float) -> tuple[float, float]:
    """a and b of T(C) = a C + b C^2 from T(chunk) and T(reach + chunk) - T(reach)."""
    squares_near = chunk * chunk
    squares_far = (reach + chunk) ** 2 - reach * reach
    per_pair = max(0.0, (far - near) / (squares_far - squares_near)) if reach else 0.0
    return max(0.0, (near - per_pair * squares_near) / chunk), per_pair


def load_or_fit(runner: Runner, model: Path, threads: int, folder: Path, disk_folder: Path | None) -> CostFigures:
    """The kept figures of this model, machine, build and thread count, else a new fit, kept for the next start."""
    what = [_FILE_VERSION, model.name, model.stat().st_size, threads, llama.VERSION, platform.machine(), _cpu_name()]
    key = hashlib.sha256(json.dumps([*what, disk_folder is not None]).encode()).hexdigest()[:16]
    path = folder / f"cost-{key}.json"
    try:
        return CostFigures(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass  # not fitted yet, or a file of another shape: fit again
    figures = fit(runner, disk_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = scratch_file(folder, path.name)
        scratch.write_text(json.dumps(dataclasses.asdict(figures)))
        scratch.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs the next start a second
    return figures


def gamma_of_gpus(model: LanguageModel, gpu_layers: int) -> Gamma | None:
    """gamma by the table, where it holds: a dense model that lies whole on GPUs of one known kind. None elsewhere."""
    whole = gpu_layers < 0 or gpu_layers > model.layer_count  # the output layer counts as one
    if not whole or model.expert_count or not llama.library().llama_supports_gpu_offload():
        return None
    opened = open_nvml()
    if isinstance(opened, NvmlAbsence):
        return None
    names = [gpu.name for gpu in opened.sample()]
    opened.close()
    return gamma_from_table(model.shape, names)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor()

"""The fitted figures: positive, plausible against a measurement of their own, and kept for the next start."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest
from equipoise.gpuctl.engine import cost as costs
from equipoise.gpuctl.engine.compute import llama
from equipoise.gpuctl.engine.compute.runner import BatchSlice, ContextMode
from equipoise.gpuctl.engine.cost import _solve, fit, gamma_of_gpus, load_or_fit
from equipoise.gpuctl.engine.schedule.cost_figures import CostFigures
from equipoise.gpuctl.engine.schedule.sequence import Slot
from equipoise.gpuctl.nvml import NvmlAbsence
from equipoise.gpuctl.tiers import disk_bytes_per_second, disk_free_bytes, host_available_bytes
from equipoise.policies.accounting import GammaSource, ModelShape
from equipoise.tests.gpuctl.engine.driving import Driven
from equipoise.tests.gpuctl.engine.fakes import FakeRunner


def test_the_fit_recovers_the_coefficients_it_was_made_from():
    def cost(tokens: int) -> float:
        return 0.002 * tokens + 1e-6 * tokens**2

    per_token, per_pair = _solve(96, 384, cost(96), cost(480) - cost(384))
    assert per_token == pytest.approx(0.002)
    assert per_pair == pytest.approx(1e-6)


def test_a_turn_that_ran_alone_is_not_slowed_down_and_one_that_waited_is():
    driven = Driven(max_running=1)
    driven.engine.cost = CostFigures(prefill_seconds_per_token=0.1, decode_step_seconds=1.0)
    first = driven.turn("a", "p" * 10, 3)
    second = driven.turn("b", "p" * 10, 3)
    for _ in range(20):
        driven.steps(1)
        driven.advance(1)
    assert first.end is not None
    assert second.end is not None
    assert first.end.cost.slowdown_ratio is not None
    assert first.end.cost.slowdown_ratio == pytest.approx(2 / 3)  # two steps' time passed; the model says 1 s + 2 s
    assert second.end.cost.slowdown_ratio == pytest.approx(5 / 3)


@pytest.mark.engine
def test_a_prefill_takes_about_what_the_fit_says(make_runner):
    runner = make_runner(kv_tokens=1024, slot_tokens=1024, mode=ContextMode.UNIFIED)
    figures = fit(runner)
    assert figures.decode_step_seconds > 0
    assert figures.host_bytes_per_second > 1e8
    assert all(runner.held_tokens(Slot(n)) == 0 for n in range(runner.slot_count))
    took = float("inf")
    for _ in range(3):  # the least of three, as the fit takes it
        began = time.perf_counter()
        for start in range(0, 384, 128):
            runner.step([BatchSlice(Slot(0), start, list(range(10, 138)))])
        took = min(took, time.perf_counter() - began)
        runner.cut(Slot(0), 0)
    said = figures.prefill_seconds_per_token * 384 + figures.prefill_seconds_per_token2 * 384**2
    assert said / 3 < took < said * 5  # a shared machine: an order of magnitude is what the economy needs


def test_figures_are_kept_and_a_broken_file_is_fitted_again(monkeypatch, tmp_path):
    fits = (CostFigures(decode_step_seconds=float(number)) for number in itertools.count(1))
    monkeypatch.setattr(costs, "fit", lambda runner, disk_folder: next(fits))
    model, cache, runner = tmp_path / "model.gguf", tmp_path / "cache", FakeRunner()
    model.write_bytes(b"GGUF")

    def figures() -> float:
        return load_or_fit(runner, model, 1, cache, None).decode_step_seconds

    assert [figures(), figures()] == [1, 1]
    (path,) = cache.iterdir()
    path.write_text("{")
    assert [figures(), figures()] == [2, 2]
    assert list(cache.iterdir()) == [path], "nothing is left beside it"


def test_the_tiers_below_say_what_they_hold(tmp_path):
    assert (host_available_bytes() or 0) > 1 << 20
    assert (disk_free_bytes(tmp_path) or 0) > 1 << 20
    assert (disk_bytes_per_second(tmp_path) or 0) > 1e6
    assert disk_bytes_per_second(tmp_path / "missing") is None
    assert disk_free_bytes(tmp_path / "missing") is None
    assert host_available_bytes(tmp_path / "missing") is None


# gamma


def model(**facts: Any) -> Any:
    shape = ModelShape(32, 8, 128, 128, 2, 8_030_261_248)
    return SimpleNamespace(layer_count=32, expert_count=0, shape=shape, **facts)


def test_gamma_is_not_by_the_table_unless_the_whole_model_lies_on_gpus(monkeypatch):
    class Library:
        offloads = True

        def llama_supports_gpu_offload(self) -> bool:
            return self.offloads

    class Gpus:
        closed = 0

        def sample(self) -> list[Any]:
            return [SimpleNamespace(name="NVIDIA H200")]

        def close(self) -> None:
            self.closed += 1

    library, gpus = Library(), Gpus()
    monkeypatch.setattr(llama, "library", lambda: library)
    monkeypatch.setattr(costs, "open_nvml", lambda: gpus)
    for layers in (-1, 33):
        found = gamma_of_gpus(model(), layers)
        assert found is not None and found.source is GammaSource.TABLE
    assert gpus.closed == 2
    for layers in (0, 20, 32):
        assert gamma_of_gpus(model(), layers) is None
    experts = model()
    experts.expert_count = 8
    assert gamma_of_gpus(experts, -1) is None
    library.offloads = False
    assert gamma_of_gpus(model(), -1) is None
    library.offloads = True
    monkeypatch.setattr(costs, "open_nvml", lambda: NvmlAbsence("none", "none"))
    assert gamma_of_gpus(model(), -1) is None


@pytest.mark.engine
def test_the_shape_read_from_the_model_accounts_for_the_bytes_its_kv_takes(make_runner, model):
    runner = make_runner()
    assert model.shape.kv_bytes_per_token == pytest.approx(runner.bytes_per_token, rel=0.01)
    assert model.shape.parameter_count > model.shape.layer_count > 0
    assert model.expert_count == 0


@pytest.mark.engine
def test_a_token_of_context_is_measured_to_cost_far_less_than_a_token_of_prefill(make_runner):
    figures = fit(make_runner(kv_tokens=1024, slot_tokens=512))
    assert figures.decode_seconds_per_context_token > 0
    # By operations: reading a token's KV against multiplying with 135 million parameters is some thousandths.
    assert figures.decode_seconds_per_context_token < figures.prefill_seconds_per_token / 10

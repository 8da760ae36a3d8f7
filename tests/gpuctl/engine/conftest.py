"""The real model, loaded once a run. A test that uses it carries the marker `engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.gpuctl.engine.compute.model import resolve
from equipoise.gpuctl.engine.compute.runner import ContextMode, LlamaRunner
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.errors import EngineError
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.tiers.table import OpenTier


@pytest.fixture(scope="session")
def model() -> Iterator[LanguageModel]:
    try:
        loaded = LanguageModel(resolve("default"))
    except EngineError as error:
        pytest.skip(f"the embedded engine cannot run here: {error}")
    yield loaded
    loaded.close()


@pytest.fixture
def make_runner(model: LanguageModel) -> Iterator[Callable[..., LlamaRunner]]:
    made: list[LlamaRunner] = []

    def make(**options: Any) -> LlamaRunner:
        settings: dict[str, Any] = {"kv_tokens": 2048, "slot_count": 8, "mode": ContextMode.SPLIT, "slot_tokens": 512}
        made.append(LlamaRunner(model, **{**settings, **options}))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


@pytest.fixture
def make_engine(
    model: LanguageModel, make_runner: Callable[..., LlamaRunner]
) -> Iterator[Callable[..., tuple[Engine, LlamaRunner]]]:
    """An engine over the real model, its thread running; and its runner."""
    made: list[Engine] = []

    def make(
        *,
        kv_tokens: int = 2048,
        scheduler: SchedulerConfig | None = None,
        tiers: Sequence[OpenTier] | None = None,
        **options: Any,
    ) -> tuple[Engine, LlamaRunner]:
        runner = make_runner(kv_tokens=kv_tokens, **options)
        config = EngineConfig(kv_tokens=kv_tokens, scheduler=scheduler or SchedulerConfig())
        engine = Engine(model, runner, config, tiers)
        engine.start()
        made.append(engine)
        return engine, runner

    yield make
    for engine in made:
        engine.stop()

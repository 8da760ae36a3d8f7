"""A sampler made anew and shown what was drawn goes on as the first one would have: against the real library."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from equipoise.gpuctl.engine.compute.runner import BatchSlice, LlamaRunner
from equipoise.gpuctl.engine.compute.sampler import Sampler
from equipoise.gpuctl.engine.errors import RequestError
from equipoise.gpuctl.engine.schedule.sequence import SamplingParams, Slot

pytestmark = pytest.mark.engine

GRAMMAR = '%llguidance {}\nstart: "{" (/[a-z]+/ ":" /[0-9]+/ ","?)+ "}"'

PENALISED = """
import ctypes
from equipoise.gpuctl.engine.compute import llama
lib = llama.library()
for _ in range(3):
    sampler = lib.llama_sampler_init_penalties(1000, 64, 1.0, 1.75, 2.0)
    lib.llama_sampler_accept(sampler, 198)
    data = (llama.TokenData * 2)(llama.TokenData(198, 5.0, 0.0), llama.TokenData(300, 4.0, 0.0))
    lib.llama_sampler_apply(sampler, ctypes.byref(llama.TokenDataArray(data, 2, -1, False)))
    lib.llama_sampler_free(sampler)
    print([token.logit for token in data])
"""


def draw(runner: LlamaRunner, slot: int, sampler: Sampler, tokens: list[int], start: int, count: int) -> list[int]:
    """Go on from `tokens`, of which the first `start` are computed."""
    drawn: list[int] = []
    for _ in range(count):
        (token,) = runner.step([BatchSlice(Slot(slot), start, [*tokens, *drawn][start:], sampler)]).sampled
        assert isinstance(token, int)
        start = len(tokens) + len(drawn)
        drawn.append(token)
    return drawn


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, top_p=0.95, seed=7),
        # So narrow that there is often one candidate left: it takes a number from the generator all the same.
        SamplingParams(temperature=0.8, top_p=0.3, seed=8),
        SamplingParams(temperature=1.3, top_k=40, min_p=0.02, seed=-2, logit_bias=((300, 2.0),)),
        SamplingParams(temperature=0.8, seed=10, frequency_penalty=1.0, presence_penalty=0.5),
        SamplingParams(),
        SamplingParams(temperature=0.9, seed=9),
    ],
    ids=["top-p", "narrow", "top-k, min-p, bias", "penalties", "grammar", "grammar, random"],
)
@pytest.mark.parametrize("cut", [1, 13])
def test_a_sampler_goes_on_exactly_after_any_number_of_draws(make_runner, model, sampling, cut, request):
    runner = make_runner()
    held = "grammar" in request.node.callspec.id
    if held:
        sampling = replace(sampling, constraint=model.constraint("lark", GRAMMAR))
    prompt = model.tokenize("The shopping list as JSON, made up: ")
    undisturbed = draw(runner, 0, runner.sampler(sampling), prompt, 0, 30)
    before = draw(runner, 1, runner.sampler(sampling), prompt, 0, cut)
    assert before == undisturbed[:cut]
    tokens = [*prompt, *before]
    after = draw(runner, 1, runner.sampler(sampling, before), tokens, len(tokens) - 1, 30 - cut)
    assert [*before, *after] == undisturbed
    if sampling.temperature > 0:
        forgetful = draw(runner, 2, runner.sampler(sampling), tokens, 0, 30 - cut)
        assert forgetful != after or held, "the draws that were shown made no difference"


def test_a_token_the_grammar_forbids_is_an_error_and_not_the_end_of_the_process(make_runner, model):
    runner = make_runner()
    (wrong,) = model.tokenize("yes")
    with pytest.raises(RequestError, match="cannot have drawn"):
        runner.sampler(SamplingParams(constraint=model.constraint("lark", '%llguidance {}\nstart: "no"')), [wrong])


def test_a_seed_is_drawn_once_and_known():
    drawn = SamplingParams(temperature=1.0).seeded()
    assert drawn.seed is not None
    assert drawn.seeded() == drawn
    assert SamplingParams(temperature=1.0, seed=-1).seeded().seed not in (None, -1, 0xFFFFFFFF)


def test_kv_copied_from_a_slot_is_what_emptying_it_would_have_given(make_runner):
    runner = make_runner()
    runner.step([BatchSlice(Slot(0), 0, list(range(100, 160)))])
    copied = runner.copy(Slot(0), 0)
    tail = runner.copy(Slot(0), 45)
    assert runner.held_tokens(Slot(0)) == 60
    assert (tail.first_token, tail.count) == (45, 15)
    taken = runner.take(Slot(0), 0)
    for mine, theirs, end in zip(copied.planes, taken.planes, tail.planes, strict=True):
        assert (mine.rows == theirs.rows).all()
        assert (end.rows == theirs.rows[45:]).all()


def test_a_penalty_counts_from_the_first_sampler_of_a_process_on():
    # In processes of their own: what a wrong prototype leaves to chance differs from one to the next.
    for _ in range(6):
        done = subprocess.run([sys.executable, "-c", PENALISED], capture_output=True, text=True, check=True)
        assert done.stdout == "[1.25, 4.0]\n" * 3

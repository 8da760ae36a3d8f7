"""A session whose KV was swapped out, dropped or preempted goes on with exactly the tokens of an undisturbed run."""

from __future__ import annotations

import itertools

import pytest
from equipoise.gpuctl.directives import Drop, OutcomeStatus, Preempt, PreemptMode, SwapOut
from equipoise.gpuctl.engine.compute.runner import BatchSlice, ContextMode
from equipoise.gpuctl.engine.errors import ContextError, SwapError
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import SamplingParams, SessionId, Slot
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.asking import Asked, Watch, soon

pytestmark = pytest.mark.engine

PROMPT = "<|im_start|>system\nYou are an agent.<|im_end|>\n<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_end|>\n<|im_start|>user\nThe tool printed: {0} passed.<|im_end|>\n<|im_start|>assistant\n"
TASKS = (
    "Run the tests.",
    "List the files.",
    "Write a haiku about rain.",
    "What is a cache?",
    "Name five rivers.",
    "Explain a queue.",
    "Count to ten.",
    "Say hello in French.",
)
numbers = itertools.count()


def second_prompt(first: Asked, prompt: str, number: int) -> str:
    ended = first.text.endswith("<|im_end|>")
    return prompt + first.text + NEXT.format(number)[0 if not ended else len("<|im_end|>") :]


def two_turns(engine, session: str, task: str, between=None) -> tuple[str, str, int]:
    prompt = PROMPT.format(task)
    first = Asked(engine, session, prompt, 24)
    first.finish()
    if between is not None:
        between(session)
    second = Asked(engine, session, second_prompt(first, prompt, 17), 24)
    end = second.finish()
    return first.text, second.text, end.cached_tokens


@pytest.mark.parametrize("mode", list(ContextMode))
def test_one_session_alone_resumes_exactly_after_a_swap(make_engine, mode):
    engine, _ = make_engine(mode=mode)
    watch = Watch(engine)

    def swap(session: str) -> None:
        directive = SwapOut(
            directive_id=f"d{next(numbers)}", deadline_ns=soon(), session_id=SessionId(session), tier=KvTier.HOST
        )
        assert watch.direct(directive).status is OutcomeStatus.COMPLETED

    undisturbed = two_turns(engine, "calm", TASKS[0])
    swapped = two_turns(engine, "moved", TASKS[0], swap)
    assert swapped == undisturbed
    assert swapped[2] >= 39, "the swapped KV was not reused"
    assert engine.totals.swap_in_count == 1


def test_a_dropped_session_is_computed_again_with_the_same_tokens(make_engine):
    engine, _ = make_engine()
    watch = Watch(engine)

    def drop(session: str) -> None:
        directive = Drop(
            directive_id=f"d{next(numbers)}", deadline_ns=soon(), session_id=SessionId(session), from_token=0
        )
        assert watch.direct(directive).status is OutcomeStatus.COMPLETED

    undisturbed = two_turns(engine, "calm", TASKS[1])
    dropped = two_turns(engine, "cut", TASKS[1], drop)
    assert dropped[:2] == undisturbed[:2]
    assert dropped[2] == 0
    assert engine.totals.recomputed_tokens > 40


def eight_with(engine, watch, mode: PreemptMode | None) -> list[str]:
    """Eight turns at once; in the middle one of them is taken out of the batch."""
    session = f"s{next(numbers)}-"
    turns = [Asked(engine, f"{session}{n}", PROMPT.format(task), 40) for n, task in enumerate(TASKS)]
    for turn in turns:
        turn.wait_for_text()
    if mode is not None:
        directive = Preempt(
            directive_id=f"d{next(numbers)}", deadline_ns=soon(), session_id=SessionId(f"{session}3"), mode=mode
        )
        assert watch.direct(directive).status is OutcomeStatus.COMPLETED
    for turn in turns:
        turn.finish()
    return [turn.text for turn in turns]


@pytest.mark.parametrize("mode", list(PreemptMode))
def test_eight_sessions_are_all_undisturbed_when_one_is_taken_out_and_put_back(make_engine, mode):
    # max_running 8 and a wide step: all eight are in the batch, which is what must not matter to any of them.
    engine, _ = make_engine(kv_tokens=4096, scheduler=SchedulerConfig(max_running=8))
    watch = Watch(engine)
    calm = eight_with(engine, watch, None)
    disturbed = eight_with(engine, watch, mode)
    assert disturbed == calm
    assert engine.totals.preempted_count == 1


def test_sampling_with_a_seed_survives_a_preemption(make_engine):
    engine, _ = make_engine()
    watch = Watch(engine)
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=7)
    calm = Asked(engine, "calm", PROMPT.format(TASKS[2]), 30, sampling=sampling)
    calm.finish()
    moved = Asked(engine, "moved", PROMPT.format(TASKS[2]), 30, sampling=sampling)
    moved.wait_for_text()
    watch.direct(
        Preempt(
            directive_id=f"d{next(numbers)}",
            deadline_ns=soon(),
            session_id=SessionId("moved"),
            mode=PreemptMode.SWAP,
        )
    )
    moved.finish()
    assert moved.text == calm.text


@pytest.mark.parametrize("mode", list(ContextMode))
def test_kv_taken_in_pieces_comes_back_whole_in_another_slot(make_runner, mode):
    runner = make_runner(mode=mode)
    tokens = list(range(100, 180))
    greedy = runner.sampler(SamplingParams())
    undisturbed = runner.step([BatchSlice(Slot(0), 0, tokens), BatchSlice(Slot(1), 0, tokens[:40])])
    runner.take(Slot(1), 0)
    runner.step([BatchSlice(Slot(1), 0, tokens[:40])])
    first = runner.take(Slot(1), 0)
    runner.put(Slot(3), [first])
    runner.step([BatchSlice(Slot(3), 40, tokens[40:])])
    second = runner.take(Slot(3), 40)
    assert (second.first_token, second.count) == (40, 40)
    runner.put(Slot(5), [first, second])
    assert runner.held_tokens(Slot(5)) == 80
    follow = runner.step([BatchSlice(Slot(5), 80, [7, 8], greedy), BatchSlice(Slot(0), 80, [7, 8], greedy)])
    assert follow.sampled[0] == follow.sampled[1]
    assert undisturbed.sampled == (None, None)


def test_a_piece_that_is_missing_is_refused_and_leaves_the_slot_empty(make_runner):
    runner = make_runner()
    runner.step([BatchSlice(Slot(0), 0, [5, 6, 7, 8])])
    tail = runner.take(Slot(0), 2)
    with pytest.raises(SwapError, match="begins at token 2"):
        runner.put(Slot(0), [tail])
    assert runner.held_tokens(Slot(0)) == 0


def test_a_shared_prefix_is_computed_once_and_gives_the_same_text(make_engine):
    scheduler = SchedulerConfig(share_prefix_tokens=16)
    alone, _ = make_engine(mode=ContextMode.UNIFIED)
    shared, _ = make_engine(mode=ContextMode.UNIFIED, scheduler=scheduler)
    texts = {}
    for engine in (alone, shared):
        for number, task in enumerate(TASKS[:3]):
            turn = Asked(engine, f"s{number}", "You are an agent that runs tools in a sandbox. " * 4 + task, 12)
            turn.finish()
            texts[engine, number] = turn.text
    assert [texts[alone, n] for n in range(3)] == [texts[shared, n] for n in range(3)]
    assert shared.totals.shared_tokens > 60
    assert shared.totals.prefill_tokens < alone.totals.prefill_tokens - 60


def test_sharing_in_split_mode_is_refused_and_not_an_abort(make_runner):
    runner = make_runner(mode=ContextMode.SPLIT)
    runner.step([BatchSlice(Slot(0), 0, [5, 6, 7])])
    with pytest.raises(ContextError, match="unified"):
        runner.share(Slot(0), Slot(1), 2)

"""Where KV goes when room is needed, over the fake runner: eviction, copies, preemption, shared prefixes."""

from __future__ import annotations

from equipoise.gpuctl.directives import OutcomeStatus
from equipoise.gpuctl.engine.schedule.sequence import IdlePolicy, SessionId, Tier
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier
from equipoise.gpuctl.engine.tiers.table import DISK, HOST
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven, holding, moved, swap_out

S = SessionId


def test_idle_sessions_leave_for_the_host_when_room_is_needed():
    driven = Driven(kv_tokens=60)
    driven.complete("old", "x" * 30)
    driven.advance(1)
    driven.complete("new", "y" * 40)
    assert holding(driven, "old").longest()[0] is HOST
    assert holding(driven, "new").longest()[0] is Tier.DEVICE


def test_the_session_whose_retention_ends_first_leaves_first():
    driven = Driven(kv_tokens=70)
    driven.complete("first", "x" * 25)
    driven.advance(1)
    driven.complete("second", "y" * 25)
    driven.advance(1)
    driven.complete("third", "z" * 10)
    assert holding(driven, "first").longest()[0] is HOST
    assert holding(driven, "second").longest()[0] is Tier.DEVICE


def test_without_room_on_the_host_a_session_is_dropped_and_computed_again():
    driven = Driven(kv_tokens=60, host_tokens=0)
    first = driven.complete("old", "x" * 30)
    driven.complete("new", "y" * 40)
    assert holding(driven, "old").longest() == (Tier.NONE, 0)
    again = driven.complete("old", "x" * 30 + first.text + "more")
    assert again.text == driven.runner.expected_output("x" * 30 + first.text + "more", 5)
    assert again.end is not None
    assert again.end.cached_tokens == 0
    assert again.end.recomputed_tokens == 34


def test_a_second_swap_out_copies_only_what_was_appended():
    driven = Driven(kv_tokens=1000)
    first = driven.complete("a", "x" * 200)
    driven.direct(swap_out(driven, "a"))
    assert driven.runner.taken_tokens == 204
    driven.complete("a", "x" * 200 + first.text + "more")
    driven.direct(swap_out(driven, "a", name="again"))
    assert driven.runner.taken_tokens == 204 + 9
    assert moved(driven)[-1].tokens == 213


def test_copies_the_device_also_holds_give_way_on_a_full_host():
    driven = Driven(kv_tokens=1000, host_tokens=60)
    first = driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a"))
    driven.complete("a", "x" * 50 + first.text)
    driven.complete("b", "y" * 50)
    assert driven.direct(swap_out(driven, "b", name="b out")).status is OutcomeStatus.ACCEPTED
    driven.settle()
    assert holding(driven, "a").copy_tokens(HOST) == 0
    assert holding(driven, "a").device_tokens > 50
    assert holding(driven, "b").copy_tokens(HOST) > 50


def test_a_swapped_session_resumes_with_the_tokens_of_an_undisturbed_run():
    driven = Driven()
    first = driven.complete("a", "hello", tokens=6)
    driven.direct(swap_out(driven, "a"))
    second = driven.complete("a", "hello" + first.text + "tool says 42", tokens=6)
    assert second.text == driven.runner.expected_output("hello" + first.text + "tool says 42", 6)
    assert second.end is not None
    assert second.end.recomputed_tokens == 0


def test_running_turns_that_outgrow_the_capacity_are_preempted_and_still_right():
    driven = Driven(kv_tokens=100, max_running=8)
    # The recent turns were short, so Past-Future admits more than will fit.
    for number in range(20):
        driven.complete(f"short{number}", "s", tokens=1, ephemeral=True)
    turns = [driven.turn(f"s{n}", chr(97 + n) * 20, tokens=40) for n in range(4)]
    driven.settle()
    assert driven.engine.totals.preempted_count > 0
    for number, turn in enumerate(turns):
        assert turn.text == driven.runner.expected_output(chr(97 + number) * 20, 40)


def test_with_whole_outputs_reserved_nobody_is_preempted():
    driven = Driven(kv_tokens=100, admit_full_output=True)
    turns = [driven.turn(f"s{n}", "p" * 20, tokens=40) for n in range(4)]
    driven.settle()
    assert driven.engine.totals.preempted_count == 0
    assert all(turn.end is not None for turn in turns)


def test_the_idle_policy_says_what_becomes_of_kv_after_a_turn():
    for policy, tier in ((IdlePolicy.RETAIN, Tier.DEVICE), (IdlePolicy.SWAP, HOST), (IdlePolicy.DROP, Tier.NONE)):
        driven = Driven(idle_policy=policy)
        driven.complete("a", "hello")
        driven.settle()
        assert holding(driven, "a").longest()[0] is tier


def test_a_session_long_unused_is_forgotten():
    driven = Driven(forget_ns=60 * SECOND)
    driven.complete("a", "hello")
    driven.advance(61)
    driven.settle()
    assert not driven.engine._scheduler.sessions
    assert driven.runner.slots.get(0, []) == []


def test_a_copy_that_cannot_be_read_back_costs_a_recompute_and_nothing_else():
    driven = Driven()
    first = driven.complete("a", "hello")
    other = driven.complete("b", "other")
    driven.direct(swap_out(driven, "a"))
    driven.runner.fail_next_put = True
    again = driven.complete("a", "hello" + first.text)
    assert again.text == driven.runner.expected_output("hello" + first.text, 5)
    assert driven.engine.totals.swap_failures == 1
    assert again.end is not None
    assert again.end.cached_tokens == 0
    more = driven.complete("b", "other" + other.text)
    assert more.end is not None
    assert more.end.cached_tokens == 9


def test_a_full_host_tier_spills_idle_copies_to_disk(tmp_path):
    disk = DiskTier(tmp_path / "kv", "fake")
    driven = Driven(kv_tokens=1000, host_tokens=60, disk=disk, disk_tokens=1000)
    first = driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a"))
    driven.complete("b", "y" * 50)
    driven.direct(swap_out(driven, "b", name="second"))
    driven.settle()
    assert holding(driven, "a").longest() == (DISK, 54)
    assert holding(driven, "b").longest() == (HOST, 54)
    again = driven.complete("a", "x" * 50 + first.text + "!")
    assert again.text == driven.runner.expected_output("x" * 50 + first.text + "!", 5)
    assert again.end is not None
    assert again.end.cached_tokens == 54
    disk.close()


def test_a_corrupt_swap_file_costs_a_recompute_and_nothing_else(tmp_path):
    disk = DiskTier(tmp_path / "kv", "fake")
    driven = Driven(disk=disk, disk_tokens=1000)
    first = driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a", KvTier.DISK))
    driven.settle()
    disk.flush()
    (path,) = (tmp_path / "kv").glob("*/*.kv")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    again = driven.complete("a", "x" * 50 + first.text)
    assert again.text == driven.runner.expected_output("x" * 50 + first.text, 5)
    assert driven.engine.totals.swap_failures == 1
    disk.close()


# Shared prefixes


def test_a_session_takes_over_the_prefix_another_one_has_and_it_is_charged_once():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "s" * 50 + "alpha")
    used = driven.engine._ledger.device_used_tokens
    turn = driven.complete("b", "s" * 50 + "beta")
    assert turn.text == driven.runner.expected_output("s" * 50 + "beta", 5)
    assert turn.end is not None
    assert turn.end.cached_tokens == 50
    assert driven.engine._ledger.device_used_tokens == used + len("beta") + 4
    assert driven.engine._ledger.shared_tokens(S("a")) == 50


def test_when_one_of_two_leaves_the_other_is_charged_for_the_whole_prefix():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "s" * 50 + "alpha")
    second = driven.complete("b", "s" * 50 + "beta")
    driven.direct(swap_out(driven, "a"))
    driven.settle()
    assert driven.engine._ledger.device_used_tokens == 50 + len("beta") + 4
    assert driven.engine._ledger.shared_tokens(S("b")) == 0
    again = driven.complete("b", "s" * 50 + "beta" + second.text)
    assert again.end is not None
    assert again.end.cached_tokens == 58


def test_a_short_common_beginning_is_not_worth_sharing():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "hello alpha")
    turn = driven.complete("b", "hello beta")
    assert turn.end is not None
    assert turn.end.cached_tokens == 0


def test_a_prefix_is_not_shared_across_tenants():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "s" * 50 + "alpha", tenant="blue")
    turn = driven.complete("b", "s" * 50 + "beta", tenant="red")
    assert turn.end is not None
    assert turn.end.cached_tokens == 0


def test_a_prefix_whose_donor_was_lost_in_the_same_step_is_computed_instead():
    driven = Driven(share_prefix_tokens=10)
    first = driven.complete("a", "s" * 50 + "alpha")
    driven.direct(swap_out(driven, "a"))
    driven.settle()
    driven.runner.fail_next_put = True
    back = driven.turn("a", "s" * 50 + "alpha" + first.text, 5)
    sharer = driven.turn("b", "s" * 50 + "beta", 5)
    for _ in range(200):
        driven.engine.cycle()
        driven.engine._ledger.check_integrity()
    assert back.text == driven.runner.expected_output("s" * 50 + "alpha" + first.text, 5)
    assert sharer.text == driven.runner.expected_output("s" * 50 + "beta", 5)
    assert driven.engine.totals.swap_failures == 2, "the donor's copy, and the prefix it could not give"

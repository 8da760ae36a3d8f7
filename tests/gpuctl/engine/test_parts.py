"""The small pure parts: text, template, admission, service counters, ledger, KV pieces, the disk tier."""

from __future__ import annotations

import stat

import pytest
from equipoise.gpuctl.engine.compute.kv_image import compose, cut_to, parse
from equipoise.gpuctl.engine.compute.template import ChatTemplate
from equipoise.gpuctl.engine.compute.text import TextStream
from equipoise.gpuctl.engine.errors import ModelError, RequestError, SwapError
from equipoise.gpuctl.engine.schedule.admission import OutputLengths, peak_tokens
from equipoise.gpuctl.engine.schedule.ledger import Ledger
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Slot, TenantId, Tier
from equipoise.gpuctl.engine.schedule.token_service import TokenService
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier, _clear_abandoned
from equipoise.tests.gpuctl.engine.fakes import FakeRunner
from hypothesis import given
from hypothesis import strategies as st

# Text


def test_a_character_split_over_tokens_appears_once_whole():
    stream = TextStream()
    snowman = "☃".encode()
    assert stream.push(snowman[:1]) == ""
    assert stream.push(snowman[1:]) == "☃"


def test_an_unfinished_character_becomes_a_replacement_at_the_end():
    stream = TextStream()
    assert stream.push("☃".encode()[:2]) == ""
    assert stream.flush() == "\ufffd"


@given(text=st.text("abS#", max_size=30), cuts=st.lists(st.integers(0, 30)))
def test_a_stop_string_cuts_the_same_however_the_text_arrives(text, cuts):
    stream = TextStream(("S#", "bb"))
    data, out, last = text.encode(), "", 0
    for cut in [*sorted(cuts), len(data)]:
        out += stream.push(data[last:cut])
        last = max(last, cut)
    out += stream.flush()
    found = [at for stop in ("S#", "bb") if (at := text.find(stop)) >= 0]
    # The stop string that is complete first ends the text, so where two overlap either may.
    assert stream.stopped == bool(found)
    if not found:
        assert out == text
    else:
        assert text.startswith(out)
        assert "S#" not in out
        assert "bb" not in out


# Template


def test_a_longer_conversation_renders_to_a_text_that_begins_with_the_shorter():
    template = ChatTemplate(None)
    messages = [{"role": "user", "content": "hi"}]
    first = template.render(messages)
    answer = "hello<|im_end|>"
    messages += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    assert template.render(messages).startswith(first + answer)


def test_a_template_that_knows_no_tools_gets_them_as_a_system_message():
    tools = [{"type": "function", "function": {"name": "run", "parameters": {}}}]
    text = ChatTemplate(None).render([{"role": "user", "content": "hi"}], tools)
    assert '"name": "run"' in text
    assert text.startswith("<|im_start|>system")


def test_a_template_that_refuses_names_the_messages():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render([{"role": "user", "content": "hi"}])


def test_a_template_cannot_reach_into_python():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError):
        template.render([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_a_model_error():
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate("{% for %}")


# Admission and service


@given(turns=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=8))
def test_the_past_future_peak_is_the_largest_sum_ever_held(turns):
    """Against the definition: all grow one token a step, a turn's KV is freed when it ends."""
    peak = held_now = sum(held for held, _ in turns)
    live = list(turns)
    while live:
        live = [(held + 1, left - 1) for held, left in live if left > 0]
        held_now = sum(held for held, _ in live)
        peak = max(peak, held_now)
    assert peak_tokens(turns) == peak


def test_remaining_output_follows_the_turns_that_went_further():
    lengths = OutputLengths(window=4)
    assert lengths.remaining(0, 100) == 100
    for length in (10, 10, 10, 90):
        lengths.add(length)
    assert lengths.remaining(0, 100, quantile=0.5) == 10
    assert lengths.remaining(20, 100, quantile=0.5) == 70
    assert lengths.remaining(95, 100) == 5
    for _ in range(4):
        lengths.add(5)
    assert lengths.remaining(0, 100, quantile=0.9) == 5


def test_a_returning_tenant_starts_at_the_least_counter_of_the_active():
    service = TokenService()
    busy, late = TenantId("busy"), TenantId("late")
    service.arrive(busy)
    service.charge_input(busy, 100)
    service.charge_output(busy, 50)
    assert service.counter(busy) == 200
    service.arrive(late)
    assert service.counter(late) == 200


def test_weight_divides_what_is_charged():
    service = TokenService()
    service.set_weight(TenantId("a"), 4)
    service.charge_output(TenantId("a"), 10)
    assert service.counter(TenantId("a")) == 5


# Ledger


def test_the_books_refuse_to_balance_when_a_slot_is_lost():
    ledger = Ledger(device_capacity_tokens=100, slot_count=2, bytes_per_token=4)
    ledger.open(SessionId("a"))
    ledger.grow(SessionId("a"), 10)
    ledger.check_integrity()
    ledger._holdings[SessionId("a")].slot = None
    with pytest.raises(AssertionError, match="slot leaked"):
        ledger.check_integrity()


def test_truncating_shortens_every_copy():
    ledger = Ledger(
        device_capacity_tokens=100, slot_count=2, bytes_per_token=4, host_capacity_bytes=400, disk_capacity_bytes=400
    )
    session = SessionId("a")
    ledger.open(session)
    ledger.grow(session, 30)
    ledger.copied(session, Tier.HOST, 20)
    ledger.copied(session, Tier.DISK, 10)
    ledger.truncate(session, 15)
    assert (ledger.device_used_tokens, ledger.host_used_bytes, ledger.disk_used_bytes) == (15, 60, 40)
    assert ledger.holding(session).longest() == (Tier.DEVICE, 15)
    ledger.forget(session)
    assert (ledger.device_used_tokens, ledger.host_used_bytes, ledger.disk_used_bytes) == (0, 0, 0)
    ledger.check_integrity()


# Pieces and the disk


def chunk_of(tokens: list[int], first: int = 0):
    runner = FakeRunner()
    runner.slots[0] = [*range(first), *tokens]
    return runner.take(Slot(0), first)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), keep=st.integers(1, 30))
def test_pieces_join_to_the_whole_and_cut_at_any_token(sizes, keep):
    tokens = list(range(1000, 1000 + sum(sizes)))
    pieces, at = [], 0
    for size in sizes:
        pieces.append(chunk_of(tokens[at : at + size], first=at))
        at += size
    joined = parse(compose(cut_to(pieces, keep)))
    rows = joined.planes[0].rows.copy().view("int32").ravel().tolist()
    assert rows == tokens[:keep]


def test_pieces_with_a_gap_are_refused():
    with pytest.raises(SwapError, match="do not join"):
        compose([chunk_of([1, 2]), chunk_of([3], first=5)])


@pytest.mark.parametrize("cut", [0, 5, 20, 60])
def test_a_blob_cut_short_is_refused(cut):
    blob = compose([chunk_of([1, 2, 3])])
    with pytest.raises(SwapError):
        parse(blob[:cut])


def test_the_disk_keeps_what_was_appended_and_is_private(tmp_path):
    disk = DiskTier(tmp_path / "kv", "model")
    session = SessionId("../../etc/passwd")
    disk.append(session, [chunk_of([1, 2])], 0)
    disk.append(session, [chunk_of([3, 4], first=2)], 2)
    chunks = disk.read(session, 3)
    assert [chunk.count for chunk in chunks] == [2, 1]
    (path,) = (tmp_path / "kv").rglob("*.kv")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent.parent == tmp_path / "kv"
    disk.close()
    assert not list((tmp_path / "kv").rglob("*.kv"))


def test_a_conversation_cut_since_is_written_anew(tmp_path):
    disk = DiskTier(tmp_path / "kv", "model")
    session = SessionId("a")
    disk.append(session, [chunk_of([1, 2, 3, 4])], 0)
    disk.append(session, [chunk_of([9], first=2)], 2)
    rows = [t for chunk in disk.read(session, 3) for t in chunk.planes[0].rows.copy().view("int32").ravel().tolist()]
    assert rows == [1, 2, 9]
    disk.close()


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "remove"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    disk = DiskTier(tmp_path / "kv", "model")
    session = SessionId("a")
    disk.append(session, [chunk_of([1, 2, 3, 4])], 0)
    disk.flush()
    (path,) = (tmp_path / "kv").rglob("*.kv")
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-5])
    elif damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "foreign":
        data[10] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(SwapError, match=r"\.kv"):
        disk.read(session, 4)
    disk.close()


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path):
    disk = DiskTier(tmp_path / "kv", "model")
    path = disk._path(SessionId("a"))
    path.symlink_to("/dev/full")
    disk.append(SessionId("a"), [chunk_of([1])], 0)
    disk.flush()
    failures = disk.take_failures()
    assert "No space left" in failures[SessionId("a")]
    assert not path.is_symlink()
    with pytest.raises(SwapError):
        disk.read(SessionId("a"), 1)
    disk.close()


def test_what_a_dead_engine_left_is_cleared_and_a_living_ones_is_not(tmp_path):
    folder = tmp_path / "kv"
    dead = folder / "engine-999999999"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "x.kv").write_bytes(b"old")
    alive = DiskTier(folder, "model")
    assert not dead.exists()
    alive.append(SessionId("a"), [chunk_of([1])], 0)
    alive.flush()
    _clear_abandoned(folder)
    assert alive.read(SessionId("a"), 1)
    alive.close()

"""Dataclasses and messages, field by field: what crosses, and that nothing is lost in silence."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NewType

import pytest
from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.gpuctl.api.v1 import peer_pb2
from equipoise.gpuctl.translation import Enumeration, OneOf, Translation, check_parts
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

Name = NewType("Name", str)


class Tier(enum.Enum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    NONE = "none"


TIERS = Enumeration(Tier, pb.KvTier, unknown=Tier.NONE)


@dataclass(frozen=True, slots=True)
class Moved:
    """Of SessionMoved."""

    session: Name
    tenant_id: str
    from_tier: Tier
    to_tier: Tier | None
    tokens: int
    moved_bytes: int
    duration_ns: int | None
    directive_id: str | None
    seen_ns: int = 7


MOVED = Translation(Moved, pb.SessionMoved, renamed={"session": "session_id"}, here=("seen_ns",), using=(TIERS,))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of TurnCost, where three fields have presence."""

    pte: float | None
    wasted_pte: float
    energy_joules: float | None
    duration_ns: int
    ideal_ns: int | None


@dataclass(frozen=True, slots=True)
class Token:
    """Of SampledToken, whose `top` are messages of two fields."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


# What crosses


@given(
    st.builds(
        Moved,
        session=st.text(),
        tenant_id=st.text(),
        from_tier=st.sampled_from(Tier),
        to_tier=st.sampled_from(Tier) | st.none(),
        tokens=st.integers(0, 2**62),
        moved_bytes=st.integers(0, 2**62),
        duration_ns=st.integers(1, 2**62) | st.none(),
        directive_id=st.text(min_size=1) | st.none(),
    )
)
def test_every_field_comes_back_as_it_went(moved):
    message = pb.SessionMoved.FromString(MOVED.encode(moved).SerializeToString())
    assert message.session_id == moved.session
    assert MOVED.decode(message) == moved


def test_without_presence_none_is_the_zero_and_comes_back_as_none():
    message = MOVED.encode(Moved(Name("s"), "t", Tier.HOST, None, 1, 2, None, None))
    assert (message.to_tier, message.duration_ns, message.directive_id) == (pb.KV_TIER_UNSPECIFIED, 0, "")
    assert message.from_tier == pb.KV_TIER_HOST
    back = MOVED.decode(message)
    assert (back.to_tier, back.duration_ns, back.directive_id) == (None, None, None)


def test_with_presence_zero_is_not_none():
    costs = Translation(Cost, pb.TurnCost)
    told = Cost(pte=0.0, wasted_pte=0.0, energy_joules=None, duration_ns=0, ideal_ns=0)
    message = costs.encode(told)
    assert message.HasField("pte") and message.HasField("ideal_ns") and not message.HasField("energy_joules")
    assert costs.decode(message) == told


@pytest.mark.parametrize("number", [0, 99])
def test_a_number_this_version_does_not_know_stands_for_what_the_enumeration_says(number):
    assert MOVED.decode(pb.SessionMoved(from_tier=number)).from_tier is Tier.NONE


def test_values_that_are_no_message_of_their_own_cross_as_one_by_their_order():
    tokens = Translation(Token, peer_pb2.SampledToken)
    message = tokens.encode(Token(5, -0.5, ((6, -1.0), (7, -2.0))))
    assert [(top.token, top.number) for top in message.top] == [(6, -1.0), (7, -2.0)]
    assert tokens.decode(message) == Token(5, -0.5, ((6, -1.0), (7, -2.0)))


def test_collections_come_back_as_what_they_were_and_sets_are_sent_in_order():
    @dataclass(frozen=True)
    class Hello:
        supported_directives: frozenset[str]

    hello = Translation(
        Hello,
        pb.EngineHello,
        there=set(pb.EngineHello.DESCRIPTOR.fields_by_name) - {"supported_directives"},
    )
    message = hello.encode(Hello(frozenset({"b", "a"})), kind="fake")
    assert (list(message.supported_directives), message.kind) == (["a", "b"], "fake")
    assert hello.decode(message) == Hello(frozenset({"a", "b"}))


def test_a_nested_dataclass_crosses_as_its_message_and_an_absent_one_is_none_where_that_is_allowed():
    @dataclass(frozen=True)
    class Ended:
        turn: str
        cost: Cost | None

    others = set(pb.TurnEnded.DESCRIPTOR.fields_by_name) - {"turn_id", "cost"}
    ended = Translation(Ended, pb.TurnEnded, renamed={"turn": "turn_id"}, there=others)
    told = Ended("t1", Cost(1.0, 0.5, None, 2, None))
    assert ended.decode(ended.encode(told)) == told
    assert ended.decode(pb.TurnEnded(turn_id="t2")) == Ended("t2", None)


def test_what_is_given_wins_over_what_the_message_says():
    back = MOVED.decode(pb.SessionMoved(tokens=5, duration_ns=3), seen_ns=9, tokens=6)
    assert (back.seen_ns, back.tokens, back.duration_ns) == (9, 6, 3)


# What does not match up


@dataclass(frozen=True)
class Drop:
    session_id: str
    from_token: int


@dataclass(frozen=True)
class DropAndMore:
    session_id: str
    from_token: int
    why: str


@dataclass(frozen=True)
class DropLess:
    session_id: str


@dataclass(frozen=True)
class DropText:
    session_id: str
    from_token: str


@dataclass(frozen=True)
class DropFloat:
    session_id: str
    from_token: float


@dataclass(frozen=True)
class DropMany:
    session_id: str
    from_token: tuple[int, ...]


@dataclass(frozen=True)
class DropEither:
    session_id: str
    from_token: int | str


@dataclass(frozen=True)
class Tiered:
    session_id: str
    tier: Tier


@pytest.mark.parametrize(
    ("kind", "message", "more", "named"),
    [
        (DropAndMore, pb.Drop, {}, "lacks why"),
        (DropLess, pb.Drop, {}, "lacks from_token"),
        (DropText, pb.Drop, {}, "from_token"),
        (DropFloat, pb.Drop, {}, "from_token"),
        (DropMany, pb.Drop, {}, "from_token"),
        (DropEither, pb.Drop, {}, "from_token"),
        (Tiered, pb.SwapOut, {}, "tier.* Enumeration"),
        (Drop, pb.Drop, {"here": ("from_tokn",)}, "no from_tokn"),
        (Drop, pb.Drop, {"there": ("from_tokn",)}, "no from_tokn"),
        (Drop, pb.Drop, {"there": ("from_token",)}, "both have from_token"),
        (Drop, pb.Drop, {"renamed": {"session": "session_id"}}, "no session"),
        (Drop, pb.Drop, {"renamed": {"session_id": "session"}}, "no session"),
        (Drop, pb.Drop, {"here": ("from_token",)}, "lacks from_token"),
        (Drop, pb.Drop, {"renamed": {"session_id": "from_token"}}, "two fields .* from_token"),
    ],
)
def test_fields_that_do_not_match_up_are_refused_by_name(kind, message, more, named):
    with pytest.raises(TypeError, match=named):
        Translation(kind, message, **more)


def test_a_nested_field_that_does_not_match_up_is_refused_by_name():
    @dataclass(frozen=True)
    class Ended:
        cost: Tiered

    others = set(pb.TurnEnded.DESCRIPTOR.fields_by_name) - {"cost"}
    with pytest.raises(TypeError, match=r"session_id"):
        Translation(Ended, pb.TurnEnded, there=others)


def test_members_of_an_enum_that_do_not_match_up_are_refused_by_name():
    class Less(enum.Enum):
        DEVICE = "device"
        HOST = "host"
        FAR = "far"

    with pytest.raises(TypeError, match="DISK, FAR, NONE"):
        Enumeration(Less, pb.KvTier, unknown=Less.FAR)
    with pytest.raises(TypeError, match="only one of them has DISK, NONE"):
        Enumeration(Less, pb.KvTier, unknown=Less.FAR, here=(Less.FAR,))


def test_parts_that_leave_a_field_out_or_have_it_twice_are_refused():
    whole = Translation(Drop, pb.Drop)
    part = Translation(DropLess, pb.Drop, there=None)
    check_parts(pb.Drop, (part,), there=("from_token",))
    with pytest.raises(TypeError, match="from_token is in no part"):
        check_parts(pb.Drop, (part,))
    with pytest.raises(TypeError, match="session_id is in several parts"):
        check_parts(pb.Drop, (whole, part))


# Members of a oneof


@dataclass(frozen=True)
class Release:
    session_id: str


REST = (
    "set_tenant_weight",
    "hold",
    "preempt",
    "swap_out",
    "swap_in",
    "retain",
    "set_capacity",
    "set_host_tier_capacity",
    "peer_is",
)


def directives(*members: Translation[Any, Any], rest: tuple[str, ...] = REST) -> OneOf[Any, Any]:
    return OneOf(pb.EngineDirective, "directive", members, there=rest)


def test_a_member_crosses_under_the_name_that_stands_for_it():
    both = directives(Translation(Drop, pb.Drop), Translation(Release, pb.Release))
    message = both.encode(Release("s"), directive_id="d")
    assert (message.WhichOneof("directive"), message.directive_id) == ("release", "d")
    assert both.decode(message) == Release("s")
    assert both.name(Drop) == "drop"


@pytest.mark.parametrize("message", [pb.EngineDirective(), pb.EngineDirective(hold=pb.Hold(session_id="s"))])
def test_nothing_and_what_stands_for_none_of_the_dataclasses_is_none(message: Message):
    assert directives(Translation(Drop, pb.Drop), Translation(Release, pb.Release)).decode(message) is None


def test_a_member_that_nothing_stands_for_is_refused_by_name():
    with pytest.raises(TypeError, match="nothing stands for release"):
        directives(Translation(Drop, pb.Drop))
    with pytest.raises(TypeError, match="no member left for Drop"):
        directives(Translation(Drop, pb.Drop), Translation(Release, pb.Release), rest=(*REST, "drop"))

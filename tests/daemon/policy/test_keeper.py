"""Which files a policy is made of, and its change while the daemon runs: all of it, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from equipoise.daemon.policy import PolicyError, PolicyKeeper, Sources, Text
from equipoise.policies.events import PolicyApplied
from equipoise.policies.model import NS_PER_S

DOCUMENT = "apiVersion: equipoise/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n  memory: {maxWait: 20s}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(DOCUMENT)
    return path


class Kept:
    """A keeper, what it told, and a clock of the test's own."""

    def __init__(self, *words: str | Path) -> None:
        self.told: list[PolicyApplied] = []
        self.keeper = PolicyKeeper(Sources([str(word) for word in words]), lambda: 7)
        self.keeper.told_to(self.told.append)

    @property
    def wait_s(self) -> float:
        return self.keeper.in_force.policy.memory.wait_ns / NS_PER_S

    @property
    def mode(self) -> str:
        return self.keeper.in_force.policy.mode.value

    def look(self) -> None:
        """As often as it takes for a change to be seen."""
        self.keeper.look()
        self.keeper.look()


# -- sources


def test_a_file_has_the_layers_beside_it_by_name_and_a_folder_is_its_files(file: Path) -> None:
    layers = file.parent / "policies.d"
    layers.mkdir()
    for name in ("20-b.yaml", "10-a.yml", "note.txt"):
        (layers / name).write_text("spec: {}")
    assert [path.name for path in Sources([str(file)]).files()] == ["policy.yaml", "10-a.yml", "20-b.yaml"]
    assert [path.name for path in Sources(["laptop", str(layers)]).files()] == ["laptop.yaml", "10-a.yml", "20-b.yaml"]
    assert [path.name for path in Sources().files()] == ["default.yaml"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "laptpo",
            "laptpo: No such file or directory: give a policy document, or none for the built-in one, or one of ",
        ),
        ("empty", "empty: no policy document there: give a file, or one of default, "),
        ("binary.yaml", "binary.yaml: not UTF-8 text: give a policy document"),
    ],
)
def test_what_is_no_policy_is_named_with_what_there_is(
    word: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError) as caught:
        Sources([word]).load()
    assert str(caught.value).startswith(says)


# -- reloading


def test_a_changed_file_is_in_force_once_it_has_settled(file: Path) -> None:
    kept = Kept(file)
    file.write_text(DOCUMENT.replace("20s", "5s"))
    kept.keeper.look()
    assert kept.wait_s == 20, "it may be in the middle of being written"
    kept.keeper.look()
    assert kept.wait_s == 5
    (event,) = kept.told
    assert event.policy is kept.keeper.in_force.policy
    kept.look()
    assert len(kept.told) == 1


def test_a_layer_that_comes_or_goes_is_a_change(file: Path) -> None:
    kept = Kept(file)
    layer = file.parent / "policies.d" / "site.yaml"
    layer.parent.mkdir()
    layer.write_text("spec: {mode: dry-run}")
    kept.look()
    assert kept.mode == "dry-run"
    assert kept.keeper.in_force.layers == (str(file), str(layer))
    layer.unlink()
    kept.look()
    assert kept.mode == "enforce"


def test_a_broken_edit_keeps_the_old_policy_and_says_so_until_it_is_mended(file: Path) -> None:
    kept = Kept(file)
    file.write_text(DOCUMENT.replace("maxWait", "maxWiat"))
    kept.look()
    assert kept.wait_s == 20 and not kept.told
    assert kept.keeper.in_force.refused == (f"{file}:5:12: spec.memory.maxWiat: unknown key; did you mean `maxWait`?",)
    kept.keeper.on_hangup()
    assert kept.keeper.in_force.refused
    file.write_text(DOCUMENT.replace("20s", "6s"))
    kept.keeper.on_hangup()
    assert kept.wait_s == 6 and not kept.keeper.in_force.refused


def test_a_file_that_vanishes_keeps_the_old_policy(file: Path) -> None:
    kept = Kept(file)
    file.unlink()
    kept.look()
    assert kept.wait_s == 20
    assert "No such file" in kept.keeper.in_force.refused[0]


def test_a_file_replaced_by_another_of_its_size_and_time_is_read_again(file: Path) -> None:
    kept = Kept(file)
    was = file.stat()
    other = file.with_name("other")
    other.write_text(DOCUMENT.replace("20s", "30s"))
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    other.replace(file)
    kept.look()
    assert kept.wait_s == 30


def test_texts_are_applied_whole_or_not_at_all_and_the_next_edit_wins(file: Path) -> None:
    kept = Kept(file)
    texts = [Text("mine", DOCUMENT), Text("over", "spec: {memory: {maxWait: 1s}}")]
    assert kept.keeper.apply(texts, only_check=True) == ["spec.memory.maxWait: 20s -> 1s"]
    assert kept.wait_s == 20
    assert kept.keeper.apply(texts) == ["spec.memory.maxWait: 20s -> 1s"]
    assert kept.wait_s == 1 and kept.keeper.in_force.layers == ("mine", "over")
    with pytest.raises(PolicyError):
        kept.keeper.apply([Text("worse", "spec: {}")])
    assert kept.wait_s == 1
    kept.look()
    assert kept.wait_s == 1, "its files are as they were"
    file.write_text(DOCUMENT.replace("20s", "9s"))
    kept.look()
    assert kept.wait_s == 9


def test_what_changes_nothing_is_no_event(file: Path) -> None:
    kept = Kept(file)
    file.write_text("# a comment\n" + DOCUMENT)
    kept.look()
    assert not kept.told


def test_a_daemon_does_not_start_with_a_policy_that_nobody_can_read(file: Path) -> None:
    file.write_text("spec: [")
    with pytest.raises(PolicyError):
        Kept(file)

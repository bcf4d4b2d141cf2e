from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import cards
from pipeline.models.cards import Card, CardStore, cards_path


def card(fingerprint: str, reference: str = "pixels", **changes: object) -> Card:
    known = Card(
        fingerprint=fingerprint,
        name=f"teacher-{fingerprint}",
        classes=("a", "b"),
        parameters=7,
        feature_dim=5,
        accuracy=0.5,
        examples=4,
        reference=reference,
        centres=torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        seconds=0.25,
        origin="o",
    )
    return dataclasses.replace(known, **changes)


def test_cards_are_kept_beside_the_zoo() -> None:
    assert cards_path("zoos/zoo.yaml") == cards_path("zoos/zoo.parquet") == Path("zoos/zoo.cards.arrow")


def test_a_store_gives_back_what_was_added(tmp_path: Path) -> None:
    store = CardStore(tmp_path / "zoo.cards.arrow")
    assert len(store) == 0 and store.get("1", "pixels") is None
    bare = card("2", feature_dim=None, accuracy=None, centres=None, examples=0)
    store.add([card("1"), bare])
    for found in (store, CardStore.open(tmp_path / "zoo.cards.arrow")):
        assert len(found) == 2
        assert found.get("1", "pixels") == card("1") and found.get("2", "pixels") == bare
        assert torch.equal(found.get("1", "pixels").centres, card("1").centres)
        assert found.get("2", "pixels").centres is None
        assert found.get("1", "other") is None and found.get("3", "pixels") is None


def test_the_last_card_wins_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_BATCH_ROWS", 2)
    store = CardStore(tmp_path / "zoo.cards.arrow")
    store.add(card(str(number)) for number in range(5))
    before = store.get("4", "pixels")
    store.add([card("1", parameters=8), card("1", "flat-1"), card("4", parameters=1), card("4", parameters=9)])
    store.add([])
    found = CardStore(store.path)
    assert len(found) == 6
    assert [found.get(str(number), "pixels").parameters for number in range(5)] == [7, 8, 7, 7, 9]
    assert found.get("1", "flat-1").parameters == 7
    assert torch.equal(before.centres, card("4").centres)  # what was read does not change
    sizes = [len(batch) for batch in found._batches]
    assert max(sizes) == 2 and all(one + next_ > 2 for one, next_ in pairwise(sizes))


def test_what_another_process_adds_meanwhile_is_kept(tmp_path: Path) -> None:
    ours, theirs = (CardStore(tmp_path / "zoo.cards.arrow") for _ in range(2))
    theirs.add([card("theirs")])
    assert ours.get("theirs", "pixels") is None
    ours.add([card("ours")])
    assert ours.get("theirs", "pixels") == card("theirs")
    assert len(CardStore(ours.path)) == 2
    assert theirs.get("theirs", "pixels") == card("theirs")  # its map is of the file that it opened


def test_a_store_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zoo\.cards\.arrow: cards can't be written \(No such file or directory\)"):
        CardStore(tmp_path / "absent" / "zoo.cards.arrow").add([card("1")])


def truncated(path: Path) -> None:
    CardStore(path).add([card(str(number)) for number in range(20)])
    path.write_bytes(path.read_bytes()[:-100])


def another_table(path: Path) -> None:
    with pa.ipc.new_file(path, pa.schema([("fingerprint", pa.string())])) as writer:
        writer.write_table(pa.table({"fingerprint": ["1"]}))


def another_version(path: Path) -> None:
    schema = cards._SCHEMA.with_metadata({cards._KEY: json.dumps({"version": 99}).encode()})
    with pa.ipc.new_file(path, schema):
        pass


def other_columns(path: Path) -> None:
    with pa.ipc.new_file(path, cards._SCHEMA.remove(2)):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"damaged \(.*\); delete it and run `faculty zoo cards` again"),
        (lambda path: path.write_bytes(b""), r"damaged \(.*\); delete it"),
        (lambda path: path.write_bytes(b"teachers: []"), r"damaged \(.*\); delete it"),
        (another_table, "holds no teacher cards; move it away, or delete it"),
        (another_version, "format version 99, this release reads 1; delete it"),
        (other_columns, r"damaged \(its columns are not those of teacher cards\); delete it"),
    ],
)
def test_a_file_that_holds_no_cards_is_told(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "zoo.cards.arrow"
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        CardStore(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_damage_within_a_file_is_told_when_it_is_met(tmp_path: Path) -> None:
    store = CardStore(tmp_path / "zoo.cards.arrow")
    store.add([card("1", classes=("unmistakable", "b")), card("2")])
    content = store.path.read_bytes()
    store.path.write_bytes(content.replace(b"unmistakable", b"\xff" * 12))
    found = CardStore(store.path)
    for touch in (lambda: found.get("1", "pixels"), lambda: found.add([card("3")])):
        with pytest.raises(UserError, match=r"zoo\.cards\.arrow: teacher cards are damaged .*; delete it"):
            touch()

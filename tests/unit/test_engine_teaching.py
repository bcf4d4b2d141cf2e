"""What the teachers say: files that come back as they were stored."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.engine.spec import RAW, SPOKEN
from pipeline.engine.teaching import Speaker, Teaching
from pipeline.errors import StageError

IDS = [f"{number:032x}" for number in range(6)]
WHO = torch.tensor([0, 1, 1, 0, 1, 0])


def spoken(folder: Path, name: str, size: int, seed: int) -> Speaker:
    generator = torch.Generator().manual_seed(seed)
    home = folder / "spoken" / name
    home.mkdir(parents=True)
    p, carried = torch.rand(6, size, generator=generator).softmax(1), torch.rand(6, 3, generator=generator).softmax(1)
    save_file({"p": p.half(), "carried": carried.half()}, home / SPOKEN)
    save_file({"logits": torch.randn(6, size).half(), "features": torch.randn(6, 7).half()}, home / RAW)
    return Speaker(name, tuple("abcd"[:size]), 0.5, str(home))


def save(folder: Path, speakers: list[Speaker], shares: torch.Tensor | None = None) -> str:
    shares = torch.nn.functional.one_hot(WHO, 2).t() * torch.linspace(0.25, 1, 6) if shares is None else shares
    costs = [torch.eye(3, 4).t(), torch.eye(2, 3)]  # the first one does not lie in memory row by row
    return Teaching.save(folder, ids=IDS, speakers=speakers, costs=costs, shares=shares)


@pytest.fixture
def speakers(tmp_path: Path) -> list[Speaker]:
    return [spoken(tmp_path, "wide", 4, 0), spoken(tmp_path, "narrow", 2, 1)]


def test_rows_come_back_as_they_were_stored(tmp_path: Path, speakers: list[Speaker]) -> None:
    save(tmp_path / "teaching", speakers)
    teaching = Teaching.open(tmp_path / "teaching")
    said = teaching.batch(torch.tensor([4, 0]), torch.tensor([1, 2]))
    torch.testing.assert_close(said.shares, torch.tensor([[0.0, 0.25], [0.85, 0.0]]), atol=1e-3, rtol=0)
    assert [tuple(p.shape) for p in said.p] == [(2, 4), (2, 2)] and said.target.shape == (2, 2, 3)
    for p in (*said.p, said.target):
        torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]), atol=1e-6, rtol=0)
    assert said.logits is None and said.features is None
    assert teaching.shares() == {"wide": 3, "narrow": 3} and len(teaching) == 6
    assert teaching.speakers[0].classes == ("a", "b", "c", "d")


def test_views_lie_one_after_the_other(tmp_path: Path) -> None:
    """Three images in two views, in files of six rows."""
    speakers = [spoken(tmp_path, "wide", 4, 0), spoken(tmp_path, "narrow", 2, 1)]
    save(tmp_path / "plain", speakers)
    costs = [torch.eye(4, 3), torch.eye(2, 3)]
    folder = tmp_path / "views"
    Teaching.save(folder, ids=IDS[:3], speakers=speakers, costs=costs, shares=torch.ones(2, 3), views=2)
    teaching, plain = Teaching.open(folder), Teaching.open(tmp_path / "plain")
    assert teaching.views == 2 and plain.views is None and len(teaching) == 3
    rows, views = torch.tensor([2, 0, 1]), torch.tensor([1, 0, 1])
    found = teaching.batch(rows, views, {"said.logits"})
    expected = plain.batch(torch.tensor([5, 0, 4]), torch.zeros(3, dtype=torch.int64), {"said.logits"})
    assert torch.equal(found.target, expected.target) and torch.equal(found.logits[0], expected.logits[0])
    assert torch.equal(plain.batch(rows, views).target, plain.batch(rows, 0 * views).target)


def test_logits_and_features_come_where_they_are_wanted(tmp_path: Path, speakers: list[Speaker]) -> None:
    save(tmp_path / "teaching", speakers)
    teaching = Teaching.open(tmp_path / "teaching")
    said = teaching.batch(torch.arange(3), torch.zeros(3, dtype=torch.int64), {"said.logits", "said.features"})
    assert [tuple(one.shape) for one in said.logits] == [(3, 4), (3, 2)]
    assert [tuple(one.shape) for one in said.features] == [(3, 7), (3, 7)]
    torch.testing.assert_close(teaching.features(torch.arange(3))[1], said.features[1])


def test_rows_of_another_table_are_refused(tmp_path: Path, speakers: list[Speaker]) -> None:
    save(tmp_path / "teaching", speakers)
    teaching = Teaching.open(tmp_path / "teaching")
    teaching.check(IDS)
    for other in (IDS[::-1], IDS[:-1]):
        with pytest.raises(StageError, match="another image table"):
            teaching.check(other)


def test_the_digest_follows_the_content(tmp_path: Path, speakers: list[Speaker]) -> None:
    same = save(tmp_path / "a", speakers)
    assert same == save(tmp_path / "b", speakers)
    assert same != save(tmp_path / "c", speakers, torch.ones(2, 6))
    assert same != save(tmp_path / "d", speakers[::-1])


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    one = tmp_path / "one"
    save(one / "teaching", [spoken(one, "wide", 4, 0), spoken(one, "narrow", 2, 1)])
    before = Teaching.open(one / "teaching").batch(torch.arange(6), torch.ones(6, dtype=torch.int64))
    shutil.move(one, tmp_path / "two")
    after = Teaching.open(tmp_path / "two" / "teaching").batch(torch.arange(6), torch.ones(6, dtype=torch.int64))
    assert torch.equal(before.target, after.target)

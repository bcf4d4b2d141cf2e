"""What teachers say, through the cache: an image is shown once, however often it is asked of."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.cache.store import CacheError
from pipeline.data.spec import AugmentSpec
from pipeline.models import nets
from pipeline.models.spec import PreprocessingSpec
from pipeline.models.teacher import Teacher, predict
from pipeline.settings_files import load_settings
from pipeline.stages.outputs import (
    CLEAN,
    CachedTeacher,
    Output,
    cache_root,
    look_after,
    outputs_of,
    tell_kept,
    view_name,
)
from tests.tiny import make_settings

GREY = PreprocessingSpec(channels=1, mean=(0.5,), std=(0.5,))
IDS = np.random.default_rng(0).integers(0, 256, (20, 16), dtype=np.uint8)
IMAGES = torch.randint(0, 256, (20, 1, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Counted:
    """A teacher, and how many images it was shown."""

    def __init__(self, classes: int = 4) -> None:
        torch.manual_seed(0)
        names = [f"c{number}" for number in range(classes)]
        self.teacher = Teacher(nets.mlp(classes, 1, 16, 12), name="t", classes=names, preprocessing=GREY)
        self.loaded, self.shown = 0, 0

    def load(self) -> Teacher:
        self.loaded += 1
        return self.teacher


def ask(cached: CachedTeacher, counted: Counted, places: list[int], **changes) -> Output:
    where = torch.tensor(places)

    def read(rows: torch.Tensor) -> torch.Tensor:
        counted.shown += len(rows)
        return IMAGES[where[rows]]

    fields = {"batch_size": 4, "autocast": None} | changes
    return outputs_of(cached, counted.load, IDS[places], read, **fields)


def cached(root: Path, **changes) -> CachedTeacher:
    return CachedTeacher(**({"root": str(root), "fingerprint": "f", "precision": "fp16", "top_k": None} | changes))


def test_an_image_is_shown_once(tmp_path: Path) -> None:
    where, counted = cached(tmp_path), Counted()
    exact = predict(counted.teacher, [IMAGES])
    first = ask(where, counted, [3, 1, 4])
    assert (first.computed, counted.shown, counted.loaded) == (3, 3, 1)
    again = ask(where, counted, [4, 3])
    assert (again.computed, counted.shown, counted.loaded, again.seconds) == (0, 3, 1, 0.0)
    assert torch.equal(again.logits, first.logits[[2, 0]])
    more = ask(where, counted, [0, 1, 2, 3, 4, 5])
    assert (more.computed, counted.shown) == (3, 6)
    torch.testing.assert_close(more.logits, exact.logits[:6], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(more.features, exact.features[:6], atol=2e-3, rtol=1e-3)
    assert more.logits.dtype == more.features.dtype == torch.float32


def test_a_cache_that_can_not_be_read_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counted = Counted()
    found = ask(cached(tmp_path / "file"), counted, [0, 1])
    assert found.note and counted.shown == 2
    assert torch.equal(found.logits, ask(cached(tmp_path / "folder"), Counted(), [0, 1]).logits)


def test_what_was_kept_changes_a_result_by_rounding_alone(tmp_path: Path) -> None:
    alone = ask(cached(tmp_path / "a"), Counted(), list(range(8)))
    ask(cached(tmp_path / "b"), Counted(), [2, 5])
    beside = ask(cached(tmp_path / "b"), Counted(), list(range(8)))
    torch.testing.assert_close(beside.logits, alone.logits, atol=2e-3, rtol=1e-3)
    assert torch.equal(ask(cached(tmp_path / "b"), Counted(), list(range(8))).logits, beside.logits)


@pytest.mark.parametrize("changes", [{"fingerprint": "g"}, {"precision": "fp32"}, {"top_k": 2}])
def test_another_teacher_or_precision_is_asked_anew(tmp_path: Path, changes) -> None:
    ask(cached(tmp_path), Counted(), [0, 1])
    counted = Counted()
    ask(cached(tmp_path, **changes), counted, [0, 1])
    assert counted.shown == 2


def test_another_view_or_type_is_asked_anew(tmp_path: Path) -> None:
    counted, augment = Counted(), AugmentSpec(shift=1, views=3)
    for changes in ({}, {"view": view_name(augment, 1)}, {"view": view_name(augment, 2)}, {"autocast": torch.bfloat16}):
        before = counted.shown
        for _ in range(2):
            ask(cached(tmp_path), counted, [0, 1], **changes)
        assert counted.shown == before + 2
    assert view_name(augment, 0) == CLEAN
    names = {view_name(AugmentSpec(shift=s, flip=f), v) for s in (1, 2) for f in (True, False) for v in (1, 2)}
    assert len(names) == 8
    assert view_name(augment, 1) == view_name(AugmentSpec(shift=1, views=8), 1)  # how many there are does not matter


def test_the_largest_logits_are_enough(tmp_path: Path) -> None:
    counted = Counted(classes=40)
    exact = predict(counted.teacher, [IMAGES[:6]]).logits.log_softmax(1)
    found = ask(cached(tmp_path, top_k=5, precision="fp32"), counted, list(range(6))).logits
    kept = exact.topk(5, 1).indices
    torch.testing.assert_close(found.log_softmax(1).gather(1, kept), exact.gather(1, kept), atol=1e-5, rtol=0)
    again = ask(cached(tmp_path, top_k=5, precision="fp32"), counted, list(range(6)))
    assert torch.equal(found, again.logits) and counted.shown == 6
    divergence = (exact.exp() * (exact - found.log_softmax(1))).sum(1)
    assert again.lost == pytest.approx(float(divergence.mean()), rel=1e-4) and again.lost > 0.001
    assert ask(cached(tmp_path, top_k=40), counted, [0]).lost == ask(cached(tmp_path), counted, [0]).lost == 0


@dataclass
class Told:
    """Keeps what would be printed."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def note(self):
        return self.notes.append

    @property
    def warn(self):
        return self.warnings.append


def test_what_is_lost_is_told_for_all_teachers_and_the_worst() -> None:
    display = Told()
    run = SimpleNamespace(settings=SimpleNamespace(cache=SimpleNamespace(top_k=5)), display=display)
    tell_kept(run, [("a", {"rows": 3, "lost": 0.1, "note": ""}), ("a", {"rows": 1, "lost": 0.5, "note": "full"}),
                    ("b", {"rows": 9, "lost": 0.0, "note": ""})])  # fmt: skip
    assert display.warnings == ["what teachers say is not kept for other runs: full"]
    [line] = display.notes
    assert "0.1 nats on average" in line and "at most 0.2 (a)" in line and "cache.top_k=5" in line
    run.settings.cache.top_k = None
    tell_kept(run, [("a", {"rows": 3, "lost": 0.0, "note": ""})])
    assert len(display.notes) == 1


def test_a_shard_cut_short_is_computed_again(tmp_path: Path) -> None:
    counted = Counted()
    first = ask(cached(tmp_path), counted, [0, 1, 2])
    [shard] = tmp_path.rglob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-10])
    again = ask(cached(tmp_path), counted, [0, 1, 2])
    assert counted.shown == 6 and torch.equal(again.logits, first.logits)
    assert ask(cached(tmp_path), counted, [0, 1, 2]).computed == 0


def test_the_cache_is_shown_and_a_damaged_file_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings([make_settings(tmp_path)], [f"cache.path={tmp_path / 'outputs'}"])
    ask(cached(cache_root(settings)), Counted(), [0, 1, 2])
    ask(cached(cache_root(settings), fingerprint="g"), Counted(), [0])
    assert look_after(settings, verify=True) == 0
    assert "2 entries" in capsys.readouterr().out
    shard = next(cache_root(settings).rglob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # the size stays
    shard.write_bytes(content)
    assert look_after(settings, verify=True) == 1 and not shard.exists()


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(cached(tmp_path), Counted(), [0])

    def full(*arguments: object) -> str:
        raise CacheError("/somewhere: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.entry.Entry.put", full)
        counted = Counted()
        found = ask(cached(tmp_path), counted, [0, 1, 2])
    assert "No space left" in found.note and found.computed == counted.shown == 2
    shutil.rmtree(tmp_path)
    assert torch.equal(ask(cached(tmp_path), Counted(), [0, 1, 2]).logits, found.logits)

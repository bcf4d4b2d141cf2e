"""Teachers as programs: the same outputs without the code, and features that are found as in any other net."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import TeacherError
from pipeline.models import nets
from pipeline.models.archive import load_program
from pipeline.models.factories import Refused
from pipeline.models.program import Exported, Program, export_teacher
from pipeline.models.spec import PreprocessingSpec
from pipeline.models.teacher import Teacher

GREY = PreprocessingSpec(size=12, channels=1, mean=(0.4,), std=(0.3,))


def teacher(net: nn.Module, preprocessing: PreprocessingSpec | None = GREY, **changes: object) -> Teacher:
    arguments = {"name": "tiny", "classes": ("a", "b", "c"), "preprocessing": preprocessing} | changes
    return Teacher(net, **arguments)


def small(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    net = nets.resnet8(3, in_channels=1, width=4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # else a batch norm that forgets its statistics would go unnoticed
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def back(path: Path, exported: Exported, like: Teacher) -> Teacher:
    net = Program(load_program(path), exported.outputs, exported.classifier)
    preprocessing = getattr(like.preprocessing, "spec", None)
    taps = {name.removeprefix("taps."): f"taps.{k}" for k, name in enumerate(exported.outputs[2:])}
    return teacher(net, preprocessing, features=net.features_path, taps=taps)


def images(count: int, side: int = 15, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def same(first: Teacher, second: Teacher, batch: torch.Tensor) -> None:
    one, other = first(batch), second(batch)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.features, other.features, rtol=1e-5, atol=1e-5)
    assert one.taps.keys() == other.taps.keys()
    for name, value in one.taps.items():
        torch.testing.assert_close(value, other.taps[name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, Path, Exported]:
    """A teacher with taps and its program; exporting one takes seconds."""
    before = teacher(small(), taps={"early": "stage1", "late": "stage3"})
    said, parameters = before(images(3)).logits, [id(value) for value in before.parameters()]
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    exported = export_teacher(before, path)
    assert torch.equal(before(images(3)).logits, said)  # it is left as it was
    assert [id(value) for value in before.parameters()] == parameters
    return before, path, exported


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_features_and_taps_come_back(pushed: tuple[Teacher, Path, Exported], count: int, channels: int) -> None:
    before, path, exported = pushed
    assert exported.outputs == ("logits", "features", "taps.early", "taps.late")
    assert (exported.image, exported.widths[:2]) == ((1, 12, 12), ((3,), (16,)))
    after = back(path, exported, before)
    same(before, after, images(count, channels=channels))
    assert after.num_parameters == before.num_parameters
    torch.testing.assert_close(after.classifier_weight, before.classifier_weight)
    assert after.feature_dim == 16


def test_images_of_any_size_stay_possible(tmp_path: Path) -> None:
    before = teacher(small(), GREY.model_copy(update={"size": None}), taps={"map": "stage1"})
    exported = export_teacher(before, tmp_path / "model.pt2")
    assert exported.image == (1, -1, -1)
    assert exported.widths[2][1:] == (-1, -1)
    after = back(tmp_path / "model.pt2", exported, before)
    for side in (12, 17, 40):
        same(before, after, images(2, side))


def test_features_that_are_a_map_come_back_averaged(tmp_path: Path) -> None:
    before = teacher(small(), features="stage3")
    exported = export_teacher(before, tmp_path / "model.pt2")
    after = back(tmp_path / "model.pt2", exported, before)
    same(before, after, images(4))
    assert exported.classifier is None
    assert after.classifier_weight is None
    plain = teacher(load_program(tmp_path / "model.pt2"), has_modules=False)  # what another reader makes of it
    torch.testing.assert_close(plain(images(4)).features, before(images(4)).features, rtol=1e-5, atol=1e-5)


class Raw(nn.Module):
    """Takes whole numbers, as a student does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x // 2).float().mean((2, 3)) / 64)


def test_a_program_of_whole_numbers_gets_whole_numbers(tmp_path: Path) -> None:
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Raw(), (images(2, 9, 3),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "raw.pt2")
    net = Program(load_program(tmp_path / "raw.pt2"))
    raw = PreprocessingSpec(size=9, channels=3, mean=(0.0,), std=(1 / 255,))
    stored, pushed = images(5, 9, 3), teacher(net, raw, has_modules=False)
    assert torch.equal(pushed(stored).logits, Raw()(stored))
    assert pushed(images(2, 21, 1)).logits.shape == (2, 3)  # other sizes and grey ones are brought to what it takes

    again = teacher(net, None, has_modules=False)
    exported = export_teacher(again, tmp_path / "again.pt2")
    assert (exported.image, exported.dtype) == ((3, 9, 9), torch.uint8)
    same(again, back(tmp_path / "again.pt2", exported, again), stored)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(144, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x.flatten(1))
        return x if x.sum() > 0 else -x


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48 * 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    ("net", "preprocessing", "message"),
    [
        (Branching(), GREY, "can't be exported"),
        (Flat(), GREY.model_copy(update={"size": None}), "name it in `preprocessing.size`"),
        (Flat(), None, "its `preprocessing` is null"),
    ],
)
def test_what_can_not_be_exported_is_told_in_one_line(
    tmp_path: Path, net: nn.Module, preprocessing: PreprocessingSpec | None, message: str
) -> None:
    with pytest.raises(TeacherError, match="teacher 'tiny': ") as caught:
        export_teacher(teacher(net, preprocessing), tmp_path / "model.pt2")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_classifier_that_the_program_lacks_is_refused(pushed: tuple[Teacher, Path, Exported]) -> None:
    _, path, exported = pushed
    with pytest.raises(Refused, match="does not have; push it again"):
        Program(load_program(path), exported.outputs, "teacher.net.absent")

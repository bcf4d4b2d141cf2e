from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, StageError
from pipeline.models import export
from pipeline.models.archive import load_program
from pipeline.models.export import export_student
from pipeline.models.spec import PreprocessingSpec, StudentSpec
from pipeline.models.student import NETS, Student, build_student, load_student, save_student

SHAPE = (1, 12, 12)


def images(count: int = 4, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def student(name: str = "small_cnn", **changes: object) -> Student:
    torch.manual_seed(0)
    fields: dict = {"name": name, "kwargs": {"width": 4}} | changes
    return build_student(StudentSpec(**fields), 3, SHAPE)


class TinyNet(nn.Module):
    def __init__(self, num_classes: int, hidden: int = 5) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(144, hidden), nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.body(x.flatten(1))))


class NoLinear(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(in_channels, num_classes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))


@pytest.mark.parametrize("name", NETS)
def test_every_net_can_be_a_student(name: str) -> None:
    one = student(name).eval()
    logits, features = one.with_features(images())
    assert logits.shape == (4, 3) and features.shape == (4, one.feature_dim)
    torch.testing.assert_close(logits, one(images()))
    torch.testing.assert_close(features, one.net.features((images().float() / 255 - 0.5) / 0.5))
    torch.testing.assert_close(one.features(images()), features)
    assert one.num_parameters == sum(p.numel() for p in one.parameters())


def test_logits_and_features_are_part_of_the_graph() -> None:
    one = student()
    logits, features = one.with_features(images().float())
    (logits.sum() + features.sum()).backward()
    assert one.net.stage1[0].weight.grad is not None
    assert one.training


def test_the_seed_decides_the_weights() -> None:
    assert torch.equal(student()(images()), student()(images()))


def test_own_preprocessing_and_own_nets() -> None:
    colour = PreprocessingSpec(size=16, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0,))
    assert student(preprocessing=colour).net.stage1[0].in_channels == 3
    own = student(f"{__name__}:TinyNet", kwargs={"hidden": 7})
    assert own.feature_dim == 7
    plain = student(f"{__name__}:NoLinear", kwargs={})
    assert plain.feature_dim is None
    with pytest.raises(ValueError, match="no penultimate features"):
        plain.features(images())


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("small_cn", {}, "nearest: small_cnn"),
        ("resnet", {}, "resnet8"),
        ("small_cnn", {"widht": 3}, "unexpected keyword argument 'widht'"),
        ("small_cnn", {"width": 0}, "width must be >= 1"),
        ("torchvision:resnet81", {}, "nearest: resnet18"),
        ("no.such.module:Net", {}, "can't be imported"),
        (f"{__name__}:TinyNets", {}, "nearest: TinyNet"),
        (f"{__name__}:TinyNet", {"num_classes": 4}, "is (2, 4), expected (2, 3) logits"),
        ("builtins:dict", {}, "returns a dict"),
    ],
)
def test_what_can_not_be_built_is_told(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        student(name, kwargs=kwargs)
    assert message in str(caught.value) and str(caught.value).startswith(f"student {name!r}: ")
    assert "\n" not in str(caught.value)


def test_a_net_that_does_not_take_such_images_is_told() -> None:
    with pytest.raises(ConfigError, match=r"an image of shape \(1, 9, 9\) fails with RuntimeError"):
        build_student(StudentSpec(name=f"{__name__}:TinyNet"), 3, (1, 9, 9))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    one = student(preprocessing=PreprocessingSpec(size=16, channels=1, mean=(0.2,), std=(0.4,)))
    one(images())  # moves the batch norms
    save_student(one, tmp_path / "s", classes=("a", "b", "c"))
    again = load_student(tmp_path / "s")
    assert not again.training and again.spec == one.spec and again.image_shape == SHAPE
    assert torch.equal(again(images()), one.eval()(images()))
    assert json.loads((tmp_path / "s" / "student.json").read_text())["classes"] == ["a", "b", "c"]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["model.safetensors", "student.json"]


def test_a_damaged_student_is_told(tmp_path: Path) -> None:
    save_student(student(), tmp_path)
    weights, description = tmp_path / "model.safetensors", tmp_path / "student.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ConfigError, match=r"model.safetensors: is truncated"):
        load_student(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model.safetensors: can't be read"):
        load_student(tmp_path)
    weights.write_bytes(content)
    description.write_text(description.read_text().replace('"width": 4', '"width": 8'))
    with pytest.raises(ConfigError, match=r"model.safetensors: holds .* of another shape"):
        load_student(tmp_path)
    description.write_text("{")
    with pytest.raises(ConfigError, match=r"student.json: is damaged"):
        load_student(tmp_path)


def test_a_folder_can_not_name_code_that_is_not_trusted(tmp_path: Path) -> None:
    save_student(student(f"{__name__}:TinyNet", kwargs={}), tmp_path)
    with pytest.raises(ConfigError, match=r"zoo.trusted_factories"):
        load_student(tmp_path)
    assert load_student(tmp_path, trusted_factories=(__name__,)).feature_dim == 5
    description = tmp_path / "student.json"
    ran = tmp_path / "ran"
    description.write_text(
        json.dumps(
            json.loads(description.read_text()) | {"student": {"name": "os:mkdir", "kwargs": {"path": str(ran)}}}
        )
    )
    with pytest.raises(ConfigError, match="not trusted"):
        load_student(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("count", [1, 3])
def test_an_exported_student_takes_batches_of_any_size(tmp_path: Path, count: int) -> None:
    one = student(preprocessing=PreprocessingSpec(size=16, channels=3, mean=(0.2,), std=(0.4,), crop=0.8))
    export_student(one, tmp_path / "deep" / "student.pt2", images(count))
    assert one.training
    program = load_program(tmp_path / "deep" / "student.pt2")
    for size in (1, 2, 7):
        torch.testing.assert_close(program(images(size)), one.eval()(images(size)))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["student.pt2"]


def test_an_export_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = student()
    nn.init.ones_(other.net.classifier.bias)
    monkeypatch.setattr(export, "load_program", lambda path: other.eval())
    with pytest.raises(StageError, match="differs from the student for a batch of 1"):
        export_student(student(), tmp_path / "student.pt2", images())
    assert not list(tmp_path.iterdir())


def test_what_is_no_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_student(student(), tmp_path / "student.onnx", images())
    with pytest.raises(ValueError, match="example must be"):
        export_student(student(), tmp_path / "student.pt2", images().float())

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models import nets
from pipeline.models.check import TeacherCheck, check_teacher
from pipeline.models.spec import TeacherSpec

CLASSES = ("a", "b", "c")


def spec(source: dict) -> TeacherSpec:
    preprocessing = {"channels": 1, "mean": [0.5], "std": [0.5]}
    return TeacherSpec.model_validate(
        {"name": "tiny", "source": source, "classes": CLASSES, "preprocessing": preprocessing}
    )


def check(net: nn.Module) -> TeacherCheck:
    return check_teacher(spec({"type": "mlflow", "uri": "x"}), (1, 8, 8), resolvers={"mlflow": lambda uri: net})


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.flatten(1)))


class Random(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


class TrainsOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.batch_norm(x, None, None, training=True).flatten(1))


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)


class Broken(Base):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("two\nlines")


class Nan(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log()


class FixedBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, 64))


def test_a_good_teacher_passes(tmp_path: Path) -> None:
    net = nets.small_cnn(3, width=4)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    source = {"type": "safetensors", "path": str(tmp_path / "net.safetensors")}
    found = check_teacher(spec({**source, "factory": "pipeline.models.nets:small_cnn", "kwargs": {"width": 4}}))
    parameters = sum(p.numel() for p in net.parameters())
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values()) / 1e6
    assert found.seconds > 0
    expected = TeacherCheck("tiny", True, None, 3, parameters, 16, 0.0, size)
    assert dataclasses.replace(found, seconds=0.0) == expected


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Random(), "differ from one look to the next"),
        (TrainsOn(), "depend on the other images of the batch"),
        (Counts(), "changes its buffer 'seen'"),
        (Nan(), "NaN or infinite logits"),
        (Broken(), "KeyError on a probe of (1, 8, 8) images"),
        (FixedBatch(), "RuntimeError on a probe"),
    ],
)
def test_a_bad_teacher_is_told_and_raises_nothing(net: nn.Module, message: str) -> None:
    found = check(net)
    assert not found.ok and found.error is not None
    assert message in found.error and found.error.startswith("teacher 'tiny': ") and "\n" not in found.error
    assert found.classes == 3 and found.parameters == sum(p.numel() for p in net.parameters())


def test_a_teacher_that_can_not_be_loaded_is_told(tmp_path: Path) -> None:
    found = check_teacher(
        spec({"type": "state_dict", "path": str(tmp_path / "no.pt"), "factory": "pipeline.models.nets:mlp"})
    )
    assert not found.ok and "does not exist" in str(found.error)
    assert found.classes is found.parameters is found.megabytes is None

"""Half precision is taken where a first batch says that it is safe, and nowhere else."""

import pytest
import torch
from torch import nn

from pipeline.models.precision import choose_autocast
from pipeline.models.spec import PreprocessingSpec
from pipeline.models.teacher import Teacher


class Net(nn.Module):
    """A linear net whose logits are as large as told."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Linear(48, 5)
        with torch.no_grad():
            self.classifier.weight.mul_(gain)

    def forward(self, x):
        return self.classifier(x.flatten(1))


def teacher(gain: float) -> Teacher:
    spec = PreprocessingSpec(channels=3, mean=(0.5,), std=(0.25,))
    return Teacher(Net(gain), name="t", classes=tuple("abcde"), preprocessing=spec)


IMAGES = torch.randint(0, 256, (32, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_cpu_computes_in_single_precision(precision):
    assert choose_autocast(teacher(1.0), IMAGES, precision) is None


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_taken_where_it_changes_little(precision, dtype):
    assert choose_autocast(teacher(1.0), IMAGES, precision) is dtype


def test_half_precision_is_refused_where_probabilities_move():
    assert choose_autocast(teacher(300.0), IMAGES, "bf16") is None


def test_half_precision_is_refused_where_it_overflows():
    assert choose_autocast(teacher(1e7), IMAGES, "fp16") is None

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.models.spec import PreprocessingSpec
from pipeline.models.teacher import Teacher, predict

GREY = PreprocessingSpec(size=8, channels=1, mean=(0.5,), std=(0.5,))


class TinyNet(nn.Module):
    """Features of 6 for 3 classes, with a batch norm that would move and a dropout that would show."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(6, 6)
        self.fc = nn.Linear(6, classes)
        self.unused = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.fc(self.drop(torch.tanh(self.first(x))))


class MapNet(nn.Module):
    """Classifies by a convolution, so that its features are a map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)).mean(dim=(2, 3))


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :3], x.flatten(1)[:, :7]


def teacher(net: nn.Module | None = None, **changes: object) -> Teacher:
    arguments = {"name": "tiny", "classes": ("a", "b", "c"), "preprocessing": GREY} | changes
    return Teacher(TinyNet() if net is None else net, **arguments)


def images(count: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def test_it_says_what_its_net_says() -> None:
    net = TinyNet()
    said = teacher(copy.deepcopy(net))(images())
    expected = net.eval()((images().float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(said.logits, expected)
    torch.testing.assert_close(said.features @ net.fc.weight.T + net.fc.bias, expected)


def test_nothing_about_it_moves() -> None:
    one = teacher()
    before = copy.deepcopy(one.state_dict())
    around = nn.ModuleDict({"teacher": one, "student": TinyNet()})
    around.train()
    first, second = one(images()), one(images())
    assert not one.training and not any(module.training for module in one.modules())
    assert around["student"].training
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert not first.logits.requires_grad


def test_it_tells_its_size() -> None:
    one = teacher()
    assert one.num_parameters == sum(p.numel() for p in TinyNet().parameters())
    assert one.feature_dim == 6
    assert one.classifier_weight is not None and one.classifier_weight.shape == (3, 6)


def test_features_are_found_by_the_name_of_the_head_before_the_last_layer() -> None:
    one = teacher()
    assert one(images()).features.shape == (5, 6)
    with pytest.raises(TeacherError, match="'unused' takes no part in the forward pass"):
        teacher(features="unused")(images())


def test_features_may_be_a_map() -> None:
    net = MapNet().eval()
    said = teacher(net, features="last")(images())
    torch.testing.assert_close(said.features, net.body((images().float() / 255 - 0.5) / 0.5).mean(dim=(2, 3)))
    assert teacher(net, features="last").classifier_weight is None


def test_a_net_may_return_its_features() -> None:
    said = teacher(TwoOutputs(), has_modules=False)(images())
    assert said.logits.shape == (5, 3) and said.features.shape == (5, 7)


def test_taps_give_what_a_module_put_out_before_others_changed_it() -> None:
    net = TinyNet()
    one = teacher(net, taps={"early": "norm", "late": "first"})
    said = one(images())
    assert said.taps["early"].shape == (5, 6, 6, 6) and said.taps["late"].shape == (5, 6)
    assert said.taps["early"].min() < 0  # the ReLU that follows works in place


def test_hooks_do_not_outlive_the_forward_pass() -> None:
    one = teacher(taps={"early": "norm"})
    one(images())
    with pytest.raises(RuntimeError):
        one(torch.zeros(2, 1, 0, 0, dtype=torch.uint8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


@pytest.mark.parametrize(
    ("net", "changes", "message"),
    [
        (TinyNet(), {"features": "classifer"}, "no module 'classifer'"),
        (TinyNet(), {"taps": {"x": "nrm"}}, r"`taps.x`: there is no module 'nrm' in the net; nearest: norm"),
        (TinyNet(4), {}, "'fc' has 4 outputs for 3 `classes`"),
        (TinyNet(4), {"features": "fc"}, "'fc' has 4 outputs for 3 `classes`"),
        (MapNet(), {}, "no linear layer; set `features`"),
        (TwoOutputs(), {"has_modules": False, "features": "fc"}, "one opaque graph"),
    ],
)
def test_what_does_not_fit_is_told_at_once(net: nn.Module, changes: dict, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        teacher(net, **changes)
    assert str(caught.value).startswith("teacher 'tiny': ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: {"logits": x}, "returns dict"),
        (lambda x: x, r"logits are \(5, 1, 8, 8\)"),
        (lambda x: x.flatten(1)[:, :4], r"logits are \(5, 4\) for 3 `classes`"),
        (lambda x: (x.flatten(1)[:, :3], x.flatten(2)), r"features must be \(B, D\)"),
    ],
)
def test_an_output_of_another_kind_is_told(answer: object, message: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> object:
            return answer(x)

    with pytest.raises(TeacherError, match=message):
        teacher(Odd(), has_modules=False)(images())


def test_predict_puts_batches_together() -> None:
    one = teacher(taps={"late": "first"})
    whole = one(images(7))
    split = [(None, images(7)[:3]), (None, images(7)[3:])]
    said = predict(one, split, taps=True)
    torch.testing.assert_close(said.logits, whole.logits)
    torch.testing.assert_close(said.features, whole.features)
    torch.testing.assert_close(said.taps["late"], whole.taps["late"])
    assert not predict(one, [images(7)]).taps


def test_what_predict_returns_may_take_part_in_a_graph() -> None:
    targets = predict(teacher(), [images()]).logits
    weight = torch.ones(3, requires_grad=True)
    (targets * weight).sum().backward()
    torch.testing.assert_close(weight.grad, targets.sum(0))


def test_predict_in_mixed_precision_stays_close() -> None:
    one = teacher()
    exact, mixed = predict(one, [images()]), predict(one, [images()], autocast=torch.bfloat16)
    assert mixed.logits.dtype == torch.float32
    assert not torch.equal(exact.logits, mixed.logits)
    torch.testing.assert_close(exact.logits, mixed.logits, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_an_error(value: float) -> None:
    net = TinyNet()
    nn.init.constant_(net.fc.bias, value)
    with pytest.raises(TeacherError, match="teacher 'tiny': NaN or infinite logits"):
        predict(teacher(net), [images()])


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches must not be empty"):
        predict(teacher(), [])


def test_a_net_in_half_precision_gets_what_it_computes_in() -> None:
    said = teacher(TinyNet().to(torch.bfloat16))(images())
    assert said.logits.dtype == torch.float32 and torch.isfinite(said.logits).all()

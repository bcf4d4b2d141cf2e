from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from pipeline.models import nets
from pipeline.models.recalibrate import assert_independent, recalibrate_batchnorm
from pipeline.models.stages import shapes_of, stages_of
from pipeline.models.student import NETS


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(side: int = 28, channels: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, side, side)


RESNET = {"stem": (4, 28, 28), "stage1": (4, 28, 28), "stage2": (8, 14, 14), "stage3": (16, 7, 7)}
STAGES = {
    "small_cnn": {"stage1": (4, 14, 14), "stage3": (16, 7, 7)},
    "mlp": {"stage1": (4,), "stage2": (4,)},
    "small_vgg": {"stage1": (4, 14, 14), "stage2": (8, 7, 7), "stage3": (16, 3, 3)},
    "small_mobilenet": {"stem": (4, 28, 28), "stage1": (8, 14, 14), "stage2": (16, 7, 7), "stage3": (32, 4, 4)},
    "resnet8": RESNET,
    "resnet14": RESNET,
    "resnet20": RESNET,
}
BEFORE = {
    "small_cnn": ["stage1.1", "stage3.1"],
    "mlp": ["stage1.1", "stage2.1"],
    "small_vgg": ["stage1", "stage2", "stage3"],  # a pooling is no activation
    "small_mobilenet": ["stem.1", "stage1.1.1", "stage2.1.1", "stage3.1.1"],
    "resnet8": ["stem.1", "stage1", "stage2", "stage3"],  # the ReLU after the sum is no module
}


@pytest.mark.parametrize("name", NETS)
def test_stages_of_the_built_in_nets(name: str) -> None:
    found = stages_of(getattr(nets, name)(3, width=4), images())
    assert found == STAGES[name]
    assert list(found) == list(STAGES[name])  # from low to high


@pytest.mark.parametrize("name", BEFORE)
def test_features_before_the_activation(name: str) -> None:
    net = getattr(nets, name)(3, width=4)
    found = stages_of(net, images(), before_activation=True)
    assert list(found) == BEFORE[name]
    assert list(found.values()) == list(STAGES[name].values())


TORCHVISION = {
    "resnet18": (
        {
            "relu": (64, 32, 32),
            "layer1": (64, 16, 16),
            "layer2": (128, 8, 8),
            "layer3": (256, 4, 4),
            "layer4": (512, 2, 2),
        },
        ["bn1", "layer1", "layer2", "layer3", "layer4"],
    ),
    "vgg11_bn": (
        {
            "features.2": (64, 64, 64),
            "features.6": (128, 32, 32),
            "features.13": (256, 16, 16),
            "features.20": (512, 8, 8),
            "features.27": (512, 4, 4),
        },
        ["features.1", "features.5", "features.12", "features.19", "features.26"],
    ),
    "mobilenet_v3_small": (
        {
            "features.0": (16, 32, 32),
            "features.1": (16, 16, 16),
            "features.3": (24, 8, 8),
            "features.8": (48, 4, 4),
            "features.12": (576, 2, 2),
        },
        ["features.0.1", "features.1", "features.3", "features.8", "features.12.1"],
    ),
    # The inside of its blocks shows one more size, in one of two branches.
    "shufflenet_v2_x0_5": (
        {"conv1": (24, 32, 32), "stage2": (48, 8, 8), "stage3": (96, 4, 4), "conv5": (1024, 2, 2)},
        ["conv1.1", "stage2", "stage3", "conv5.1"],
    ),
    # The classifier is a convolution.
    "squeezenet1_1": (
        {
            "features.1": (64, 31, 31),
            "features.4": (128, 15, 15),
            "features.7": (256, 7, 7),
            "features.12": (512, 3, 3),
        },
        ["features.0", "features.4", "features.7", "features.12"],
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_stages_of_torchvision_nets(name: str) -> None:
    with torch.device("meta"):  # shapes without the arithmetic
        net = torchvision.models.get_model(name, weights=None, num_classes=5)
        x = images(64, 3)
    stages, before = TORCHVISION[name]
    assert stages_of(net, x) == stages
    assert list(stages_of(net, x, before_activation=True)) == before


def test_maps_with_channels_last_are_no_maps() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 24, 4, stride=4)
            self.blocks = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 48))
            self.head = nn.Linear(48, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks(self.patches(x).permute(0, 2, 3, 1)).mean(dim=(1, 2)))

    assert stages_of(Last(), images()) == {"patches": (24, 7, 7)}


def test_a_net_of_tokens_does_not_fail() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(28, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.embed(x[:, 0]))[:, 0])

    net = Tokens()
    assert stages_of(net, images()) == stages_of(net, images(), before_activation=True) == {}
    assert shapes_of(net, images(), ["encoder.layers.1", "embed"]) == {"embed": (28, 8), "encoder.layers.1": (28, 8)}


def test_a_layer_without_a_weight_matrix_belongs_to_the_one_before_it() -> None:
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    assert stages_of(net, images()) == {"3": (8,), "5": (6,)}
    assert stages_of(net, images(), before_activation=True) == {"2": (8,), "4": (6,)}


def test_looking_leaves_no_trace() -> None:
    net = nets.resnet8(3, width=4)
    net.stage2.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    stages_of(net, images())
    shapes_of(net, images(), ["stem"])
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError):
        stages_of(net, torch.randn(2, 5, 28, 28))  # a net that fails leaves none either
    assert not any(module._forward_hooks for module in net.modules())
    assert {name: module.training for name, module in net.named_modules()} == modes


def test_shapes_of_named_layers_come_in_the_order_of_the_run() -> None:
    net = nets.resnet8(3, width=4)
    found = shapes_of(net, images(), ["classifier", "stage2.0.conv1", "stem"])
    assert list(found.items()) == [("stem", (4, 28, 28)), ("stage2.0.conv1", (8, 14, 14)), ("classifier", (3,))]


def test_a_layer_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="there is no module 'stage9' in the net; nearest: stage3"):
        shapes_of(nets.resnet8(3, width=4), images(), ["stage9"])


def test_a_module_that_runs_twice_is_no_layer() -> None:
    net = torchvision.models.resnet18(num_classes=3)
    with pytest.raises(ValueError, match=r"'layer1\.0\.relu' does not return one tensor once"):
        shapes_of(net, images(64, 3), ["layer1.0.relu"])


# BatchNorm


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))


def test_recalibrated_statistics_are_the_mean_over_batches() -> None:
    net = normed().train()
    net[4].eval()
    for _ in range(3):
        net(torch.randn(8, 5) + 4)  # what the teachers' features did to the statistics
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [torch.randn(6, 5), torch.randn(6, 5), torch.randn(3, 5)]
    modes = [module.training for module in net.modules()]
    recalibrate_batchnorm(net, iter(batches))

    outputs = [net[0](batch).detach() for batch in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack([out.mean(0) for out in outputs]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([out.var(0) for out in outputs]).mean(0))
    assert not torch.allclose(net[1].running_mean, before["1.running_mean"])
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.3
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_deeper_statistics_are_those_of_features_without_dropout() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    batch = 3 * torch.randn(16, 4) + 1
    recalibrate_batchnorm(net, [batch])
    normal = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(net[2].running_var, normal.var(0))


def test_a_net_without_statistics_asks_for_no_batch() -> None:
    def none():
        raise AssertionError("asked for a batch")
        yield

    recalibrate_batchnorm(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)), none())


def test_a_batch_of_one_has_no_variance() -> None:
    net, batch = normed(), torch.randn(6, 5)
    recalibrate_batchnorm(net, [batch, torch.randn(1, 5)])
    torch.testing.assert_close(net[1].running_var, net[0](batch).detach().var(0))
    before = net[1].running_var.clone()
    with pytest.raises(ValueError, match="at least one batch of two samples"):
        recalibrate_batchnorm(net, [torch.randn(1, 5)])
    assert torch.equal(net[1].running_var, before)


# Independence


def test_a_student_on_its_own_passes() -> None:
    net = nets.resnet8(3, width=4)
    teachers = [nets.resnet8(3, width=4), nets.mlp(3)]
    net.load_state_dict(teachers[0].state_dict())  # a copy of a teacher's weights is its own
    assert_independent(net, set(net.state_dict()), teachers)
    assert_independent(net, sum(parameter.numel() for parameter in net.parameters()), teachers)
    legacy = nn.utils.spectral_norm(nn.Linear(3, 2))
    assert_independent(legacy, set(legacy.state_dict()), teachers)


def smuggle(student: nn.Module, teacher: nn.Module, how: str) -> None:
    match how:
        case "submodule":
            student.teacher = teacher
        case "part":
            student.stage1.append(teacher.stage1[2])  # a ReLU without any parameter
        case "tensor":
            student.classifier.weight = teacher.classifier.weight
        case "view":
            student.classifier.weight.data = teacher.classifier.weight.data[:, :]
        case "buffer":
            student.register_buffer("kept", teacher.classifier.weight.detach(), persistent=False)
        case "list":
            student.stage1.kept = {"inside": [(teacher,)]}
        case "closure":
            student.forward = lambda x: teacher(x)
        case "default":
            student.forward = lambda x, net=teacher: net(x)
        case "method":
            student.forward = teacher.forward
        case "partial":
            student.stage2.call = partial(nn.Module.__call__, teacher)
        case "object":
            student.kept = Holder(teacher)


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value


@pytest.mark.parametrize(
    "how",
    ["submodule", "part", "tensor", "view", "buffer", "list", "closure", "default", "method", "partial", "object"],
)
@pytest.mark.parametrize("by_count", [False, True])
def test_a_smuggled_teacher_is_found(how: str, by_count: bool) -> None:
    student, teacher = nets.small_cnn(3, width=4), nets.small_cnn(3, width=4)
    student.requires_grad_(False)
    smuggle(student, teacher, how)
    # Even where the names or the count were taken after the teacher got in.
    expected = sum(parameter.numel() for parameter in student.parameters()) if by_count else set(student.state_dict())
    with pytest.raises(ValueError, match="must not hold a teacher"):
        assert_independent(student, expected, [nets.mlp(3), teacher])


def test_more_and_less_than_its_own_is_refused() -> None:
    student = nets.small_cnn(3, width=4)
    own = set(student.state_dict())
    count = sum(parameter.numel() for parameter in student.parameters())
    student.adapter = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"adapter\.bias is extra, adapter\.weight is extra"):
        assert_independent(student, own)
    with pytest.raises(ValueError, match=f"must have {count} parameter values, got {count + 3}"):
        assert_independent(student, count)
    with pytest.raises(ValueError, match=r"gone\.weight is missing"):
        assert_independent(student, set(student.state_dict()) | {"gone.weight"})


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_that_stayed_is_found(kind: str) -> None:
    student = nets.small_cnn(3, width=4)
    getattr(student.stage2, kind)(lambda *_: None)
    with pytest.raises(ValueError, match=r"must have no hooks, got one of .* on stage2"):
        assert_independent(student, set(student.state_dict()))

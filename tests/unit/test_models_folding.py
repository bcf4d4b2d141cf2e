"""Batch norms folded into convolutions: the same function, unless a layer has more to give than the pair."""

import copy

import pytest
import torch
from torch import nn

from pipeline.models import nets
from pipeline.models.folding import fold_batch_norms
from pipeline.models.spec import PreprocessingSpec
from pipeline.models.teacher import Teacher

GREY = PreprocessingSpec(channels=1, mean=(0.5,), std=(0.5,))


def norms_of(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """A net in evaluation mode whose batch norms have something to do."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms_of(net):
        for value, low in ((norm.weight, -2.0), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.1)):
            if value is not None:
                value.data.copy_(low + 3 * torch.rand(value.shape, generator=generator))
    return net.eval()


def both(net: nn.Module, images: torch.Tensor, **keep) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return how many were folded, and what the net gave before and after, in double precision."""
    net = settled(net).double()
    with torch.no_grad():
        before = net(images.double())
        count = fold_batch_norms(net, **keep)
        return count, before, net(images.double())


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "small_vgg", "small_cnn"])
def test_a_net_gives_the_same_with_no_batch_norm_left(name: str) -> None:
    net = getattr(nets, name)(10, in_channels=3)
    norms = len(norms_of(net))
    count, before, after = both(net, torch.randn(4, 3, 32, 32))
    assert count == norms > 0 and not norms_of(net)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_torchvision_s_resnet_too() -> None:
    from torchvision.models import resnet18

    net = resnet18(num_classes=7)
    count, before, after = both(net, torch.randn(2, 3, 64, 64))
    assert count == 20 and not norms_of(net)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


class Odd(nn.Module):
    """Pairs that may not be folded: each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm_1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)  # what the first gives is added later, too
        self.twice, self.norm_2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)  # runs twice
        self.looked_at, self.norm_3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)  # its weights are used besides
        self.last, self.norm_4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)  # by the batch

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        a = self.first(images)
        b = self.norm_1(a).relu() + a
        c = self.norm_2(self.twice(b)) + self.twice(b)
        d = self.norm_3(self.looked_at(c)) * self.looked_at.weight.sum()
        return self.norm_4(self.last(d)).mean((2, 3))


def test_layers_that_have_more_to_give_stay() -> None:
    count, before, after = both(Odd(), torch.randn(3, 1, 8, 8))
    assert count == 0 and torch.equal(before, after)


def test_a_module_in_two_places_stays() -> None:
    shared = nn.BatchNorm2d(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), shared, nn.Conv2d(2, 2, 1), shared)
    assert both(net, torch.randn(2, 1, 4, 4))[0] == 0


def test_a_net_that_can_not_be_followed_stays_as_it_is() -> None:
    class Deciding(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images if float(images.sum()) > 0 else -images)

    count, before, after = both(Deciding(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), torch.randn(2, 1, 4, 4))
    assert count == 0 and torch.equal(before, after)


def test_in_training_mode_nothing_is_folded() -> None:
    assert fold_batch_norms(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()) == 0


@pytest.mark.parametrize(("keep", "count"), [({"outputs": {"0"}}, 0), ({"inputs": {"1"}}, 0), ({"outputs": {"1"}}, 1)])
def test_what_is_wanted_besides_stays(keep, count: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    assert both(net, torch.randn(2, 1, 4, 4), **keep)[0] == count


def test_a_folded_teacher_shows_the_same_and_keeps_its_count() -> None:
    net = settled(nets.resnet8(4, in_channels=1))
    paths = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)][:4]
    names = [f"c{number}" for number in range(4)]
    teacher = Teacher(
        net, name="t", classes=names, preprocessing=GREY, taps={f"tap{n}": path for n, path in enumerate(paths)}
    )
    folded = copy.deepcopy(teacher).fold()
    assert len(norms_of(folded)) < len(norms_of(teacher))
    assert folded.num_parameters == teacher.num_parameters
    assert not any(value.requires_grad for value in folded.parameters())
    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    one, other = teacher(images), folded(images)
    torch.testing.assert_close(other.logits, one.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.features, one.features, rtol=1e-4, atol=1e-4)
    for tap in teacher.taps:
        torch.testing.assert_close(other.taps[tap], one.taps[tap], rtol=1e-4, atol=1e-4)


def test_half_precision_weights_stay_half() -> None:
    net = settled(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))).half()
    assert fold_batch_norms(net) == 1
    assert {value.dtype for value in net.parameters()} == {torch.float16}

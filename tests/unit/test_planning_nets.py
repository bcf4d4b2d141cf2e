"""Sizes found on paper, against hand counts, real state dicts, and real forward and backward passes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.models import nets
from pipeline.models.spec import TRUSTED_FACTORIES, StudentSpec, TeacherSpec
from pipeline.models.zoo import load_zoo
from pipeline.planning.nets import measure_net
from pipeline.planning.teachers import header_of, size_teachers, skeleton
from pipeline.planning.work import student_size
from tests.tiny import SIDE, make_zoo

GREY = {"size": SIDE, "channels": 1, "mean": [0.5], "std": [1.0]}


def on_paper(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def test_operations_of_a_linear_layer_are_two_a_weight() -> None:
    net = on_paper(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 3)))
    found = measure_net(net, (3, 4, 4))
    assert found.flops == 2 * (48 * 10 + 10 * 3)
    assert (found.parameters, found.outputs, found.features) == (48 * 10 + 10 + 33, 3, 10)


def test_operations_of_a_convolution_are_two_a_weight_and_place() -> None:
    net = on_paper(lambda: nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1, groups=1, bias=False))
    assert measure_net(net, (3, 16, 16)).flops == 2 * (3 * 8 * 9) * 8 * 8


def test_grouped_convolutions_see_their_own_channels_alone() -> None:
    net = on_paper(lambda: nn.Conv2d(8, 8, kernel_size=3, padding=1, groups=8, bias=False))
    assert measure_net(net, (8, 5, 5)).flops == 2 * (8 * 9) * 5 * 5


def test_a_small_cnn_by_hand() -> None:
    """Stem 3x3 at full size, then three convolutions that halve it, then the classifier."""
    net = on_paper(lambda: nets.resnet8(3, 1, 12))
    expected = (
        sum(
            2 * module.weight.numel() * places
            for module, places in zip(
                [m for m in net.modules() if isinstance(m, nn.Conv2d)], places_of(nets.resnet8(3, 1, 12)), strict=True
            )
        )
        + 2 * 48 * 3
    )
    assert measure_net(net, (1, 28, 28)).flops == expected


def places_of(net: nn.Module) -> list[int]:
    """The positions that each convolution computes, from a real pass."""
    seen: dict[nn.Module, int] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, _, output: seen.__setitem__(module, output.shape[2] * output.shape[3])
        )
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
    ]
    net.eval()(torch.zeros(1, 1, 28, 28))
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in net.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "small_vgg", "small_mobilenet", "resnet8"])
def test_weights_are_as_large_as_a_real_state_dict(name: str) -> None:
    build = getattr(nets, name)
    real = build(5, 1).state_dict()
    net = on_paper(lambda: build(5, 1))
    found = measure_net(net, (1, 28, 28))
    assert found.weight_bytes == sum(value.numel() * value.element_size() for value in real.values())
    assert found.parameters == sum(value.numel() for value in build(5, 1).parameters())


def test_activations_of_a_chain_are_the_largest_pair_of_neighbours() -> None:
    """A layer's input and its output are there at once, and nothing else: 4 · (100 + 400) bytes of an image."""
    net = on_paper(lambda: nn.Sequential(nn.Linear(20, 100), nn.Linear(100, 400), nn.Linear(400, 2)))

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x):
            x = x.flatten(1)
            for layer in self.inner:
                x = layer(x)
            return x

    found = measure_net(Flat(), (1, 4, 5))
    # The input stays, as whoever made it holds it.
    assert found.forward_bytes == 4 * (20 + 100 + 400)


def test_the_backward_pass_keeps_what_autograd_saves_of_a_real_pass() -> None:
    student = nets.small_cnn(4, 1, 8)
    found = measure_net(on_paper(lambda: nets.small_cnn(4, 1, 8)), (1, 12, 12), training=True)
    weights = {value.data_ptr() for value in (*student.parameters(), *student.buffers())}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        logits = student.train()(torch.zeros(64, 1, 12, 12))
    assert logits.requires_grad  # the graph lives, so that no storage came twice
    assert found.training_bytes == pytest.approx(sum(kept.values()) / 64, rel=0.01)


def test_measuring_changes_nothing() -> None:
    net = nets.small_cnn(3, 1, 8).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measure_net(net, (1, 12, 12), training=True)
    assert not any(module.training for module in net.modules())
    assert not any(value.requires_grad for value in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_teachers_of_a_zoo_are_sized_without_their_values(tmp_path: Path) -> None:
    zoo = load_zoo(make_zoo(tmp_path, ("untrained", "blind")))
    told: list[str] = []
    found = size_teachers(
        zoo.values(), (1, SIDE, SIDE), trusted=TRUSTED_FACTORIES, advance=lambda done, name: told.append(name)
    )
    assert told == ["untrained", "blind"]
    assert [one.classes for one in found] == [4, 2]
    assert not any(one.problem for one in found)
    for one in found:
        tensors = header_of(zoo[one.name].path or "")
        assert one.net is not None
        assert one.net.weight_bytes == sum(value.numel() * value.element_size() for value in tensors.values())
    assert len({one.key for one in found}) == 2  # other numbers of classes are other nets


def test_a_header_is_what_the_file_holds(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5), "b": torch.zeros(2, dtype=torch.int64), "c": torch.randn(4).half()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        found = header_of(tmp_path / name)
        assert {key: (tuple(value.shape), value.dtype) for key, value in found.items()} == {
            key: (tuple(value.shape), value.dtype) for key, value in state.items()
        }
        assert all(value.is_meta for value in found.values())


def test_weights_that_do_not_fit_are_found_without_reading_them(tmp_path: Path) -> None:
    zoo = load_zoo(make_zoo(tmp_path, ("blind",)))
    save_file(nets.mlp(2, 1, 16, SIDE).state_dict(), tmp_path / "teachers" / "blind.safetensors")
    (one,) = size_teachers(zoo.values(), (1, SIDE, SIDE), trusted=TRUSTED_FACTORIES)
    assert "another shape" in one.problem
    (tmp_path / "teachers" / "blind.safetensors").unlink()
    (one,) = size_teachers(zoo.values(), (1, SIDE, SIDE), trusted=TRUSTED_FACTORIES)
    assert "does not exist" in one.problem
    assert one.net is not None  # what it is made of is known all the same


def test_a_factory_that_is_not_trusted_is_not_run(tmp_path: Path) -> None:
    save_file(nets.mlp(2, 1, 16, SIDE).state_dict(), tmp_path / "w.safetensors")
    spec = TeacherSpec.model_validate(
        {
            "name": "t",
            "source": {"type": "safetensors", "path": str(tmp_path / "w.safetensors"), "factory": "os:getcwd"},
            "classes": ["a", "b"],
            "preprocessing": GREY,
        }
    )
    (one,) = size_teachers([spec], (1, SIDE, SIDE), trusted=TRUSTED_FACTORIES)
    assert "not trusted" in one.problem
    # The header still tells how large it is.
    assert one.net is not None and one.net.parameters == sum(
        v.numel() for v in header_of(tmp_path / "w.safetensors").values()
    )


def test_published_architectures_have_their_published_size() -> None:
    from torchvision import models

    spec = TeacherSpec.model_validate(
        {
            "name": "r",
            "source": {"type": "torchvision", "model": "resnet18", "weights": "DEFAULT"},
            "preprocessing": None,
        }
    )
    (one,) = size_teachers([spec], (3, 224, 224), trusted=())
    about = models.ResNet18_Weights.DEFAULT.meta
    assert one.net is not None and one.net.flops is not None
    assert one.net.parameters == about["num_params"]
    assert one.net.flops / 2e9 == pytest.approx(about["_ops"], rel=1e-3)  # which counts multiplications alone
    assert one.classes == 1000


def test_a_net_that_looks_at_values_is_built_with_them() -> None:
    """regnet rounds tensors in its constructor."""
    spec = TeacherSpec.model_validate(
        {
            "name": "r",
            "source": {"type": "torchvision", "model": "regnet_y_400mf", "weights": "DEFAULT"},
            "preprocessing": None,
        }
    )
    assert all(value.is_meta for value in skeleton(spec, ()).parameters())


def test_an_exported_program_is_loaded_to_be_sized(tmp_path: Path) -> None:
    from pipeline.models.sources import load_teacher

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 3)),
        (torch.zeros(2, 1, SIDE, SIDE),),
        dynamic_shapes=({0: batch},),
    )
    torch.export.save(program, tmp_path / "t.pt2")
    spec = TeacherSpec.model_validate(
        {
            "name": "t",
            "source": {"type": "exported", "path": str(tmp_path / "t.pt2")},
            "classes": ["a", "b", "c"],
            "preprocessing": GREY,
        }
    )
    (one,) = size_teachers([spec], (1, SIDE, SIDE), trusted=(), load=load_teacher)
    assert one.problem == ""
    assert one.net is not None and one.net.flops == 2 * SIDE * SIDE * 3


def test_a_student_is_sized_as_it_will_be_trained() -> None:
    found = student_size(StudentSpec(name="small_cnn", kwargs={"width": 8}), 4, (1, 12, 12))
    real = nets.small_cnn(4, 1, 8)
    assert found.parameters == sum(value.numel() for value in real.parameters())
    assert found.training_bytes is not None and found.training_bytes > found.forward_bytes > 0


def test_a_key_is_plain_text(tmp_path: Path) -> None:
    zoo = load_zoo(make_zoo(tmp_path, ("blind",)))
    (one,) = size_teachers(zoo.values(), (1, SIDE, SIDE), trusted=TRUSTED_FACTORIES)
    assert str(tmp_path) not in one.key
    assert json.loads(one.key)[1] == 2

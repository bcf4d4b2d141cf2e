"""Objectives by name: every part is found and built, and one's own is one class."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.distillation.step import About, Objective, Said, Seen, Step, TeacherAbout
from pipeline.engine.objective_spec import ObjectiveSpec, labels_alone, objective_of
from pipeline.engine.objectives import build_objective, wants
from pipeline.errors import ConfigError

CLASSES = ("a", "b", "c")
RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
NAMES = sorted(set(ObjectiveSpec.model_fields) - {"own"})


def about(_layers: object = None) -> About:
    labels = torch.arange(12) % 3
    generator = torch.Generator().manual_seed(0)
    teachers = tuple(
        TeacherAbout(
            name,
            classes,
            torch.rand(3, 3, generator=generator),
            feature_dim=5,
            tap_shapes={"low": (4, 6, 6), "high": (8, 3, 3)},
            labelled_features=torch.randn(12, 5, generator=generator) + labels[:, None],
            labels=labels,
        )
        for name, classes in (("one", CLASSES), ("two", ("b", "c", "a")))
    )
    return About(CLASSES, 7, {"stage1": (6, 5, 5), "stage2": (12, 2, 2)}, teachers)


def step(taught: int = 6) -> Step:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n = 3 + taught
    said = Said(
        shares=torch.tensor([[1.0, 0] * (taught // 2), [0, 1.0] * (taught // 2)]),
        p=(rand(taught, 3).softmax(1), rand(taught, 3).softmax(1)),
        target=rand(2, taught, 3).softmax(2),
        logits=(rand(taught, 3), rand(taught, 3)),
        features=(rand(taught, 5), rand(taught, 5)),
    )
    live = tuple(Seen(rand(n, 3), rand(n, 5), {"low": rand(n, 4, 6, 6), "high": rand(n, 8, 3, 3)}) for _ in range(2))
    return Step(
        rand(n, 3).requires_grad_(),
        torch.tensor([0, 1, 2] + [-1] * taught),
        said,
        rand(n, 7).requires_grad_(),
        {"stage1": rand(n, 6, 5, 5).requires_grad_(), "stage2": rand(n, 12, 2, 2).requires_grad_()},
        live,
        0.5,
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_found_by_its_name_and_trains(name: str) -> None:
    spec = objective_of(**{name: {}})
    objective = build_objective(spec, about)
    parts = objective(step())
    assert torch.isfinite(parts["loss"].detach())
    assert len(parts) > 1 and all(not value.requires_grad for key, value in parts.items() if key != "loss")
    parts["loss"].backward()
    for parameter in objective.parameters():
        assert parameter.grad is not None
    assert wants(spec) <= {"said", "said.each", "said.logits", "said.features", "live", "features", "taps", "labelled"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_part_reports_has_no_weight_and_the_loss_has(name: str) -> None:
    once, thrice = (build_objective(objective_of(**{name: {"weight": weight}}), about) for weight in (1.0, 3.0))
    thrice.load_state_dict(once.state_dict())
    if name == "dropping":
        torch.manual_seed(0)
    first = once(step())
    if name == "dropping":
        torch.manual_seed(0)
    second = thrice(step())
    torch.testing.assert_close(second["loss"].detach(), 3 * first["loss"].detach())
    for key in first.keys() - {"loss"}:
        torch.testing.assert_close(first[key], second[key])


def test_the_default_is_three_parts_and_without_teachers_the_labels_remain() -> None:
    assert [name for name, _ in ObjectiveSpec().parts()] == ["cross_entropy", "transport", "kd"]
    assert [name for name, _ in labels_alone(objective_of(kd={})).parts()] == ["cross_entropy"]
    smoothed = objective_of(cross_entropy={"label_smoothing": 0.1}, kd={})
    assert labels_alone(smoothed).cross_entropy.label_smoothing == 0.1
    assert wants(labels_alone(ObjectiveSpec())) == frozenset()


def test_the_objective_on_the_page_of_the_recipes_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = RECIPES.read_text(encoding="utf-8").split("```python\n# certain.py\n")[1].split("```")[0]
    (tmp_path / "certain.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "certain", raising=False)
    spec = objective_of(own={"certain:Certain": {"weight": 0.1, "power": 2.0}})
    found = build_objective(spec, about)(step())
    given = step()
    expected = (1 - given.logits[3:].softmax(1).max(1).values).pow(2).mean()
    torch.testing.assert_close(found["certain"], expected.detach())
    torch.testing.assert_close(found["loss"], 0.1 * expected)


class NotOne(nn.Module):
    pass


class Mine(Objective):
    def __init__(self, about: About, *, size: int = 1) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"no_such_module:X": {}}, "own.no_such_module:X: .*can't be imported"),
        ({"my_losses": {}}, "not of the form package.module:Class"),
        ({f"{__name__}:NotOne": {}}, "is no subclass of"),
        ({f"{__name__}:Missing": {}}, "is no subclass of"),
        ({f"{__name__}:Mine": {"sise": 2}}, "unexpected keyword argument 'sise'"),
        ({f"{__name__}:Mine": {"weight": -1}}, "weight"),
    ],
)
def test_a_bad_objective_of_one_s_own_is_refused_with_its_name(own: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wants(objective_of(own=own))


def test_settings_that_an_objective_refuses_are_named() -> None:
    with pytest.raises(ConfigError, match=r"own\..*Mine: size must be >= 1, got 0"):
        build_objective(objective_of(own={f"{__name__}:Mine": {"size": 0}}), about)
    with pytest.raises(ConfigError, match="every part is null"):
        build_objective(objective_of(), about)

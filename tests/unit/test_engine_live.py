"""Teachers beside a training: they show what is asked for, and nothing of them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.distillation.flow import Flow, FlowStudent, default_sources
from pipeline.distillation.step import About, Said, TeacherAbout
from pipeline.engine.context import LocalContext
from pipeline.engine.learner import Learner
from pipeline.engine.live import Live, student_layers, teacher_layers
from pipeline.engine.loop import Lesson, fit
from pipeline.engine.objective_spec import FlowSpec, LayersSpec, objective_of
from pipeline.engine.objectives import build_objective, wants
from pipeline.engine.spec import LoopSpec
from pipeline.errors import ConfigError
from pipeline.models import nets
from pipeline.models.recalibrate import assert_independent
from pipeline.models.spec import PreprocessingSpec, StudentSpec
from pipeline.models.student import Student, adopt, build_student, student_like
from pipeline.models.teacher import Teacher
from pipeline.models.zoo import load_zoo
from tests.tiny import make_zoo

CPU = torch.device("cpu")
GREY = PreprocessingSpec(channels=1, mean=(0.5,), std=(0.5,))


class Shapes:
    def __init__(self, n: int, labelled: bool) -> None:
        generator = torch.Generator().manual_seed(n)
        self._images = torch.randint(0, 256, (n, 1, 12, 12), generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(n) % 3 if labelled else torch.full((n,), -1)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self._images[rows]


class Says:
    """Two teachers, each of which teaches every other image."""

    def batch(self, rows, device, wants=()):
        shares = torch.stack([(rows % 2 == 0).float(), (rows % 2 == 1).float()])
        p = torch.full((len(rows), 3), 1 / 3)
        return Said(shares, (p, p), torch.stack([p, p]))


def teachers() -> list[Teacher]:
    torch.manual_seed(0)
    made = nets.resnet8(3, 1, 4), nets.mlp(4, 1, 16, 12)
    return [
        Teacher(net, name=name, classes=classes, preprocessing=GREY)
        for net, name, classes in zip(made, ("residual", "dense"), (("a", "b", "c"), ("a", "b", "c", "d")), strict=True)
    ]


def student() -> Student:
    torch.manual_seed(1)
    return build_student(StudentSpec(name="small_cnn", kwargs={"width": 4}), 3, (1, 12, 12))


def learner_of(kind: str, pupil: Student, live: Live) -> Learner:
    example = torch.zeros(2, 1, 12, 12, dtype=torch.uint8)
    own = student_layers(pupil, LayersSpec())
    shapes = [teacher_layers(teacher, LayersSpec(), example) for teacher in live.teachers]
    for number, one in enumerate(shapes):
        live.tap(number, one)
    about = About(
        ("a", "b", "c"),
        pupil.feature_dim,
        own,
        tuple(
            TeacherAbout(teacher.name, teacher.classes, torch.zeros(3, 3), tap_shapes=one)
            for teacher, one in zip(live.teachers, shapes, strict=True)
        ),
    )
    flow, spec = None, objective_of(cross_entropy={}, **({kind: {}} if kind != "flow" else {}))
    if kind == "flow":
        flow = FlowStudent(pupil, Flow(own, default_sources(own, shapes)))
    objective = build_objective(spec, lambda layers: about)
    flowing = FlowSpec(kl=0.5, every=2, ramp=0.6) if flow is not None else None
    return Learner(pupil, objective, wants=wants(spec), taps=tuple(own), flow=flow, flow_spec=flowing)


@pytest.mark.parametrize("kind", ["hints", "component", "flow"])
def test_nothing_of_a_teacher_changes(kind: str) -> None:
    live, pupil = Live(teachers()), student()
    own = set(pupil.state_dict())
    before = [{name: value.clone() for name, value in teacher.state_dict().items()} for teacher in live.teachers]
    weights = {name: value.clone() for name, value in pupil.state_dict().items()}
    learner = learner_of(kind, pupil, live)
    lesson = Lesson("live", Shapes(12, True), Shapes(40, False), Says(), live)
    spec = LoopSpec(epochs=3, batch_size=16, labelled_batch=4)
    history = fit(learner, lesson, spec, LocalContext(device=CPU), seed=0)
    for teacher, state in zip(live.teachers, before, strict=True):
        assert not teacher.training
        assert all(parameter.grad is None for parameter in teacher.parameters())
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, state[name]), name  # batch norms included
    assert any(not torch.equal(value, weights[name]) for name, value in pupil.state_dict().items())
    if kind == "flow":
        shares = [value for key, value in history[-1].items() if key.endswith(".student")]
        assert shares and min(shares) == pytest.approx(1)
        assert history[0]["flow_kl"] >= 0 and history[0]["dependency"] > 0
    assert_independent(pupil, own, live.teachers)


def test_without_fading_the_loss_alone_sets_the_weights() -> None:
    live, pupil = Live(teachers()), student()
    learner = learner_of("flow", pupil, live)
    learner.flow_spec = FlowSpec(fade=False)
    assert learner.begin(1.0)
    images = torch.zeros(4, 1, 12, 12, dtype=torch.uint8)
    looked = learner.look(images, live(images))
    assert all(0 < float(value) < 1 for key, value in learner.flow_weights().items() if key.endswith("student"))
    assert not torch.allclose(looked, learner.look(images, None))


def test_layers_by_name_are_checked() -> None:
    teacher, pupil = teachers()[0], student()
    example = torch.zeros(2, 1, 12, 12, dtype=torch.uint8)
    assert list(teacher_layers(teacher, LayersSpec(teachers={"residual": ("stage2",)}), example)) == ["stage2"]
    assert list(student_layers(pupil, LayersSpec(student=("stage2",)))) == ["stage2"]
    with pytest.raises(ConfigError, match=r"layers.teachers.residual: there is no module 'stage9'"):
        teacher_layers(teacher, LayersSpec(teachers={"residual": ("stage9",)}), example)
    with pytest.raises(ConfigError, match=r"layers.student: student 'small_cnn': there is no module 'stem'"):
        student_layers(pupil, LayersSpec(student=("stem",)))


def test_a_student_starts_from_a_teacher_of_its_architecture(tmp_path: Path) -> None:
    from pipeline.models.sources import load_teacher

    spec = load_zoo(make_zoo(tmp_path, ("flat",)))["flat"]
    teacher = load_teacher(spec)
    pupil = build_student(student_like(spec), 4, (1, 12, 12))
    fresh = adopt(pupil, teacher)
    assert fresh == ["classifier.bias", "classifier.weight"]  # two classes there, four here
    assert torch.equal(pupil.net.state_dict()["stage1.0.weight"], teacher.net.state_dict()["stage1.0.weight"])
    with pytest.raises(ConfigError, match="their architectures differ"):
        adopt(student(), teacher)

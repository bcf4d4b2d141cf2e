"""Teachers beside a training: they show what is asked for, and nothing of them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.distillation.flow import Flow, FlowStudent, default_sources
from pipeline.distillation.previous import previous_output_kl
from pipeline.distillation.step import About, Said, TeacherAbout
from pipeline.engine.context import LocalContext
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.live import Live, student_layers, teacher_layers
from pipeline.engine.loop import fit
from pipeline.engine.objective_spec import FlowSpec, LayersSpec, objective_of
from pipeline.engine.objectives import build_objective, wants
from pipeline.engine.spec import LoopSpec
from pipeline.errors import ConfigError, TeacherError
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
        self.numbers = torch.arange(n)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self._images[rows]


class Says:
    """Two teachers, each of which teaches every other image."""

    views = None

    def batch(self, rows, views, wants=()):
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


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_teachers_show_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tracing, which is ours to get right, in `make test`; what it makes of that, which takes longer, in slow."""
    asked: list[object] = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda look, **how: asked.append(look) or compiler(look, backend=backend, **how)
    )
    found = []
    for compiled in (False, True):
        live, pupil = Live(teachers(), compiled=compiled), student()
        learner = learner_of("hints", pupil, live)
        lesson = Lesson("live", Shapes(12, True), Shapes(40, False), Says(), live.fold())
        spec = LoopSpec(epochs=2, batch_size=16, labelled_batch=4)
        history = fit(learner, lesson, spec, LocalContext(device=CPU), seed=0)
        images = torch.randint(0, 256, (7, 1, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        found.append((live(images), live(images[:5]), history))
    assert len(asked) == len(teachers())
    for one, other in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        torch.testing.assert_close(vars(one), vars(other))
        assert one.taps
    losses = [[epoch["loss"] for epoch in history] for _, _, history in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_teacher_that_can_not_be_compiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> None:
        raise RuntimeError("no compiler found")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda look, **how: compiler(look, backend=broken, **how))
    live = Live(teachers(), compiled=True)
    with pytest.raises(TeacherError, match=r"'residual': it can't be compiled .*no compiler.*compile_teachers: false"):
        live(torch.zeros(4, 1, 12, 12, dtype=torch.uint8))


def test_without_fading_the_loss_alone_sets_the_weights() -> None:
    live, pupil = Live(teachers()), student()
    learner = learner_of("flow", pupil, live)
    learner.flow_spec = FlowSpec(fade=False)
    assert learner.begin(1.0)
    images = torch.zeros(4, 1, 12, 12, dtype=torch.uint8)
    looked = learner.look(images, live(images))
    assert all(0 < float(value) < 1 for key, value in learner.flow_weights().items() if key.endswith("student"))
    assert not torch.allclose(looked, learner.look(images, None))


def test_the_student_alone_learns_the_labels_and_what_it_says_with_its_teachers() -> None:
    live, pupil = Live(teachers()), student()
    learner = learner_of("flow", pupil, live)
    learner.flow_spec = FlowSpec(alone=2, kl=0, dependency=0)
    learner.previous = None
    assert learner.begin(0.3)
    images, labels = torch.randint(0, 255, (6, 1, 12, 12), dtype=torch.uint8), torch.tensor([0, 2, -1, -1, -1, 1])
    pupil.eval()  # one BatchNorm for all passes below
    pupil.net.classifier.weight.data *= 50  # a student that has made up its mind
    parts = learner(images, labels, None, live(images), 0.3)
    parts["loss"].backward()
    mixed, own = learner.look(images, live(images)).detach(), pupil(images)
    with torch.no_grad():
        p, q = mixed.softmax(1), own.softmax(1)
        kl = (p * (p / q).log()).sum(1).mean()
        entropies = [-one[torch.tensor([0, 1, 5]), torch.tensor([0, 2, 1])].log().mean() for one in (p, q)]
    assert float(kl) > 1e-3
    torch.testing.assert_close(parts["loss"], entropies[0] + 2 * (kl + entropies[1]))
    # What the student says with its teachers is not drawn to what it says alone: all of flow's gradient is the labels'.
    found = [parameter.grad.clone() for parameter in learner.flow.parameters()]
    learner.zero_grad()
    learner.flow_spec = FlowSpec(alone=0, kl=0, dependency=0)
    learner(images, labels, None, live(images), 0.3)["loss"].backward()
    for one, parameter in zip(found, learner.flow.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_former_parameters_keep_the_teachers_that_they_had() -> None:
    live, pupil = Live(teachers()), student()
    pupil.eval()
    pupil.net.classifier.weight.data *= 50
    learner = learner_of("flow", pupil, live)
    images = torch.randint(0, 255, (6, 1, 12, 12), dtype=torch.uint8)
    labels = torch.full((6,), 1)
    before = learner.look(images, live(images)).detach()
    learner.begin(0.5)  # the teachers fade; no parameter has moved
    parts = learner(images, labels, None, live(images), 0.5)
    now = learner.look(images, live(images)).detach()
    torch.testing.assert_close(parts["flow_kl"], previous_output_kl(before, now))
    assert float(parts["flow_kl"]) > 1e-4
    assert learner.begin(0.7)  # none flow now, but the former parameters still look
    for _ in range(4):
        learner.after_step()
    assert not learner.begin(0.8)
    assert float(learner(images, labels, None, None, 0.8)["flow_kl"]) == pytest.approx(0, abs=1e-6)


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

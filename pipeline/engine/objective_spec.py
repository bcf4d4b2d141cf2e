"""Settings of the loss: which objectives, with what weights and schedules. Imports no torch.

An objective is one file in `pipeline/distillation` and one class here, which says where it is and what can be set; its
field of `ObjectiveSpec` is the name that YAML knows it by. Someone's own needs no line here: see `ObjectiveSpec.own`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.strict import StrictModel

_ROOM = "pipeline.distillation"


class Part(StrictModel):
    """An objective: its weight and the weight's schedule; what else can be set is its own.

    `weight` rises linearly from 0 over the first `rise` of the training, and falls linearly to 0 from `fade` on.
    """

    target: ClassVar[str]

    weight: float = Field(1.0, ge=0, description="of this part in the loss")
    rise: float = Field(0.0, ge=0, le=1, description="part of the training over which the weight rises from 0")
    fade: float = Field(1.0, ge=0, le=1, description="point of the training from which the weight falls to 0; 1: never")

    def arguments(self) -> dict[str, Any]:
        """Return what the objective itself is built with."""
        return self.model_dump(exclude={"weight", "rise", "fade", "layers"}, exclude_none=True)


class LayersSpec(StrictModel):
    """Which inner layers take part; null: the stages of the net, from the stem on (`pipeline.models.stages`)."""

    student: tuple[str, ...] | None = Field(None, description="paths of modules of the student, from low to high")
    teachers: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="by teacher: names of its taps, or paths of its modules, from low to high"
    )
    before_activation: bool = Field(False, description="take a stage's features before its last activation")


class CrossEntropyPart(Part):
    """Cross-entropy on the labelled images."""

    target: ClassVar[str] = f"{_ROOM}.cross_entropy:CrossEntropy"

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label that is spread over all classes")


class TransportPart(Part):
    """Transport loss to the teachers, each in its own label space (SCTD)."""

    target: ClassVar[str] = f"{_ROOM}.transport:TransportDistillation"

    weight: float = Field(10.0, ge=0, description="1 / reg puts it on the scale of a cross-entropy")
    reg: float = Field(0.1, gt=0, description="entropic regulariser ε, on costs in [0, 1]")


class KDPart(Part):
    """KL divergence to what the teachers say of the task's classes, at a temperature."""

    target: ClassVar[str] = f"{_ROOM}.kd:KnowledgeDistillation"

    temperature: float = Field(1.0, gt=0, description="of the softmax on both sides")


class DKDPart(Part):
    """Decoupled distillation: the target class and the others apart."""

    target: ClassVar[str] = f"{_ROOM}.dkd:DKD"

    alpha: float = Field(1.0, ge=0, description="weight of the target class's part")
    beta: float = Field(8.0, ge=0, description="weight of the other classes' part")
    temperature: float = Field(4.0, gt=0, description="of the softmax on both sides")


class DISTPart(Part):
    """Correlation with the teacher over the classes of an image, and over the images of a batch."""

    target: ClassVar[str] = f"{_ROOM}.dist:DIST"

    beta: float = Field(1.0, ge=0, description="weight of the relation over classes")
    gamma: float = Field(1.0, ge=0, description="weight of the relation over images")
    temperature: float = Field(1.0, gt=0, description="of the softmax on both sides")


class HintsPart(Part):
    """Squared distance to the teachers' inner features, through a learnt map (FitNets). Runs the teachers live."""

    target: ClassVar[str] = f"{_ROOM}.hints:Hints"

    layers: LayersSpec = LayersSpec()


class AttentionPart(Part):
    """Attention transfer: where the features are large. Runs the teachers live."""

    target: ClassVar[str] = f"{_ROOM}.attention:AttentionTransfer"

    weight: float = Field(1000.0, ge=0, description="half of it is the β of the authors' code")
    power: float = Field(2.0, gt=0, description="of the activations that a map sums up")
    layers: LayersSpec = LayersSpec()


class RelationsPart(Part):
    """KL divergence to the relations between a teacher's embedding and the task's class centres in it."""

    target: ClassVar[str] = f"{_ROOM}.relations:ClassCentreRelations"

    temperature: float = Field(0.1, gt=0, description="of the softmax over cosines")


class BTuningPart(Part):
    """Squared distance to the teachers' Bayesian linear predictions, mixed by their evidence (B-Tuning)."""

    target: ClassVar[str] = f"{_ROOM}.b_tuning:BTuning"

    weight: float = Field(100.0, ge=0)
    temperature: float = Field(1.0, gt=0, description="of the softmax over the teachers' evidences")


class ConcatenatedPart(Part):
    """Distillation of all teachers' logits, put one after the other."""

    target: ClassVar[str] = f"{_ROOM}.concatenated:ConcatenatedKD"

    temperature: float = Field(4.0, gt=0, description="of the softmax on both sides")
    head: Literal["auxiliary", "classes"] = Field(
        "auxiliary",
        description="auxiliary: a second head, dropped afterwards; classes: the student's own, where the teachers' "
        "classes are the task's by name",
    )


class DroppingPart(Part):
    """All teachers teach, the worst matched one always, the others at random (UNIC's teacher dropping)."""

    target: ClassVar[str] = f"{_ROOM}.dropping:TeacherDropping"

    drop: float = Field(0.5, ge=0, lt=1, description="probability that a teacher is dropped for an image")
    temperature: float = Field(1.0, gt=0, description="of the softmax on both sides")


class CommonFeaturesPart(Part):
    """Student and teachers meet in a common feature space (CFL)."""

    target: ClassVar[str] = f"{_ROOM}.common_features:CommonFeatures"

    dim: int = Field(64, ge=1, description="dimensions of the common space")


class ComponentPart(Part):
    """A component net learns from the teachers of one sub-task (AKA, first step). Runs the teachers live."""

    target: ClassVar[str] = f"{_ROOM}.amalgamation:Component"

    features: float = Field(1.0, ge=0, description="weight of the features in the common space")
    logits: float = Field(1.0, ge=0, description="weight of the logits")
    norm: float = Field(1.0, ge=0, description="keeps the common space from shrinking to nothing")
    soft: float = Field(0.0, ge=0, description="weight of the teacher's distribution over the sub-task's classes")
    view: Literal["classes", "carried"] | None = Field(
        None,
        description="classes: teachers know the sub-task by the names of its classes; carried: their label spaces are "
        "related to it, by the labelled images or by names; null: classes for named sub-tasks, else carried",
    )
    layers: LayersSpec = LayersSpec(before_activation=True)


class TargetPart(Part):
    """The target net learns from the component nets (AKA, second step). Runs them live."""

    target: ClassVar[str] = f"{_ROOM}.amalgamation:Target"

    features: float = Field(1.0, ge=0, description="weight of the features in the common space")
    logits: float = Field(1.0, ge=0, description="weight of the logits")
    layers: LayersSpec = LayersSpec(before_activation=True)


class ObjectiveSpec(StrictModel):
    """What the student is trained on: loss = Σ weight(t) · part, over the parts that are not null.

    The first three are on unless they are set to null.
    """

    cross_entropy: CrossEntropyPart | None = CrossEntropyPart()
    transport: TransportPart | None = TransportPart()
    kd: KDPart | None = KDPart()
    dkd: DKDPart | None = None
    dist: DISTPart | None = None
    hints: HintsPart | None = None
    attention: AttentionPart | None = None
    relations: RelationsPart | None = None
    b_tuning: BTuningPart | None = None
    concatenated: ConcatenatedPart | None = None
    dropping: DroppingPart | None = None
    common_features: CommonFeaturesPart | None = None
    component: ComponentPart | None = None
    target: TargetPart | None = None
    own: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="objectives of your own: `package.module:Class` to its settings, among them weight, rise, fade",
    )

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Yield name and settings of every part that is on."""
        for name in type(self).model_fields:
            part = getattr(self, name)
            if isinstance(part, Part):
                yield name, part


def objective_of(**parts: Mapping[str, Any]) -> ObjectiveSpec:
    """Return settings with these parts alone: ``objective_of(cross_entropy={}, kd={"temperature": 4})``."""
    off: dict[str, Any] = dict.fromkeys(set(ObjectiveSpec.model_fields) - {"own"})
    return ObjectiveSpec.model_validate(off | parts)


def labels_alone(spec: ObjectiveSpec) -> ObjectiveSpec:
    """Return settings with the cross-entropy of `spec` alone, switched on if it is not: training without teachers."""
    part = (spec.cross_entropy or CrossEntropyPart()).model_dump()
    return objective_of(cross_entropy=part | {"weight": part["weight"] or 1.0})


class FlowSpec(StrictModel):
    """Knowledge flow: features of the teachers flow into the student while it learns, and fade out."""

    layers: LayersSpec = LayersSpec()
    dependency: float = Field(0.1, ge=0, description="λ₁ of the sum of -log p_student, reached at the end of `ramp`")
    ramp: float = Field(0.9, gt=0, le=1, description="part of the training over which λ₁ rises from 0")
    fade: bool = Field(
        True, description="scale the teachers' weights down to 0 over `ramp`; false: the loss alone is to do that"
    )
    kl: float = Field(0.0, ge=0, description="λ₂ of the KL divergence to the output under the previous parameters")
    alone: float = Field(
        2.0, ge=0, description="λ₃ (ours) of what the student learns on its own: labels, and what it says with teachers"
    )
    every: int = Field(50, ge=1, description="steps between two snapshots of the previous parameters")
    student_share: float = Field(
        0.2, gt=0, lt=1, description="weight of the student's own features at the start; the teachers share the rest"
    )
    precise: int = Field(2048, ge=1, description="images that BatchNorm is recalibrated on after the teachers are gone")

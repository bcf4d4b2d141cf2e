"""Knowledge amalgamation: teachers that share a sub-task into a component net, component nets into a target net.

Shapes: B taught images, T teachers, C_t classes of teacher t, C_s of the student, K of them that a teacher knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.amalgamation.common_space import Adapters
from pipeline.amalgamation.subtasks import SubTask, nearest, sources_of
from pipeline.distillation.kd import checked_weights, no_loss, softened_divergence
from pipeline.distillation.pairing import pair_layers
from pipeline.distillation.step import About, Objective, Seen, Step, TeacherAbout

Shapes = Mapping[str, tuple[int, ...]]
_LEAST = 1e-4  # probability


class _Amalgamation(Objective):
    """What both steps have in common: adapters for every teacher, and where its classes are among the student's."""

    needs: ClassVar[frozenset[str]] = frozenset({"said", "live", "taps"})

    def __init__(self, about: About, *, features: float, logits: float, source_side: bool) -> None:
        super().__init__()
        if not about.teachers:
            raise ValueError("there must be at least one teacher")
        self.features, self.logits = _factor("features", features), _factor("logits", logits)
        self._names = tuple(teacher.name for teacher in about.teachers)
        # Without a weight there are no adapters that would be trained for nothing.
        self._points = [_pairs(about.tap_shapes, teacher) if self.features else [] for teacher in about.teachers]
        self.adapters = nn.ModuleList(
            [
                Adapters(
                    [(about.tap_shapes[mine], teacher.tap_shapes[theirs]) for mine, theirs in points],
                    source_side=source_side,
                )
                for points, teacher in zip(self._points, about.teachers, strict=True)
            ]
        )

    def _set_classes(self, number: int, columns: Tensor, places: Tensor) -> None:
        self.register_buffer(f"columns_{number}", columns, persistent=False)
        self.register_buffer(f"places_{number}", places, persistent=False)

    def _said_logits(self, step: Step, live: Sequence[Seen], number: int) -> Tensor:
        """Return a teacher's logits of the taught images (B, …), of which `_set_classes` told the columns."""
        return live[number].logits[step.taught]

    def _compared(self, step: Step, live: Sequence[Seen], number: int, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return how far the student is from a teacher on some taught rows: in features (b,), and in logits (b,)."""
        adapters, seen = self.adapters[number], live[number]
        assert isinstance(adapters, Adapters)
        mine, theirs = step.logits[step.taught][rows], self._said_logits(step, live, number)[rows]
        columns, places = self.get_buffer(f"columns_{number}"), self.get_buffer(f"places_{number}")
        in_features = in_logits = mine.new_zeros(len(mine))
        if self._points[number]:
            in_features = adapters.features(
                [step.taps[name][step.taught][rows] for name, _ in self._points[number]],
                [seen.taps[name][step.taught][rows] for _, name in self._points[number]],
            )
        if self.logits:
            in_logits = adapters.logits(mine[:, places], theirs[:, columns])
        return in_features, in_logits

    def _nothing(self, step: Step, *names: str) -> dict[str, Tensor]:
        """Return all parts as 0, with a graph to every parameter, of the student's layers too."""
        parts = no_loss(step, *names, objective=self)
        for name in dict.fromkeys(name for points in self._points for name, _ in points):
            parts["loss"] = parts["loss"] + step.taps[name][:0].sum()
        return parts

    def _live(self, step: Step) -> tuple[Seen, ...]:
        if step.live is None or len(step.live) != len(self._names):
            raise ValueError(
                f"live must show what the {len(self._names)} teachers see, got "
                f"{'nothing' if step.live is None else len(step.live)}"
            )
        return step.live


class Component(_Amalgamation):
    """A component net learns from the teachers of one sub-task, every image from those that have a share in it.

    loss = 1/B Σ_b Σ_t w_tb [Σ_l MSE(A_tl F_l, B_tl F_tl) + MSE(m_t z[places], z_t[columns])]
    + Σ_t Σ_l mean_o (‖B_tl,o‖² − 1)²

    for image b, with w the shares (one-hot where the least ambiguous teacher alone teaches), F_l features of layer l,
    A and B 1×1 convolutions, m_t a learnt scalar, z logits over those classes of the sub-task that teacher t knows,
    and each MSE the mean over the elements of one image [1]_. The last term counts once a step.

    The mean over the B images of a mixed batch, where the publication takes one batch from each teacher's share, and
    the distribution over the sub-task (`soft`) are ours. So is how layers of nets of different depth are paired, see
    `pair_layers`.

    Parameters
    ----------
    about : About
        Its classes are those of the sub-task, alone or as "sub-task/class"; a single head names the sub-task too.
    features, logits, norm
        Weights ≥ 0 of the three terms; 1 in the publication. With fixed features a row of B_tl still shrinks to 0 where
        1/B Σ_b w_tb r_b² ≥ 2 · norm / features, r_b what A leaves unexplained of the row at norm 1.
    view
        ``"classes"``: z_t are the teacher's logits, its classes matched with the sub-task's by name. ``"carried"``: z_t
        is the logarithm, less its mean, of what it says of the sub-task's classes after its label space was related to
        them; for teachers whose classes are others (ours).
    soft
        Weight ≥ 0 of 1/B Σ_b Σ_t w_tb KL(p_tb ‖ softmax(z_b)), p_tb what the teacher's distribution stands for among
        the classes of the sub-task. Of use where teachers know different classes: the logits term says nothing of
        those that a teacher does not know.

    Raises
    ------
    ValueError
        Without teachers, for negative weights, an unknown view, a teacher that knows fewer than two classes of the
        sub-task by name where that counts, and nets without layers to compare while `features` is not 0.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """

    def __init__(
        self,
        about: About,
        *,
        features: float = 1.0,
        logits: float = 1.0,
        norm: float = 1.0,
        soft: float = 0.0,
        view: Literal["classes", "carried"] = "classes",
    ) -> None:
        super().__init__(about, features=features, logits=logits, source_side=True)
        self.norm, self.soft = _factor("norm", norm), _factor("soft", soft)
        if view not in ("classes", "carried"):
            raise ValueError(f"view must be classes or carried, got {view!r}")
        self.view = view
        if view == "carried":
            for number in range(len(about.teachers)):
                every = torch.arange(len(about.classes))
                self._set_classes(number, every, every.clone())
            return
        subtask = SubTask.of(about.classes, about.heads[0].name if len(about.heads) == 1 else None)
        sources = {one.teacher: one for one in sources_of(subtask, [one.classes for one in about.teachers])}
        for number, teacher in enumerate(about.teachers):
            if number not in sources:
                raise ValueError(
                    f"teacher {teacher.name!r} knows fewer than two classes of sub-task {subtask.name!r} "
                    f"({', '.join(subtask.classes)}); {nearest(subtask.classes, teacher.classes)}"
                )
            self._set_classes(number, sources[number].columns, sources[number].places)

    def _said_logits(self, step: Step, live: Sequence[Seen], number: int) -> Tensor:
        if self.view == "classes" or step.said is None:
            return super()._said_logits(step, live, number)
        # What half precision rounds to 0 would be minus infinity.
        log_p = step.said.target[number].clamp_min(_LEAST).log()
        return log_p - log_p.mean(1, keepdim=True)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "component", "component.features", "component.logits", "component.norm"}``.

        And ``"component.soft"`` where its weight is not 0. All but the first two are before their weights. 0 when
        nobody is taught.
        """
        names = ["component", "component.features", "component.logits", "component.norm"]
        names += ["component.soft"] * (self.soft > 0)
        # Keeps teachers without an image in this batch in the graph.
        nothing = self._nothing(step, *names)
        if step.said is None:
            return nothing
        live, shares = self._live(step), step.said.shares
        if shares.shape[0] != len(live):
            raise ValueError(f"shares must have {len(live)} rows, got shape {tuple(shares.shape)}")
        features, logits, soft, norm = (nothing["loss"] for _ in range(4))
        for number, share in enumerate(shares):
            rows = torch.nonzero(checked_weights(share, shares.shape[1]) > 0)[:, 0]
            if len(rows):
                in_features, in_logits = self._compared(step, live, number, rows)
                weights = share[rows].to(in_logits) / shares.shape[1]
                features, logits = features + (weights * in_features).sum(), logits + (weights * in_logits).sum()
                if self.soft:
                    mine = step.logits[step.taught][rows]
                    each = softened_divergence(mine, step.said.target[number][rows], 1.0)
                    soft = soft + (weights * each).sum()
        for adapters in self.adapters:
            assert isinstance(adapters, Adapters)
            norm = norm + adapters.penalty()
        loss = self.features * features + self.logits * logits + self.norm * norm + self.soft * soft
        values = (loss, features, logits, norm, soft)
        return {"loss": loss} | {name: value.detach() for name, value in zip(names, values, strict=False)}


class Target(_Amalgamation):
    """A target net with a head for each sub-task learns from the component nets, every image from all of them.

    loss = 1/B Σ_b Σ_i [Σ_l MSE(A_il F_l, F_il) + MSE(m_i z[head i], z_i)] for image b and component i, with 1×1
    convolutions on the target's side alone, one set a component, onto its raw features, and each MSE the mean over the
    elements of one image [1]_. Shares do not count.

    How layers of nets of different depth are paired is ours, see `pair_layers`.

    Parameters
    ----------
    about : About
        Its classes are "sub-task/class"; the teachers are the component nets, with classes of the same form.
    features, logits
        Weights ≥ 0 of the two terms; 1 in the publication.

    Raises
    ------
    ValueError
        Without components, for negative weights, a class of a component that the target does not have, and nets
        without layers to compare while `features` is not 0.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """

    def __init__(self, about: About, *, features: float = 1.0, logits: float = 1.0) -> None:
        super().__init__(about, features=features, logits=logits, source_side=False)
        at = {name: place for place, name in enumerate(about.classes)}
        for number, component in enumerate(about.teachers):
            missing = [name for name in component.classes if name not in at]
            if missing:
                raise ValueError(
                    f"component {component.name!r} has the class {missing[0]!r}, which the target does not; "
                    f"{nearest(missing[:1], about.classes)}"
                )
            places = torch.tensor([at[name] for name in component.classes])
            self._set_classes(number, torch.arange(len(places)), places)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "target", "target.features", "target.logits"}``; 0 when nobody is taught.

        The last two are before their weights.
        """
        nothing = self._nothing(step, "target", "target.features", "target.logits")
        if step.said is None:
            return nothing
        live = self._live(step)
        features = logits = nothing["loss"]
        rows = max(step.said.target.shape[1], 1)
        for number in range(len(live)):
            in_features, in_logits = self._compared(step, live, number, slice(None))
            features, logits = features + in_features.sum() / rows, logits + in_logits.sum() / rows
        loss = self.features * features + self.logits * logits
        return {
            "loss": loss,
            "target": loss.detach(),
            "target.features": features.detach(),
            "target.logits": logits.detach(),
        }


def _factor(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return value


def _pairs(shapes: Shapes, teacher: TeacherAbout) -> list[tuple[str, str]]:
    mine, theirs = tuple(shapes), tuple(teacher.tap_shapes)
    if not mine or not theirs:
        who = "the student" if not mine else f"teacher {teacher.name!r}"
        raise ValueError(f"{who} has no layers to compare; name some, or set features to 0")
    return pair_layers(mine, theirs)

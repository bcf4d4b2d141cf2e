"""What is trained: the student, the loss with its adapters and heads, and the flow of features, as one module."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distillation.cross_entropy import labelled_cross_entropy
from pipeline.distillation.flow import FlowStudent
from pipeline.distillation.previous import Previous, previous_output_kl
from pipeline.distillation.step import Said, Seen, Step
from pipeline.engine.objective_spec import FlowSpec
from pipeline.models.capture import captured, find_penultimate, pooled


@dataclass(frozen=True)
class Other:
    """What the images that are mixed into those of a step are to be taken for.

    Attributes
    ----------
    share : float
        λ: the loss is λ L(own targets) + (1 − λ) L(these).
    labels : (n,) tensor
    said : Said or None
    """

    share: float
    labels: Tensor
    said: Said | None

    def take(self, rows: Tensor, taught: slice) -> Other:
        """Return those of some rows, among them these taught ones."""
        return Other(self.share, self.labels[rows], None if self.said is None else self.said.take(taught))


class Learner(nn.Module):
    """Student and objective in one forward pass, so that data-parallel training averages the gradients of both.

    loss = objective + λ₁(t) L_dep + λ₂ L_KL + λ₃ L_alone; the last three with knowledge flow alone, whose objective is
    that of the student with its teachers. L_alone is ours: with q the student on its own and z what it says with its
    teachers, L_alone = CE(q, y) + mean_b KL(z_b ‖ q_b), without a gradient to z, as long as anything flows. The student
    so learns, from images that have no label, what its teachers' features are good for.

    Parameters
    ----------
    student : Module
        Maps images to logits.
    objective : Module
        Maps a `Step` to parts of the loss.
    wants : collection of str
        What the objective needs, see `pipeline.distillation.step.Objective`.
    taps : collection of str
        Paths of the student's layers that the objective looks at.
    flow : FlowStudent, optional
        Wraps the same student.
    flow_spec : FlowSpec, optional
        Given with `flow`.

    Attributes
    ----------
    autocast : torch.dtype or None
        Half precision for the student's forward pass; what is made of its output is always computed in float32.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: nn.Module,
        *,
        wants: Collection[str] = (),
        taps: Collection[str] = (),
        flow: FlowStudent | None = None,
        flow_spec: FlowSpec | None = None,
    ) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.wants, self.taps = frozenset(wants), tuple(taps)
        self.flow = None if flow is None else flow.flow
        self._flowing = _Unlisted(flow)
        self.flow_spec = flow_spec
        self.autocast: torch.dtype | None = None
        self.previous = None
        if flow is not None and flow_spec is not None and flow_spec.kl > 0:
            self.previous = Previous(flow, flow_spec.every)
        self._penultimate = find_penultimate(self._net) if "features" in self.wants else None
        if "features" in self.wants and self._penultimate is None:
            raise ValueError("the student has no linear layer, so it has no penultimate features")

    @property
    def _net(self) -> nn.Module:
        net = getattr(self.student, "net", self.student)
        assert isinstance(net, nn.Module)
        return net

    def begin(self, progress: float) -> bool:
        """Turn to a step; return whether the teachers have to look at its images."""
        if self.flow is None or self.flow_spec is None:
            return "live" in self.wants
        remaining = max(0.0, 1 - progress / self.flow_spec.ramp) if self.flow_spec.fade else 1.0
        self.flow.remaining = remaining
        if remaining > 0 or "live" in self.wants:
            return True
        # After the fade the former parameters, to which the output is held, may still have had their teachers.
        return self.previous is not None and float(self.previous.copy_of("flow._remaining")) > 0

    def look(self, images: Tensor, live: tuple[Seen, ...] | None) -> Tensor:
        """Return the student's logits, with what flows in from the teachers where they have looked."""
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self._flowing.module is None or live is None:
                logits: Tensor = self.student(images)
            else:
                logits = self._flowing.module(images, [seen.taps for seen in live])
        return logits.float() if self.autocast is not None else logits

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        said: Said | None,
        live: tuple[Seen, ...] | None,
        progress: float,
        other: Other | None = None,
    ) -> dict[str, Tensor]:
        """Return the parts of the loss, among them ``"loss"``, their total.

        Parameters
        ----------
        images : (n, C, H, W) tensor
            Labelled ones first, then taught ones.
        labels : (n,) tensor
            −1 for taught images.
        said : Said of the taught images, or None
        live : T `Seen`, or None
        progress : float
            Part of the training done, in [0, 1).
        other : Other, optional
            What is mixed into the images.
        """
        with captured(self._net, features=self._penultimate, taps={path: path for path in self.taps}) as seen:
            logits = self.look(images, live)
        features = pooled(seen["features", ""]).float() if self._penultimate is not None else None
        taps = {path: seen["tap", path].float() for path in self.taps}
        step = Step(logits, labels, said, features, taps, live, progress)
        parts = dict(self.objective(step))
        if other is not None:
            partners = self.objective(replace(step, labels=other.labels, said=other.said))
            parts = {name: torch.lerp(partners[name], value, other.share) for name, value in parts.items()}
        if self.flow is not None and self.flow_spec is not None:
            parts |= self._flow_parts(parts["loss"], logits, images, labels, live, progress, other)
        return parts

    def _flow_parts(
        self,
        loss: Tensor,
        logits: Tensor,
        images: Tensor,
        labels: Tensor,
        live: tuple[Seen, ...] | None,
        progress: float,
        other: Other | None,
    ) -> dict[str, Tensor]:
        assert self.flow is not None and self.flow_spec is not None
        dependency = self.flow.dependency()
        loss = loss + self.flow_spec.dependency * min(progress / self.flow_spec.ramp, 1.0) * dependency
        parts = {"dependency": dependency.detach()}
        if live is None:
            loss = loss + self.flow.untouched()
        if self.flow_spec.alone > 0 and (progress < self.flow_spec.ramp or not self.flow_spec.fade):
            alone = self._alone(images, labels, logits, other)
            loss = loss + self.flow_spec.alone * alone
            parts["flow_alone"] = alone.detach()
        if self.previous is not None:
            if live is None:
                with self.flow.alone():
                    before = self.previous.logits(images)
            else:
                before = self.previous.logits(images, [seen.taps for seen in live])
            jump = previous_output_kl(before, logits)
            loss = loss + self.flow_spec.kl * jump
            parts["flow_kl"] = jump.detach()
        return {"loss": loss} | parts | self.flow_weights()

    def _alone(self, images: Tensor, labels: Tensor, logits: Tensor, other: Other | None) -> Tensor:
        """Return what the student has yet to learn to do without its teachers, see `Learner`."""
        own = self.look(images, None)
        loss = labelled_cross_entropy(own, labels)
        if other is not None:
            loss = torch.lerp(labelled_cross_entropy(own, other.labels), loss, other.share)
        return loss + previous_output_kl(logits, own)

    def flow_weights(self) -> dict[str, Tensor]:
        """Return the mixing weight of every source: ``flow.LAYER.student`` and ``flow.LAYER.TEACHER``, by number."""
        found: dict[str, Tensor] = {}
        if self.flow is None:
            return found
        for layer, weights in self.flow.weights().items():
            found[f"flow.{layer}.student"] = weights[0].detach()
            for source, weight in zip(self.flow.sources[layer], weights[1:], strict=True):
                key = f"flow.{layer}.{source.teacher}"
                found[key] = found.get(key, torch.zeros_like(weight)) + weight.detach()
        return found

    def undecayed(self) -> list[nn.Parameter]:
        """Return the mixing weights: weight decay would draw the student back to its teachers."""
        return [] if self.flow is None else list(self.flow.w)

    def after_step(self) -> None:
        """Count a step of the optimiser: from time to time the parameters become the previous ones."""
        if self.previous is not None:
            self.previous.step()


class _Unlisted:
    """Holds a module that must not be listed twice among the parts of another one."""

    def __init__(self, module: Any) -> None:
        self.module = module

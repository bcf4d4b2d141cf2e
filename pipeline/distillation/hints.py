"""Hints: the student's inner features, through a learnt map, come close to those of its teachers.

Shapes: B taught images, T teachers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.distillation.kd import no_loss, weighted_mean
from pipeline.distillation.pairing import Adapter, each_squared_error, is_map, pair_layers
from pipeline.distillation.step import About, Objective, Step


def hint_loss(mapped: Tensor, hint: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return mean_b w_b mean_i (mapped_bi − hint_bi)², for one layer of the student and one of a teacher.

    Parameters
    ----------
    mapped : (B, …) tensor
        The student's features in the teacher's shape.
    hint : (B, …) tensor
        The teacher's. No gradient flows to them.
    weights : (B,) tensor, optional
        w, ≥ 0; by default 1. The mean is over the B rows.

    Raises
    ------
    ValueError
        For shapes that differ, and weights that are not B finite numbers ≥ 0.
    """
    return weighted_mean(each_squared_error(mapped, hint), weights)


class Hints(Objective):
    """Squared distance between features of the student and of its teachers (FitNets [1]_).

    loss = mean_b Σ_t w_tb mean_j MSE(A_tj(f_b^j), f_tb^j), over the pairs j of layers that `pair_layers` makes with
    teacher t, A learnt (`Adapter`), w the shares. Part: ``hints``.

    Published is ½ ‖A(f^j) − f_t^j‖² for one teacher and one pair in the middle, as a stage of its own before soft
    targets. The mean over elements, several pairs and teachers, their weights and training on hints and all else at
    once are ours.

    Parameters
    ----------
    about : About
        The taps of the student and of its teachers.
    layers
        ``"all"`` pairs, or the ``"last"``: of those whose two sides are maps the highest one, or the highest of all
        where there are none.

    Raises
    ------
    ValueError
        When the student or a teacher shows no layer, or one that is neither a map nor a vector.

    References
    ----------
    .. [1] Romero et al., "FitNets: hints for thin deep nets", ICLR 2015 (arXiv 1412.6550).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "live", "taps"})

    def __init__(self, about: About, *, layers: Literal["last", "all"] = "all") -> None:
        super().__init__()
        if layers not in ("last", "all"):
            raise ValueError(f"layers must be 'last' or 'all', got {layers!r}")
        self.pairs: list[list[tuple[str, str]]] = []
        self.adapters = nn.ModuleList()
        for teacher in about.teachers:
            mine, theirs = about.tap_shapes, teacher.tap_shapes
            try:
                pairs = pair_layers(tuple(mine), tuple(theirs))
                if layers == "last":
                    maps = [(own, other) for own, other in pairs if is_map(mine[own]) and is_map(theirs[other])]
                    pairs = [(maps or pairs)[-1]]
                self.adapters.extend(Adapter(mine[own], theirs[other]) for own, other in pairs)
            except ValueError as error:
                raise ValueError(f"hints of teacher {teacher.name!r}: {error}") from None
            self.pairs.append(pairs)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "hints"}``; 0 when nobody is taught."""
        # The graph reaches all parameters, also those of a teacher that has no share in these images.
        loss = no_loss(step, objective=self)["loss"]
        if step.said is not None:
            assert step.live is not None
            adapters = iter(self.adapters)
            for share, seen, pairs in zip(step.said.shares, step.live, self.pairs, strict=True):
                rows = torch.nonzero(share > 0)[:, 0]  # a teacher costs work for the images that it teaches alone
                for own, other in pairs:
                    adapter = next(adapters)
                    if len(rows):
                        mapped = adapter(step.taps[own][step.taught][rows])
                        part = hint_loss(mapped, seen.taps[other][step.taught][rows], share[rows])
                        loss = loss + part * (len(rows) / len(share) / len(pairs))
        return {"loss": loss, "hints": loss.detach()}

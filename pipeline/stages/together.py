"""The chosen teachers speak together: one view of the task from all their embeddings, beside what each says alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Settings
from pipeline.data.mirror import here
from pipeline.engine.spec import RAW, SPOKEN
from pipeline.errors import ConfigError, StageError
from pipeline.stages.base import Run
from pipeline.stages.probe import labelled_features
from pipeline.stages.speaking import spoken
from pipeline.stages.teachers import has_labels, save_tensors, table_of

if TYPE_CHECKING:
    import torch

    from pipeline.amalgamation.together import Together
    from pipeline.engine.teaching import Speaker

TOGETHER = "(together)"  # no teacher's name has brackets
_ROWS = 4096  # at a time: the embeddings of a large task do not fit in memory
_FITTED = 5000  # images that the view is fitted on where there are no labels
_EACH = frozenset({"live", "said.each", "said.logits", "said.features", "labelled"})


def choice_of(settings: Settings) -> str:
    """Return who teaches an image: what the settings say, or what suits the task and the loss where they leave it open.

    Raises
    ------
    ConfigError
        If the teachers are to teach together, and the task or the loss does not allow it.
    """
    from pipeline.engine.objectives import wants

    given = settings.amalgamate.choice
    if given not in (None, "together"):
        return given
    if settings.amalgamate.mode == "components":  # which choose for themselves
        return "least_ambiguous"
    why, labelled = None, settings.task.splits.probe > 0
    if settings.distill.flow is not None or wants(settings.distill.objective) & _EACH:
        why = "the student's loss needs what each teacher says, or its layers"
    elif given is None and labelled and settings.assess.bridge.kind != "centres":
        why = "each teacher is to be heard in its own label space"
    if why is None:
        return "together"
    if given == "together":
        raise ConfigError(f"amalgamate.choice: together can't be, {why}; set it to least_ambiguous, average or gain")
    return "least_ambiguous"


def speak_together(run: Run, names: Sequence[str]) -> tuple[Speaker, torch.Tensor]:
    """Write what teachers say together of the training images; return the speaker and its ground cost (C_s, C_s).

    What each of them says must be there with its features, see `pipeline.stages.speaking.speak`.
    """
    import torch
    from safetensors import safe_open

    from pipeline.engine.teaching import Speaker

    view, classes = _view(run, names), table_of(run).classes
    keyed = {"spoken": [spoken(run, name).name for name in names], "version": 2}
    folder = run.part("spoken", "together", keyed)
    if not here(folder / SPOKEN).exists():
        handles = [safe_open(here(spoken(run, name) / RAW), "pt") for name in names]
        stored = [handle.get_slice("features") for handle in handles]
        rows = stored[0].get_shape()[0]
        parts = [
            view.distribution([one[start : start + _ROWS].float() for one in stored]).half()
            for start in range(0, rows, _ROWS)
        ]
        p = torch.cat(parts)
        save_tensors(folder, SPOKEN, {"p": p, "carried": p.clone()})
    return Speaker(TOGETHER, classes, 1.0, str(folder)), view.bridge.M


def said_together(folder: Path, images: int) -> torch.Tensor:
    """Return what they say of the images as they are, (N, C_s)."""
    from safetensors import safe_open

    with safe_open(here(folder / SPOKEN), "pt") as handle:
        p: torch.Tensor = handle.get_slice("carried")[:images].float()
    return p / p.sum(-1, keepdim=True)  # half precision rounds the sums away from 1


def _view(run: Run, names: Sequence[str]) -> Together:
    """Fit the view on labelled images; without any on training images, with the labels that the teachers give them."""
    import torch
    from safetensors import safe_open

    from pipeline.amalgamation.together import fit_together, pseudo_labels
    from pipeline.engine.arms import TAUGHT

    table = table_of(run)
    if has_labels(run):
        labels = table.split("train_labelled").labels
        features = [labelled_features(run, name)[: len(labels)] for name in names]
    else:
        wanted = max(_FITTED, 5 * len(table.classes))
        rows, carried, features = min(wanted, len(table.split(*TAUGHT))), [], []
        for name in names:
            with safe_open(here(spoken(run, name) / SPOKEN), "pt") as handle:
                carried.append(handle.get_slice("carried")[:rows].float())
            with safe_open(here(spoken(run, name) / RAW), "pt") as handle:
                features.append(handle.get_slice("features")[:rows].float())
        try:
            labels = pseudo_labels(torch.stack(carried))
        except ValueError as error:
            raise StageError(f"amalgamate.choice=together: {error}; set it to least_ambiguous") from None
    return fit_together(features, labels, len(table.classes), temperature=run.settings.assess.bridge.temperature)

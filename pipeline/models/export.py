"""Exporting a student as a program that needs none of this package's code."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import StageError
from pipeline.models.archive import load_program
from pipeline.models.student import Student

_BATCHES = (1, 2, 5)


def export_student(student: Student, path: str | Path, example: Tensor) -> torch.export.ExportedProgram:
    """Write a student as a ``.pt2`` program that maps stored images (B, C, H, W), uint8, to logits, for any B.

    The file is read back and its logits are compared with the student's for batches of 1, 2 and 5 images before it gets
    its name.

    Parameters
    ----------
    student : Student
        Is left as it is.
    path : path
        Must end in ``.pt2``.
    example : (B, C, H, W) uint8 tensor
        Stored images.

    Returns
    -------
    torch.export.ExportedProgram

    Raises
    ------
    ValueError
        On another suffix, or an example that is no batch of stored images.
    StageError
        When the program says something else than the student.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {path.name!r}")
    if example.ndim != 4 or example.dtype != torch.uint8 or len(example) < 1:
        raise ValueError(f"example must be (B, C, H, W) uint8, got {tuple(example.shape)} {example.dtype}")
    model = copy.deepcopy(student).cpu().eval()
    largest = max(_BATCHES)
    images = example.cpu().repeat(-(-largest // len(example)), 1, 1, 1)[:largest]
    # A batch of 1 in the example would be taken for a constant.
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.part.pt2")
    try:
        torch.export.save(program, unfinished)
        _compare(model, load_program(unfinished), images)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return program


def _compare(model: Student, program: torch.nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        for count in _BATCHES:
            expected, got = model(images[:count]), program(images[:count])
            if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-4, atol=1e-5):
                raise StageError(
                    f"the exported student differs from the student for a batch of {count}: "
                    f"{tuple(got.shape)} for {tuple(expected.shape)}, or other logits; nothing was written"
                )

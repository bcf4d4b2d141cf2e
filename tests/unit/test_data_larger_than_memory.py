"""More images than memory holds: half of them would do to store, look at and learn from them all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

COUNT, SIDE = 20_480, 64  # 252 MB
ALLOWED = 125  # MB on top of what the libraries take, for all that the process does

# What belongs to a process alone is looked at all the time: pages of mapped files are the system's to take back.
CHILD = """
import sys, threading

import torch

from pipeline.data.ingest import build_table
from pipeline.data.spec import ImageSpec, NumpySource, SplitSpec
from pipeline.data.table import ImageTable
from pipeline.data.views import augment
from pipeline.data.spec import AugmentSpec
from pipeline.distillation.step import About
from pipeline.engine.context import LocalContext
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.loop import fit
from pipeline.engine.objective_spec import ObjectiveSpec, labels_alone
from pipeline.engine.objectives import build_objective
from pipeline.engine.spec import LoopSpec
from pipeline.models.nets import mlp
from pipeline.models.spec import PreprocessingSpec, StudentSpec
from pipeline.models.student import build_student
from pipeline.models.teacher import Teacher, predict

source, folder, storage, side = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
classes = ("even", "odd")
student = build_student(StudentSpec(name="mlp", kwargs={"width": 8}), 2, (3, side, side))
preprocessing = PreprocessingSpec(channels=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
teacher = Teacher(mlp(2, 3, 8), name="t", classes=classes, preprocessing=preprocessing)
objective = build_objective(labels_alone(ObjectiveSpec()), lambda layers: About(classes, student.feature_dim, {}, ()))


def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def watch():
    while not done.wait(0.005):
        most[0] = max(most[0], own())


def grown():
    return round((max(most[0], own()) - before) / 1e6)


before, most, done = own(), [0], threading.Event()
threading.Thread(target=watch, daemon=True).start()

image = ImageSpec(size=side, storage=storage)
splits = SplitSpec(train_labelled=2, probe=2, validation=2, test=2)
report = build_table(NumpySource(path=source), image, splits, 0, folder)
table = ImageTable.open(folder)
print("rows", len(table), report.rows)
everything = table.split("train_labelled", "train_unlabelled", "probe", "validation", "test")
print("said", len(predict(teacher, everything.batches(128)).logits))
lesson = Lesson("alone", table.split("train_labelled"), everything, None)
spec = LoopSpec(epochs=1, batch_size=128, labelled_batch=4)
views = AugmentSpec(shift=2)
history = fit(
    Learner(student, objective),
    lesson,
    spec,
    LocalContext(device=torch.device("cpu")),
    seed=0,
    augment=lambda images, keys: augment(images, views, keys),
)
print("epochs", len(history))
print("grown", grown())
everything.images()
print("at once", grown())
done.set()
"""


@pytest.mark.parametrize("storage", ["raw", pytest.param("encoded", marks=pytest.mark.slow)])
def test_half_of_the_images_fit_into_memory(tmp_path: Path, storage: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    assert images.nbytes > 2 * ALLOWED * 10**6
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(COUNT) % 2, classes=["even", "odd"])
    arguments = [tmp_path / "images.npz", tmp_path / "table", storage, SIDE]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    told = re.fullmatch(rf"rows {COUNT} {COUNT}\nsaid {COUNT}\nepochs 1\ngrown (\d+)\nat once (\d+)\n", found.stdout)
    assert told is not None, found.stdout
    grown, at_once = map(int, told.groups())
    assert grown < ALLOWED < images.nbytes / 1e6 <= at_once

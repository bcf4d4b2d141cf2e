"""What lies in a folder of images: classes, how many images each has, their sizes and colours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from pipeline.data.pixels import FORMATS
from pipeline.data.sources import FolderImages, image_files
from pipeline.data.spec import ImageFolderSource
from pipeline.errors import DataError, UserError

# What people call a folder of images without labels, and the two halves of a data set that comes split.
_UNLABELLED = ("unlabelled", "unlabeled", "unsupervised")
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_LOOKED_AT = 200  # images that are opened, spread over the folder
_SIDES = (28, 32, 48, 64, 96, 128, 160, 192, 224)


@dataclass(frozen=True)
class Images:
    """A folder of images, as it was found.

    Attributes
    ----------
    folder : Path
        Holds a folder for each class.
    counts : dict of str to int
        Images by class, in the order of the labels.
    unlabelled : str or None
        The folder among them whose images have no label.
    unlabelled_count : int
    test_folder : Path or None
        A folder of the same classes for the test split.
    test_counts : dict of str to int
    side : int
        Median of the shorter sides of the images that were opened, in pixels.
    grey : bool
        Whether all of these are without colour.
    unreadable : tuple of str
        Those that could not be opened.
    """

    folder: Path
    counts: dict[str, int]
    unlabelled: str | None
    unlabelled_count: int
    test_folder: Path | None
    test_counts: dict[str, int]
    side: int
    grey: bool
    unreadable: tuple[str, ...]

    @property
    def total(self) -> int:
        """Images for all splits, but for a test folder of its own."""
        return sum(self.counts.values()) + self.unlabelled_count

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return 1 if self.grey else 3

    @property
    def stored_side(self) -> int:
        """The largest usual side that most images fill, at most 224."""
        fitting = [side for side in _SIDES if side <= self.side]
        return fitting[-1] if fitting else self.side


def look_at_images(folder: Path, unlabelled: str | None = None) -> Images:
    """Count a folder's images by class, and open some of them.

    Parameters
    ----------
    folder : Path
        Holds a folder for each class; or `train` and `test` folders that do.
    unlabelled : str, optional
        Name of the folder whose images have no label; by default one that is called ``unlabelled``.

    Raises
    ------
    UserError
        When there are no class folders, or no image that can be read.
    """
    names = _subfolders(folder)
    lower = {name.lower(): name for name in names}
    train = next((lower[name] for name in _TRAIN if name in lower), None)
    test_folder = None
    if train is not None and set(lower) <= {*_TRAIN, *_TEST, *_UNLABELLED}:
        found = next((lower[name] for name in _TEST if name in lower), None)
        test_folder = None if found is None else folder / found
        folder = folder / train
        names = _subfolders(folder)
    if unlabelled is None:
        unlabelled = next((name for name in names if name.lower() in _UNLABELLED), None)
    if not [name for name in names if name != unlabelled]:
        held = (
            f"images, but no folder for each class; if {folder.name!r} is one class, give"
            if _holds_images(folder)
            else "no folder for each class; give"
        )
        raise UserError(f"--images {folder}: it holds {held} the folder above the classes' folders")
    source = FolderImages(ImageFolderSource(path=str(folder), unlabelled=unlabelled))
    if len(source.classes) < 2:
        raise DataError(f"{folder}: has one class folder, {source.classes[0]!r}; a task needs two or more")
    files = {name: list(image_files(folder / name)) for name in source.classes}
    without = list(image_files(folder / unlabelled)) if unlabelled is not None else []
    test_counts: dict[str, int] = {}
    if test_folder is not None:
        test_counts = {name: sum(1 for _ in image_files(test_folder / name)) for name in _subfolders(test_folder)}
        if set(test_counts) != set(source.classes):
            odd = sorted(set(test_counts) ^ set(source.classes))[0]
            raise DataError(
                f"{test_folder}: its class folders are not those of {folder} (see {odd!r}); make them agree"
            )
    every = [path for paths in files.values() for path in paths] + without
    side, grey, unreadable = _opened(every, folder)
    return Images(
        folder=folder,
        counts={name: len(paths) for name, paths in files.items()},
        unlabelled=unlabelled,
        unlabelled_count=len(without),
        test_folder=test_folder,
        test_counts=test_counts,
        side=side,
        grey=grey,
        unreadable=unreadable,
    )


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise UserError(
            f"{folder}: can't be read ({error.strerror}); name the folder of images with --images"
        ) from None


def _holds_images(folder: Path) -> bool:
    return next(iter(image_files(folder)), None) is not None


def _opened(files: Sequence[str], folder: Path) -> tuple[int, bool, tuple[str, ...]]:
    """Open some images; return the median of their shorter sides, whether all are grey, and which can't be read."""
    if not files:
        raise DataError(f"{folder}: its class folders hold no images; check --images")
    step = max(1, len(files) // _LOOKED_AT)
    sides: list[int] = []
    grey, unreadable = True, []
    for path in files[::step]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                grey = grey and _is_grey(image)
                sides.append(min(image.size))
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
            unreadable.append(f"{path} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    if not sides:
        raise DataError(
            f"{folder}: none of {len(unreadable)} images can be read, first {unreadable[0]}; check --images"
        )
    return int(statistics.median_low(sides)), grey, tuple(unreadable)


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "LA"):
        return True
    bands = image.convert("RGB").split()
    return all(ImageChops.difference(bands[0], other).getbbox() is None for other in bands[1:])

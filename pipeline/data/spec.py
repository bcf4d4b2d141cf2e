"""Settings of the data: where images come from, how they are stored, how they are split and augmented."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.strict import StrictModel

Side = Annotated[int, Field(ge=1, le=4096)]


class ImageSpec(StrictModel):
    """How every image is stored in the table.

    An image of another size is scaled until it covers `size` (bilinear with antialiasing, aspect kept) and the middle
    is cut out; an image of another mode is converted (grey: ITU-R 601 luma).

    Attributes
    ----------
    size : int or (int, int)
        Side of a square, or (height, width), in pixels.
    channels : {1, 3}
        Grey or RGB.
    storage : {"raw", "encoded"}
        Raw pixels are read fastest, straight from the memory map. Encoded images (lossless: PNG, or the source's own
        bytes where they already fit) take less disk and are decoded at every read.
    max_unreadable : float
        Fraction of the source's images that may be unreadable; they are skipped and listed. Above it ingest fails.
    """

    size: Side | tuple[Side, Side] = 32
    channels: Literal[1, 3] = 3
    storage: Literal["raw", "encoded"] = "raw"
    max_unreadable: float = Field(default=0.01, ge=0, le=1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a stored image."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.channels, height, width


class _Source(StrictModel):
    """What all sources share.

    Attributes
    ----------
    classes : list of str, optional
        Class names in the order of the integer labels. Not needed where the source knows them itself.
    only : list of str, optional
        The task's classes, in the task's order, if it wants fewer than the source has. Samples of other classes are
        left out without being decoded; samples without a label stay.
    """

    classes: list[str] | None = None
    only: list[str] | None = None

    @field_validator("classes", "only")
    @classmethod
    def _names(cls, names: list[str] | None) -> list[str] | None:
        if names is not None:
            if len(names) < 2:
                raise ValueError("at least two class names are needed")
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"class name {repeated[0]!r} occurs twice")
        return names

    @model_validator(mode="after")
    def _only_known(self) -> _Source:
        if self.classes is not None and self.only is not None:
            unknown = [name for name in self.only if name not in self.classes]
            if unknown:
                raise ValueError(f"`only` names {unknown[0]!r}, which is not in `classes`")
        return self


class ParquetSource(_Source):
    """Parquet with one image a row, as Hugging Face's image data sets are laid out.

    Attributes
    ----------
    path : str
        A file, a folder (its ``*.parquet``, at any depth) or a glob; local or a URI that ``pyarrow.fs`` knows.
    image_column : str
        Encoded images: a binary column, or a struct with a field ``bytes``.
    label_column : str or None
        Integers (null or -1: no label), or strings that name the class. None: no sample has a label.
    """

    type: Literal["parquet"] = "parquet"
    path: str
    image_column: str = "image"
    label_column: str | None = "label"


class ImageFolderSource(_Source):
    """A folder for each class with image files in it, at any depth.

    Attributes
    ----------
    path : str
        The folder that holds the class folders.
    unlabelled : str, optional
        Name of a folder beside them whose images have no label.
    """

    type: Literal["image_folder"] = "image_folder"
    path: str
    unlabelled: str | None = None


class TorchvisionSource(_Source):
    """A data set of ``torchvision.datasets``.

    Attributes
    ----------
    name : str
        Name of the class, for instance ``FashionMNIST``.
    root : str
        Its folder.
    train : bool
        Which half. A data set that has `split` instead of `train` gets "train" or "test".
    split : str, optional
        Passed on where the data set has an argument of that name.
    download : bool
        Whether it may be fetched when it is not in `root`.
    """

    type: Literal["torchvision"] = "torchvision"
    name: str
    root: str
    train: bool = True
    split: str | None = None
    download: bool = False


class NumpySource(_Source):
    """A NumPy archive.

    Attributes
    ----------
    path : str
        ``.npz`` with ``images`` (N, H, W) or (N, H, W, C) uint8 and, where there are labels, ``labels`` (N,): integers
        (-1: no label) or class names. ``classes`` (a string array) may hold the names.
    """

    type: Literal["numpy"] = "numpy"
    path: str


class OwnSource(_Source):
    """Code of one's own that gives images with their labels; from the task's settings alone, never from a zoo file.

    Attributes
    ----------
    factory : str
        ``package.module:callable``, on the path of the process that reads the images. Called with `kwargs`, it gives
        something to go through: ``(image, label)`` after ``(image, label)``. An image is a uint8 array (H, W) or
        (H, W, C), an encoded file's bytes or a PIL image; a label is a number, a class name or None.
    kwargs : dict
        Its arguments. What lies at a local `path` or `root` among them counts by its content, as with other sources.
    version : str
        Change it when the images have changed and nothing else tells.
    """

    type: Literal["own"] = "own"
    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    kwargs: dict[str, Any] = Field(default_factory=dict)
    version: str = ""


SourceSpec = Annotated[
    ParquetSource | ImageFolderSource | TorchvisionSource | NumpySource | OwnSource,
    Field(discriminator="type"),
]


class SplitSpec(StrictModel):
    """How many samples go where.

    Every class gives the same number of samples to `test`, `validation`, `probe` and `train_labelled`, in this order,
    so that asking for more labels never changes what a student is tested on. `train_unlabelled` is drawn from what is
    left: samples that have no label first, then the classes in proportion to what they have left. At most one of
    `train_unlabelled` and `test` takes all the rest, unless `test` comes from a source of its own.

    Attributes
    ----------
    train_labelled, probe, validation : int
        Samples a class; all three 0 for a task without labels.
    train_unlabelled : int or None
        Samples in total, whose labels are not stored; None: all that no other split asks for.
    test : int or None
        Samples a class; None: all that no other split asks for, or all of the test source; 0 for a task without labels.
    """

    train_labelled: int = Field(default=10, ge=0)
    train_unlabelled: int | None = Field(default=None, ge=0)
    probe: int = Field(default=10, ge=0)
    validation: int = Field(default=10, ge=0)
    test: int | None = Field(default=100, ge=0)

    def problem(self, *, test_source: bool) -> str | None:
        """Say in one line why these numbers can't be met whatever the data; None if they can."""
        if self.train_unlabelled is None and self.test is None and not test_source:
            return "`train_unlabelled` and `test` can't both take the rest; give one of them a number"
        without = [name for name in ("train_labelled", "probe", "validation") if getattr(self, name) == 0]
        if 0 < len(without) < 3:
            return f"`{without[0]}` is 0; train_labelled, probe and validation are all above 0, or all 0 (no labels)"
        if self.test == 0 and not without:
            return "`test` is 0; give at least 1 a class, or null for all of the rest"
        return None


class AugmentSpec(StrictModel):
    """Random changes to training images.

    Attributes
    ----------
    shift : int
        Largest shift in each direction, in pixels; what moves in from outside is black.
    flip : bool
        Whether half of the images are mirrored left to right.
    views : int or None
        How many views of each image the student cycles through, the image as it is being one of them; what teachers
        say is then computed and kept for each. None: a new view in every epoch, of which only live teachers see more
        than the image as it is.
    """

    shift: int = Field(default=2, ge=0)
    flip: bool = False
    views: int | None = Field(default=None, ge=1)

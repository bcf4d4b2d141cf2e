"""A source of one's own: anything that gives images with labels, read as strictly as the others."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.data.ingest import build_table
from pipeline.data.sources import open_source
from pipeline.data.spec import ImageSpec, OwnSource, SplitSpec
from pipeline.errors import DataError
from pipeline.stages.ingest import source_identity

ME = __name__
CALLS: list[int] = []


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)


def generator(count=3, label="owl"):
    CALLS.append(count)
    for number in range(count):
        yield pixels(number), label


class Listed:
    classes = ("owl", "wren")

    def __init__(self, path=None) -> None:
        self.path = path

    def __iter__(self):
        buffer = io.BytesIO()
        Image.fromarray(pixels(1)).save(buffer, "PNG")
        yield pixels(0), 0
        yield buffer.getvalue(), np.int64(1)
        yield Image.fromarray(pixels(2)), None


def breaks():
    yield pixels(0), "owl"
    raise OSError("the line is dead")


def alone():
    yield pixels(0)


def of_strings():
    yield "a.png", "owl"


def number():
    return 3


def spec(name: str, **kwargs) -> OwnSource:
    return OwnSource(factory=f"{ME}:{name}", kwargs=kwargs, classes=["owl", "wren"])


def test_a_generator_is_called_again_for_each_pass() -> None:
    CALLS.clear()
    source = open_source(spec("generator", count=2, label="wren"))
    for _ in range(2):
        samples = list(source)
        assert [sample.label for sample in samples] == [1, 1]
        np.testing.assert_array_equal(samples[1].image, pixels(1))
    assert CALLS == [2, 2]


def test_an_object_with_class_names_gives_images_of_every_kind() -> None:
    source = open_source(OwnSource(factory=f"{ME}:Listed"))
    assert source.classes == ("owl", "wren")
    assert [sample.label for sample in source] == [0, 1, None] == [sample.label for sample in source]
    only = open_source(OwnSource(factory=f"{ME}:Listed", only=["wren", "owl"]))
    assert [sample.label for sample in only] == [1, 0, None]


def test_it_becomes_a_table(tmp_path: Path) -> None:
    splits = SplitSpec(train_labelled=0, probe=0, validation=0, test=0)
    report = build_table(OwnSource(factory=f"{ME}:Listed"), ImageSpec(size=6), splits, 0, tmp_path)
    assert report.counts["train_unlabelled"] and report.rows == 3 and report.classes == ("owl", "wren")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("breaks", {}, "image 1 fails with OSError .the line is dead."),
        ("alone", {}, r"image 0: is a ndarray; each must be \(image, label\)"),
        ("of_strings", {}, "image 0: its image is a str; give a uint8 array"),
        ("number", {}, "gives a int, which can't be gone through"),
        ("generator", {"label": "kite"}, "label 'kite' is outside the 2 classes"),
        ("generator", {"cuont": 3}, "unexpected keyword argument 'cuont'"),
        ("nothing", {}, "has no callable 'nothing'"),
    ],
)
def test_what_gives_no_samples_is_told_in_one_line(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(open_source(spec(name, **kwargs)))


def test_a_module_that_is_not_there_and_a_name_that_is_none() -> None:
    with pytest.raises(DataError, match=r"'no_such_module' can't be imported .* put its folder on PYTHONPATH"):
        open_source(OwnSource(factory="no_such_module:x", classes=["a", "b"]))
    with pytest.raises(DataError, match="has no class names"):
        open_source(OwnSource(factory=f"{ME}:generator"))
    with pytest.raises(ValidationError):
        OwnSource(factory="os.system")


def test_its_identity_is_code_arguments_version_and_what_lies_at_its_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.bin").write_bytes(b"1")

    def identity(**changes) -> str:
        return source_identity(
            OwnSource(**{"factory": f"{ME}:Listed", "kwargs": {"path": str(tmp_path / "a")}, **changes})
        )

    before = identity()
    assert identity(kwargs={"path": str(tmp_path / "b")}) == before  # moved
    others = [
        identity(version="2"),
        identity(factory=f"{ME}:generator"),
        identity(factory="tests.tiny:images"),
        identity(kwargs={"path": str(tmp_path / "a"), "side": 3}),
    ]
    (tmp_path / "a" / "x.bin").write_bytes(b"2")
    others.append(identity())
    assert len({before, *others}) == 6
    with pytest.raises(DataError, match="does not exist or holds no file"):
        identity(kwargs={"path": str(tmp_path / "none")})

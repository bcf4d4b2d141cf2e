"""Tasks and zoos for a notebook: what is given becomes the settings that a file would have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import pipeline as faculty
from pipeline.config import TaskSettings
from pipeline.data.sources import open_source
from pipeline.models.spec import TRUSTED_FACTORIES, TeacherSpec
from pipeline.models.zoo import Zoo as Catalogue


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_of_class_folders(here: Path) -> None:
    (here / "my birds" / "owl").mkdir(parents=True)
    task = faculty.load_task("my birds", image_size=(24, 32), channels=1, probe=3, test="rest", train_unlabelled=7)
    expected = {
        "source": {"type": "image_folder", "path": str(here / "my birds")},
        "image": {"size": (24, 32), "channels": 1},
        "splits": {"probe": 3, "test": None, "train_unlabelled": 7},
    }
    assert task.settings == TaskSettings.model_validate(expected)
    assert task.name == "my-birds"
    assert "24 x 32" in repr(task) and "test the rest" in repr(task)


@pytest.mark.parametrize(
    ("place", "kind", "name"),
    [
        ("birds.npz", "numpy", "birds"),
        ("birds.parquet", "parquet", "birds"),
        ("published", "parquet", "published"),
        ("birds/*.parquet", "parquet", "task"),
        ("s3://bucket/birds", "parquet", "birds"),
    ],
)
def test_files_by_what_they_are(here: Path, place: str, kind: str, name: str) -> None:
    (here / "birds.npz").touch()
    (here / "birds.parquet").touch()
    (here / "published" / "data").mkdir(parents=True)
    (here / "published" / "data" / "train.parquet").touch()
    task = faculty.load_task(place, classes=["owl", "wren"])
    assert (task.settings.source.type, task.name) == (kind, name)
    assert task.settings.source.path == (place if "://" in place else str(here / place))
    assert task.settings.source.classes == ["owl", "wren"]


def test_a_name_of_torchvision_and_a_mapping(here: Path) -> None:
    task = faculty.load_task("FashionMNIST", root="sets", only=["Bag", "Coat"])
    assert task.settings.source.model_dump(exclude_defaults=True) == {
        "name": "FashionMNIST",
        "root": str(here / "sets"),
        "only": ["Bag", "Coat"],
    }
    given = {"type": "own", "factory": "my_data:sheets", "kwargs": {"path": "x"}, "classes": ["a", "b"]}
    own = faculty.load_task(given)
    assert own.settings.source.kwargs == {"path": str(here / "x")}
    assert own.name == "sheets"


@pytest.mark.parametrize("form", ["array", "tensor", "grey tensor"])
def test_arrays_become_an_archive_named_by_its_content(here: Path, form: str) -> None:
    grey = form == "grey tensor"
    array = pixels(9, 6, 8) if grey else pixels(9, 6, 8, 3)
    first = array[:, None] if grey else array.transpose(0, 3, 1, 2).copy()
    given = array if form == "array" else torch.from_numpy(first)
    names = ["owl", "wren", None] * 3
    task = faculty.load_task(given, names, train_labelled=1, probe=1, validation=1, test=1)
    assert task.settings.image.shape == (1 if grey else 3, 6, 8)
    source = open_source(task.settings.source)
    samples = list(source)
    assert source.classes == ("owl", "wren")
    assert [sample.label for sample in samples] == [0, 1, None] * 3
    np.testing.assert_array_equal(np.stack([sample.image for sample in samples]), array)
    written = list((here / "runs" / "kept").iterdir())
    faculty.load_task(given, names, train_labelled=2)
    assert list((here / "runs" / "kept").iterdir()) == written
    faculty.load_task(given, ["owl", "owl", "wren"] * 3)
    assert len(list((here / "runs" / "kept").iterdir())) == 2


def test_numbers_with_and_without_names_and_no_labels_at_all() -> None:
    images = pixels(4, 5, 5)
    numbered = faculty.load_task(images, torch.tensor([0, 2, 1, -1]))
    assert open_source(numbered.settings.source).classes == ("0", "1", "2")
    named = faculty.load_task(images, [0, 1, 1, 0], classes=["owl", "wren"])
    assert open_source(named.settings.source).classes == ("owl", "wren")
    bare = faculty.load_task(images, classes=["owl", "wren"])
    splits = bare.settings.splits
    assert (splits.train_labelled, splits.probe, splits.validation, splits.test) == (0, 0, 0, 0)
    assert [sample.label for sample in open_source(bare.settings.source)] == [None] * 4


def test_a_test_source_of_its_own(here: Path) -> None:
    task = faculty.load_task(pixels(4, 5, 5), ["a", "b"] * 2, test_source=(pixels(2, 5, 5), ["b", "a"]))
    assert task.settings.test_source is not None and task.settings.test_source.path != task.settings.source.path
    assert task.settings.splits.test is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: faculty.load_task("nowhere/birds"), "nowhere/birds: does not exist"),
        (lambda: faculty.load_task("FashionMNST"), "no folder or file 'FashionMNST', and no data set of that name"),
        (lambda: faculty.load_task("notes.txt"), "is neither a folder, nor .npz"),
        (lambda: faculty.load_task("notes.txt", [1]), "`labels` belong to arrays"),
        (lambda: faculty.load_task(pixels(4, 5, 5).astype(float), [0, 1, 0, 1]), "images are float64; convert"),
        (lambda: faculty.load_task(pixels(4, 3, 5, 5), [0, 1, 0, 1]), r"shape \(4, 3, 5, 5\); give \(N, H, W\)"),
        (lambda: faculty.load_task(torch.zeros(4, 5, 5, 3, dtype=torch.uint8), [0] * 4), r"give \(N, H, W\) or \(N, C"),
        (lambda: faculty.load_task(pixels(4, 5, 5), [0, 1]), "2 labels for 4 images"),
        (lambda: faculty.load_task(pixels(4, 5, 5)), "name them in `classes`"),
        (lambda: faculty.load_task(pixels(2, 5, 5), ["a", "c"], classes=["a", "b"]), "label 'c' is none of `classes`"),
        (lambda: faculty.load_task(pixels(2, 5, 5), [0, 3], classes=["a", "b"]), r"0\.\.3 for 2 classes"),
        (lambda: faculty.load_task(pixels(2, 5, 5), [0, "a"]), "all of one kind"),
        (lambda: faculty.load_task(pixels(2, 5, 5), [0, 1], probe=0), "load_task: .*`probe` is 0"),
        (
            lambda: faculty.load_task(".", unlabeled="x"),
            "`source.unlabeled` is not a setting; did you mean `unlabelled`",
        ),
    ],
)
def test_what_is_no_task_is_told_in_one_line(here: Path, call, message: str) -> None:
    (here / "notes.txt").touch()
    with pytest.raises(faculty.FacultyError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


ENTRY = {
    "name": "mine",
    "source": {"type": "safetensors", "path": "mine.safetensors", "factory": "pipeline.models.nets:small_cnn"},
    "classes": ["a", "b"],
    "preprocessing": {"channels": 3, "mean": [0.5], "std": [0.5]},
}


def test_a_zoo_file_and_some_of_its_teachers(here: Path) -> None:
    (here / "zoo.yaml").write_text(yaml.safe_dump({"teachers": [ENTRY, {**ENTRY, "name": "other"}]}), encoding="utf-8")
    zoo = faculty.load_zoo("zoo.yaml")
    assert zoo.settings.path == str(here / "zoo.yaml")
    assert list(zoo) == ["mine", "other"] and len(zoo) == 2 and zoo["mine"].classes == ("a", "b")
    some = faculty.load_zoo(here / "zoo.yaml", only=["other"], trust=["my_nets."])
    assert some.names == ("other",)
    assert some.settings.trusted_factories == (*TRUSTED_FACTORIES, "my_nets.")
    with pytest.raises(faculty.FacultyError, match="no teacher 'mein'; did you mean 'mine'"):
        faculty.load_zoo("zoo.yaml", only=["mein"])
    with pytest.raises(faculty.FacultyError, match=r"zoo\.yml: can't be read"):
        faculty.load_zoo("zoo.yml")


def test_entries_become_a_zoo_file_with_absolute_paths(here: Path) -> None:
    spec = TeacherSpec.model_validate({**ENTRY, "name": "other", "licence": "MIT"})
    zoo = faculty.load_zoo([ENTRY, spec])
    assert zoo["mine"].path == str(here / "mine.safetensors")
    assert zoo["other"].licence == "MIT"
    assert faculty.load_zoo([ENTRY, spec]).settings.path == zoo.settings.path
    assert faculty.load_zoo([spec]).settings.path != zoo.settings.path
    assert "2 teachers: mine, other" in repr(zoo)


def test_a_zoo_file_in_a_store_is_named_by_its_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipeline.models.zoo.load_zoo", lambda place: asked.append(place) or Catalogue([]))
    assert faculty.load_zoo("s3://bucket/zoo.yaml").settings.path == "s3://bucket/zoo.yaml"
    assert asked == ["s3://bucket/zoo.yaml"]


def test_a_registry_is_asked_later() -> None:
    zoo = faculty.load_zoo("mlflow", filter="tags.task = 'birds'", alias="approved")
    asked = zoo.settings
    assert (asked.source, asked.filter, asked.alias) == ("mlflow", "tags.task = 'birds'", "approved")
    assert "birds" in repr(zoo)
    with pytest.raises(faculty.FacultyError, match="asked when a run begins"):
        len(zoo)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ENTRY, "takes a path, a list of entries or 'mlflow', got dict; put it in a list"),
        ([{**ENTRY, "clases": []}], "`teachers.0.clases` is not a setting; did you mean `classes`"),
        ([ENTRY, ENTRY], "two teachers are called 'mine'"),
        ([], "teachers"),
        ([{**ENTRY, "examples": {"type": "own", "factory": "evil:code"}}], "a zoo file names none for its examples"),
    ],
)
def test_what_is_no_zoo_is_told_in_one_line(given, message: str) -> None:
    with pytest.raises(faculty.FacultyError, match=message) as caught:
        faculty.load_zoo(given)
    assert all(line.startswith("load_zoo: ") for line in str(caught.value).splitlines())


def test_images_of_any_kind_become_the_task_s(here: Path) -> None:
    from pipeline.data.spec import ImageSpec
    from pipeline.face.student import as_stored

    array = pixels(5, 6, 8, 3)
    spec = ImageSpec(size=(6, 8), channels=3, storage="encoded")
    expected = torch.from_numpy(array.transpose(0, 3, 1, 2).copy())
    Image.fromarray(array[0]).save(here / "one.png")
    for given in (array, expected, list(array), [Image.fromarray(one) for one in array]):
        assert torch.equal(as_stored(given, spec), expected)
    for one in ("one.png", here / "one.png", (here / "one.png").read_bytes(), Image.fromarray(array[0])):
        assert torch.equal(as_stored(one, spec), expected[:1])
    assert as_stored(array, ImageSpec(size=4, channels=1)).shape == (5, 1, 4, 4)
    assert as_stored([], spec).shape == (0, 3, 6, 8)
    for wrong, message in (
        ("none.png", "none.png can't be read"),
        (array[0, 0], r"shape \(8, 3\); give a batch"),
        (expected[0], r"shape \(3, 6, 8\); give \(N, C, H, W\)"),
        ([3], "image 0 is a int; give"),
        (array / 255, "image array is float64"),
        (b"no image", "image 0: is no whole image"),
    ):
        with pytest.raises(faculty.FacultyError, match=message):
            as_stored(wrong, spec)

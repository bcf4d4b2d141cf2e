import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import ingest
from pipeline.data.ingest import IngestReport, build_table, try_reading
from pipeline.data.pixels import canonical, sample_id
from pipeline.data.spec import ImageFolderSource, ImageSpec, NumpySource, SplitSpec
from pipeline.data.table import NO_LABEL, SPLITS, ImageTable
from pipeline.errors import ConfigError, DataError

CLASSES = ["cat", "dog", "fox"]
IMAGE = ImageSpec(size=4, channels=1)
FEW = SplitSpec(train_labelled=2, probe=2, validation=2, test=2)  # eight a class


def make_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4), dtype=np.uint8)


def save(path: Path, images: np.ndarray, labels, classes=CLASSES) -> NumpySource:
    np.savez(path, images=images, labels=np.asarray(labels), classes=classes)
    return NumpySource(path=str(path))


def content(table: ImageTable) -> dict[str, tuple[str, int]]:
    """Sample id → (split, label)."""
    found = {}
    for name in SPLITS:
        split = table.split(name)
        found.update({one: (name, label) for one, label in zip(split.ids, split.labels.tolist(), strict=True)})
    return found


@pytest.fixture
def source(tmp_path) -> NumpySource:
    return save(tmp_path / "source.npz", make_images(60), np.arange(60) % 3)


@pytest.mark.parametrize("storage", ["raw", "encoded"])
def test_the_table_holds_the_source(tmp_path, source, storage):
    image = ImageSpec(size=4, channels=1, storage=storage)
    report = build_table(source, image, FEW, 0, tmp_path / "out")
    table = ImageTable.open(report.path)
    assert report == IngestReport(
        path=str(tmp_path / "out" / "images.arrow"),
        rows=60,
        counts=table.counts(),
        classes=("cat", "dog", "fox"),
        fingerprint=table.fingerprint,
        skipped=[],
        duplicates=0,
        conflicts=0,
        overlap=0,
        unused=0,
    )
    per_class = {"cat": 2, "dog": 2, "fox": 2}
    assert report.counts == {
        "train_labelled": per_class,
        "train_unlabelled": {NO_LABEL: 36},
        "probe": per_class,
        "validation": per_class,
        "test": per_class,
    }
    number_of = {sample_id(image[None]).hex(): number for number, image in enumerate(make_images(60))}
    split = table.split(*SPLITS)
    order = torch.tensor([number_of[one] for one in split.ids])
    assert torch.equal(split.images()[:, 0], torch.from_numpy(make_images(60))[order])
    assert all(label in (-1, order[row] % 3) for row, label in enumerate(split.labels.tolist()))
    assert os.listdir(tmp_path / "out") == ["images.arrow"]


def test_storage_does_not_change_the_fingerprint_but_the_seed_does(tmp_path, source):
    def fingerprint(**changes):
        arguments = {"source": source, "image": IMAGE, "splits": FEW, "seed": 0} | changes
        return build_table(**arguments, destination_dir=tmp_path / str(len(os.listdir(tmp_path)))).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    assert fingerprint(image=ImageSpec(size=4, channels=1, storage="encoded")) == base
    others = {
        fingerprint(seed=1),
        fingerprint(splits=FEW.model_copy(update={"train_labelled": 3})),
        fingerprint(image=ImageSpec(size=4, channels=3)),
        fingerprint(source=source.model_copy(update={"classes": ["cat", "dog", "cow"]})),
        fingerprint(source=source.model_copy(update={"only": ["cat", "dog"]})),
    }
    assert len(others | {base}) == 6


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 100))
def test_the_order_of_the_source_and_duplicates_change_nothing(tmp_path_factory, random, seed):
    folder = tmp_path_factory.mktemp("order")
    images, labels = make_images(45), np.arange(45) % 3
    order = list(range(45)) + [random.randrange(45) for _ in range(random.randrange(20))]
    random.shuffle(order)
    plain = build_table(save(folder / "a.npz", images, labels), IMAGE, FEW, seed, folder / "a")
    mixed = build_table(save(folder / "b.npz", images[order], labels[order]), IMAGE, FEW, seed, folder / "b")
    assert mixed.duplicates == len(order) - 45 and plain.duplicates == 0
    assert Path(plain.path).read_bytes() == Path(mixed.path).read_bytes()


def test_every_image_lies_in_one_split(tmp_path):
    images = make_images(40)
    source = save(tmp_path / "a.npz", np.concatenate([images] * 3), np.tile(np.arange(40) % 2, 3), ["a", "b"])
    report = build_table(source, IMAGE, FEW, 0, tmp_path)
    ids = ImageTable.open(report.path).split(*SPLITS).ids
    assert len(ids) == len(set(ids)) == report.rows == 40
    assert report.duplicates == 80


def test_an_image_with_two_labels_has_none(tmp_path):
    images, labels = make_images(31), [*(np.arange(30) % 3), -1]
    extra = images[[0, 0, 30, 1]]
    # Image 0 comes as class 0, 1 and 0 again; image 30 first without a label, then as 2; image 1 twice alike.
    source = save(tmp_path / "a.npz", np.concatenate([images, extra]), [*labels, 1, 0, 2, 1])
    splits = SplitSpec(train_labelled=2, probe=2, validation=2, test=None, train_unlabelled=1)
    report = build_table(source, IMAGE, splits, 0, tmp_path)
    assert (report.duplicates, report.conflicts, report.unused) == (4, 1, 0)
    found = content(ImageTable.open(report.path))
    assert found[sample_id(images[0][None]).hex()] == ("train_unlabelled", -1)
    assert found[sample_id(images[30][None]).hex()][1] == 2
    assert found[sample_id(images[1][None]).hex()][1] == 1


def test_samples_without_a_label_are_unlabelled_ones(tmp_path):
    labels = np.where(np.arange(60) < 40, np.arange(60) % 3, -1)
    source = save(tmp_path / "a.npz", make_images(60), labels)
    some = build_table(source, IMAGE, FEW.model_copy(update={"train_unlabelled": 5}), 0, tmp_path)
    assert some.counts["train_unlabelled"] == {NO_LABEL: 5} and some.unused == 60 - 24 - 5
    found = content(ImageTable.open(some.path))
    for number, image in enumerate(make_images(60)[:40]):
        assert found.get(sample_id(image[None]).hex(), ("", number % 3))[1] == number % 3


def test_a_test_source_is_the_test_split_and_nothing_else(tmp_path):
    images = make_images(60)
    main = save(tmp_path / "main.npz", images[:45], np.arange(45) % 3)
    # Its classes come in another order, and ten of its images are in the main source too.
    order = {0: 2, 1: 0, 2: 1}
    test_labels = [order[number % 3] for number in range(35, 60)]
    test = save(tmp_path / "test.npz", images[35:], test_labels, ["dog", "fox", "cat"])
    splits = SplitSpec(train_labelled=2, probe=2, validation=2, test=None)
    report = build_table(main, IMAGE, splits, 0, tmp_path, test_source=test)
    assert (report.rows, report.overlap, report.unused) == (60, 10, 0)
    found = content(ImageTable.open(report.path))
    for number, image in enumerate(images):
        split, label = found[sample_id(image[None]).hex()]
        assert (split == "test") is (number >= 35)
        assert label in ((number % 3,) if split != "train_unlabelled" else (-1,))
    fewer = build_table(main, IMAGE, splits.model_copy(update={"test": 3}), 0, tmp_path, test_source=test)
    ids = set(ImageTable.open(fewer.path).split(*SPLITS).ids)
    assert fewer.counts["test"] == {"cat": 3, "dog": 3, "fox": 3} and fewer.unused == 25 - 9
    assert len(ids & {sample_id(image[None]).hex() for image in images[35:]}) == 9
    strange = save(tmp_path / "test.npz", images[35:], np.arange(25) % 3, ["cat", "dog", "cow"])
    with pytest.raises(DataError, match=r"test\.npz: class 'cow' is none of the training source's \(cat, dog, fox\)"):
        build_table(main, IMAGE, splits, 0, tmp_path, test_source=strange)


# Unreadable images


def make_folder(root: Path, good: int, bad: int) -> ImageFolderSource:
    images = make_images(good)
    for number in range(good):
        folder = root / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(images[number]).save(buffer, format="PNG")
        (folder / f"{number:03}.png").write_bytes(buffer.getvalue())
    for number in range(bad):
        (root / "dog" / f"bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return ImageFolderSource(path=str(root))


def test_a_few_unreadable_images_are_skipped_and_listed(tmp_path):
    source = make_folder(tmp_path / "images", 300, 3)
    report = build_table(source, IMAGE, FEW, 0, tmp_path / "out")
    assert report.rows == 300
    assert [Path(origin).name for origin, _ in report.skipped] == ["bad0.png", "bad1.png", "bad2.png"]
    assert all(reason for _, reason in report.skipped)


def test_too_many_unreadable_images_are_an_error(tmp_path):
    source = make_folder(tmp_path / "images", 30, 3)
    message = r"3 of 33 images are unreadable, more than `image.max_unreadable` 0\.01; the first: .*bad0\.png"
    with pytest.raises(DataError, match=message):
        build_table(source, IMAGE, FEW, 0, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
    lenient = IMAGE.model_copy(update={"max_unreadable": 0.1})
    assert build_table(source, lenient, FEW, 0, tmp_path / "out").rows == 30


# Errors


def test_errors_come_before_anything_is_written(tmp_path, source):
    both = SplitSpec(train_unlabelled=None, test=None)
    with pytest.raises(ConfigError, match="splits: `train_unlabelled` and `test` can't both take the rest"):
        build_table(source, IMAGE, both, 0, tmp_path / "out")
    with pytest.raises(DataError, match=r"each class for 26 labelled samples .*, but class 'cat' has 20"):
        build_table(source, IMAGE, FEW.model_copy(update={"train_labelled": 20}), 0, tmp_path / "out")
    four = source.model_copy(update={"classes": [*CLASSES, "gnu"]})
    with pytest.raises(DataError, match=r"source\.npz: class 'gnu' has no labelled sample"):
        build_table(four, IMAGE, FEW, 0, tmp_path / "out")
    wrong = save(tmp_path / "b.npz", make_images(2), [0, 2], ["a", "b"])
    with pytest.raises(DataError, match="image 1: label 2 is outside the 2 classes"):
        build_table(wrong, IMAGE, FEW, 0, tmp_path / "out")
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="images: has no samples"):
        build_table(ImageFolderSource(path=str(tmp_path / "images")), IMAGE, FEW, 0, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_destination_that_cannot_be_made(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out: can't be made \(Not a directory\); choose another destination"):
        build_table(source, IMAGE, FEW, 0, tmp_path / "file" / "out")


def test_a_uri_as_destination(tmp_path, source):
    target = (tmp_path / "bucket" / "run").as_uri()
    report = build_table(source, IMAGE, FEW, 0, target)
    assert report.path == f"{target}/images.arrow"
    assert ImageTable.open(report.path).fingerprint == report.fingerprint
    assert os.listdir(tmp_path / "bucket" / "run") == ["images.arrow"]


def test_sizes_and_channels_are_those_of_the_settings(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 9, 7, 3), dtype=np.uint8)
    report = build_table(
        save(tmp_path / "a.npz", images, np.arange(30) % 3), ImageSpec(size=(5, 6), channels=1), FEW, 0, tmp_path
    )
    table = ImageTable.open(report.path)
    assert table.image_shape == (1, 5, 6)
    assert table.split("test").images().shape == (6, 1, 5, 6)


def test_shards_of_a_split_have_all_classes(tmp_path):
    source = save(tmp_path / "a.npz", make_images(600), np.arange(600) % 3)
    report = build_table(source, IMAGE, FEW.model_copy(update={"test": 150}), 0, tmp_path)
    shards = [ImageTable.open(report.path).split("test").shard(rank, 3) for rank in range(3)]
    for shard in shards:  # 150 of 450: 50 a class, standard deviation below 5
        assert all(30 <= count <= 70 for count in Counter(shard.labels.tolist()).values())


def test_reading_can_be_tried_and_leaves_nothing(tmp_path, source):
    many = save(tmp_path / "many.npz", make_images(900), np.arange(900) % 3)
    found = try_reading(many, IMAGE, tmp_path, seconds=60.0)
    assert found is not None and found.seconds > 0 and found.opening >= 0
    assert found.size == 16  # 4 x 4, as they are stored
    assert try_reading(source, IMAGE, tmp_path, seconds=60.0).seconds > 0  # fewer than are read at a time
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.npz", "source.npz"]


def test_no_more_is_tried_than_wanted(tmp_path, source, monkeypatch):
    read = []
    monkeypatch.setattr(
        ingest, "canonical", lambda image, spec, origin: read.append(origin) or canonical(image, spec, origin)
    )
    many = save(tmp_path / "many.npz", make_images(2000), np.arange(2000) % 3)
    try_reading(many, IMAGE, tmp_path, seconds=60.0, most=512)
    assert len(read) == 512

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.sources import open_source
from pipeline.data.spec import ImageFolderSource, NumpySource, ParquetSource, TorchvisionSource
from pipeline.errors import ConfigError, DataError
from pipeline.strict import validate


def png(value: int = 0, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, format="PNG")
    return buffer.getvalue()


def labels_of(source) -> list[int | None]:
    return [sample.label for sample in source]


# Parquet


def write_parquet(path: Path, labels, *, layout="struct", names=None, images=None, label_type=None) -> Path:
    contents = images if images is not None else [png(number) for number in range(len(labels))]
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([c if c is None else {"bytes": c, "path": None} for c in contents], kind)
    else:
        column = pa.array(contents, pa.large_binary() if layout == "large" else pa.binary())
    table = pa.table({"image": column, "label": pa.array(labels, label_type)})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("layout", ["struct", "binary", "large"])
def test_parquet_with_the_names_in_its_metadata(tmp_path, layout):
    path = write_parquet(tmp_path / "a.parquet", [1, 0, None, -1], layout=layout, names=["cat", "dog"])
    source = open_source(ParquetSource(path=str(path)))
    assert source.classes == ("cat", "dog")
    for _ in range(2):  # a source can be gone through again
        samples = list(source)
        assert [sample.image for sample in samples] == [png(number) for number in range(4)]
        assert [sample.label for sample in samples] == [1, 0, None, None]
    assert samples[2].origin == f"{path}, row 2"


def test_parquet_of_many_files_and_batches(tmp_path):
    (tmp_path / "more").mkdir()
    write_parquet(tmp_path / "b.parquet", [0, 1] * 150, names=["cat", "dog"], images=[png(7)] * 300)
    write_parquet(tmp_path / "more" / "a.parquet", [1], names=["cat", "dog"])
    (tmp_path / "README.md").write_text("not data")
    for path in (tmp_path, tmp_path / "**" / "*.parquet", tmp_path.as_uri()):
        samples = list(open_source(ParquetSource(path=str(path))))
        assert len(samples) == 301
        assert samples[299].origin.endswith("b.parquet, row 299")


def test_parquet_with_class_names_as_labels(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["fox", "cat", None, "fox"])
    source = open_source(ParquetSource(path=str(path)))
    assert source.classes == ("cat", "fox")
    assert labels_of(source) == [1, 0, None, 1]
    assert labels_of(open_source(ParquetSource(path=str(path), classes=["fox", "cat"]))) == [0, 1, None, 0]


def test_parquet_without_labels(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 1])
    source = open_source(ParquetSource(path=str(path), label_column=None, classes=["a", "b"]))
    assert labels_of(source) == [None, None]


def test_a_parquet_row_without_bytes_is_told(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 1], names=["a", "b"], images=[png(), None])
    good, bad = open_source(ParquetSource(path=str(path)))
    assert good.problem == "" and bad.image is None
    assert bad.problem == "has no bytes in column `image`"


def test_parquet_errors_name_file_field_and_remedy(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 5])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + b"x" * 50)
    pq.write_table(pa.table({"image": [1.0], "label": [[1]]}), tmp_path / "types.parquet")
    pq.write_table(pa.table({"image": [b""], "label": [0.5]}), tmp_path / "float.parquet")
    cases = [
        ({"path": "none"}, "none: there is no Parquet file; check the source's `path`"),
        ({"image_column": "img"}, r"a\.parquet: has no column `img` \(it has image, label\); set .*`image_column`"),
        ({"label_column": "fine_label"}, "has no column `fine_label`.*set the source's `label_column`"),
        ({}, "a.parquet: has no class names in its metadata; list them in the source's `classes`"),
        ({"path": "broken.parquet"}, r"broken\.parquet: can't be read as Parquet \("),
        ({"path": "types.parquet"}, r"types\.parquet: column `image` is double; it must hold encoded images"),
        ({"path": "float.parquet"}, r"float\.parquet: column `label` is double; labels are integers or strings"),
    ]
    for changes, message in cases:
        settings = {"path": "a.parquet"} | changes
        settings["path"] = str(tmp_path / settings["path"])
        with pytest.raises(DataError, match=message):
            open_source(ParquetSource(**settings))
    source = open_source(ParquetSource(path=str(path), classes=["a", "b"]))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: label 5 is outside the 2 classes of Parquet .*`classes`"):
        list(source)


def test_parquet_damaged_after_its_footer_was_read(tmp_path):
    random = np.random.default_rng(0)
    images = [random.bytes(500) for _ in range(50)]
    path = write_parquet(tmp_path / "a.parquet", [0, 1] * 25, names=["a", "b"], images=images)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    source = open_source(ParquetSource(path=str(path)))
    with pytest.raises(DataError, match=r"a\.parquet: can't be read as Parquet"):
        list(source)


# Image folder


def make_folder(root: Path) -> None:
    for name in ("dog", "cat", "raw"):
        (root / name / "deeper").mkdir(parents=True)
        (root / name / "b.PNG").write_bytes(png(1))
        (root / name / "a.jpg").write_bytes(png(2))
        (root / name / "deeper" / "c.png").write_bytes(png(3))
        (root / name / ".hidden.png").write_bytes(b"")
        (root / name / "Thumbs.db").write_bytes(b"")
    (root / ".cache").mkdir()
    (root / "README.txt").write_text("no image")


def test_image_folder_is_sorted_and_takes_images_alone(tmp_path):
    make_folder(tmp_path)
    source = open_source(ImageFolderSource(path=str(tmp_path), unlabelled="raw"))
    assert source.classes == ("cat", "dog")
    samples = list(source)
    assert [(str(Path(s.origin).relative_to(tmp_path)), s.label) for s in samples] == [
        (f"{name}/{file}", label)
        for name, label in (("cat", 0), ("dog", 1), ("raw", None))
        for file in ("a.jpg", "b.PNG", "deeper/c.png")
    ]
    assert samples[0].image == png(2)


def test_image_folder_in_the_order_of_classes_and_a_selection_of_them(tmp_path):
    make_folder(tmp_path)
    source = open_source(ImageFolderSource(path=str(tmp_path), classes=["raw", "dog", "cat"]))
    assert labels_of(source) == [0] * 3 + [1] * 3 + [2] * 3
    chosen = open_source(ImageFolderSource(path=str(tmp_path), only=["raw", "cat"]))
    assert chosen.classes == ("raw", "cat")
    assert [(Path(s.origin).parts[len(tmp_path.parts)], s.label) for s in chosen][::3] == [("cat", 1), ("raw", 0)]


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "cat" / "0.png").symlink_to(tmp_path / "nowhere.png")
    first = next(iter(open_source(ImageFolderSource(path=str(tmp_path)))))
    assert first.image is None and "No such file" in first.problem


def test_image_folder_errors_name_folder_field_and_remedy(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    cases = [
        ({"path": "none"}, "none: can't be read .No such file or directory.; check the source's `path`"),
        ({"path": "empty"}, "empty: has no class folders"),
        ({"path": "one"}, "one: a task needs two or more classes with different names, found cat"),
        ({"classes": ["cat", "dog", "cow"]}, "has no folder for class 'cow'"),
        ({"classes": ["cat", "dog", "raw", "one"]}, "empty: is no class of the source's `classes`; add it there, or"),
        ({"unlabelled": "extra"}, "extra: no such folder; check the source's `unlabelled`"),
        ({"only": ["cat", "dgo"]}, "`only` names 'dgo', which is no class of it; did you mean 'dog'"),
    ]
    for changes, message in cases:
        settings = {"path": ""} | changes
        settings["path"] = str(tmp_path / settings["path"])
        with pytest.raises(DataError, match=message):
            open_source(ImageFolderSource(**settings))


# NumPy


def test_numpy_archive(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    path = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, images=images, labels=[0, 1, -1, 1, 0], classes=["cat", "dog"])
        source = open_source(NumpySource(path=str(path)))
        samples = list(source)
        assert source.classes == ("cat", "dog")
        assert all((sample.image == image).all() for sample, image in zip(samples, images, strict=True))
        assert labels_of(source) == [0, 1, None, 1, 0]
    np.savez(path, images=images[..., 0], labels=["b", "a", "b", "a", "b"])
    source = open_source(NumpySource(path=str(path)))
    assert source.classes == ("a", "b") and labels_of(source) == [1, 0, 1, 0, 1]
    np.savez(path, images=images)
    assert labels_of(open_source(NumpySource(path=str(path), classes=["a", "b"]))) == [None] * 5


def test_numpy_errors_name_file_array_and_remedy(tmp_path):
    path, names = tmp_path / "a.npz", ["a", "b"]
    good = np.zeros((2, 4, 4), np.uint8)
    cases = [
        ({"labels": [0, 1]}, r"a\.npz: has no array `images` \(it has labels\.npy\)"),
        ({"images": good.astype(float)}, r"`images` is float64 of shape \(2, 4, 4\); it must be uint8"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"`images` is uint8 of shape \(2, 3, 4, 4\)"),
        ({"images": np.asfortranarray(good)}, "`images` is in Fortran order"),
        ({"images": good, "labels": [0]}, r"`labels` is int64 of shape \(1,\); it must hold 2 integers"),
        ({"images": good, "labels": [0.5, 1]}, "`labels` is float64"),
        ({"images": good, "labels": np.array([0, {}], object)}, "array `labels` can't be read .*allow_pickle"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=message):
            open_source(NumpySource(path=str(path), classes=names))
    np.savez(path, images=good, labels=[0, 2])
    with pytest.raises(DataError, match="has no class names; list them in the source's `classes`"):
        open_source(NumpySource(path=str(path)))
    with pytest.raises(DataError, match="image 1: label 2 is outside the 2 classes"):
        list(open_source(NumpySource(path=str(path), classes=names)))
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"a\.npz: is no \.npz archive"):
        open_source(NumpySource(path=str(path)))
    with pytest.raises(DataError, match=r"none\.npz: can't be read"):
        open_source(NumpySource(path=str(tmp_path / "none.npz")))


def test_numpy_archive_that_ends_too_early(tmp_path):
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((9, 4, 4), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", buffer.getvalue()[:-20])
    source = open_source(NumpySource(path=str(path), classes=["a", "b"]))
    with pytest.raises(DataError, match=r"array `images` can't be read \(it ends too early\)"):
        list(source)


# torchvision


def write_mnist(root: Path, count: int) -> np.ndarray:
    """Write a data set in MNIST's own file format, as torchvision finds it after a download."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = bytes(number % 10 for number in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)
    return images


def test_torchvision(tmp_path):
    images = write_mnist(tmp_path, 12)
    for train in (True, False):
        source = open_source(TorchvisionSource(name="FashionMNIST", root=str(tmp_path), train=train))
        assert source.classes[:2] == ("T-shirt/top", "Trouser")
        samples = list(source)
        assert [sample.label for sample in samples] == [number % 10 for number in range(12)]
        assert all((np.asarray(s.image) == image).all() for s, image in zip(samples, images, strict=True))


def test_torchvision_errors_name_data_set_and_remedy(tmp_path):
    with pytest.raises(DataError, match=r"torchvision\.datasets has no 'FashionMINST'; did you mean 'FashionMNIST'"):
        open_source(TorchvisionSource(name="FashionMINST", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"FashionMNIST in .*: can't be opened \(Dataset not found.*`download: true`"):
        open_source(TorchvisionSource(name="FashionMNIST", root=str(tmp_path)))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "parqet", "path": "x"}, "did you mean `parquet`"),
        ({"type": "numpy", "path": "x", "classes": ["a", "a"]}, "class name 'a' occurs twice"),
        ({"type": "numpy", "path": "x", "classes": ["a"]}, "at least two class names"),
        ({"type": "numpy", "path": "x", "classes": ["a", "b"], "only": ["a", "c"]}, "`only` names 'c'"),
        ({"type": "parquet", "path": "x", "image_colum": "img"}, "did you mean `image_column`"),
    ],
)
def test_settings_are_strict(settings, message):
    from pipeline.data.spec import SourceSpec

    with pytest.raises(ConfigError, match=message):
        validate(SourceSpec, settings, where="task.yaml")

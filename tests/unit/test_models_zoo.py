from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import yaml

from pipeline.data.whole import replacing
from pipeline.errors import ConfigError, TeacherError
from pipeline.models.files import file_sha256
from pipeline.models.zoo import Zoo, load_zoo


def entry(name: str, path: str | None = None, **changes: object) -> dict:
    return {
        "name": name,
        "source": {
            "type": "safetensors",
            "path": path or f"weights/{name}.safetensors",
            "factory": "pipeline.models.nets:mlp",
        },
        "preprocessing": {"size": 28, "channels": 1, "mean": [0.5], "std": [0.5]},
    } | changes


def write(folder: Path, *entries: dict) -> Path:
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    for item in entries:
        if not os.path.isabs(item["source"]["path"]):
            (folder / item["source"]["path"]).write_bytes(item["name"].encode())
    (folder / "zoo.yaml").write_text(yaml.safe_dump({"teachers": list(entries)}))
    return folder / "zoo.yaml"


def test_paths_are_relative_to_the_zoo_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = tmp_path / "elsewhere.safetensors"
    path = write(tmp_path / "zoo", entry("a"), entry("b", str(absolute)), entry("c", "../c.safetensors"))
    monkeypatch.chdir(tmp_path)
    zoo = load_zoo("zoo/zoo.yaml")
    assert zoo["a"].path == str(path.parent / "weights" / "a.safetensors")
    assert zoo["b"].path == str(absolute)
    assert os.path.samefile(str(zoo["c"].path), tmp_path / "c.safetensors")


def test_paths_of_examples_are_relative_to_the_zoo_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = {"type": "torchvision", "name": "MNIST", "root": "../data"}
    remote = {"type": "parquet", "path": "s3://bucket/a.parquet", "label_column": None}
    entries = [
        entry("a", examples={"type": "image_folder", "path": "images"}),
        entry("b", "~/b.safetensors", examples=published),
        entry("c", examples=remote),
    ]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "zoo.yaml"
    path.write_text(yaml.safe_dump({"teachers": entries}))
    monkeypatch.chdir(tmp_path)
    zoo = load_zoo("zoo.yaml")
    assert zoo["a"].examples.path == str(tmp_path / "images")
    assert zoo["b"].examples.root == str(tmp_path / ".." / "data")
    assert zoo["b"].path == str(tmp_path / "home" / "b.safetensors")
    assert zoo["c"].examples.path == "s3://bucket/a.parquet"


def test_it_is_a_mapping_in_the_order_of_the_file(tmp_path: Path) -> None:
    zoo = load_zoo(write(tmp_path, entry("b"), entry("a"), entry("c")))
    assert zoo.names == tuple(zoo) == ("b", "a", "c")
    assert len(zoo) == 3 and "a" in zoo and "d" not in zoo
    assert zoo.only(["c", "b"]).names == ("b", "c")
    copy = pickle.loads(pickle.dumps(zoo))
    assert copy.names == zoo.names and copy["a"] == zoo["a"] and copy.fingerprint == zoo.fingerprint


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    zoo = load_zoo(write(tmp_path, entry("shoes"), entry("tops")))
    with pytest.raises(ConfigError, match=r"zoo.yaml: there is no teacher 'shoe'; did you mean 'shoes'\?"):
        zoo["shoe"]
    with pytest.raises(ConfigError, match="no teacher 'zzz'; it has: shoes, tops"):
        zoo.only(["tops", "zzz"])
    with pytest.raises(ConfigError, match="`only` is empty"):
        zoo.only([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold `teachers:`"),
        ("", "must hold `teachers:`"),
        ("teachers: []", "teachers"),
        ("teacher: []", "did you mean `teachers`"),
        ("teachers: [\n", "line"),
        ("teachers: !!python/object/apply:os.getcwd []", "zoo.yaml"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"zoo\.yaml") as caught:
        load_zoo(tmp_path / "zoo.yaml")
    assert message in str(caught.value)


def test_duplicates_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two teachers are called 'a'"):
        load_zoo(write(tmp_path, entry("a"), entry("a")))


def fingerprint(folder: Path, item: dict) -> str:
    return load_zoo(write(folder, item)).fingerprint_of("a")


def test_a_fingerprint_is_that_of_what_the_teacher_answers(tmp_path: Path) -> None:
    first = fingerprint(tmp_path / "1", entry("a"))
    assert first == fingerprint(tmp_path / "2", entry("a"))
    people = {"notes": "x", "licence": "MIT", "accuracy": 0.5, "examples": {"type": "numpy", "path": "a.npz"}}
    assert first == fingerprint(tmp_path / "3", entry("a", "weights/renamed.safetensors", **people))
    other = {"preprocessing": {"size": 28, "channels": 1, "mean": [0.4], "std": [0.5]}}
    assert first != fingerprint(tmp_path / "4", entry("a", **other))
    zoo = load_zoo(tmp_path / "1" / "zoo.yaml")
    Path(str(zoo["a"].path)).write_bytes(b"others")
    assert first != zoo.fingerprint_of("a")


def test_a_declared_hash_stands_for_the_file_in_the_fingerprint(tmp_path: Path, monkeypatch) -> None:
    hashed = load_zoo(write(tmp_path, entry("a"))).fingerprint_of("a")
    declared = load_zoo(write(tmp_path, entry("a", sha256=hashlib.sha256(b"a").hexdigest())))
    false = load_zoo(write(tmp_path, entry("a", sha256="0" * 64)))
    monkeypatch.setattr("pipeline.models.zoo.file_sha256", None)  # the file is not read
    assert declared.fingerprint_of("a") == hashed != false.fingerprint_of("a")
    os.remove(str(declared["a"].path))
    with pytest.raises(TeacherError, match="does not exist"):
        declared.fingerprint_of("a")


def test_the_zoo_s_fingerprint_is_that_of_all(tmp_path: Path) -> None:
    zoo = load_zoo(write(tmp_path, entry("a"), entry("b")))
    turned = Zoo([zoo["b"], zoo["a"]])
    assert len({zoo.fingerprint, turned.fingerprint, zoo.only(["a"]).fingerprint}) == 3


def test_a_missing_weight_file_is_told_by_the_fingerprint_alone(tmp_path: Path) -> None:
    zoo = load_zoo(write(tmp_path, entry("a")))
    os.remove(str(zoo["a"].path))
    with pytest.raises(TeacherError, match=r"zoo\.yaml: teacher 'a': `source.path` .* does not exist"):
        _ = zoo.fingerprint


def test_uris_of_registered_teachers_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    registered = [entry(name, source={"type": "mlflow", "uri": f"models:/{name}@a"}) for name in "abc"]
    path.write_text(yaml.safe_dump({"teachers": registered}))
    zoo = load_zoo(path)
    moved = zoo.with_uris({"b": "models:/b/7"})
    assert [spec.source.uri for spec in moved.values()] == ["models:/a@a", "models:/b/7", "models:/c@a"]
    assert zoo["b"].source.uri == "models:/b@a" and moved.where == str(path)


def test_an_error_does_not_list_a_large_zoo(tmp_path: Path) -> None:
    zoo = load_zoo(write(tmp_path, *(entry(f"t{number}") for number in range(30))))
    with pytest.raises(ConfigError, match=r"it has: t0, t1, .*, t19, …$"):
        zoo["zzz"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as sink:
        sink.write(b"one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), replacing(path) as sink:
        sink.write(b"other")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_changed_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = file_sha256(path)
    assert first == file_sha256(path)
    path.write_bytes(b"four")
    assert file_sha256(path) != first


def test_an_invalid_entry_is_told_once_and_by_name(tmp_path: Path) -> None:
    misspelt = entry("shoes")
    misspelt["preprocesing"] = misspelt.pop("preprocessing")
    with pytest.raises(ConfigError) as caught:
        load_zoo(write(tmp_path, misspelt))
    told = "`teachers.0.preprocesing` is not a setting; did you mean `preprocessing`?"
    assert str(caught.value) == f"{tmp_path / 'zoo.yaml'} (teacher 'shoes'): {told}"

    with pytest.raises(ConfigError) as caught:
        load_zoo(write(tmp_path, entry("fine"), entry("two words")))
    assert "is 'two words'; use letters, digits, _ . and -" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1

    (tmp_path / "zoo.yaml").write_text("teachers: []")
    with pytest.raises(ConfigError, match="at least 1"):
        load_zoo(tmp_path / "zoo.yaml")

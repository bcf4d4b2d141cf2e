from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.models.catalogue import Catalogue, write_catalogue
from pipeline.models.zoo import Zoo, load_zoo
from tests.command import Command


def entry(name: str, path: str | None = None, **changes: object) -> dict:
    return {
        "name": name,
        "source": {
            "type": "safetensors",
            "path": path or f"weights/{name}.safetensors",
            "factory": "pipeline.models.nets:mlp",
        },
        "classes": ["a", "b"],
        "preprocessing": {"size": 28, "channels": 1, "mean": [0.5], "std": [0.5]},
    } | changes


def write_yaml(folder: Path, *entries: dict) -> Path:
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    for item in entries:
        if item["source"].get("path", "").startswith("weights/"):
            (folder / item["source"]["path"]).write_bytes(item["name"].encode())
    (folder / "zoo.yaml").write_text(yaml.safe_dump({"teachers": list(entries)}))
    return folder / "zoo.yaml"


def packed(folder: Path, *entries: dict) -> Catalogue:
    write_catalogue(load_zoo(write_yaml(folder, *entries)), folder / "zoo.parquet")
    found = load_zoo(folder / "zoo.parquet")
    assert isinstance(found, Catalogue)
    return found


def write_rows(path: Path, names: list, specs: list, **options: object) -> Path:
    pq.write_table(pa.table({"name": names, "spec": specs}), path, **options)
    return path


MIXED = (
    entry("shoes", accuracy=0.9, examples={"type": "numpy", "path": "shoes.npz", "classes": ["a", "b"]}),
    entry("registered", source={"type": "mlflow", "uri": "models:/m@a"}, classes=None),
    entry("tops", sha256="0" * 64, licence="MIT", examples={"type": "torchvision", "name": "MNIST", "root": "data"}),
    entry("far", "/elsewhere/far.safetensors", source={"type": "torchvision", "model": "resnet18", "weights": "X"}),
)


def test_a_packed_zoo_is_the_same_zoo(tmp_path: Path) -> None:
    catalogue = packed(tmp_path, *MIXED)
    zoo = load_zoo(tmp_path / "zoo.yaml")
    assert catalogue.names == tuple(catalogue) == zoo.names
    assert len(catalogue) == 4 and "tops" in catalogue and "coats" not in catalogue
    assert dict(catalogue) == dict(zoo)
    assert catalogue.fingerprint == zoo.fingerprint
    assert catalogue["shoes"].examples.path == str(tmp_path / "shoes.npz")


def test_what_lies_under_its_folder_moves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside.safetensors"
    packed(tmp_path / "old", *MIXED, entry("out", str(outside)))
    stored = pq.read_table(tmp_path / "old" / "zoo.parquet").column("spec").to_pylist()
    assert not [text for text in stored if str(tmp_path / "old") in text]
    shutil.move(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    moved = load_zoo("new/zoo.parquet")
    assert moved["shoes"].path == str(tmp_path / "new" / "weights" / "shoes.safetensors")
    assert moved["tops"].examples.root == str(tmp_path / "new" / "data")
    assert moved["out"].path == str(outside)


def test_a_catalogue_elsewhere_names_the_same_files(tmp_path: Path) -> None:
    zoo = load_zoo(write_yaml(tmp_path / "zoo", *MIXED))
    (tmp_path / "other").mkdir()
    write_catalogue(zoo, tmp_path / "other" / "zoo.parquet")
    assert dict(load_zoo(tmp_path / "other" / "zoo.parquet")) == dict(zoo)


def test_parts_and_other_uris_stay_lazy(tmp_path: Path) -> None:
    good = json.dumps(entry("b", source={"type": "mlflow", "uri": "models:/m@a"}))
    path = write_rows(tmp_path / "zoo.parquet", ["c", "b", "a"], ["{", good, "{"])
    zoo = load_zoo(path)
    part = zoo.only(["a", "b"])
    assert part.names == tuple(part) == ("b", "a")
    assert isinstance(part, Catalogue) and part.where == str(path)
    moved = part.with_uris({"b": "models:/m/7"})
    assert moved["b"].source.uri == "models:/m/7"
    assert moved.names == ("b", "a") and zoo["b"].source.uri == "models:/m@a"
    assert zoo.only(["b"]).fingerprint == Zoo([zoo["b"]]).fingerprint != moved.fingerprint_of("b")
    with pytest.raises(ConfigError, match="`only` is empty"):
        zoo.only([])
    copy = pickle.loads(pickle.dumps(moved))
    assert copy.names == ("b", "a") and copy["b"] == moved["b"]


def test_a_copy_notices_that_the_file_is_another(tmp_path: Path) -> None:
    zoo = packed(tmp_path, entry("a"), entry("b"))
    travelling = pickle.dumps(zoo)
    write_catalogue(zoo.only(["b"]), tmp_path / "zoo.parquet")
    assert zoo["a"].name == "a"  # the file that was opened is still open
    copy = pickle.loads(travelling)
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match=r"zoo\.parquet: is not the catalogue that it was .*; run again"):
            copy[name]


def test_every_row_is_found_whatever_the_groups(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(700)]
    zoo = load_zoo(write_yaml(tmp_path, *(entry(name) for name in names)))
    write_catalogue(zoo, tmp_path / "zoo.parquet")
    assert pq.ParquetFile(tmp_path / "zoo.parquet").metadata.num_row_groups == 3
    catalogue = load_zoo(tmp_path / "zoo.parquet")
    assert [spec.name for spec in catalogue.values()] == names
    assert [catalogue[name].name for name in ("t699", "t0", "t256", "t255")] == ["t699", "t0", "t256", "t255"]
    assert catalogue.only(["t511", "t512"])["t512"].name == "t512"


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_writers_columns_of_text_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"note": [1, 2], "spec": [json.dumps(entry("a")), json.dumps(entry("b"))], "name": ["a", "b"]}
    table = pa.table(
        {name: pa.array(values).cast(kind) if name != "note" else values for name, values in columns.items()}
    )
    pq.write_table(table, tmp_path / "zoo.parquet", row_group_size=1)
    zoo = load_zoo(tmp_path / "zoo.parquet")
    assert zoo.names == ("a", "b") and zoo["b"].path == str(tmp_path / "weights" / "b.safetensors")


def test_unknown_names_get_a_suggestion_among_many(tmp_path: Path) -> None:
    names = [f"teacher_{number:04d}" for number in range(5000)]
    zoo = load_zoo(write_rows(tmp_path / "zoo.parquet", names, ["{"] * 5000))
    with pytest.raises(ConfigError, match=r"no teacher 'techer_3471'; did you mean 'teacher_3471'\?"):
        zoo["techer_3471"]
    with pytest.raises(ConfigError, match=r"no teacher 'zzz'; it has: teacher_0000, .*, teacher_0019, …$"):
        zoo.only(["teacher_0001", "zzz"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{", r"`spec` is no valid JSON \(.*\); correct it, or write the catalogue anew"),
        ("", "`spec` is no valid JSON"),
        ("[" * 100_000, "`spec` is no valid JSON"),
        (None, "`spec` is null; correct it"),
        ("[1]", "should be a valid dictionary"),
        (json.dumps(entry("bad", featurs="fc")), "`featurs` is not a setting; did you mean `features`"),
        (json.dumps(entry("bad", source={"type": "safetensors", "path": "x"})), "`source.factory` is missing"),
        (json.dumps(entry("bad", accuracy=90)), "`accuracy` is 90: "),
        (json.dumps(entry("other")), "`name` in its `spec` is 'other'"),
    ],
)
def test_an_invalid_row_is_told_when_it_is_asked_for(tmp_path: Path, spec: str | None, message: str) -> None:
    rows = [json.dumps(entry("a")), spec, json.dumps(entry("b"))]
    zoo = load_zoo(write_rows(tmp_path / "zoo.parquet", ["a", "bad", "b"], rows))
    assert zoo["a"].name == "a" and zoo["b"].name == "b" and len(zoo) == 3
    for ask in (zoo.__getitem__, zoo.fingerprint_of):
        with pytest.raises(ConfigError, match=message) as caught:
            ask("bad")
        assert str(caught.value).startswith(f"{tmp_path / 'zoo.parquet'}: teacher 'bad': ")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": ["a"]}, "must have one column `spec`, it has name; write the catalogue with `faculty zoo pack`"),
        ({"spec": ["{}"], "teacher": ["a"]}, "must have one column `name`, it has spec, teacher"),
        ({"name": ["a", "b", "a"], "spec": ["{}"] * 3}, "row 2: `name`: two teachers are called 'a'; rename one"),
        ({"name": ["a", None], "spec": ["{}"] * 2}, "row 1: `name` is null"),
        ({"name": ["a", "../b"], "spec": ["{}"] * 2}, "row 1: `name` is '../b'; it must be letters"),
        ({"name": [1], "spec": ["{}"]}, "column `name` is int64; it must hold text"),
        ({"name": ["a"], "spec": [b"{}"]}, "column `spec` is binary; it must hold text"),
        ({"name": pa.array([], pa.string()), "spec": pa.array([], pa.string())}, "holds no teacher"),
    ],
)
def test_a_file_that_is_no_catalogue_is_told_at_opening(tmp_path: Path, table: dict, message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "zoo.parquet")
    with pytest.raises(ConfigError) as caught:
        load_zoo(tmp_path / "zoo.parquet")
    assert str(caught.value).startswith(f"{tmp_path / 'zoo.parquet'}: {message}")


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["{}"], ["b"]], names=["name", "spec", "name"]), tmp_path / "zoo.parquet")
    with pytest.raises(ConfigError, match="must have one column `name`, it has name, spec, name"):
        load_zoo(tmp_path / "zoo.parquet")


@pytest.mark.parametrize("content", [b"", b"teachers: []", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zoo.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"zoo\.parquet: can't be read as Parquet \(.*\); write the catalogue anew"):
        load_zoo(tmp_path / "zoo.parquet")


def test_a_file_that_is_cut_off_or_absent_is_told(tmp_path: Path) -> None:
    packed(tmp_path, entry("a"))
    content = (tmp_path / "zoo.parquet").read_bytes()
    (tmp_path / "zoo.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="can't be read as Parquet"):
        load_zoo(tmp_path / "zoo.parquet")
    with pytest.raises(ConfigError, match=r"absent\.parquet: can't be read"):
        load_zoo(tmp_path / "absent.parquet")


def test_a_damaged_page_is_told(tmp_path: Path) -> None:
    packed(tmp_path, *(entry(f"t{number}", licence=f"licence {number}") for number in range(50)))
    path = tmp_path / "zoo.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 4] = bytes(4)
    path.write_bytes(content)
    zoo = load_zoo(path)
    with pytest.raises(ConfigError, match=r"zoo\.parquet: can't be read as Parquet"):
        zoo["t0"]


def test_writing_fails_before_the_old_file_is_touched(tmp_path: Path) -> None:
    zoo = packed(tmp_path, entry("a"))
    before = (tmp_path / "zoo.parquet").read_bytes()
    broken = load_zoo(write_rows(tmp_path / "broken.parquet", ["a"], ["{"]))
    with pytest.raises(ConfigError, match="no valid JSON"):
        write_catalogue(broken, tmp_path / "zoo.parquet")
    assert (tmp_path / "zoo.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.parquet", "weights", "zoo.parquet", "zoo.yaml"]
    with pytest.raises(ConfigError, match=r"must end in \.parquet"):
        write_catalogue(zoo, tmp_path / "zoo.arrow")
    with pytest.raises(ConfigError, match="can't be written"):
        write_catalogue(zoo, tmp_path / "no" / "zoo.parquet")
    with pytest.raises(ValueError, match="at least one teacher"):
        write_catalogue(Zoo([]), tmp_path / "zoo.parquet")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    return Command(capsys, monkeypatch).plainly


def test_pack_writes_what_list_reads_and_overwrites_only_when_told(tmp_path: Path, cli) -> None:
    zoo, out = write_yaml(tmp_path, entry("shoes"), entry("tops")), tmp_path / "zoo.parquet"
    code, text, err = cli("zoo", "pack", zoo, "-o", out)
    assert (code, err) == (0, "") and "2 teachers in" in text
    code, text, _ = cli("zoo", "list", out)
    assert code == 0 and "2 teachers in" in text and "shoes" in text and "--all" not in text
    before = out.read_bytes()
    write_yaml(tmp_path, entry("coats"))
    code, _, err = cli("zoo", "pack", zoo, "-o", out)
    assert code == 2 and err.startswith(f"error: {out}: is there already; overwrite it with --force")
    assert out.read_bytes() == before
    assert cli("zoo", "pack", zoo, "-o", out, "--force")[0] == 0
    assert load_zoo(out).names == ("coats",)
    code, _, err = cli("zoo", "pack", zoo, "-o", tmp_path / "zoo.json")
    assert code == 2 and len(err.splitlines()) == 1 and "must end in .parquet" in err


def test_list_shows_the_first_fifty(tmp_path: Path, cli) -> None:
    names = [f"t{number:02d}" for number in range(60)]
    path = write_rows(tmp_path / "zoo.parquet", names, [json.dumps(entry(name)) for name in names])
    code, text, _ = cli("zoo", "list", path)
    assert code == 0 and "the first 50 of 60 teachers; --all lists every one" in text
    assert "t49" in text and "t50" not in text
    code, text, _ = cli("zoo", "list", path, "--all")
    assert code == 0 and "t59" in text and "--all" not in text


def test_an_invalid_row_does_not_keep_the_others_from_being_listed_or_checked(tmp_path: Path, cli) -> None:
    path = write_rows(tmp_path / "zoo.parquet", ["bad", "lost"], ["{", json.dumps(entry("lost"))])
    code, text, err = cli("zoo", "list", path)
    assert (code, err) == (2, "")
    assert "bad not valid" in text and "no valid JSON" in text and "lost safetensors a, b" in text
    code, text, err = cli("zoo", "check", path)
    assert (code, err) == (2, "")
    assert "0 of 2 teachers can teach" in text and "does not exist" in text


@pytest.mark.parametrize("command", ["list", "check", "cards"])
def test_every_command_tells_a_bad_catalogue_in_one_line(tmp_path: Path, cli, command: str) -> None:
    code, out, err = cli("zoo", command, write_rows(tmp_path / "zoo.parquet", ["a", "a"], ["{}", "{}"]))
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'zoo.parquet'}: row 1: `name`: two teachers are called 'a'; rename one\n"

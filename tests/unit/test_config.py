"""Settings: overlays, overrides, and errors that say where and what."""

from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.settings_files import apply, load_settings, parse_overrides
from pipeline.strict import parse_yaml

BASE = """
name: tiny
task:
  source: {type: numpy, path: data.npz}
  image: {size: 8, channels: 1}
zoo: {path: zoo.yaml}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_and_paths_relative_to_the_file(base: Path, tmp_path: Path) -> None:
    settings = load_settings([base])
    assert settings.run_dir == "runs/tiny"
    assert settings.task.source.path == str(tmp_path / "data.npz")
    assert settings.zoo.path == str(tmp_path / "zoo.yaml")


def test_a_uri_stays_a_uri(base: Path, tmp_path: Path) -> None:
    overlay = write(tmp_path, "o.yaml", "zoo: {path: 's3://bucket/zoo.yaml'}")
    assert load_settings([base, overlay]).zoo.path == "s3://bucket/zoo.yaml"


def test_overlays_merge_in_order_then_overrides(base: Path, tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "distill: {loop: {epochs: 3, optim: {lr: 1e-2}}}\nseed: 4")
    second = write(tmp_path, "second.yaml", "distill: {loop: {epochs: 5}}")
    settings = load_settings([base, first, second], ["seed=9", "distill.objective.transport.reg=2e-2"])
    assert settings.distill.loop.epochs == 5
    assert settings.distill.loop.optim.lr == 0.01
    assert settings.distill.objective.transport.reg == 0.02
    assert settings.seed == 9


def test_another_source_type_replaces_the_former_one_whole(base: Path, tmp_path: Path) -> None:
    overlay = write(tmp_path, "o.yaml", "task: {source: {type: image_folder, path: images}}")
    source = load_settings([base, overlay]).task.source
    assert source.type == "image_folder"
    assert source.path == str(tmp_path / "images")


def test_the_same_function_takes_overrides_and_samples_of_a_search(base: Path) -> None:
    settings = load_settings([base])
    changed = apply(settings, {"distill.loop.optim.lr": 0.5, "register.name": "x"})
    assert isinstance(changed, Settings)
    assert changed.distill.loop.optim.lr == 0.5
    assert changed.registration.name == "x"
    assert settings.distill.loop.optim.lr != 0.5
    with pytest.raises(ConfigError, match=r"distill\.loop\.optim\.lr"):
        apply(settings, {"distill.loop.optim.lr": -1})


def test_dump_round_trips(base: Path) -> None:
    settings = load_settings([base])
    assert Settings.model_validate(settings.dump()) == settings


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1E5", 1e5), (".5", 0.5), ("-2.5e+3", -2500.0), ("7", 7), ("1e", "1e"), ("no", False)],
)
def test_numbers(text: str, value: object) -> None:
    found = parse_yaml(text, where="x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", r"bad\.yaml, line 2: duplicate key 'seed'"),
        ("distill: {looop: {}}", r"bad\.yaml: `distill\.looop` is not a setting; did you mean `loop`\?"),
        ("distill: {loop: {epochs: 0}}", r"bad\.yaml: `distill\.loop\.epochs` is 0"),
        ("distill: {loop: {epochs: many}}", r"bad\.yaml: `distill\.loop\.epochs` is 'many'"),
        (
            "task: {source: {type: parket, path: x}}",
            r"bad\.yaml: `task\.source\.type` is 'parket'; did you mean `parquet`",
        ),
        (
            "task: {source: {type: numpy, path: x, pth: y}}",
            r"`task\.source\.pth` is not a setting; did you mean `path`",
        ),
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("- a", "must hold a mapping"),
        ("registr: {}", r"`registr` is not a setting; did you mean `register`"),
        ("register: {nam: x}", r"`register\.nam` is not a setting; did you mean `name`"),
        ("a: [", "line 1"),
        ("assess: {bridge: {kind: center}}", r"`assess\.bridge\.kind` is 'center'; did you mean `centres`"),
        ("distill: {resources: {num_workers: [4, 2]}}", r"`distill\.resources\.num_workers`: .* got \[4, 2\]"),
        (
            "distill: {loop: {batch_size: 128, labelled_batch: 6}, resources: {num_workers: [2, 8]}}",
            r"distill\.loop\.labelled_batch=6 can't be shared among distill\.resources\.num_workers=8",
        ),
        (
            "distill: {loop: {batch_size: 9}, resources: {num_workers: 2}}",
            r"distill\.loop\.batch_size=9 can't be shared among distill\.resources\.num_workers=2",
        ),
    ],
)
def test_errors_name_file_path_and_remedy(base: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings([base, write(tmp_path, "bad.yaml", text)])


def test_a_merge_key_gives_way_to_the_mapping_s_own_keys() -> None:
    text = "base: &base {lr: 1, steps: 5}\nchild: {<<: *base, lr: 2}"
    assert parse_yaml(text, where="x")["child"] == {"lr": 2, "steps": 5}
    with pytest.raises(ConfigError, match="duplicate key 'lr'"):
        parse_yaml("base: &base {a: 1}\nchild: {<<: *base, lr: 2, lr: 3}", where="x")


def test_a_run_folder_in_an_unknown_store_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"`run_dir`: s4://bucket/x is of no store that is known"):
        load_settings([base], ["run_dir=s4://bucket/x"])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`task` is missing"):
        load_settings([write(tmp_path, "x.yaml", "name: x\nzoo: {path: z}")])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: can't be read \(No such file"):
        load_settings([tmp_path / "absent.yaml"])
    with pytest.raises(ConfigError, match="give a file with -c"):
        load_settings([])


def test_bad_overrides(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"not of the form section\.key=value"):
        parse_overrides(["seed"])
    with pytest.raises(ConfigError, match="given twice"):
        parse_overrides(["seed=1", "seed=2"])
    with pytest.raises(ConfigError, match=r"override distill\.loop\.epoch=3: `distill\.loop\.epoch` .* `epochs`"):
        load_settings([base], ["distill.loop.epoch=3"])

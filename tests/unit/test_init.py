"""`faculty init`: what it finds in folders and weight files, what it writes, and what it refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from pipeline.data.splits import assign
from pipeline.errors import ConfigError, DataError, TeacherError, UserError
from pipeline.models import nets
from pipeline.models.sources import load_teacher
from pipeline.models.zoo import load_zoo
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.start.command import Wanted, initialise
from pipeline.start.images import look_at_images
from pipeline.start.splits import batch_sizes, epochs_for, propose_splits
from pipeline.start.teachers import FILL_IN
from pipeline.start.weights import recognise
from tests.tiny import make_zoo


def make_images(folder: Path, counts: dict[str, int], side: int = 40, colour: bool = True) -> Path:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (side, side + 10, 3) if colour else (side, side + 10)
            pixels = random.integers(0, 255, shape).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def init(tmp_path: Path, answers: list[str] | None = None, **wanted: object) -> tuple[int, str]:
    """Run it; return the exit code and what it printed."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    if answers is not None:
        left = iter(answers)
        console.input = lambda question: output.write(question) and next(left)  # type: ignore[method-assign,assignment]
    asked = Wanted(**({"images": tmp_path / "birds", "out": tmp_path / "run.yaml"} | wanted))  # type: ignore[arg-type]
    return initialise(asked, Display(console), interactive=answers is not None), output.getvalue()


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    return make_images(tmp_path / "birds", {"robin": 30, "jay": 25, "wren": 40})


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"), ("untrained", "blind"))


def test_what_it_writes_loads_and_says_what_was_found(birds: Path, zoo: Path, tmp_path: Path) -> None:
    code, told = init(tmp_path, zoo=zoo)
    assert code == 0
    settings = load_settings([tmp_path / "run.yaml"])
    assert settings.name == "birds"
    assert settings.task.source.path == str(birds)
    assert (settings.task.image.size, settings.task.image.channels) == (32, 3)
    splits = settings.task.splits
    assert (splits.train_labelled, splits.probe, splits.validation, splits.test) == (16, 2, 2, 5)  # jay's 25
    assert settings.zoo.path == str(zoo)
    assert settings.registration.name == "faculty-birds"
    text = (tmp_path / "run.yaml").read_text()
    assert "path: birds " in text
    assert "3 classes, 25 to 40 images each" in text
    keys = [line for line in text.splitlines() if ":" in line and line.strip()[0] != "#" and line.rstrip()[-1] != ":"]
    assert sum("#" in line for line in keys) >= 0.8 * len(keys)
    assert "faculty run -c" in told
    assert "teachers    " + str(zoo) + ": 2" in told


def test_editors_find_the_schema_beside_it(birds: Path, zoo: Path, tmp_path: Path) -> None:
    import jsonschema

    init(tmp_path, zoo=zoo)
    first = (tmp_path / "run.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=run.schema.json"
    schema = json.loads((tmp_path / "run.schema.json").read_text())
    jsonschema.validate(yaml.safe_load((tmp_path / "run.yaml").read_text()), schema)


def test_nothing_is_overwritten_unless_it_is_asked_for(birds: Path, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"run\.yaml exists; --force"):
        init(tmp_path, zoo=zoo)
    assert (tmp_path / "run.yaml").read_text() == "mine"
    assert init(tmp_path, zoo=zoo, force=True)[0] == 0
    assert "robin" not in (tmp_path / "run.yaml").read_text()
    assert load_settings([tmp_path / "run.yaml"]).name == "birds"


def test_a_zoo_that_is_there_is_not_overwritten_for_weights(birds: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"zoo\.yaml exists"):
        init(tmp_path, teachers=[tmp_path / "any.safetensors"])
    assert not (tmp_path / "run.yaml").exists()


def test_a_name_or_class_that_yaml_would_take_for_something_else_survives(zoo: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "birds" / "on: off #1", {"yes": 4, "1": 4})
    init(tmp_path, zoo=zoo, images=tmp_path / "birds" / "on: off #1")
    settings = load_settings([tmp_path / "run.yaml"])
    assert settings.task.source.path.endswith("on: off #1")
    assert settings.name == "on-off-1"


@pytest.mark.parametrize("colour", [True, False])
def test_colours_and_sizes_are_seen(tmp_path: Path, colour: bool) -> None:
    found = look_at_images(make_images(tmp_path, {"a": 5, "b": 5}, side=70, colour=colour))
    assert found.channels == (3 if colour else 1)
    assert (found.side, found.stored_side) == (70, 64)


def test_grey_images_stored_as_rgb_are_grey(tmp_path: Path) -> None:
    folder = make_images(tmp_path, {"a": 3, "b": 3}, colour=False)
    for path in folder.rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    assert look_at_images(folder).grey


def test_train_and_test_folders_and_images_without_label(zoo: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "birds" / "train", {"robin": 12, "jay": 12, "Unlabelled": 7})
    make_images(tmp_path / "birds" / "test", {"robin": 3, "jay": 4})
    init(tmp_path, zoo=zoo)
    task = load_settings([tmp_path / "run.yaml"]).task
    assert task.source.path == str(tmp_path / "birds" / "train")
    assert task.source.unlabelled == "Unlabelled"
    assert task.test_source.path == str(tmp_path / "birds" / "test")
    assert task.splits.test is None


def test_a_task_whose_images_have_no_label(zoo: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "birds", {"robin": 0, "jay": 0, "unlabelled": 9})
    init(tmp_path, zoo=zoo)
    splits = load_settings([tmp_path / "run.yaml"]).task.splits
    assert (splits.train_labelled, splits.probe, splits.validation, splits.test) == (0, 0, 0, 0)


def test_images_that_can_t_be_read_are_told(birds: Path, zoo: Path, tmp_path: Path) -> None:
    (birds / "jay" / "0.png").write_bytes(b"no image")
    code, told = init(tmp_path, zoo=zoo)
    assert code == 0
    assert "can't be read" in told and "jay/0.png" in told


@pytest.mark.parametrize("smallest", [4, 5, 9, 40, 333, 2000])
@pytest.mark.parametrize("apart", [True, False])
def test_the_splits_can_be_met(smallest: int, apart: bool) -> None:
    counts = {"a": smallest, "b": smallest + 3}
    splits = propose_splits(counts, test_apart=apart)
    assert splits.problem(test_source=apart) is None
    labels = np.repeat([0, 1], list(counts.values()))
    ids = np.random.default_rng(0).integers(0, 255, (len(labels), 16)).astype(np.uint8)
    assign(ids, labels, ("a", "b"), splits, seed=0, where="made", test_source=apart)  # raises where they can't
    taught, labelled = batch_sizes(splits, 2, len(labels))
    assert 1 <= labelled <= 2 * splits.train_labelled
    assert 1 <= taught <= len(labels)


@pytest.mark.parametrize("images", [20, 700, 3_100, 100_000])
def test_a_student_of_few_images_gets_steps_enough_to_learn(images: int) -> None:
    splits = propose_splits({"a": images, "b": images})
    taught = 2 * (images - splits.probe - splits.validation - (splits.test or 0))
    epochs, steps = epochs_for(splits, 2, 2 * images), math.ceil(taught / batch_sizes(splits, 2, 2 * images)[0])
    assert 20 <= epochs <= 200
    assert epochs * steps >= 600 or epochs == 200
    assert epochs == 20 or (epochs - 1) * steps < 600


def test_few_labels_can_be_asked_for() -> None:
    assert propose_splits({"a": 100, "b": 100}, labels=5).train_labelled == 5
    with pytest.raises(DataError, match="give 1 to 60"):
        propose_splits({"a": 100, "b": 100}, labels=61)
    with pytest.raises(DataError, match="'a' has 3 images"):
        propose_splits({"a": 3, "b": 100})


# --- teachers of one's own ---

OURS = {
    "mlp": {"width": 20, "grid": 9},
    "small_cnn": {"width": 6},
    "small_vgg": {"width": 5},
    "small_mobilenet": {"width": 4},
    "resnet8": {"width": 4},
    "resnet14": {"width": 4},
    "resnet20": {"width": 4},
}


@pytest.mark.parametrize("name", OURS)
def test_this_package_s_nets_are_recognised_by_their_weights(name: str) -> None:
    net = getattr(nets, name)(num_classes=3, in_channels=1, **OURS[name])
    found = recognise(net.state_dict())
    assert found is not None
    assert found.source == {"factory": f"pipeline.models.nets:{name}", "kwargs": OURS[name] | {"in_channels": 1}}
    assert (found.classes, found.channels) == (3, 1)


def test_torchvision_s_nets_are_recognised_by_their_weights() -> None:
    from torchvision import models

    with torch.device("meta"):
        state = models.mobilenet_v3_small(num_classes=7).state_dict()
    found = recognise(state)
    assert found is not None and found.torchvision
    assert found.source == {"model": "mobilenet_v3_small"}
    assert found.classes == 7


def test_weights_of_something_else_are_not_taken_for_a_net() -> None:
    state = nets.resnet8(num_classes=3, in_channels=1, width=4).state_dict()
    assert recognise({"extra.weight": torch.zeros(1)} | state) is None
    assert recognise({name: value for name, value in state.items() if "stage2" not in name}) is None


def weights(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    known, unknown = folder / "pond birds.safetensors", folder / "own.pt"
    save_file(nets.small_cnn(num_classes=3, in_channels=1, width=6).state_dict(), known)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).state_dict(), unknown)
    return [known, unknown]


def test_a_zoo_is_written_with_what_is_known_and_refuses_what_is_not(birds: Path, tmp_path: Path) -> None:
    code, told = init(tmp_path, teachers=weights(tmp_path))
    assert code == 0
    assert "replace FILL_IN for own" in told
    text = (tmp_path / "zoo.yaml").read_text()
    assert text.count(f": {FILL_IN}") == 1
    assert "4 outputs" in text
    with pytest.raises(ConfigError, match=r"teachers\.1\.source\.factory.*FILL_IN"):
        load_zoo(tmp_path / "zoo.yaml")
    row = yaml.safe_load(text)["teachers"][0]
    assert row["name"] == "pond_birds"
    assert row["source"]["path"] == "pond birds.safetensors"


def test_a_recognised_teacher_loads_as_it_is_written(birds: Path, tmp_path: Path) -> None:
    init(tmp_path, teachers=weights(tmp_path)[:1], classes=["duck,heron,coot"])
    spec = load_zoo(tmp_path / "zoo.yaml")["pond_birds"]
    teacher = load_teacher(spec)
    assert teacher.classes == ("duck", "heron", "coot")
    logits, _ = teacher(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))[:2]
    assert logits.shape == (2, 3)


def test_class_names_beside_the_weights_are_found_and_counted(birds: Path, tmp_path: Path) -> None:
    (known, _) = weights(tmp_path)
    known.with_name("pond birds.classes.txt").write_text("duck\nheron\ncoot\n")
    init(tmp_path, teachers=[known])
    assert load_zoo(tmp_path / "zoo.yaml")["pond_birds"].classes == ("duck", "heron", "coot")
    with pytest.raises(UserError, match=r"names 2 classes, the net of .* has 3 outputs"):
        init(tmp_path, teachers=[known], classes=["pond_birds=duck,heron"], force=True)
    known.with_name("pond birds.classes.txt").write_text("duck\nheron\n")
    with pytest.raises(UserError, match=r"^[^-].*pond birds\.classes\.txt: names 2 classes"):
        init(tmp_path, teachers=[known], force=True)


def test_a_program_tells_its_size_channels_and_outputs(birds: Path, tmp_path: Path) -> None:
    net = nets.small_cnn(num_classes=3, in_channels=1, width=4).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (torch.zeros(2, 1, 20, 24),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "scan.pt2")
    init(tmp_path, teachers=[tmp_path / "scan.pt2"])
    spec = load_zoo(tmp_path / "zoo.yaml")["scan"]
    assert spec.preprocessing is not None
    assert (spec.preprocessing.size, spec.preprocessing.channels) == ((20, 24), 1)
    assert load_teacher(spec)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).logits.shape == (2, 3)
    with pytest.raises(UserError, match=r"names 2 classes, the net of .* has 3 outputs"):
        init(tmp_path, teachers=[tmp_path / "scan.pt2"], classes=["crack,dent"], force=True)

    for change, remedy in (
        ({"size": 24}, r"takes images of 20 x 24 pixels; set `preprocessing.size` to \[20, 24\]"),
        ({"channels": 3}, "takes images of 1 channels; set `preprocessing.channels` to 1"),
    ):
        other = spec.preprocessing.model_validate(spec.preprocessing.model_dump() | change)
        with pytest.raises(TeacherError, match=remedy):
            load_teacher(spec.model_copy(update={"preprocessing": other}))


def test_an_architecture_of_one_s_own_is_trusted_because_its_user_named_it(birds: Path, tmp_path: Path) -> None:
    _, told = init(tmp_path, teachers=weights(tmp_path), architectures=["own=my_nets.flat:build"])
    assert "zoo.yaml --trust my_nets.\n" in told
    settings = load_settings([tmp_path / "run.yaml"])
    assert settings.zoo.trusted_factories[-1] == "my_nets."
    assert load_zoo(tmp_path / "zoo.yaml")["own"].source.factory == "my_nets.flat:build"


def test_on_a_terminal_it_asks_for_what_is_not_given(birds: Path, tmp_path: Path) -> None:
    _, own = weights(tmp_path)
    code, told = init(tmp_path, [str(birds), str(own), "my_nets:flat", "a,b,c,d"], images=None)
    assert code == 0
    spec = load_zoo(tmp_path / "zoo.yaml")["own"]
    assert spec.source.factory == "my_nets:flat"
    assert spec.classes == ("a", "b", "c", "d")
    assert "Folder of images" in told and "architecture" in told


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({}, "no teachers: give a zoo file with --zoo"),
        ({"images": None}, "--images is not given"),
        ({"images": Path("nowhere"), "zoo": Path(__file__)}, "nowhere: can't be read"),
        ({"zoo": Path("nowhere.yaml")}, "nowhere.yaml: there is no such file"),
        ({"zoo": Path("a.yaml"), "teachers": [Path("b.pt")]}, "two zoos"),
        ({"teachers": [Path("lost.safetensors")]}, "lost.safetensors does not exist"),
        ({"teachers": [Path(__file__)]}, "has the suffix '.py'"),
        ({"name": "a b", "zoo": Path(__file__)}, "run.yaml: `name`"),
        ({"out": Path("nowhere/run.yaml"), "zoo": Path(__file__)}, "nowhere does not exist"),
    ],
)
def test_what_can_t_be_done_is_one_line(birds: Path, tmp_path: Path, wanted: dict, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        init(tmp_path, **wanted)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run.yaml").exists()


def test_the_folder_of_one_class_is_not_taken_for_that_of_all(birds: Path, zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="if 'jay' is one class, give the folder above"):
        init(tmp_path, images=birds / "jay", zoo=zoo)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--images .*empty: it holds no folder for each class"):
        init(tmp_path, images=tmp_path / "empty", zoo=zoo)


def test_teachers_that_were_named_wrongly_are_told(birds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such teacher; the files' names are pond_birds, own"):
        init(tmp_path, teachers=weights(tmp_path), architectures=["pond=resnet"])


def test_a_damaged_weight_file_is_one_line(birds: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.safetensors: is truncated or no safetensors file"):
        init(tmp_path, teachers=[tmp_path / "bad.safetensors"])

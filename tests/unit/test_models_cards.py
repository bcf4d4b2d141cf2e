from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.errors import TeacherError
from pipeline.models import examples
from pipeline.models.cards import Card, CardStore, make_card
from pipeline.models.examples import read_examples
from pipeline.models.reference import reference_embedding, reference_id
from pipeline.models.sources import load_teacher
from pipeline.models.spec import TeacherSpec
from pipeline.models.teacher import Teacher
from pipeline.models.zoo import Zoo, load_zoo
from tests.command import Command
from tests.tiny import SIDE, images, make_zoo, write_zoo


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    make_zoo(folder, ("flat", "solid"))
    return folder


@pytest.fixture
def world(tmp_path: Path, trained: Path) -> Path:
    """A folder with a zoo of two teachers; flat has ten examples of each of its classes, solid declares an accuracy."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    pixels, labels = images(10, seed=3, classes=(0, 1))
    np.savez(tmp_path / "flat.npz", images=pixels, labels=labels, classes=np.array(["bar", "post"]))
    flat, solid = yaml.safe_load((trained / "zoo.yaml").read_text())["teachers"]
    write_zoo(
        tmp_path / "zoo.yaml",
        [flat | {"examples": {"type": "numpy", "path": "flat.npz"}, "accuracy": 0.1}, solid | {"accuracy": 0.75}],
    )
    return tmp_path


def change(world: Path, name: str, **changes: object) -> Zoo:
    entries = yaml.safe_load((world / "zoo.yaml").read_text())["teachers"]
    write_zoo(world / "zoo.yaml", [entry | changes if entry["name"] == name else entry for entry in entries])
    return load_zoo(world / "zoo.yaml")


def flat(world: Path) -> tuple[TeacherSpec, Teacher]:
    spec = load_zoo(world / "zoo.yaml")["flat"]
    return spec, load_teacher(spec)


def made(teacher: Teacher, **changes: object) -> Card:
    known = {"fingerprint": "f", "declared_accuracy": None, "images": None, "labels": None, "reference": "pixels"}
    return make_card(teacher, **(known | {"embed": reference_embedding(None)[0]} | changes))


def test_a_card_measures_accuracy_and_centres_on_the_examples(world: Path) -> None:
    spec, teacher = flat(world)
    pixels, labels = read_examples(spec, teacher.classes)
    card = made(teacher, images=pixels, labels=labels, declared_accuracy=0.1, batch_size=7)
    with torch.inference_mode():
        said = teacher(pixels).logits.argmax(1)
    assert card.accuracy == float((said == labels).double().mean()) > 0.7
    assert (card.name, card.classes, card.examples) == ("flat", ("bar", "post"), 20)
    assert (card.parameters, card.feature_dim) == (teacher.num_parameters, teacher.feature_dim)
    features = reference_embedding(None)[0](pixels)
    expected = torch.stack([features[labels == k].mean(0) for k in (0, 1)])
    torch.testing.assert_close(card.centres, expected)
    assert card.seconds >= 0


def test_without_examples_the_declared_accuracy_stands(world: Path) -> None:
    _, teacher = flat(world)
    card = made(teacher, declared_accuracy=0.6)
    assert (card.accuracy, card.examples, card.centres) == (0.6, 0, None)
    assert made(teacher).accuracy is None


def test_a_class_without_an_example_has_a_row_of_zeros(world: Path) -> None:
    _, teacher = flat(world)
    card = made(teacher, images=torch.full((3, 1, 12, 12), 255, dtype=torch.uint8), labels=torch.tensor([1, 1, 1]))
    assert torch.equal(card.centres, torch.tensor([[0.0], [0.5]]).expand(2, 3 * 14 * 14))


def test_what_can_t_be_embedded_is_told(world: Path) -> None:
    _, teacher = flat(world)
    one = {"images": torch.zeros(1, 1, 12, 12, dtype=torch.uint8), "labels": torch.tensor([0])}
    with pytest.raises(TeacherError, match="'flat': the reference r says NaN or infinity of `examples`"):
        made(teacher, **one, reference="r", embed=lambda batch: torch.full((len(batch), 2), torch.nan))
    for labels in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="labels must be 1 indices below 2"):
            made(teacher, **(one | {"labels": labels}))
    with pytest.raises(ValueError, match="given together"):
        made(teacher, images=one["images"])


def test_the_pixel_reference_averages_over_a_grid() -> None:
    embed, name = reference_embedding(None)
    assert name == reference_id(None) == "pixels"
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blocks = grey.double().reshape(2, 14, 2, 14, 2).mean((2, 4)) / 255 - 0.5
    torch.testing.assert_close(embed(grey), blocks.float().flatten(1).repeat(1, 3))
    assert torch.equal(embed(grey.expand(-1, 3, -1, -1)), embed(grey))
    assert torch.equal(embed(grey.float()), embed(grey))
    for shape in ((1, 3, 8, 8), (1, 1, 50, 31)):
        assert embed(torch.zeros(shape)).shape == (1, 588)
    with pytest.raises(ValueError, match="must be"):
        embed(torch.zeros(1, 4, 28, 28))


def test_a_teacher_can_be_the_reference(world: Path) -> None:
    spec, teacher = flat(world)
    embed, name = reference_embedding(spec)
    pixels = read_examples(spec, teacher.classes)[0]
    torch.testing.assert_close(embed(pixels), teacher(pixels).features)
    assert name == reference_id(spec)
    assert name.startswith("flat-") and len(name) == len("flat-") + 12
    assert reference_id(change(world, "flat", features="net.0")["flat"]) != name
    assert reference_id(change(world, "flat", features=None, accuracy=0.9, examples=None)["flat"]) == name


def folder_of_images(world: Path, per_class: dict[str, int], sides: tuple[int, ...] = (SIDE,), mode: str = "L") -> dict:
    number = 0
    for name, count in per_class.items():
        (world / "images" / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            side = sides[number % len(sides)]
            Image.new(mode, (side, side)).save(world / "images" / name / f"{number:04d}.png")
            number += 1
    return {"type": "image_folder", "path": "images"}


def test_examples_are_brought_to_the_teacher_s_size_and_order(world: Path) -> None:
    spec, teacher = flat(world)
    pixels, labels = read_examples(spec, teacher.classes)
    stored = np.load(world / "flat.npz")
    assert pixels.shape == (20, 3, SIDE, SIDE) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(stored["images"])[:, None].expand(-1, 3, -1, -1))
    assert labels.tolist() == stored["labels"].tolist()
    assert read_examples(spec, ("post", "x", "bar"))[1].tolist() == [2 * (label == 0) for label in stored["labels"]]
    source = folder_of_images(world, {"bar": 3, "post": 2}, sides=(5, 20), mode="RGB")
    pixels, labels = read_examples(change(world, "flat", examples=source)["flat"], teacher.classes)
    assert pixels.shape == (5, 3, SIDE, SIDE) and labels.tolist() == [0, 0, 0, 1, 1]
    assert read_examples(spec.model_copy(update={"examples": None}), teacher.classes) is None


def test_a_teacher_without_preprocessing_sees_examples_as_they_are(world: Path) -> None:
    source = folder_of_images(world, {"bar": 2, "post": 1}, sides=(9,))
    spec = change(world, "flat", examples=source, preprocessing=None)["flat"]
    assert read_examples(spec, ("bar", "post"))[0].shape == (3, 1, 9, 9)
    any_size = {"channels": 1, "mean": [0.5], "std": [1.0]}
    assert read_examples(change(world, "flat", preprocessing=any_size)["flat"], ("bar", "post"))[0].shape == (
        3,
        3,
        9,
        9,
    )
    spec = change(world, "flat", examples={"type": "numpy", "path": "flat.npz"}, preprocessing=None)["flat"]
    assert read_examples(spec, ("bar", "post"))[0].shape == (20, 1, SIDE, SIDE)


def test_a_few_examples_of_each_class_are_enough(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, teacher = flat(world)
    monkeypatch.setattr(examples, "PER_CLASS", 4)
    assert torch.bincount(read_examples(spec, teacher.classes)[1]).tolist() == [4, 4]
    monkeypatch.setattr(examples, "IN_ALL", 5)
    assert torch.bincount(read_examples(spec, teacher.classes)[1]).tolist() == [2, 2]


def drop_labels(world: Path) -> dict:
    np.savez(world / "none.npz", images=np.zeros((2, 8, 8), np.uint8), classes=np.array(["bar", "post"]))
    return {"examples": {"type": "numpy", "path": "none.npz"}}


def cut_an_image(world: Path) -> dict:
    source = folder_of_images(world, {"bar": 1, "post": 1})
    path = world / "images" / "post" / "0001.png"
    path.write_bytes(path.read_bytes()[:30])
    return {"examples": source}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda _: {"examples": {"type": "numpy", "path": "absent.npz"}}, r"absent\.npz"),
        (lambda _: {"classes": ["bar", "pots"]}, r"class 'post' of .*flat\.npz is not among .*; did you mean 'pots'\?"),
        (lambda _: {"classes": ["bar", "zebra"]}, r"class 'post' of .* name the others in `only`"),
        (drop_labels, r"none\.npz: holds no labelled image; give it some"),
        (cut_an_image, r"0001\.png: .*; replace the image"),
        (lambda world: cut_an_image(world) | {"preprocessing": None}, r"0001\.png: .*; replace the image"),
        (
            lambda world: {"examples": folder_of_images(world, {"bar": 1, "post": 1}, (8, 9)), "preprocessing": None},
            "have 2 different sizes, and `preprocessing` wants none",
        ),
    ],
)
def test_examples_that_can_t_serve_are_told(world: Path, changes: Callable[[Path], dict], message: str) -> None:
    spec = change(world, "flat", **changes(world))["flat"]
    with pytest.raises(TeacherError, match=f"^teacher 'flat': `examples`: .*{message}"):
        read_examples(spec, spec.classes)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    return Command(capsys, monkeypatch).plainly


def test_the_command_makes_what_is_missing_and_loads_nothing_again(world: Path, cli, monkeypatch) -> None:
    zoo = load_zoo(world / "zoo.yaml")
    code, text, err = cli("zoo", "cards", world / "zoo.yaml")
    assert (code, err) == (0, "")
    assert "2 cards made, 0 up to date, 0 teachers without" in text
    store = CardStore(world / "zoo.cards.arrow")
    first, second = (store.get(zoo.fingerprint_of(name), "pixels") for name in ("flat", "solid"))
    assert first.accuracy > 0.7 and first.examples == 20 and first.centres.shape == (2, 588)
    assert (second.accuracy, second.examples, second.centres) == (0.75, 0, None)
    assert f"flat 2 {first.parameters:,d} {first.accuracy:.3f} 20 yes solid 2 {second.parameters:,d} 0.750 0 no" in text
    assert cli("zoo", "pack", world / "zoo.yaml", "-o", world / "zoo.parquet")[0] == 0
    before = (world / "zoo.cards.arrow").read_bytes()
    monkeypatch.setattr("pipeline.models.sources.load_teacher", None)
    for name in ("zoo.yaml", "zoo.parquet"):
        code, text, err = cli("zoo", "cards", world / name)
        assert (code, err) == (0, "")
        assert "0 cards made, 2 up to date, 0 teachers without" in text and " 20 yes solid 2 " in text
    assert (world / "zoo.cards.arrow").read_bytes() == before


def test_the_command_makes_again_what_is_out_of_date(world: Path, cli) -> None:
    assert cli("zoo", "cards", world / "zoo.yaml")[0] == 0
    change(world, "solid", notes="of no matter")
    assert "0 cards made, 2 up to date" in cli("zoo", "cards", world / "zoo.yaml")[1]
    change(world, "solid", accuracy=0.25)
    text = cli("zoo", "cards", world / "zoo.yaml")[1]
    assert "1 cards made, 1 up to date" in text and " 0.250 0 no" in text
    pixels, labels = images(6, seed=4, classes=(0, 1))
    np.savez(world / "flat.npz", images=pixels, labels=labels, classes=np.array(["bar", "post"]))
    text = cli("zoo", "cards", world / "zoo.yaml")[1]
    assert "1 cards made, 1 up to date" in text and " 12 yes" in text
    assert len(CardStore(world / "zoo.cards.arrow")) == 2


def test_a_teacher_can_be_named_as_the_reference(world: Path, cli) -> None:
    zoo = load_zoo(world / "zoo.yaml")
    assert cli("zoo", "cards", world / "zoo.yaml")[0] == 0
    code, text, _ = cli("zoo", "cards", world / "zoo.yaml", "--reference", "solid")
    assert code == 0 and "2 cards made" in text
    store = CardStore(world / "zoo.cards.arrow")
    assert len(store) == 4
    found = store.get(zoo.fingerprint_of("flat"), reference_id(zoo["solid"]))
    assert found.centres.shape == (2, load_teacher(zoo["solid"]).feature_dim)
    code, _, err = cli("zoo", "cards", world / "zoo.yaml", "--reference", "sold")
    assert code == 2 and err.startswith("error: ") and "did you mean 'solid'?" in err


def test_a_teacher_that_fails_is_a_row_with_its_problem_and_no_card(world: Path, cli) -> None:
    entries = yaml.safe_load((world / "zoo.yaml").read_text())["teachers"]
    entry = entries[0]
    lost = entry | {"name": "lost", "source": entry["source"] | {"path": "teachers/lost.safetensors"}}
    swapped = entry | {"name": "swapped", "sha256": "0" * 64}
    misnamed = entry | {"name": "misnamed", "classes": ["bar", "zebra"]}
    absent = entry | {"name": "absent", "examples": {"type": "numpy", "path": "absent.npz"}}
    foreign = entry | {"name": "foreign", "source": entry["source"] | {"factory": "tests.tiny:mlp"}}
    write_zoo(world / "zoo.yaml", [lost, swapped, misnamed, absent, foreign, entries[1]])
    code, text, err = cli("zoo", "cards", world / "zoo.yaml")
    assert (code, err) == (2, "")
    assert "1 cards made, 0 up to date, 5 teachers without" in text
    for problem in (
        "lost.safetensors does not exist",
        "`sha256` does not fit",
        "class 'post' of",
        "absent.npz",
        "not trusted",
    ):
        assert problem.replace(" ", "") in text.replace(" ", "")  # the column folds its lines
    assert len(CardStore(world / "zoo.cards.arrow")) == 1


def test_code_that_is_trusted_is_run(world: Path, cli) -> None:
    entry = yaml.safe_load((world / "zoo.yaml").read_text())["teachers"][1]
    change(world, "solid", source=entry["source"] | {"factory": "tests.tiny:mlp"})
    assert cli("zoo", "cards", world / "zoo.yaml")[0] == 2
    code, text, _ = cli("zoo", "cards", world / "zoo.yaml", "--trust", "tests.")
    assert code == 0 and "1 cards made, 1 up to date" in text


def test_what_was_made_is_kept_when_the_call_is_interrupted(world: Path, cli, monkeypatch) -> None:
    real = load_teacher

    def stop(spec: TeacherSpec, **options: object) -> Teacher:
        if spec.name == "solid":
            raise KeyboardInterrupt
        return real(spec, **options)

    monkeypatch.setattr("pipeline.models.sources.load_teacher", stop)
    assert cli("zoo", "cards", world / "zoo.yaml")[0] != 0
    monkeypatch.undo()
    assert len(CardStore(world / "zoo.cards.arrow")) == 1


def test_cards_are_written_while_the_work_goes_on(world: Path, cli, monkeypatch) -> None:
    sizes = []
    real = CardStore.add
    monkeypatch.setattr("pipeline.stages.zoo._SAVE_SECONDS", 0)
    monkeypatch.setattr(CardStore, "add", lambda self, made: (real(self, made), sizes.append(len(self)))[0])
    assert cli("zoo", "cards", world / "zoo.yaml")[0] == 0
    assert sizes[0] == 1 and sizes[-1] == 2


def test_a_damaged_file_of_cards_ends_with_one_line(world: Path, cli) -> None:
    path = world / "zoo.cards.arrow"
    assert cli("zoo", "cards", world / "zoo.yaml")[0] == 0
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    code, out, err = cli("zoo", "cards", world / "zoo.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: teacher cards are damaged (") and len(err.splitlines()) == 1
    assert err.endswith("delete it and run `faculty zoo cards` again\n")
    assert path.read_bytes() == before

"""What a registered model says of itself, read without MLflow and without loading it."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.models.description import completed, read_description
from pipeline.models.factories import Refused
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.spec import PreprocessingSpec, TeacherSpec

NORMAL = {"size": 12, "channels": 3, "mean": [0.4], "std": [0.2]}
PUSHED = {
    "format": 1,
    "preprocessing": NORMAL,
    "outputs": ["logits", "features", "taps.a", "taps.b"],
    "classifier": "teacher.net.fc",
    "sha256": "0" * 64,
    "fingerprint": "f" * 64,
    "card": "pixels",
    "licence": "MIT",
    "notes": "of birds",
    "accuracy": 0.9,
}


def model(dtype: str = "float32", shape: tuple[int, ...] = (-1, 3, 16, 20), **metadata: object) -> dict:
    """What an `MLmodel` file holds."""

    def side(dtype: str, shape: tuple[int, ...]) -> str:
        return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}])

    return {
        "flavors": {"pytorch": {"model_data": "data"}},
        "signature": {"inputs": side(dtype, shape), "outputs": side("float32", (-1, 5))},
        "metadata": metadata,
    }


def spec(**changes: object) -> TeacherSpec:
    return TeacherSpec.model_validate(
        {"name": "birds", "source": {"type": "mlflow", "uri": "models:/birds/1"}} | changes
    )


def test_a_pushed_teacher_tells_all_and_what_the_zoo_states_stays() -> None:
    found = read_description(model(classes=["ant", "bee"], faculty_teacher=PUSHED))
    full = completed(spec(), found)
    assert full.classes == ("ant", "bee")
    assert full.preprocessing == PreprocessingSpec(size=12, channels=3, mean=(0.4,), std=(0.2,))
    assert (full.licence, full.notes, full.accuracy) == ("MIT", "of birds", 0.9)
    assert full.taps == {"a": "taps.0", "b": "taps.1"}
    assert not full.source.described
    own = completed(spec(classes=["x", "y"], preprocessing=None, licence="own", accuracy=0.0), found)
    assert (own.classes, own.preprocessing, own.licence, own.accuracy) == (("x", "y"), None, "own", 0.0)


def test_a_student_s_signature_tells_what_it_takes() -> None:
    found = completed(spec(), read_description(model("uint8", (-1, 1, 16, 20), classes=["a", "b"], output="logits")))
    raw = found.preprocessing
    assert (raw.size, raw.channels) == ((16, 20), 1)
    images = torch.arange(256, dtype=torch.uint8).repeat(5)[: 2 * 320].reshape(2, 1, 16, 20)
    assert torch.equal(Preprocessing(raw)(images), images.float())  # to the last bit, so that none is rounded away
    free = read_description(model("uint8", (-1, 1, -1, -1)))
    assert (free.preprocessing, free.problem, free.count) == (None, "", 5)


def test_a_signature_of_floats_does_not_tell_how_they_are_normalised() -> None:
    found = read_description(model(classes=["a", "b"]))
    assert "takes float32 (-1, 3, 16, 20) and nothing says" in found.problem
    with pytest.raises(Refused, match=r"set the version's tag faculty\.preprocessing"):
        completed(spec(), found)
    assert completed(spec(preprocessing=NORMAL), found).classes == ("a", "b")
    assert "has no signature" in read_description({"flavors": {"pytorch": {}}}).problem


def test_the_signature_fills_in_size_and_channels() -> None:
    found = read_description(model(preprocessing={"mean": [0.5], "std": [0.25]}))
    assert found.preprocessing == PreprocessingSpec(size=(16, 20), channels=3, mean=(0.5,), std=(0.25,))
    other = read_description(model(preprocessing={"size": 8, "mean": [0.5], "std": [0.25]}))
    assert other.preprocessing.size == 8


def test_tags_mend_what_the_files_leave_out() -> None:
    tags = {"faculty.classes": "[ant, bee]", "faculty.preprocessing": json.dumps(NORMAL)}
    full = completed(spec(), read_description(model(classes=["x", "y"]), tags))
    assert full.classes == ("ant", "bee")
    assert full.preprocessing.size == 12
    raw = read_description(model(), {"faculty.preprocessing": "null", "faculty.classes": "cifar-10"})
    assert (raw.preprocessing, raw.problem, raw.classes) == (None, "", "cifar-10")


@pytest.mark.parametrize(
    ("content", "tags", "message"),
    [
        ({"flavors": {"sklearn": {}}}, {}, "no PyTorch model"),
        (model(classes={"a": 1}), {}, "metadata `classes` must be a list"),
        (model(faculty_teacher={"format": 2}), {}, "faculty_teacher`: `format` is 2"),
        (model(preprocessing={"mean": [0.5]}), {}, "`std` is missing"),
        (model(), {"faculty.preprocessing": "{size: "}, "tag faculty.preprocessing"),
        (model(), {"faculty.preprocessing": "!!python/object/apply:os.system ['true']"}, "constructor"),
        (model(), {"faculty.classes": "3"}, "faculty.classes must be a list"),
    ],
)
def test_what_is_not_valid_is_told_in_one_line(content: dict, tags: dict, message: str) -> None:
    with pytest.raises(Refused, match=r".") as caught:
        read_description(content, tags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

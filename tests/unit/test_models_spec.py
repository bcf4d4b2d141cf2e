from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.models.class_names import class_names
from pipeline.models.spec import PreprocessingSpec, StudentSpec, TeacherSpec, ZooFile
from pipeline.strict import validate


def entry(**changes: object) -> dict:
    return {
        "name": "shoes",
        "source": {"type": "safetensors", "path": "a.safetensors", "factory": "pipeline.models.nets:mlp"},
        "classes": ["boot", "sandal"],
        "preprocessing": {"size": 28, "channels": 1, "mean": [0.5], "std": [0.5]},
    } | changes


def problem(data: dict, model: type = TeacherSpec) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(model, data, where="zoo.yaml")
    text = str(caught.value)
    assert text.startswith("zoo.yaml: ")
    return text


def test_a_good_entry_is_read() -> None:
    spec = validate(TeacherSpec, entry(), where="zoo.yaml")
    assert spec.classes == ("boot", "sandal")
    assert spec.path == "a.safetensors"
    assert spec.preprocessing.side((1, 14, 14)) == (28, 28)
    assert validate(TeacherSpec, spec.model_dump(mode="json"), where="again") == spec


def test_a_card_s_fields_are_read() -> None:
    source = {"type": "numpy", "path": "a.npz", "classes": ["sandal", "boot", "clog"], "only": ["boot", "sandal"]}
    spec = validate(TeacherSpec, entry(accuracy=1, examples=source), where="zoo.yaml")
    assert spec.accuracy == 1.0
    assert spec.examples.only == ["boot", "sandal"]
    assert validate(TeacherSpec, spec.model_dump(mode="json"), where="again") == spec
    bare = validate(TeacherSpec, entry(), where="zoo.yaml")
    assert bare.accuracy is None and bare.examples is None
    # Which classes these are is known when the teacher is loaded.
    for classes in ("mnist", None):
        assert validate(TeacherSpec, entry(classes=classes, examples=source), where="zoo.yaml").examples is not None


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "x" * 81])
def test_unsafe_names_are_refused(name: str) -> None:
    assert "`name`" in problem(entry(name=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "cifar10"}, "no built-in list"),
        ({"classes": ["boot", "boot"]}, "'boot' occurs twice"),
        ({"classes": ["boot"]}, "at least two"),
        ({"sha256": "abc"}, "sha256"),
        ({"feature": "fc"}, "did you mean `features`"),
        ({"source": {"type": "safetensor", "path": "a"}}, "did you mean `safetensors`"),
        ({"source": {"type": "torchvision", "model": "resnet18"}}, "either `weights`"),
        ({"source": {"type": "torchvision", "model": "resnet18", "weights": "DEFAULT", "path": "a.pt"}}, "either"),
        ({"source": {"type": "timm", "model": "resnet18"}}, "either `path`"),
        ({"source": {"type": "safetensors", "path": "a", "factory": "os.system"}}, "module:callable"),
        ({"source": {"type": "safetensors", "path": "a", "factory": "a:b.c"}}, "module:callable"),
        (
            {"source": {"type": "torchvision", "model": "resnet18", "weights": "DEFAULT"}, "sha256": "0" * 64},
            "needs a source with a `path`",
        ),
        ({"source": {"type": "mlflow", "uri": "models:/x/1", "described": True}}, "`preprocessing` is given here and"),
        ({"accuracy": 1.01}, "`accuracy` is 1.01"),
        ({"accuracy": -0.1}, "`accuracy` is -0.1"),
        ({"examples": "a.npz"}, "`examples`"),
        ({"examples": {"type": "npz", "path": "a"}}, "`examples.type` is 'npz'"),
        ({"examples": {"type": "numpy", "path": "a", "onyl": []}}, "`examples.onyl` is not a setting; did you mean"),
        (
            {"examples": {"type": "numpy", "path": "a", "classes": ["boot", "zebra"]}},
            "`examples`: class 'zebra' is not among the teacher's `classes`",
        ),
        ({"examples": {"type": "numpy", "path": "a", "only": ["clog", "boot"]}}, "`examples`: class 'clog' is not"),
    ],
)
def test_errors_name_the_field(changes: dict, message: str) -> None:
    assert message in problem(entry(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.1, 0.2]}, "`mean` has 2 values for 3 channels"),
        ({"std": [0.0]}, "`std` must be > 0"),
        ({"crop": 0.9, "size": None}, "`crop` needs a `size`"),
        ({"interpolation": "linear"}, "bilinear"),
        ({"channels": 2}, "channels"),
    ],
)
def test_preprocessing_must_fit_together(changes: dict, message: str) -> None:
    good = {"size": 32, "channels": 3, "mean": [0.5], "std": [0.5]}
    assert message in problem(good | changes, PreprocessingSpec)


def test_two_teachers_of_one_name_are_refused() -> None:
    assert "two teachers are called 'shoes'" in problem({"teachers": [entry(), entry()]}, ZooFile)
    assert "teachers" in problem({"teachers": []}, ZooFile)


def test_a_student_needs_a_name() -> None:
    assert "`name` is missing" in problem({}, StudentSpec)


@pytest.mark.parametrize(
    ("name", "count"), [("mnist", 10), ("fashion-mnist", 10), ("cifar-10", 10), ("cifar-100", 100)]
)
def test_built_in_labels_are_complete(name: str, count: int) -> None:
    names = class_names(name)
    assert len(names) == len(set(names)) == count
    assert all(n == n.strip() and n for n in names)


def test_built_in_labels_are_in_the_order_of_the_data_sets() -> None:
    assert class_names("fashion-mnist")[9] == "Ankle boot"
    assert class_names("cifar-10")[3] == "cat"
    assert class_names("cifar-100") == tuple(sorted(class_names("cifar-100")))
    with pytest.raises(ValueError, match="name must be one of"):
        class_names("svhn")

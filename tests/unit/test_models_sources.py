from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import TeacherError
from pipeline.models import nets
from pipeline.models.class_names import class_names
from pipeline.models.files import file_sha256
from pipeline.models.sources import load_teacher
from pipeline.models.spec import PreprocessingSpec, TeacherSpec

GREY = PreprocessingSpec(size=12, channels=1, mean=(0.5,), std=(0.5,))
IMAGES = torch.arange(2 * 144, dtype=torch.uint8).reshape(2, 1, 12, 12)


def net() -> nets.SmallCNN:
    torch.manual_seed(3)
    return nets.small_cnn(3, width=4).eval()


def spec(source: dict, **changes: object) -> TeacherSpec:
    fields = {"name": "tiny", "source": source, "classes": ("a", "b", "c"), "preprocessing": GREY} | changes
    return TeacherSpec.model_validate(fields)


def weights(path: Path, **changes: object) -> TeacherSpec:
    kind = "safetensors" if path.suffix == ".safetensors" else "state_dict"
    factory = changes.pop("factory", "pipeline.models.nets:small_cnn")
    kwargs = changes.pop("kwargs", {"width": 4})
    return spec({"type": kind, "path": str(path), "factory": factory, "kwargs": kwargs}, **changes)


def problem(bad: TeacherSpec, **arguments: object) -> str:
    with pytest.raises(TeacherError) as caught:
        load_teacher(bad, **arguments)
    text = str(caught.value)
    assert text.startswith("teacher 'tiny': ") and "\n" not in text
    return text


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file(net().state_dict(), path)
    return path


def save_plain(path: Path) -> None:
    torch.save(net().state_dict(), path)


def save_checkpoint(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in net().state_dict().items()}}, path)


def save_model_key(path: Path) -> None:
    torch.save({"model": net().state_dict(), "optimizer": {"lr": 0.1}}, path)


def save_without_counters(path: Path) -> None:
    torch.save({k: v for k, v in net().state_dict().items() if "num_batches" not in k}, path)


@pytest.mark.parametrize("save", [save_plain, save_checkpoint, save_model_key, save_without_counters])
def test_state_dicts_of_the_usual_kinds_are_understood(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "net.pth")
    said = load_teacher(weights(tmp_path / "net.pth"))(IMAGES)
    torch.testing.assert_close(said.logits, net()((IMAGES.float() / 255 - 0.5) / 0.5))


def test_safetensors_are_the_same_net(safetensors: Path) -> None:
    teacher = load_teacher(weights(safetensors, sha256=file_sha256(safetensors)))
    torch.testing.assert_close(teacher(IMAGES).logits, net()((IMAGES.float() / 255 - 0.5) / 0.5))
    assert teacher.classes == ("a", "b", "c") and teacher.feature_dim == 16


def test_classes_without_names_are_numbered(safetensors: Path) -> None:
    teacher = load_teacher(weights(safetensors, classes=None, kwargs={"width": 4, "num_classes": 3}))
    assert teacher.classes == ("class 0", "class 1", "class 2")


def test_a_built_in_list_gives_the_names(tmp_path: Path) -> None:
    save_file(nets.small_cnn(10, width=4).state_dict(), tmp_path / "net.safetensors")
    assert load_teacher(weights(tmp_path / "net.safetensors", classes="cifar-10")).classes[9] == "truck"


def test_files_that_are_none_are_told(tmp_path: Path, safetensors: Path) -> None:
    assert "does not exist" in problem(weights(tmp_path / "none.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    assert "is not a file" in problem(weights(tmp_path / "folder.safetensors"))
    assert "is a URI" in problem(
        weights(safetensors).model_copy(
            update={"source": weights(safetensors).source.model_copy(update={"path": "s3://bucket/net.safetensors"})}
        )
    )
    odd = spec({"type": "safetensors", "path": str(safetensors) + "\0", "factory": "pipeline.models.nets:mlp"})
    assert "is no path" in problem(odd)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_files_are_told(tmp_path: Path, safetensors: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        save_plain(path)
    else:
        path.write_bytes(safetensors.read_bytes())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    assert "is truncated or no" in problem(weights(path))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, write: Callable) -> None:
    write({"weight": Bomb(tmp_path / "ran")}, tmp_path / "net.pt")
    assert "is refused: it holds a pickle of more than tensors" in problem(weights(tmp_path / "net.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_pickled_net_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "net.pt")
    assert "SmallCNN); save `net.state_dict()` as safetensors" in problem(weights(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.ones(2)], "holds a list"), ({"a": 3}, "holds 'a', which is no tensor"), ({}, "holds no tensors")],
)
def test_files_without_a_state_dict_are_told(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    assert message in problem(weights(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kwargs": {"width": 8}},
            "of another shape (first: stage1.0.weight is (4, 1, 3, 3) in the file, (8, 1, 3, 3)",
        ),
        ({"factory": "pipeline.models.nets:resnet8"}, "lacks 45 of the net's"),
        ({"factory": "pipeline.models.nets:resnet8"}, "that the net does not have (first: stage"),
        ({"classes": ("a", "b")}, "(3, 16) in the file, (2, 16) in the net"),
        ({"classes": ("a", "b"), "kwargs": {"width": 4, "num_classes": 3}}, "3 outputs for 2 `classes`"),
        ({"kwargs": {"widht": 4}}, "unexpected keyword argument 'widht'"),
        ({"sha256": "0" * 64}, "`sha256` does not fit"),
        ({"features": "clasifier"}, "nearest: classifier"),
        ({"factory": "pipeline.models.nets:small_cn"}, "has no 'small_cn'; nearest: small_cnn"),
        ({"factory": "pipeline.models.net:small_cnn"}, "can't be imported"),
        ({"factory": "pipeline_of_none:net"}, "or to --trust of `faculty zoo`"),
        ({"factory": "pipeline.models.nets:torch"}, "no function or class"),
        ({"factory": "pipeline.models.spec:Factory"}, "no function or class"),
        (
            {"factory": "pipeline.models.class_names:class_names", "kwargs": {"name": "mnist"}},
            "returns a tuple, not an",
        ),
    ],
)
def test_what_does_not_fit_is_told(safetensors: Path, changes: dict, message: str) -> None:
    assert message in problem(weights(safetensors, **changes))


def test_only_trusted_modules_are_imported(tmp_path: Path, safetensors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import pathlib, pipeline.models.nets\n"
        "pathlib.Path('ran').touch()\n"
        "def make(**kwargs):\n    return pipeline.models.nets.small_cnn(**kwargs)\n"
    )
    (tmp_path / "outside_nets.py").write_text(code)
    (tmp_path / "pipelinex.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for module in ("outside_nets", "pipelinex"):  # a prefix is a package, not the beginning of a word
        text = problem(weights(safetensors, factory=f"{module}:make"), trusted_factories=("pipeline",))
        assert f"add '{module}.' to `zoo.trusted_factories`" in text
    assert "is not trusted" in problem(weights(safetensors, factory="os:system"), trusted_factories=("", "."))
    assert not (tmp_path / "ran").exists()
    kwargs = {"width": 4, "num_classes": 3}
    trusted = weights(safetensors, factory="outside_nets:make", kwargs=kwargs)
    assert load_teacher(trusted, trusted_factories=("outside_nets.",)).feature_dim == 16


def test_a_trusted_module_lends_no_trust_to_what_it_imported(safetensors: Path) -> None:
    bad = weights(safetensors, factory="pipeline.models.files:cache", kwargs={})
    assert "no function or class of pipeline.models.files" in problem(bad)


def test_the_suffix_tells_the_type(safetensors: Path) -> None:
    bad = spec({"type": "state_dict", "path": str(safetensors), "factory": "pipeline.models.nets:mlp"})
    assert "use `type: safetensors`" in problem(bad)


def test_mlflow_goes_through_its_resolver() -> None:
    source = spec({"type": "mlflow", "uri": "models:/tiny@champion"})
    asked: list[str] = []

    def resolve(uri: str) -> nn.Module:
        asked.append(uri)
        return net()

    assert load_teacher(source, resolvers={"mlflow": resolve}).feature_dim == 16
    assert asked == ["models:/tiny@champion"]
    assert "set `tracking.uri`" in problem(source)

    def fail(uri: str) -> nn.Module:
        raise ConnectionError("no route\nto host")

    assert "can't be fetched (no route)" in problem(source, resolvers={"mlflow": fail})


def test_torchvision_models_take_local_weights(tmp_path: Path) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    theirs = get_model("squeezenet1_1", num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "net.safetensors")
    colour = PreprocessingSpec(size=32, channels=3, mean=(0.5,), std=(0.5,))
    source = {"type": "torchvision", "model": "squeezenet1_1", "path": str(tmp_path / "net.safetensors")}
    teacher = load_teacher(spec(source, preprocessing=colour, features="classifier"))
    x = torch.nn.functional.interpolate(IMAGES.float(), (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(IMAGES).logits, theirs((x / 255 - 0.5).expand(-1, 3, -1, -1) / 0.5))
    assert teacher.feature_dim == 512
    assert "no linear layer; set `features`" in problem(spec(source, preprocessing=colour))
    assert "nearest: resnet18" in problem(spec(source | {"model": "resnet81"}))
    by_name = {"type": "torchvision", "model": "resnet18", "weights": "IMAGENET_V1"}
    assert "IMAGENET1K_V1" in problem(spec(by_name))


def test_imagenet_names_come_from_torchvision() -> None:
    names = class_names("imagenet-1k")
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "tench" and names[999] == "toilet tissue"


def test_a_missing_optional_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python does for a package that is not there
    assert "pip install 'faculty[timm]'" in problem(spec({"type": "timm", "model": "resnet18", "pretrained": True}))

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError, StageError, TeacherError
from pipeline.tracking.connect import open_tracker
from pipeline.tracking.registry import register_student, registered
from pipeline.tracking.resolve import download_model, load_mlflow_module, pinned
from pipeline.tracking.spec import TrackingSpec
from pipeline.tracking.tracker import NoTracker

pytestmark = [
    pytest.mark.integration,
    # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
CLASSES = ["ant", "bee", "cat", "dog", "eel"]


class TinyStudent(nn.Module):
    """Owns its preprocessing, as every student does: resize, scale, then convolution and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(4, len(CLASSES))
        nn.init.normal_(self.norm.running_mean)

    def forward(self, images):
        x = images.float() / 255 if images.dtype == torch.uint8 else images / 255
        x = nn.functional.interpolate(x, size=(12, 12), mode="bilinear", antialias=True, align_corners=False)
        return self.classifier(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Branching(TinyStudent):
    def forward(self, images):
        logits = super().forward(images)
        return logits if logits.sum() > 0 else -logits


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)


def logits_of(student, batch):
    with torch.no_grad():
        return student.eval()(torch.from_numpy(batch)).numpy()


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return TinyStudent()


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_tracker(TrackingSpec(), tmp_path_factory.mktemp("run"), name="run") as opened:
            yield opened


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder and look that nothing strays into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert os.listdir(tmp_path) == []


def register(tracker, student, **changes):
    settings = {
        "student": student,
        "example": images(3, 5),
        "classes": CLASSES,
        "name": "tiny",
        "alias": "challenger",
        "tags": {"accuracy": 0.5},
        "metadata": {"zoo": "abc", "teachers": ["a", "b"]},
        "model_card": "# Tiny\n",
    }
    return register_student(tracker, **{**settings, **changes})


def test_the_same_content_is_registered_once(tracker, student, capfd):
    student.train()
    first = register(tracker, student)
    assert student.training
    assert student.norm.training
    assert first.created
    assert (first.name, first.uri) == ("tiny", "models:/tiny@challenger")
    assert first.tags["accuracy"] == "0.5"

    again = register(tracker, student, alias="candidate", tags={"accuracy": 0.9})
    assert not again.created
    assert again.version == first.version
    assert registered(tracker, "tiny", "candidate").version == first.version
    assert registered(tracker, "tiny", "challenger").version == first.version

    other = register(tracker, student, metadata={"zoo": "another"})
    assert other.created
    assert other.version != first.version
    assert registered(tracker, "tiny", "challenger").version == other.version
    assert registered(tracker, "tiny", "candidate").version == first.version

    back = register(tracker, student)  # the alias follows the content that was registered last
    assert (back.created, back.version) == (False, first.version)
    assert registered(tracker, "tiny", "challenger").version == first.version
    assert registered(tracker, "tiny", "absent") is None
    assert registered(tracker, "absent", "challenger") is None

    version = tracker.client.get_model_version("tiny", first.version)
    assert (version.run_id, version.description) == (tracker.run_id, "# Tiny\n")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_clean_process_predicts_without_pickle(tracker, student, tmp_path_factory):
    entry = register(tracker, student)
    folder = tmp_path_factory.mktemp("clean")
    np.savez(folder / "images.npz", one=images(1, 1), seven=images(7, 2))
    script = textwrap.dedent(
        """
        import json, sys
        class Absent:
            # As where mlflow and torch are installed, and nothing of ours.
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("pipeline", "jobs", "faculty", "ray", "torchvision", "timm"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        import mlflow, numpy as np
        model = mlflow.pyfunc.load_model(sys.argv[1])
        data = np.load("images.npz")
        logits = {key: model.predict(data[key]) for key in data}
        assert all(value.dtype == np.float32 for value in logits.values())
        print(json.dumps({
            "metadata": model.metadata.metadata,
            "inputs": model.metadata.signature.inputs.to_dict(),
            "logits": {key: value.tolist() for key, value in logits.items()},
        }))
        """
    )
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_TRACKING_URI": tracker.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # As on a machine with a GPU, where MLflow would pick it and then refuse weights that were exported on the CPU.
        "MLFLOW_DEFAULT_PREDICTION_DEVICE": "meta",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, entry.uri], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout.splitlines()[-1])
    assert given["metadata"]["classes"] == CLASSES
    assert given["metadata"]["lineage"] == {"zoo": "abc", "teachers": ["a", "b"]}
    assert given["inputs"][0]["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 3, 16, 16]}
    np.testing.assert_allclose(given["logits"]["one"], logits_of(student, images(1, 1)), atol=1e-5)
    np.testing.assert_allclose(given["logits"]["seven"], logits_of(student, images(7, 2)), atol=1e-5)
    assert os.listdir(folder) == ["images.npz"]


def test_places_and_times_are_no_content_but_what_is_told_is_brought_up_to_date(tracker, student):
    def again(run_id, card, **changes):
        metadata = {"run": run_id, "data": "abc"}
        return register(
            tracker, student, name="told", metadata=metadata, identity={"data": "abc"}, model_card=card, **changes
        )

    first = again("run-1", "# One\n", tags={"accuracy": 0.5})
    second = again("run-2", "# Two\n", tags={"accuracy": 0.6})
    assert (first.created, second.created, second.version) == (True, False, first.version)
    version = tracker.client.get_model_version("told", first.version)
    assert (version.tags["accuracy"], version.description) == ("0.6", "# Two\n")
    assert second.tags["accuracy"] == "0.6"
    assert register(tracker, student, name="told", metadata={}, identity={"data": "xyz"}).created


def test_a_long_card_is_cut_at_a_line_where_the_registry_shows_it(tracker, student, tmp_path_factory):
    card = "# Long\n" + "".join(f"- line {number}\n" for number in range(2000))
    entry = register(tracker, student, name="long", model_card=card)
    shown = tracker.client.get_model_version("long", entry.version).description
    assert len(shown) <= 5000
    assert shown.splitlines()[:-2] == card.splitlines()[: len(shown.splitlines()) - 2]
    path = download_model(entry.uri, tracking_uri=tracker.secret_uri, folder=tmp_path_factory.mktemp("model"))
    assert (path / "model_card.md").read_text() == card


def test_the_stored_model_holds_no_image_of_the_data(tracker, student, tmp_path_factory):
    entry = register(tracker, student)
    path = download_model(entry.uri, tracking_uri=tracker.secret_uri, folder=tmp_path_factory.mktemp("model"))
    kept = np.asarray(json.loads((path / "input_example.json").read_text()))
    assert kept.shape == (2, 3, 16, 16)
    assert not any(np.array_equal(image, mine) for image in kept for mine in images(3, 5))
    assert (path / "requirements.txt").read_text().split("\n")[0].startswith("mlflow==")
    assert (path / "model_card.md").read_text() == "# Tiny\n"
    assert not (path / "data" / "model.pth").exists()


def test_a_registered_model_serves_as_a_teacher(tracker, student):
    entry = register(tracker, student)
    module = load_mlflow_module(entry.uri, tracker.secret_uri)
    batch = torch.from_numpy(images(5, 3))
    before = module(batch)
    assert module.train() is module
    assert module.eval() is module
    np.testing.assert_array_equal(module(batch).detach().numpy(), before.detach().numpy())
    np.testing.assert_allclose(before.detach().numpy(), logits_of(student, images(5, 3)), atol=1e-5)
    by_version = load_mlflow_module(f"models:/tiny/{entry.version}", tracker.secret_uri)
    assert torch.equal(by_version(batch), before)


def test_an_alias_is_pinned_to_the_version_it_names_now(tracker, student):
    entry = register(tracker, student)
    alias = entry.uri
    assert "@" in alias
    assert pinned(alias, tracker.secret_uri) == f"models:/tiny/{entry.version}"
    for uri in ("models:/tiny@absent", "models:/nothing@champion", f"models:/tiny/{entry.version}"):
        assert pinned(uri, tracker.secret_uri) == uri


def test_a_pickled_teacher_is_refused_unless_allowed(tracker, student, tmp_path_factory):
    import mlflow.pytorch

    path = tmp_path_factory.mktemp("pickled") / "model"
    mlflow.pytorch.save_model(nn.Linear(2, 3), str(path), serialization_format="pickle", pip_requirements=["torch"])
    with pytest.raises(TeacherError, match=r"was saved by pickle.*allow_pickle"):
        load_mlflow_module(str(path))
    assert load_mlflow_module(str(path), allow_pickle=True)(torch.zeros(4, 2)).shape == (4, 3)


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("models:/absent@champion", "absent"),
        ("models:/tiny@absent", "absent"),
        ("models:/tiny", "names no version"),
        ("models:/tiny/999", "999"),
    ],
)
def test_a_teacher_that_is_not_there_is_an_error_of_one_line(tracker, student, uri, part):
    register(tracker, student)
    with pytest.raises(TeacherError, match=part) as caught:
        load_mlflow_module(uri, tracker.secret_uri)
    assert "\n" not in str(caught.value)
    with pytest.raises(TeacherError, match="MLFLOW_TRACKING_URI"):
        load_mlflow_module(uri)


def test_what_can_not_be_registered_leaves_no_version(tracker, student):
    with pytest.raises(ConfigError, match=r"tracking\.enabled"):
        register(NoTracker(), student)
    with pytest.raises(ValueError, match="B >= 2"):
        register(tracker, student, example=images(1))
    with pytest.raises(ValueError, match=r"\(3, 5\) logits for 3 images and 2 classes"):
        register(tracker, student, classes=["a", "b"])
    with pytest.raises(StageError, match="can't be exported"):
        register(tracker, Branching(), name="branching")
    assert list(tracker.client.search_model_versions("name = 'branching'")) == []
    logged = tracker.client.search_logged_models([tracker.experiment_id])
    assert {model.status for model in logged} == {"READY"}

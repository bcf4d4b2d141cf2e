"""A registry as a zoo: pushed, found by tags and aliases, fixed when a run begins, and the same teachers as before."""

from __future__ import annotations

import io
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from pipeline.config import TrialResources
from pipeline.errors import ConfigError, StageError, TeacherError
from pipeline.models import nets
from pipeline.models.cards import CardStore, cards_path
from pipeline.models.sources import load_teacher
from pipeline.models.teacher import predict
from pipeline.models.zoo import load_zoo
from pipeline.models.zoo_spec import RegistryQuery
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages.artefacts import Record, RunFolder
from pipeline.stages.base import Run
from pipeline.stages.push import Push, push_zoo
from pipeline.stages.registered import pull_zoo, zoo_of
from pipeline.stages.teachers import TeacherJob, load_options, source_options
from pipeline.stages.zoo import Access, card_origin, check_zoo
from pipeline.tracking.connect import open_tracker
from pipeline.tracking.registry import register_student
from pipeline.tracking.spec import TrackingSpec
from pipeline.tracking.teachers import find_teachers, find_versions, read_teachers
from pipeline.tracking.versions import Registry
from tests import tiny

# MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
CODE = """
from torch import nn
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(144, 2)
    def forward(self, x):
        x = self.fc(x.flatten(1))
        return x if x.sum() > 0 else -x
"""


def entry(name: str, path: str, **changes: object) -> dict:
    return {
        "name": name,
        "source": {"type": "safetensors", "path": path, "factory": "pipeline.models.nets:small_cnn"},
        "classes": ["bar", "post"],
        "preprocessing": {"size": tiny.SIDE, "channels": 1, "mean": [0.4], "std": [0.3]},
    } | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zoo: a teacher with all that a zoo file can say, one that can't be exported, and one without
    its weights."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    net = nets.small_cnn(2, width=4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    save_file(net.state_dict(), folder / "full.safetensors")
    (folder / "branching_nets.py").write_text(CODE, encoding="utf-8")
    save_file({"fc.weight": torch.ones(2, 144), "fc.bias": torch.ones(2)}, folder / "branching.safetensors")
    pixels, labels = tiny.images(6, seed=1, classes=(0, 1))
    np.savez(folder / "examples.npz", images=pixels, labels=labels, classes=np.array(["bar", "post"]))
    source = {"type": "safetensors", "factory": "pipeline.models.nets:small_cnn", "kwargs": {"width": 4}}
    full = {
        "source": source | {"path": "full.safetensors"},
        "taps": {"early": "stage1"},
        "licence": "CC-BY-4.0",
        "notes": "shapes of http://someone:sentinel-7f3a@host/data",
        "examples": {"type": "numpy", "path": "examples.npz"},
    }
    code = {"source": {**source, "path": "branching.safetensors", "factory": "branching_nets:Branching", "kwargs": {}}}
    entries = [entry("full", "", **full), entry("branching", "", **code), entry("absent", "absent.safetensors")]
    tiny.write_zoo(folder / "zoo.yaml", entries)
    return folder


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: creating it takes seconds."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = f"sqlite:///{folder}/mlflow.db"
        with open_tracker(TrackingSpec(uri=uri, experiment="faculty-zoo"), folder, name="first"):
            pass
    return uri


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Path):
    """Work in an empty folder and look that nothing strays into it."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.syspath_prepend(str(world))
    yield
    assert os.listdir(tmp_path / "cwd") == []


@pytest.fixture
def shown() -> Display:
    return Display(Console(file=io.StringIO(), width=300, highlight=False))


def text(display: Display) -> str:
    return display.console.file.getvalue()


@pytest.fixture(scope="module")
def registry(uri: str) -> Registry:
    from mlflow.tracking import MlflowClient

    return Registry(MlflowClient(uri, registry_uri=uri), uri)


@pytest.fixture(scope="module")
def pushed(world: Path, uri: str) -> tuple[int, str]:
    """The zoo in the registry; exit code and output of the push."""
    display = Display(Console(file=io.StringIO(), width=300, highlight=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.syspath_prepend(str(world))
        code = push_zoo(
            world / "zoo.yaml",
            Push(prefix="acme-", alias="live", tags={"task": "shapes"}, tracking_uri=uri, trusted=("branching_nets.",)),
            display,
        )
    return code, text(display)


@pytest.fixture(scope="module")
def student(uri: str) -> str:
    """A student of another run, registered as Faculty registers it; its URI."""
    torch.manual_seed(1)
    net = Raw()
    example = np.random.default_rng(0).integers(0, 256, (4, 1, 9, 9), dtype=np.uint8)
    with open_tracker(TrackingSpec(uri=uri), ".", name="student") as tracker:
        return register_student(
            tracker, student=net, example=example, classes=["ant", "bee"], name="pupil", alias="champion"
        ).uri


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(9, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images.float().mean(1).mean(1) / 255)


def find(registry: Registry, **query: object):
    return find_teachers(registry, RegistryQuery(**query))


def test_what_can_not_be_pushed_is_a_row_and_the_rest_is_registered(pushed, registry: Registry) -> None:
    code, out = pushed
    assert code == 1
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip() and line.split()[0].isalpha()}
    assert "acme-full" in rows["full"] and "new" in rows["full"]
    assert "can't be exported" in rows["branching"]
    assert "does not exist" in rows["absent"]
    assert "1 new, 0 unchanged, 2 not pushed" in out
    assert {model.name for model in registry.client.search_registered_models("name LIKE 'acme-%'")} == {"acme-full"}
    version = registry.client.get_model_version_by_alias("acme-full", "live")
    assert version.tags["task"] == "shapes"
    assert "Licence: CC-BY-4.0" in version.description
    assert "sentinel-7f3a" not in version.description


def test_the_same_content_again_adds_no_version_but_tags_and_alias(pushed, world, uri, registry, shown) -> None:
    push = Push(only=["full"], prefix="acme-", alias="second", tags={"more": "1"}, tracking_uri=uri)
    assert push_zoo(world / "zoo.yaml", push, shown) == 0
    assert "0 new, 1 unchanged" in text(shown)
    versions = registry.client.search_model_versions("name = 'acme-full'")
    assert len(versions) == 1
    assert (versions[0].tags["more"], versions[0].tags["task"]) == ("1", "shapes")
    assert registry.client.get_model_version_by_alias("acme-full", "second").version == versions[0].version


def test_what_comes_back_is_the_same_teacher(pushed, world, uri, registry, tmp_path, shown) -> None:
    assert (
        pull_zoo(RegistryQuery(filter="tags.task = 'shapes'"), tmp_path / "z.yaml", tracking_uri=uri, display=shown)
        == 0
    )
    local, zoo = load_zoo(world / "zoo.yaml"), load_zoo(tmp_path / "z.yaml")
    before, after = local["full"], zoo["acme-full"]
    assert (after.classes, after.preprocessing, after.licence) == (("bar", "post"), before.preprocessing, "CC-BY-4.0")
    assert after.source.uri.startswith("models:/acme-full/")
    assert "sentinel-7f3a" not in (tmp_path / "z.yaml").read_text()
    first = load_teacher(before)
    second = load_teacher(after, **source_options((), uri))
    images = torch.from_numpy(tiny.images(5, seed=9)[0])[:, None]
    one, other = predict(first, images.split(7), taps=True), predict(second, images.split(7), taps=True)
    for name in ("logits", "features"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.taps["early"], other.taps["early"], rtol=1e-5, atol=1e-5)
    assert second.num_parameters == first.num_parameters
    torch.testing.assert_close(second.classifier_weight, first.classifier_weight)

    card = CardStore(cards_path(tmp_path / "z.yaml")).get(zoo.fingerprint_of("acme-full"), "pixels")
    assert (card.name, card.examples, card.centres.shape) == ("acme-full", 12, (2, 588))
    assert card.origin == card_origin(after)  # `faculty zoo cards` finds nothing to do
    assert card.accuracy == after.accuracy
    assert check_zoo(tmp_path / "z.yaml", Access(tracking_uri=uri), shown) == 0


def test_the_pushed_files_hold_no_pickle_no_path_and_no_secret(pushed, world, registry, uri) -> None:
    import mlflow.pytorch

    version = registry.client.get_model_version_by_alias("acme-full", "live")
    folder = Path(registry.client.get_model_version_download_uri("acme-full", version.version).removeprefix("file://"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"MLmodel", "card.arrow", "data/model.pt2", "model_card.md", "requirements.txt"}
    for name in files:
        content = (folder / name).read_bytes()
        assert b"sentinel-7f3a" not in content, name
        assert str(world).encode() not in content, name
    logits, features, _ = mlflow.pytorch.load_model(str(folder))(torch.zeros(3, 1, 12, 12))  # MLflow reads it, too
    assert (logits.shape, features.shape) == ((3, 2), (3, 16))


def test_another_program_under_the_pinned_version_is_refused(pushed, registry, uri) -> None:
    (spec,) = find(registry, filter="name = 'acme-full'").specs
    wrong = spec.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(TeacherError, match="`sha256` does not fit the program of models:/acme-full"):
        load_teacher(wrong, **source_options((), uri))


def test_a_student_is_a_teacher(student: str, registry: Registry, uri: str) -> None:
    (spec,) = find(registry, filter="name = 'pupil'").specs
    assert (spec.name, spec.classes, spec.preprocessing.size) == ("pupil", ("ant", "bee"), (9, 9))
    teacher = load_teacher(spec, **source_options((), uri))
    torch.manual_seed(1)
    own = Raw()
    stored = torch.randint(0, 256, (3, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(stored).logits, own(stored), rtol=1e-5, atol=1e-5)
    assert teacher(torch.zeros(2, 3, 20, 20, dtype=torch.uint8)).logits.shape == (2, 2)


def plain_version(registry: Registry, name: str, folder: Path, tags: dict | None = None, **form: object) -> str:
    """Register a model as someone without Faculty would; return its URI."""
    import mlflow.pytorch
    from mlflow.models import infer_signature

    batch = np.zeros((2, 1, 12, 12), np.float32)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    kind = {
        "serialization_format": "pt2",
        "input_example": batch,
        "signature": infer_signature(batch, batch[:, 0, 0, :3]),
    }
    mlflow.pytorch.save_model(net, str(folder / name), pip_requirements=["torch"], **(kind | form))
    if name not in {model.name for model in registry.client.search_registered_models()}:
        registry.client.create_registered_model(name)
    version = registry.client.create_model_version(name, (folder / name).as_uri(), tags=tags)
    return f"models:/{name}/{version.version}"


PICKLED = {"serialization_format": "pickle", "input_example": None, "signature": None}
MENDED = {"faculty.classes": "[x, y, z]", "faculty.preprocessing": "{size: 12, channels: 1, mean: [0.5], std: [0.5]}"}


def test_versions_without_usable_metadata_are_left_out_and_can_be_mended(registry, uri, tmp_path, shown) -> None:
    plain_version(registry, "silent", tmp_path)
    registry.client.set_registered_model_tag("silent", "group", "plain")
    with pytest.raises(ConfigError, match=r"none of 1 versions .* models:/silent/1: .*set the version's tag faculty"):
        pull_zoo(RegistryQuery(filter="tags.group = 'plain'"), tmp_path / "z.yaml", tracking_uri=uri, display=shown)
    for key, value in MENDED.items():
        registry.client.set_model_version_tag("silent", "1", key, value)
    (spec,) = find(registry, filter="tags.group = 'plain'").specs
    assert (spec.classes, spec.preprocessing.mean) == (("x", "y", "z"), (0.5,))
    assert load_teacher(spec, **source_options((), uri))(torch.zeros(2, 1, 9, 9)).logits.shape == (2, 3)


def test_a_pickled_teacher_is_refused_unless_the_settings_name_it(registry, uri, tmp_path, shown) -> None:
    plain_version(registry, "pickled", tmp_path, tags=MENDED, **PICKLED)
    (spec,) = find(registry, filter="name = 'pickled'").specs
    batch = torch.zeros(2, 1, 9, 9)
    table = tmp_path / "run" / "ingest" / "k" / "ingest.json"
    table.parent.mkdir(parents=True)
    table.write_text('{"path": "table.arrow"}')
    for allowed in ((), ("other",), ("pickled",)):
        zoo = {"source": "mlflow", "filter": "name = 'pickled'", "allow_pickle": list(allowed)}
        settings = settings_for(tmp_path, uri, zoo)
        run = Run(settings, RunFolder(tmp_path / "run"), shown, zoo_of(settings, shown))
        run.records["ingest"] = Record("ingest", "k", "", {}, {}, 0.0, 0.0)
        job = TeacherJob.of(run, "pickled", tmp_path, TrialResources())
        loads = [job.load, partial(load_teacher, spec, **load_options(run))]
        if "pickled" in allowed:
            assert [load()(batch).logits.shape for load in loads] == [(2, 3)] * 2
            continue
        for load in loads:
            with pytest.raises(TeacherError, match=r"'pickled': .*by pickle.*name the teacher in `zoo\.allow_pickle`"):
                load()

    tiny.write_zoo(tmp_path / "z.yaml", [{"name": "own", "source": {"type": "mlflow", "uri": spec.source.uri}}])
    assert check_zoo(tmp_path / "z.yaml", Access(tracking_uri=uri), shown) == 2
    assert "zoo.allow_pickle" in text(shown)
    assert check_zoo(tmp_path / "z.yaml", Access(tracking_uri=uri, allow_pickle=("own",)), shown) == 0


def test_versions_are_chosen_by_filter_alias_and_number(registry, uri, tmp_path, monkeypatch) -> None:
    for number in range(1, 4):
        plain_version(registry, "many birds", tmp_path / str(number), tags=MENDED | {"size": str(number)})
    registry.client.set_registered_model_tag("many birds", "kind", "bird")
    registry.client.set_registered_model_alias("many birds", "champion", "2")
    monkeypatch.setattr("pipeline.tracking.teachers._PAGE", 1)  # so that there are pages

    def found(**query: object) -> dict[str, str]:
        return {spec.name: spec.source.uri for spec in find(registry, **query).specs}

    last, bird = {"many-birds": "models:/many birds/3"}, "tags.kind = 'bird'"
    assert found(filter=bird) == found(filter="name ILIKE 'MANY%'") == last
    assert found(filter=bird, alias="champion") == {"many-birds": "models:/many birds/2"}
    assert found(filter="tags.size = '1'") == {"many-birds": "models:/many birds/1"}  # a tag of the version alone
    assert found(filter="version_number < 3 and name = 'many birds'") == {"many-birds": "models:/many birds/2"}
    assert found(filter="tags.size = '1'", alias="champion") == {}
    assert found(filter=bird, alias="absent") == found(filter="tags.kind = 'none'") == {}
    every = found(filter=bird, versions="all")
    assert every == {f"many-birds-v{number}": f"models:/many birds/{number}" for number in (1, 2, 3)}
    assert "many-birds" in found()
    with pytest.raises(ConfigError, match=r"zoo\.filter: the registry does not understand .kind is bird."):
        find(registry, filter="kind is bird")
    monkeypatch.setattr(registry.client, "search_registered_models", lambda *_, **__: _lost())
    with pytest.raises(StageError, match="no such table"):
        find(registry)


def _lost():
    from sqlalchemy.exc import OperationalError

    raise OperationalError("select", {}, Exception("no such table"))


def test_who_is_missed_by_chance_ends_the_search_and_who_has_no_files_does_not(registry, tmp_path, monkeypatch) -> None:
    for name in ("emptied", "foreign"):
        plain_version(registry, name, tmp_path, tags=MENDED)
    shutil.rmtree(tmp_path / "emptied")
    (tmp_path / "foreign" / "MLmodel").write_text("flavors: {sklearn: {}}")
    found = find(registry, filter="name IN ('emptied', 'foreign')")
    assert found.specs == ()
    assert found.left_out["models:/foreign/1"].startswith("it is no PyTorch model")
    assert found.left_out["models:/emptied/1"].startswith("can't be loaded")
    versions = find_versions(registry, RegistryQuery(filter="name = 'emptied'"))
    monkeypatch.setattr(registry.client, "search_registered_models", lambda *_, **__: _lost())
    with pytest.raises(StageError, match="no such table"):
        read_teachers(registry, versions, numbered=False)


def settings_for(folder: Path, uri: str, zoo: dict, **changes: object):
    tiny.make_settings(folder, zoo=zoo, tracking={"uri": uri}, run_dir=str(folder / "run"), **changes)
    return load_settings([folder / "run.yaml"])


def test_a_run_keeps_the_versions_that_it_began_with(registry, uri, tmp_path, shown) -> None:
    plain_version(registry, "moving", tmp_path / "1", tags=MENDED | {"moves": "yes"})
    settings = settings_for(tmp_path, uri, {"source": "mlflow", "filter": "tags.moves = 'yes'"})
    first = zoo_of(settings, shown)
    assert {name: spec.source.uri for name, spec in first.items()} == {"moving": "models:/moving/1"}
    plain_version(registry, "moving", tmp_path / "2", tags=MENDED | {"moves": "yes"})
    again = zoo_of(settings, shown)
    assert dict(again) == dict(first)
    assert again.fingerprint == first.fingerprint
    assert "1 registered teachers as of" in text(shown)
    (tmp_path / "run" / "registered.json").unlink()
    assert zoo_of(settings, shown)["moving"].source.uri == "models:/moving/2"
    other = settings_for(tmp_path, uri, {"source": "mlflow", "filter": "tags.moves = 'yes'", "versions": "all"})
    assert zoo_of(other, shown).names == ("moving-v1", "moving-v2")
    with pytest.raises(ConfigError, match="there is no teacher 'mving-v1'; did you mean"):
        zoo_of(settings_for(tmp_path, uri, other.zoo.model_dump(exclude_defaults=True) | {"only": ["mving-v1"]}), shown)
    (tmp_path / "run" / "registered.json").write_text("{")
    with pytest.raises(Exception, match="is damaged; delete it") as caught:
        zoo_of(other, shown)
    assert type(caught.value).__name__ == "UserError"


def test_an_alias_in_a_zoo_file_is_kept_and_the_model_tells_the_rest(pushed, registry, uri, tmp_path, shown) -> None:
    for number in ("1", "2"):
        plain_version(registry, "aliased", tmp_path / number, tags=MENDED)
    registry.client.set_registered_model_alias("aliased", "live", "1")
    named = {"name": "mine", "source": {"type": "mlflow", "uri": "models:/aliased@live"}}
    own = {"name": "own", "source": {"type": "mlflow", "uri": "models:/aliased/2"}, "classes": ["p", "q", "r"]}
    own["preprocessing"] = {"size": 12, "channels": 1, "mean": [0.0], "std": [1.0]}
    tiny.write_zoo(tmp_path / "zoo.yaml", [named, own])
    settings = settings_for(tmp_path, uri, {"path": "zoo.yaml"})
    zoo = zoo_of(settings, shown)
    assert (zoo["mine"].source.uri, zoo["mine"].classes) == ("models:/aliased/1", ("x", "y", "z"))
    assert zoo["mine"].preprocessing.mean == (0.5,)
    assert (zoo["own"].source.uri, zoo["own"].classes) == ("models:/aliased/2", ("p", "q", "r"))
    registry.client.set_registered_model_alias("aliased", "live", "2")
    assert dict(zoo_of(settings, shown)) == dict(zoo)
    assert "models:/aliased@live names models:/aliased/2 now; this run keeps models:/aliased/1" in text(shown)


def test_a_registry_that_is_not_there_is_told(tmp_path, uri, world, shown) -> None:
    query = {"source": "mlflow", "filter": "tags.task = 'fish'"}
    with pytest.raises(ConfigError, match=r"has no model for this query \(filter \"tags\.task = 'fish'\"\)"):
        zoo_of(settings_for(tmp_path, uri, query), shown)
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        zoo_of(settings_for(tmp_path, "jsonl", query), shown)
    with pytest.raises(Exception, match="there is no model registry") as caught:
        zoo_of(settings_for(tmp_path, f"sqlite:///{tmp_path}/none.db", query), shown)
    assert type(caught.value).__name__ == "UserError"
    assert not (tmp_path / "none.db").exists()
    assert not (tmp_path / "run").exists()
    for call in (lambda: push_zoo(world / "zoo.yaml", Push()), lambda: pull_zoo(RegistryQuery(), tmp_path / "z.yaml")):
        with pytest.raises(ConfigError, match="name it with --tracking-uri, or set MLFLOW_TRACKING_URI"):
            call()


def test_the_metadata_says_what_was_pushed(pushed, registry) -> None:
    version = registry.client.get_model_version_by_alias("acme-full", "live")
    folder = registry.client.get_model_version_download_uri("acme-full", version.version).removeprefix("file://")
    content = yaml.safe_load((Path(folder) / "MLmodel").read_text())
    about = content["metadata"]["faculty_teacher"]
    assert content["metadata"]["classes"] == ["bar", "post"]
    assert about["outputs"] == ["logits", "features", "taps.early"]
    assert about["accuracy"] is not None and len(about["fingerprint"]) == 64
    outputs = json.loads(content["signature"]["outputs"])
    assert [one["name"] for one in outputs] == about["outputs"]
    assert version.run_id is not None

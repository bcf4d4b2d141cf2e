import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.strict import validate
from pipeline.tracking.connect import find_store
from pipeline.tracking.entries import (
    VALUE_LIMIT,
    check_key,
    clean_document,
    clean_metrics,
    clean_name,
    clean_params,
    clean_tags,
    table_document,
)
from pipeline.tracking.redact import redact
from pipeline.tracking.spec import RegisterSpec, TrackingSpec


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://me:s3cret@host:5000/x", "http://host:5000/x"),
        ("https://token@host", "https://host"),
        ("postgresql+psycopg://u:p@ss@db/faculty", "postgresql+psycopg://db/faculty"),
        ("mysql://u:pa/ss@db/faculty", "mysql://db/faculty"),
        ("s3://bucket/a?X-Amz-Signature=abc&b=1", "s3://bucket/a?X-Amz-Signature=***&b=1"),
        ("see http://u:p@a/ and http://u:p@b/", "see http://a/ and http://b/"),
        ("http://host:5000/models/student@challenger", "http://host:5000/models/student@challenger"),
        ("sqlite:////runs/a@b/mlflow.db", "sqlite:////runs/a@b/mlflow.db"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_redact_takes_out_credentials_alone(given, shown):
    assert redact(given) == shown


def test_params_are_flat_bounded_and_free_of_credentials():
    params = clean_params(
        {"a": {"b": 1, "c": [1, 2]}, "long": "x" * 9000, "uri": "http://u:p@h", "spec": TrackingSpec()}
    )
    assert params["a.b"] == "1"
    assert params["a.c"] == "[1, 2]"
    assert params["uri"] == "http://h"
    assert params["spec.experiment"] == "faculty"
    assert len(params["long"]) == VALUE_LIMIT
    assert params["long"].endswith("[cut, 9000 characters]")


def test_metrics_become_floats_and_infinities_nan():
    metrics = clean_metrics(
        {"a": np.float32(0.5), "b": torch.tensor(2.0), "part": {"c": 3}, "d": math.inf, "e": math.nan}
    )
    assert {name: metrics[name] for name in ("a", "b", "part.c")} == {"a": 0.5, "b": 2.0, "part.c": 3.0}
    assert math.isnan(metrics["d"])
    assert math.isnan(metrics["e"])
    with pytest.raises(ValueError, match=r"metric a must be a number, got 'much'"):
        clean_metrics({"a": "much"})


@pytest.mark.parametrize(
    ("given", "name"),
    [("acc/Kätze & Hund?", "acc/Kätze _ Hund_"), ("../up", "up"), ("/a//b/", "a/b"), ("", "_"), ("x" * 400, "x" * 250)],
)
def test_names_are_ones_every_store_takes(given, name):
    assert clean_name(given) == name


def test_tags_leave_out_none():
    assert clean_tags({"a": None, "b": False}) == {"b": "False"}


def test_documents_are_strict_json():
    rows = [{"a": float("nan"), "p": Path("/x")}, {"a": np.array([1, 2]), "u": "http://u:p@h"}]
    assert clean_document(rows) == [{"a": None, "p": "/x"}, {"a": [1, 2], "u": "http://h"}]
    assert table_document(rows) == {
        "columns": ["a", "p", "u"],
        "data": [[None, "/x", None], [[1, 2], None, "http://h"]],
    }


def test_keys_that_a_search_could_not_quote_are_refused():
    assert check_key("assess/task@1 [a]".replace("[a]", "a")) == "assess/task@1 a"
    with pytest.raises(ValueError, match="a run's key has"):
        check_key("it's")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"name": "a/b"}, "`name`.*none of / : @"),
        ({"alias": "v2"}, "`alias`.*reserves the alias 'v2'"),
        ({"alias": "a b"}, "`alias`.*letters, digits"),
        ({"alias": "latest"}, "reserves the alias"),
    ],
)
def test_register_settings_are_refused_early(data, part):
    with pytest.raises(ConfigError, match=part):
        validate(RegisterSpec, data, where="run.yaml")


def test_the_store_is_found_from_settings_then_environment_then_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@env:5000/")
    assert find_store(TrackingSpec(uri="https://given"), tmp_path).uri == "https://given"
    from_environment = find_store(TrackingSpec(), tmp_path)
    assert (from_environment.kind, from_environment.shown) == ("server", "http://env:5000")
    assert find_store(TrackingSpec(enabled=False), tmp_path).kind == "none"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    embedded = find_store(TrackingSpec(), tmp_path)
    assert embedded.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert embedded.artifacts == f"file://{tmp_path}/mlartifacts"
    assert find_store(TrackingSpec(uri="jsonl"), tmp_path).uri == f"{tmp_path}/tracking.jsonl"


def test_a_relative_database_becomes_absolute_with_its_artefacts_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = find_store(TrackingSpec(uri="sqlite:///sub/ml.db"), "elsewhere")
    assert store.uri == f"sqlite:///{tmp_path}/sub/ml.db"
    assert store.artifacts == f"file://{tmp_path}/sub/mlartifacts"


@pytest.mark.parametrize(
    ("uri", "run_dir", "part"),
    [
        ("./mlruns", "runs/a", "a folder, which MLflow no longer writes to"),
        ("127.0.0.1:5000", "runs/a", "a server's begins with http://"),
        ("file:///x/mlruns", "runs/a", "use sqlite:////x/mlruns/mlflow.db"),
        ("sqlite://", "runs/a", "in memory"),
        ("sqlite:///:memory:", "runs/a", "in memory"),
        (None, "s3://bucket/run", "the run folder s3://bucket/run is remote"),
        (None, "runs/100%", "has one of"),
    ],
)
def test_stores_that_can_not_work_are_refused(uri, run_dir, part, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=part):
        find_store(TrackingSpec(uri=uri), run_dir)


def test_the_light_modules_import_neither_mlflow_nor_torch():
    names = ("spec", "tracker", "connect", "jsonlines", "entries", "quiet", "redact", "mlflow")
    code = "import sys\n" + "\n".join(f"import pipeline.tracking.{name}" for name in names)
    code += "\nassert not {'mlflow', 'torch', 'ray', 'requests'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Where a company keeps its runs: artefacts in a bucket, a server that asks for a password."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from pipeline.errors import UserError
from pipeline.tracking.connect import open_tracker
from pipeline.tracking.registry import register_student
from pipeline.tracking.resolve import load_mlflow_module
from pipeline.tracking.spec import TrackingSpec
from tests.loopback import TrackingServer
from tests.tiny import TinyClassifier

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # botocore's and SQLAlchemy's own
]
SECRET = "sentinel-7f3a-bucket"
PASSWORD = "sentinel-7f3a-password"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A loopback S3 with one bucket, which the environment leads to; gives its endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="faculty")
        yield endpoint
    finally:
        server.stop()


def keys(endpoint: str) -> list[str]:
    listed = boto3.client("s3", endpoint_url=endpoint).list_objects_v2(Bucket="faculty")
    return [item["Key"] for item in listed.get("Contents", [])]


def record(spec: TrackingSpec, folder: Path) -> str:
    """Record a run with a file and a student; return the student's URI."""
    (folder / "notes.txt").write_text("of a run")
    torch.manual_seed(0)
    student = TinyClassifier()
    example = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    with open_tracker(spec, folder / "run", name="run", key="k", params={"lr": 0.1}) as tracker:
        with tracker.run("stage", key="s") as stage:
            stage.metrics({"loss": 0.5}, step=1)
            stage.artifact(folder / "notes.txt", "texts")
        version = register_student(tracker, student=student, example=example, classes=["a", "b"], name="kept")
    module = load_mlflow_module(version.uri, spec.uri)
    with torch.no_grad():
        images = torch.from_numpy(example)
        assert torch.allclose(module(images), student(images), atol=1e-5)
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    return version.uri


def test_artefacts_and_students_may_lie_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    record(TrackingSpec(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts="s3://faculty/runs"), tmp_path)
    stored = keys(bucket)
    assert any(key.startswith("runs/") and key.endswith("artifacts/texts/notes.txt") for key in stored)
    assert any(key.startswith("runs/") and key.endswith("/data/model.pt2") for key in stored)
    assert not (tmp_path / "mlartifacts").exists()
    assert SECRET.encode() not in (tmp_path / "mlflow.db").read_bytes()


@pytest.mark.slow
def test_a_server_that_asks_for_a_password_and_keeps_its_files_in_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = tmp_path / "users.ini"
    users.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{tmp_path}/users.db\n"
        f"admin_username = keeper\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = TrackingServer(
        tmp_path,
        artifacts="s3://faculty/served",
        options=["--app-name", "basic-auth"],
        environment={"MLFLOW_AUTH_CONFIG_PATH": str(users), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the sessions"},
    ).start()
    try:
        spec = TrackingSpec(uri=server.uri, timeout=20)
        with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as caught:
            with open_tracker(spec, tmp_path / "run", name="run"):
                pytest.fail("the block must not be entered")
        assert "\n" not in str(caught.value)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "keeper")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        record(spec, tmp_path)
        stored = keys(bucket)
        assert any(key.startswith("served/") and key.endswith("artifacts/texts/notes.txt") for key in stored)
        assert any(key.startswith("served/") and key.endswith("/data/model.pt2") for key in stored)
    finally:
        server.stop()
    # The server's own users file and its hash of the password aside, nobody was told.
    told = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("users.ini", "users.db")]
    for secret in (SECRET, PASSWORD):
        assert [path for path in told if secret.encode() in path.read_bytes()] == []
    assert "mlruns" not in os.listdir(tmp_path)

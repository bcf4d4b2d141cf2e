"""A whole run whose folder lies in a bucket: killed, and finished by a machine that has nothing of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from pyarrow import fs

from pipeline.data.claim import NAME
from pipeline.data.mirror import Mirror
from pipeline.engine.checkpoint import MANIFEST, CheckpointStore
from pipeline.places import local_place
from tests.tiny import make_data, make_settings, make_zoo

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # botocore's own
]
SECRET = "sentinel-7f3a-mirror"
STAGES = ("ingest", "assess", "select", "amalgamate", "distill", "evaluate")
PREFIX = "runs/tiny"


class Bucket:
    """A loopback S3 with one bucket, and runs of the command that keep their folder in it."""

    def __init__(self, endpoint: str) -> None:
        self.client = boto3.client("s3", endpoint_url=f"http://{endpoint}")
        self.client.create_bucket(Bucket="faculty")
        self.options = f"?endpoint_override={endpoint}&scheme=http&region=us-east-1"
        self.uri = f"s3://faculty/{PREFIX}{self.options}"

    def objects(self) -> dict[str, tuple[Any, str]]:
        """Path in the run folder to time and hash of every object."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="faculty", Prefix=f"{PREFIX}/")
        return {
            item["Key"].removeprefix(f"{PREFIX}/"): (item["LastModified"], item["ETag"])
            for page in pages
            for item in page.get("Contents", [])
            if not item["Key"].endswith("/")
        }

    def checkpoints(self) -> CheckpointStore | None:
        """The student's."""
        names = {name.split("/")[1] for name in self.objects() if name.startswith("ray/epochs-")}
        return CheckpointStore(f"s3://faculty/{PREFIX}/ray{self.options}", names.pop()) if names else None


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        endpoint = "{}:{}".format(*server.get_host_and_port())
        # The servers of one process share their buckets.
        urlopen(Request(f"http://{endpoint}/moto-api/reset", method="POST")).close()
        yield Bucket(endpoint)
    finally:
        server.stop()


def start(settings: Path, cache: Path, *words: str) -> subprocess.Popen[str]:
    """Run the command on a machine that has nothing but its cache."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *(words or ("run",)), "-c", str(settings)],
        env=environment | {"FACULTY_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(settings: Path, cache: Path, *words: str) -> str:
    process = start(settings, cache, *words)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def run_and_kill_and_finish(bucket: Bucket, folder: Path, workers: int, length: int) -> None:
    make_data(folder)
    zoo = make_zoo(folder / "zoo", ("flat", "solid", "mixed"))
    for path in (zoo, *zoo.parent.glob("teachers/*")):
        bucket.client.upload_file(str(path), "faculty", path.relative_to(folder).as_posix())
    shutil.rmtree(zoo.parent)
    settings = make_settings(
        folder,
        run_dir=bucket.uri,
        zoo={"path": f"s3://faculty/zoo/zoo.yaml{bucket.options}"},
        tracking={"uri": "jsonl"},
        register={"enabled": False},
        evaluate={"controls": []},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": length, "batch_size": 32, "labelled_batch": 16},
            "guard": None,
            "resources": {"num_workers": workers},
        },
    )

    def epochs() -> int:
        store = bucket.checkpoints()
        saved = store.newest() if store is not None else None
        return 0 if saved is None else int(saved.metrics["epoch"])

    process = start(settings, folder / "first")
    deadline = time.monotonic() + 240
    try:
        while epochs() < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    before = bucket.objects()
    assert {name.split("/")[0] for name in before if name.endswith("/stage.json")} == set(STAGES[:4])
    assert not any("stage.json" in name for name in before if name.startswith("distill/"))

    output = finish(settings, folder / "second")
    for stage in STAGES[:4]:
        assert f"{stage} unchanged since" in output
    after = bucket.objects()
    for name, about in before.items():
        if name.split("/")[0] in ("ingest", "teachers", "outputs", "spoken", "students", "assess"):
            assert after[name] == about, name  # written once, by the machine that was killed
    assert len([name for name in after if name.startswith("distill/") and name.endswith("/stage.json")]) == 1
    store = bucket.checkpoints()
    newest = store.newest() if store is not None else None
    assert newest is not None
    assert newest.index == length - 1  # one an epoch: had the training begun anew, there would be more
    [history] = [name for name in after if name.startswith("distill/") and name.endswith("/history.json")]
    content = bucket.client.get_object(Bucket="faculty", Key=f"{PREFIX}/{history}")["Body"].read()
    assert [row["epoch"] for row in yaml.safe_load(content)] == list(range(1, length + 1))
    assert "tracking.jsonl" in after
    assert NAME not in after
    assert not any("/." in name or name.startswith(".") for name in after)

    # A machine that has seen nothing of it has nothing to do, and fetches no images.
    output = finish(settings, folder / "third")
    for stage in STAGES:
        assert f"{stage} unchanged since" in output
    assert list((folder / "third").rglob("stage.json"))
    assert not list((folder / "third").rglob("images.arrow"))
    assert {name for name in bucket.objects() if name.endswith("stage.json")} == {
        name for name in after if name.endswith("stage.json")
    }
    told = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in told if SECRET.encode() in path.read_bytes()] == []


def test_a_run_in_a_bucket_is_finished_by_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    run_and_kill_and_finish(bucket, tmp_path, workers=0, length=30)


@pytest.mark.slow  # the same through Ray Train's storage_path: the workers start three times
def test_a_run_in_a_bucket_whose_workers_keep_their_checkpoints_there(bucket: Bucket, tmp_path: Path) -> None:
    run_and_kill_and_finish(bucket, tmp_path, workers=2, length=12)


@pytest.mark.slow  # trials of Ray Tune, on two machines one after the other
def test_a_sweep_in_a_bucket_is_finished_by_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    make_data(tmp_path)
    settings = make_settings(
        tmp_path,
        run_dir=bucket.uri,
        zoo={"path": str(make_zoo(tmp_path / "zoo", ("flat", "solid", "mixed")))},
        tracking={"uri": "jsonl"},
        register={"enabled": False},
        evaluate={"controls": []},
        sweep={"space": {"distill.loop.optim.lr": [1e-2, 5e-3, 2e-3]}, "search": "grid", "max_concurrent": 1},
    )

    def rows() -> dict[str, tuple[Any, str]]:
        found = bucket.objects()
        return {name: found[name] for name in found if name.startswith("sweep/") and name.endswith("/row.json")}

    process = start(settings, tmp_path / "first", "sweep")
    deadline = time.monotonic() + 240
    try:
        while not rows():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no trial ended"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    before = rows()
    assert 1 <= len(before) < 3
    assert f"{len(before)} have ended before" in finish(settings, tmp_path / "second", "sweep")
    after = bucket.objects()
    assert {name: after[name] for name in before} == before and len(rows()) == 3
    left = {name.split("/")[2] for name in after if name.startswith("sweep/")}
    assert {"trials.parquet", "best.yaml", "parallel.svg", "promoted.json"} <= left
    # A third machine trains nothing, and goes on from the best one's student.
    output = finish(settings, tmp_path / "third", "sweep")
    assert "3 have ended before" in output and "side by side" not in output
    [best] = (tmp_path / "third").rglob("best.yaml")
    assert "distill unchanged since" in finish(settings, tmp_path / "third", "evaluate", "-c", str(best))


def test_what_is_cut_off_does_not_show_in_a_bucket(bucket: Bucket, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FACULTY_CACHE", str(tmp_path / "cache"))
    mirror = Mirror(bucket.uri, local_place(bucket.uri))
    path = mirror.local / "spoken/x/spoken.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(12 * 2**20))  # two pieces, and more than one part of an upload
    (path.parent / "done.json").write_text("{}")
    read = Path.open

    class Interrupts:
        def __init__(self, file: Any) -> None:
            self.file, self.pieces = file, 0

        def read(self, size: int) -> bytes:
            self.pieces += 1
            if self.pieces == 2:
                raise KeyboardInterrupt
            return self.file.read(size)

        def __enter__(self) -> Interrupts:
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda self, *a, **k: Interrupts(read(self, *a, **k)) if self == path else read(self, *a, **k)
        )
        with pytest.raises(KeyboardInterrupt):
            mirror.push()
    assert bucket.objects() == {}
    mirror.push()
    assert set(bucket.objects()) == {"spoken/x/spoken.safetensors", "spoken/x/done.json"}
    monkeypatch.setenv("FACULTY_CACHE", str(tmp_path / "other"))
    other = Mirror(bucket.uri, local_place(bucket.uri))
    assert other.local != mirror.local
    assert other.ensure("spoken/x/spoken.safetensors").read_bytes() == path.read_bytes()
    # Checkpoints lie beside, in a store of their own.
    store = CheckpointStore(f"s3://faculty/{PREFIX}/ray{bucket.options}", "run")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/a").write_text("a")
    saved = store.save(tmp_path / "state", {"step": 1}, 0)
    assert store.newest() == saved
    assert store.path(saved.name) == f"s3://faculty/{PREFIX}/ray/run/{saved.name}{bucket.options}"
    assert CheckpointStore.at(store.uri).manifests().keys() == {saved.name}
    assert f"ray/run/{saved.name}/{MANIFEST}" in bucket.objects()
    assert isinstance(store.filesystem, fs.S3FileSystem)
    assert not any(name.startswith("ray") for name in other.listed(""))

"""The MLflow callback in real Ray Train runs that know nothing else of this package."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import ray.train
from mlflow.tracking import MlflowClient
from ray.train import Checkpoint, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.cluster.mlflow_callback import MlflowCallback, mlflow_callbacks, reduced, throughput

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray Data, among its own modules
]


def loop(config):
    """Report five epochs with a checkpoint each; break after the third, the first time."""
    rank = ray.train.get_context().get_world_rank()
    saved, start = ray.train.get_checkpoint(), 0
    if saved is not None:
        with saved.as_directory() as folder:
            start = int((Path(folder) / "epoch").read_text())
    for epoch in range(start + 1, 6):
        metrics = {"epoch": epoch, "loss": 1 / epoch + rank, "images": 10 + rank, "note": "text", "tokens": 3}
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                (Path(folder) / "epoch").write_text(str(epoch))
            ray.train.report(metrics, checkpoint=Checkpoint(folder) if rank == 0 else None)
        if epoch == 3 and not Path(config["flag"]).exists():
            if rank == 0:
                Path(config["flag"]).touch()
            raise ValueError("on purpose")


def fit(folder: Path, **named: object) -> None:
    DataParallelTrainer(
        loop,
        train_loop_config={"flag": str(folder / "flag"), "lr": 0.1},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="birds",
            storage_path=str(folder / "storage"),
            callbacks=mlflow_callbacks(
                f"sqlite:///{folder}/mlflow.db", summed=["tokens"], tags={"team": "a"}, load_every_s=0.01, **named
            ),
        ),
    ).fit()


@pytest.mark.usefixtures("cluster")
def test_a_run_is_recorded_from_its_start_over_a_failure_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError):
        fit(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("ray-train")
    assert experiment is not None
    (failed,) = client.search_runs([experiment.experiment_id])
    assert failed.info.status == "FAILED"
    assert "on purpose" in failed.data.tags["faculty.error"]
    assert any("on purpose" in text for name, text in failed.data.tags.items() if name.startswith("exception."))

    fit(tmp_path)  # Ray Train goes on from its third checkpoint, and so does the record
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")
    assert "faculty.error" not in run.data.tags
    assert run.data.tags["team"] == "a"
    assert (run.data.params["loop.lr"], run.data.params["workers"]) == ("0.1", "2")
    for name, shift in (("loss", 0.5), ("loss/min", 0.0), ("loss/max", 1.0)):
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((point.step, point.value) for point in history) == [
            (epoch, pytest.approx(1 / epoch + shift)) for epoch in range(1, 6)
        ]
    assert run.data.metrics["tokens"] == 6
    assert run.data.metrics["images_per_second"] == pytest.approx(21 / run.data.metrics["seconds_per_report"])
    assert any(name.startswith("system/") and name.endswith("/memory_mb") for name in run.data.metrics)
    assert "note" not in run.data.metrics
    kept = json.loads(Path(client.download_artifacts(run.info.run_id, "checkpoints.json", str(tmp_path))).read_text())
    assert [entry["step"] for entry in kept][-2:] == [4, 5]
    assert kept[-1]["files"]["epoch"]["sha256"] == hashlib.sha256(b"5").hexdigest()
    assert Path(kept[-1]["path"], "epoch").read_text() == "5"
    assert not (tmp_path / "storage" / "birds" / "tracking-journal").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_checkpoints_may_be_uploaded(tmp_path: Path) -> None:
    (tmp_path / "flag").touch()
    fit(tmp_path, checkpoints="artifact")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("ray-train")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    stored = client.download_artifacts(run.info.run_id, "checkpoints", str(tmp_path))
    assert {path.parent.name: path.read_text() for path in Path(stored).glob("*/epoch")} == {
        f"step_{epoch}": str(epoch) for epoch in range(1, 6)
    }


def test_ranks_are_brought_together() -> None:
    ranks = [{"loss": 1.0, "epoch": 2, "tokens": 3}, {"loss": 3.0, "epoch": 2, "tokens": 4, "text": "x", "flag": True}]
    assert reduced(ranks, ["tokens"]) == {"loss": 2.0, "loss/min": 1.0, "loss/max": 3.0, "epoch": 2.0, "tokens": 7.0}
    assert reduced([]) == {}
    assert throughput(ranks, ["tokens", "images"], 2.0) == {"seconds_per_report": 2.0, "tokens_per_second": 3.5}


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="checkpoints must be"):
        MlflowCallback(checkpoints="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load_every_s must be"):
        MlflowCallback(load_every_s=0)

"""What is sent with a cluster job: its command, what travels, what does not, and no credentials. No Ray cluster."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipeline.errors import ConfigError, UserError
from pipeline.remote.request import STAGES, Options, make_request
from tests.tiny import make_settings, make_zoo

SECRET = "sentinel-4c1d"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with settings, a zoo of one teacher and images, which is the current folder."""
    folder = tmp_path / "my project"
    folder.mkdir()
    make_zoo(folder, ("untrained",))
    (folder / "shapes.npz").write_bytes(b"not looked into")
    make_settings(folder, run_dir="/shared/run", cluster={"num_cpus": 2})
    for name in ("MLFLOW_TRACKING_URI", "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def request_of(*overrides: str, config: tuple[str, ...] = ("run.yaml",), **options):
    return make_request([Path(name) for name in config], overrides, Options(**options))[0]


def refused(*overrides: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        request_of(*overrides, **options)
    return str(caught.value)


def change(folder: Path, **changes: object) -> None:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes), encoding="utf-8")


def test_the_stages_are_those_of_the_pipeline() -> None:
    from pipeline.stages.run import STAGES as KNOWN

    assert set(STAGES) == {"run", "sweep"} | {stage.name for stage in KNOWN}
    assert all(find_spec(f"jobs.{stage}") for stage in STAGES)


def test_the_shell_reads_back_what_was_given(world: Path) -> None:
    (world / "an overlay.yaml").write_text("seed: 3\n")
    given = ["distill.objective.dkd={weight: 0.5, rise: 0.1}", "zoo.only=['untrained']", "register.name=it's-$HOME"]
    made = request_of(*given, config=("run.yaml", "an overlay.yaml"), stage="assess", verbose=True)
    words = shlex.split(made.entrypoint)
    assert words[:3] == ["python", "-m", "jobs.assess"]
    assert words[3:8] == ["-c", "run.yaml", "-c", "an overlay.yaml", "-v"]
    assert words[8:] == [*given, "cluster.address=auto"]


def test_a_run_always_uses_the_cluster_that_its_job_is_on(world: Path) -> None:
    change(world, cluster={"address": "ray://elsewhere:10001"})
    words = shlex.split(request_of("cluster.address=null", "seed=4").entrypoint)
    assert [word for word in words if word.startswith("cluster.address")] == ["cluster.address=auto"]
    assert words[-2:] == ["seed=4", "cluster.address=auto"]


def test_settings_are_checked_before_anything_is_sent(world: Path) -> None:
    assert "did you mean `epochs`" in refused("distill.loop.epoch=3")
    assert "missing.yaml: can't be read" in refused(config=("missing.yaml",))
    assert "--stage asess: is none of run, sweep, ingest" in refused(stage="asess")
    assert "there is no such folder" in refused(working_dir=Path("nowhere"))


def test_a_settings_file_outside_of_the_folder_does_not_travel(world: Path) -> None:
    (world.parent / "other.yaml").write_text("seed: 3\n")
    message = refused(config=("run.yaml", "../other.yaml"))
    assert "../other.yaml: lies outside of the working folder" in message
    assert "--working-dir" in message


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/data/shapes.npz", "name its folder with --shared"),
        ("../shapes.npz", "relative path, which leads nowhere"),
        ("lost.npz", "task.source.path: lost.npz is not in the working folder"),
    ],
)
def test_images_that_the_job_would_not_find_are_refused(world: Path, place: str, said: str) -> None:
    task = yaml.safe_load((world / "run.yaml").read_text())["task"]
    change(world, task=task | {"source": {"type": "numpy", "path": place}})
    message = refused()
    assert message.startswith("task.source.path: ")
    assert said in message
    assert "\n" not in message
    assert "faculty-submit" not in message  # no name that the user has not given


def test_an_absolute_path_into_the_folder_is_another_one_there(world: Path) -> None:
    message = refused(f"task.source.path={world}/shapes.npz")
    assert "write the path relative to its file" in message


def test_shared_folders_buckets_and_globs_are_fine(world: Path) -> None:
    assert "--shared" in refused("task.source.path=/data/sets/shapes.npz")
    request_of("task.source.path=/data/sets/shapes.npz", shared=[Path("/data")])
    request_of("task.source={type: parquet, path: 's3://bucket/shapes/*.parquet'}")
    (world / "sets").mkdir()
    (world / "sets" / "a.parquet").touch()
    request_of("task.source={type: parquet, path: 'sets/*.parquet'}")
    assert "names is not in the working folder" in refused("task.source={type: parquet, path: 'names/*.parquet'}")


def test_what_is_left_out_does_not_travel(world: Path) -> None:
    (world / ".gitignore").write_text("*.npz\n")
    message = refused()
    assert message.startswith("task.source.path: shapes.npz is left out when the working folder is packed")
    (world / ".gitignore").write_text("*.log\n")
    request_of()
    (world / "env.yaml").write_text("excludes: [teachers]\n")
    message = refused(runtime_env=Path("env.yaml"))
    assert message.startswith("zoo.yaml: teacher 'untrained': source.path: teachers/untrained.safetensors is left out")


def test_teachers_outside_of_the_folder_are_named(world: Path) -> None:
    zoo = yaml.safe_load((world / "zoo.yaml").read_text())
    zoo["teachers"][0]["source"]["path"] = "/home/me/weights.safetensors"
    (world / "zoo.yaml").write_text(yaml.safe_dump(zoo))
    message = refused()
    assert message.startswith("zoo.yaml: teacher 'untrained': source.path: /home/me/weights.safetensors lies outside")
    request_of(shared=[Path("/home/me")])


def test_a_teacher_whose_file_is_missing_is_left_to_the_run(world: Path) -> None:
    (world / "teachers" / "untrained.safetensors").unlink()
    request_of()


@pytest.mark.parametrize(
    "override",
    ["run_dir=runs/mine", "cache.path=cache", "tracking.uri=sqlite:///mlflow.db", "tracking.artifacts=models"],
)
def test_what_would_go_with_the_job_s_copy_is_refused(world: Path, override: str) -> None:
    message = refused(override)
    assert message.startswith(f"{override.partition('=')[0]}: ")
    assert "deleted when the job has ended" in message


def test_credentials_stay_out_of_the_command(world: Path) -> None:
    message = refused(f"tracking.uri=http://me:{SECRET}@host:5000")
    assert SECRET not in message
    assert "--env" in message


def test_variables_travel_by_name_and_are_never_shown(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    made = request_of(env=["MLFLOW_TRACKING_PASSWORD"])
    assert made.runtime_env["env_vars"]["MLFLOW_TRACKING_PASSWORD"] == SECRET
    assert SECRET not in repr(made)
    assert SECRET not in json.dumps(made.metadata) + made.entrypoint
    assert "is not set here" in refused(env=["NOT_SET_ANYWHERE"])
    message = refused(env=[f"PASSWORD={SECRET}"])
    assert "give the name alone" in message
    assert SECRET not in message


def test_a_job_has_time_to_end_unless_the_file_says_otherwise(world: Path) -> None:
    assert request_of().runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    (world / "conf").mkdir()
    text = "excludes: [big]\nenv_vars: {RAY_JOB_STOP_WAIT_TIME_S: '5', A: b}\npip: [einops]\n"
    (world / "conf" / "runtime_env.yaml").write_text(text)
    assert request_of().runtime_env == {
        "excludes": ["big"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "5", "A": "b"},
        "pip": ["einops"],
        "working_dir": str(world),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "must hold a mapping"),
        ("working_dir: .\n", "--working-dir"),
        ("excludes: runs\n", "list of patterns"),
        ("env_vars: {A: 1}\n", "put numbers in quotes"),
    ],
)
def test_a_runtime_environment_of_another_form_is_refused(world: Path, text: str, said: str) -> None:
    (world / "env.yaml").write_text(text)
    message = refused(runtime_env=Path("env.yaml"))
    assert message.startswith("env.yaml: ")
    assert said in message


def test_a_folder_that_no_cluster_takes_is_refused_by_name(world: Path) -> None:
    with (world / "movie.bin").open("wb") as handle:
        handle.truncate(2**30)
    message = refused()
    assert "movie.bin 1024 MiB" in message
    assert "excludes" in message


def test_what_a_job_says_of_itself(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = request_of(stage="assess").metadata
    assert said["faculty.run"] == "tiny"
    assert said["faculty.stage"] == "assess"
    assert said["faculty.run_dir"] == "/shared/run"
    assert request_of("seed=9").metadata["faculty.settings"] != said["faculty.settings"]
    world.rename(tmp_path / "moved")  # the same project elsewhere is the same job
    monkeypatch.chdir(tmp_path / "moved")
    assert request_of().metadata["faculty.settings"] == said["faculty.settings"]


def test_the_demo_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    made, folder = make_request([Path("conf/demo/run.yaml")], ["run_dir=/shared/demo"], Options())
    assert folder.holds("conf/demo/data")
    assert folder.holds("pipeline/cluster/jobs.py")
    assert not [name for name in folder.files if name.startswith((".git/", ".venv/", "runs/"))]
    assert made.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    with pytest.raises(ConfigError, match="run_dir: runs/demo is relative"):
        make_request([Path("conf/demo/run.yaml")], [], Options())

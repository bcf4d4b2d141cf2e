"""The files for clusters, as far as they can be checked without one: schemas, names, versions, commands, settings."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import json
import mmap
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from pipeline.settings_files import load_settings

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "conf" / "cluster"
IN_IMAGE = "/home/ray/faculty/"
PACKAGES = Path(ray.__file__).parents[1]


@cache
def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def rayjob() -> dict[str, Any]:
    return parsed("conf/cluster/rayjob.yaml")


def compose() -> dict[str, Any]:
    return parsed("docker-compose.yaml")


def pods() -> Iterator[dict[str, Any]]:
    cluster = rayjob()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def locked(package: str, lock: str = "requirements.lock") -> str:
    text = (ROOT / lock).read_text(encoding="utf-8")
    return re.search(rf"^{re.escape(package)}==([^\s;]+)", text, re.MULTILINE)[1]


def instructions() -> list[tuple[str, list[str]]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("#")[0].split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    return [(words[0], words[1:]) for words in lines]


# --- the RayJob ---


def test_the_rayjob_has_the_fields_that_the_operator_knows() -> None:
    schema = yaml.safe_load((Path(__file__).parent / "rayjob.schema.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(rayjob())
    wrong = yaml.safe_load(yaml.safe_dump(rayjob()))
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.Draft202012Validator(schema).validate(wrong)


def test_the_rayjob_s_pods_can_be_scheduled_and_see_the_same_volume() -> None:
    claim = parsed("conf/cluster/shared_volume.yaml")
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
        assert not volumes, "a volume that nobody mounts"
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_gpus_are_on_spot_workers_alone_and_go_to_none() -> None:
    cluster = rayjob()["spec"]["rayClusterSpec"]
    head, worker = pods()
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (group,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    assert rayjob()["spec"]["shutdownAfterJobFinishes"]


def test_a_worker_has_the_time_to_leave_that_its_commands_take() -> None:
    _, worker = pods()
    *_, script = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, sleep = (shlex.split(part) for part in script.split(";"))
    deadline = int(drain[drain.index("--deadline-remaining-seconds") + 1])
    assert int(sleep[1]) < deadline < worker["terminationGracePeriodSeconds"]


def test_no_ray_is_open_to_whoever_reaches_it() -> None:
    assert rayjob()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for name in ("head", "worker"):
        environment = compose()["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_the_rayjob_s_credentials_come_from_secrets() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        assert "env" not in container
        assert {entry["secretRef"]["name"] for entry in container["envFrom"]} == {"faculty-mlflow", "faculty-s3"}


# --- the launcher ---


def test_ray_up_is_accepted_by_the_installed_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray_up.yaml").read_text(encoding="utf-8"))
    prepared = prepare_config(config)
    validate_config(prepared)
    workers = prepared["available_node_types"]["spot_gpu"]
    assert (workers["min_workers"], workers["max_workers"]) == (0, prepared["max_workers"])
    assert workers["resources"]["GPU"] >= 1
    assert prepared["available_node_types"][prepared["head_node_type"]]["resources"] == {"CPU": 0}
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepared | {"setup_command": []})


def test_ray_up_s_machines_are_what_ec2_takes() -> None:
    import botocore.loaders
    import botocore.model
    import botocore.validate
    from ray.autoscaler._private.aws.config import DEFAULT_AMI

    config = parsed("conf/cluster/ray_up.yaml")
    assert config["provider"]["region"] in DEFAULT_AMI  # which has Docker and the GPU's driver
    service = botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("ec2", "service-2"))
    shape = service.operation_model("RunInstances").input_shape
    for kind in config["available_node_types"].values():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()
    market = config["available_node_types"]["spot_gpu"]["node_config"]["InstanceMarketOptions"]
    assert market["MarketType"] in service.shape_for("MarketType").enum


# --- the images ---


def test_every_image_holds_the_locked_ray_and_python() -> None:
    arguments = dict(words[0].split("=") for name, words in instructions() if name == "ARG" and "=" in words[0])
    base = next(words[0] for name, words in instructions() if name == "FROM" and words[0].startswith("rayproject/ray"))
    python = re.search(r"python_version: \"(\d)\.(\d+)\"", (ROOT / "pyproject.toml").read_text().replace(" = ", ": "))
    assert arguments["RAY_VERSION"] == locked("ray") == rayjob()["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"-py{python[1]}{python[2]}-" in base
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"UV_VERSION := {arguments['UV_VERSION']}" in makefile
    built = {
        (service["image"], service["build"]["target"])
        for service in compose()["services"].values()
        if "build" in service
    }
    stages = {words[2]: words[0] for name, words in instructions() if name == "FROM"}
    assert built == {("faculty:cpu", "faculty"), ("faculty:mlflow", "mlflow")}
    assert {target for _, target in built} == set(stages)
    assert stages["mlflow"].startswith(f"python:{python[1]}.{python[2]}-")
    assert list(stages)[-1] == "faculty"  # what `docker build .` makes


def test_the_tracking_server_is_the_one_that_is_tested() -> None:
    lock = "conf/cluster/mlflow.lock"
    text = (ROOT / lock).read_text(encoding="utf-8")
    names = re.findall(r"^([a-z0-9][\w.-]*)==", text, re.MULTILINE)
    shared = [
        name
        for name in names
        if re.search(rf"^{re.escape(name)}==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    ]
    assert {"mlflow", "boto3"} <= set(shared)
    assert {name: locked(name, lock) for name in shared} == {name: locked(name) for name in shared}
    assert "psycopg2-binary" in names
    assert text.count("--hash=sha256:") >= len(names)
    assert "://" not in text
    wanted = [line for line in (CLUSTER / "mlflow.in").read_text().splitlines() if line and line[0] != "#"]
    assert set(wanted) <= set(names)


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the tree out: its last pattern that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!").removeprefix("**/")
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        if any(fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(Path(part).name, pattern) for part in parents):
            out = not line.startswith("!")
    return out


def test_what_the_images_copy_is_there_and_not_ignored() -> None:
    copied = [
        word for name, words in instructions() if name == "COPY" for word in words[:-1] if not word.startswith("--")
    ]
    assert {"requirements.lock", "pipeline", "jobs", "conf"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    assert ignored(".env")
    assert ignored("runs/demo")
    assert ignored("tests")


# --- the names of variables ---


def sources(*patterns: str) -> str:
    paths = [path for pattern in patterns for path in sorted(PACKAGES.glob(pattern))]
    assert paths, patterns
    return "\n".join(path.read_bytes().decode("utf-8", "ignore") for path in paths)


# Where the reader of a variable is looked for. The images of PostgreSQL and MinIO are not installed here; their names
# are from their documentation.
READERS = {
    "MLFLOW_": ("mlflow/environment_variables.py", "mlflow/cli/__init__.py", "mlflow/utils/cli_args.py"),
    "AWS_": ("botocore/configprovider.py", "botocore/credentials.py"),
    "RAY_": (
        "ray/_private/ray_constants.py",
        "ray/autoscaler/_private/constants.py",
        "ray/autoscaler/_private/command_runner.py",
        "ray/autoscaler/_private/util.py",
        "ray/dashboard/modules/job/*.py",
        "ray/_private/authentication/*.py",
    ),
}
ELSEWHERE = {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB", "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"}
PYTHON = {"PYTHONUNBUFFERED"}


def variables() -> set[str]:
    found: set[str] = set()
    for service in compose()["services"].values():
        found |= set(service.get("environment", {}))
    found |= set(parsed("conf/runtime_env.yaml")["env_vars"])
    texts = [
        (CLUSTER / name).read_text(encoding="utf-8") for name in ("rayjob.yaml", "ray_up.yaml", "shared_volume.yaml")
    ]
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for text in (*texts, guide):
        found |= set(re.findall(r"\b(?:MLFLOW|AWS|RAY)_[A-Z][A-Z0-9_]+\b", text))
    return found


def test_every_variable_has_somebody_who_reads_it() -> None:
    names = variables()
    assert {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID"} <= names
    told = {prefix: sources(*paths) for prefix, paths in READERS.items()}
    for name in sorted(names - ELSEWHERE - PYTHON):
        prefix = next((prefix for prefix in READERS if name.startswith(prefix)), None)
        assert prefix is not None, f"{name}: nobody is known to read it"
        known = re.search(rf"\b{name}\b", told[prefix]) or (prefix == "RAY_" and in_library("ray/_raylet.so", name))
        assert known, f"{name} is in none of {READERS[prefix]}"


def in_library(path: str, name: str) -> bool:
    with open(PACKAGES / path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def test_arrow_reads_the_same_names_for_buckets() -> None:
    library = next(path for path in (PACKAGES / "pyarrow").iterdir() if path.name.startswith("libarrow.so"))
    for name in {name for name in compose()["services"]["head"]["environment"] if name.startswith("AWS_")}:
        assert in_library(f"pyarrow/{library.name}", name)


# --- commands and settings ---


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield where and the words of every command that the files run or tell to run."""
    yield "rayjob.yaml", shlex.split(rayjob()["spec"]["entrypoint"])
    *_, script = list(pods())[1]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    yield "rayjob.yaml", shlex.split(script.split(";")[0])
    up = parsed("conf/cluster/ray_up.yaml")
    for text in (*up["head_start_ray_commands"], *up["worker_start_ray_commands"]):
        for part in text.split(";"):
            yield "ray_up.yaml", shlex.split(part)
    for name in ("head", "worker"):
        yield (
            "docker-compose.yaml",
            shlex.split(re.sub(r"\$\{\w+:-(\w+)\}", r"\1", compose()["services"][name]["command"])),
        )
    for name in ("docker-compose.yaml", *(f"conf/cluster/{path.name}" for path in CLUSTER.glob("*.yaml"))):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            told = re.match(r"#   (?:docker compose exec head )?(faculty .*|ray .*)", line)
            if told:
                yield name, shlex.split(told[1].rstrip("& "), comments=True)


def test_every_ray_command_has_the_options_that_are_given() -> None:
    from ray.scripts.scripts import cli

    seen = set()
    for where, words in commands():
        if words[0] != "ray":
            continue
        command = cli.commands[words[1]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[2:]:
            if word.startswith("--"):
                assert word.split("=")[0] in options, (where, word)
        for parameter in command.params:
            given = next(
                (word for word, after in zip(words, [*words[1:], ""], strict=True) if word in parameter.opts), None
            )
            choices = getattr(parameter.type, "choices", None)
            if given and choices:
                assert words[words.index(given) + 1] in choices
        seen.add(words[1])
    assert {"start", "stop", "drain-node", "up", "down", "dashboard"} <= seen


def test_every_faculty_command_exists_and_its_files_are_there() -> None:
    import typer

    from jobs.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for where, words in commands():
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), (where, words[2])
            assert words[2].removeprefix("jobs.") in known
        elif words[0] == "faculty":
            assert words[1] in known, (where, words)
            options = {option for parameter in known[words[1]].params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= options, (where, words)
        else:
            continue
        seen += 1
        for given, path in itertools.pairwise(words):
            if given == "-c" and path != "run.yaml":  # which is the reader's own
                assert (ROOT / path.removeprefix(IN_IMAGE)).is_file(), (where, path)
    assert seen >= 4


@pytest.mark.parametrize("where", ["rayjob.yaml", "docker-compose.yaml"])
def test_the_demo_s_settings_are_valid_as_the_file_runs_them(where: str) -> None:
    words = next(words for name, words in commands() if name == where and "conf/demo/run.yaml" in " ".join(words))
    files = [ROOT / path.removeprefix(IN_IMAGE) for given, path in itertools.pairwise(words) if given == "-c"]
    settings = load_settings(files, [word for word in words if "=" in word and not word.startswith("-")])
    assert settings.cluster.address == "auto"
    assert settings.run_dir.startswith("/shared/")


def test_a_worker_s_share_fits_the_nodes() -> None:
    settings = load_settings([ROOT / "conf/demo/run.yaml", CLUSTER / "spot.yaml"])
    assert settings.cluster.autoscaling
    node = list(pods())[1]["containers"][0]["resources"]["limits"]
    launched = parsed("conf/cluster/ray_up.yaml")["available_node_types"]["spot_gpu"]["resources"]
    for cpus, gpus in ((int(node["cpu"]), int(node["nvidia.com/gpu"])), (launched["CPU"], launched["GPU"])):
        for asked in (settings.assess.resources, settings.amalgamate.resources):
            assert asked.cpus <= cpus * min(1, asked.gpus / gpus)  # as many teachers as share its GPU
        assert settings.distill.resources.cpus_per_worker <= cpus
        assert settings.distill.resources.gpus_per_worker <= gpus


# --- compose ---


def test_compose_holds_together() -> None:
    found = compose()
    services = found["services"]
    assert {"head", "worker", "mlflow", "postgres", "minio"} <= set(services)
    volumes = set()
    for name, service in services.items():
        assert "image" in service, name
        assert ":" in service["image"] and not service["image"].endswith(":latest"), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), (name, port)
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[other]["healthcheck"]["test"][0] == "CMD", (name, other)
            else:
                assert how["condition"] == "service_completed_successfully"
                assert "restart" not in services[other]
        volumes |= {mount.split(":")[0] for mount in service.get("volumes", ())}
    assert volumes == set(found["volumes"])
    assert services["worker"]["deploy"]["replicas"] == 2
    for name in ("head", "worker"):
        assert services[name]["volumes"] == ["shared:/shared"]


def test_compose_s_services_find_each_other() -> None:
    services = compose()["services"]
    text = (ROOT / "docker-compose.yaml").read_text(encoding="utf-8")
    for host, port in re.findall(r"(?:https?://|@|address=)([a-z]+):(\d+)", text):
        assert host in services, host
        assert port in {"5000", "5432", "6379", "9000"}
    allowed = services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert services["head"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://") in allowed
    destination = services["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"]
    made = re.search(r"mc mb --ignore-existing (.*)$", services["buckets"]["command"][0])[1].split()
    assert destination.replace("s3://", "store/") in made


def test_compose_s_credentials_are_in_no_file() -> None:
    text = (ROOT / "docker-compose.yaml").read_text(encoding="utf-8")
    example = dict(
        line.split("=") for line in (ROOT / ".env.example").read_text().splitlines() if line and line[0] != "#"
    )
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(example)
    for name in asked:
        secret = name != "WORKER_CPUS"
        assert (example[name] == "") == secret, name
        if secret:
            assert re.findall(rf"\$\{{{name}(\S*)", text) == [":?set"] * len(re.findall(rf"\$\{{{name}", text))
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY|TOKEN", name):
                assert value.startswith("${"), name


def test_the_files_say_where_they_are_told_of() -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for name in (
        "conf/cluster/rayjob.yaml",
        "conf/cluster/ray_up.yaml",
        "conf/cluster/shared_volume.yaml",
        "docker-compose.yaml",
    ):
        assert (ROOT / name).is_file()
        assert name in guide
    assert json.dumps(parsed("conf/cluster/shared_volume.yaml"))  # plain values alone

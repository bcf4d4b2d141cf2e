"""Models of a registry: downloaded by alias or version, described, and loaded without unpickling anything."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pipeline.errors import TeacherError
from pipeline.models.archive import load_program
from pipeline.models.description import Description, read_description
from pipeline.models.factories import Refused
from pipeline.models.files import file_sha256
from pipeline.models.sources import Fetched
from pipeline.tracking.quiet import environment, prepare
from pipeline.tracking.redact import one_line, redact


def download_model(
    uri: str, *, tracking_uri: str | None = None, folder: str | Path | None = None, only: str | None = None
) -> Path:
    """Bring a logged model to this machine.

    Parameters
    ----------
    uri : str
        ``models:/name@alias``, ``models:/name/version``, ``models:/<model id>``, or the folder of a logged model.
    tracking_uri : str, optional
        Where it is registered; default: the environment's ``MLFLOW_TRACKING_URI``.
    folder : str or Path, optional
        Where to; default: a new temporary folder.
    only : str, optional
        Bring this one of its files alone.

    Returns
    -------
    Path
        The folder that holds the ``MLmodel`` file, or the one file that was asked for.

    Raises
    ------
    TeacherError
        When there is no such model or it can't be downloaded.
    """
    prepare()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if uri.startswith("models:") and not store:
        # Without a store MLflow would make a database of its own in the working folder and look there.
        raise TeacherError(f"the model {redact(uri)} can't be loaded: set `tracking.uri` or MLFLOW_TRACKING_URI")
    target = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="faculty-model-"))
    target.mkdir(parents=True, exist_ok=True)
    try:
        where = location(uri, store) if uri.startswith("models:") else uri
        path = Path(
            download_artifacts(
                artifact_uri=where if only is None else f"{where.rstrip('/')}/{only}",
                dst_path=str(target),
                tracking_uri=store or None,
                registry_uri=store or None,
            )
        )
    except (MlflowException, OSError) as error:
        raise TeacherError(
            f"the model {redact(uri)} can't be loaded: {one_line(error)}; correct the teacher's `uri` or `tracking.uri`"
        ) from None
    if only is not None:
        return path.parent
    if not (path / "MLmodel").is_file():
        raise TeacherError(
            f"the model {redact(uri)} can't be loaded: there is no MLmodel file; correct the teacher's `uri`"
        )
    return path


def pinned(uri: str, tracking_uri: str | None = None) -> str:
    """Return the URI of the version that an alias names now; any other URI, and one that can't be resolved, as it is.

    What can't be resolved is told of when the model is loaded.
    """
    match = re.fullmatch(r"models:/+([^/@]+)@([^/@]+)", uri)
    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if match is None or not store:
        return uri
    prepare()
    from mlflow.tracking import MlflowClient

    try:
        version = MlflowClient(store, registry_uri=store).get_model_version_by_alias(match[1], match[2])
    except Exception:  # whatever a store, its driver or a network may do
        return uri
    return f"models:/{match[1]}/{version.version}"


def load_mlflow_module(
    uri: str, tracking_uri: str | None = None, *, allow_pickle: bool = False, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a registered PyTorch model as a module.

    Parameters
    ----------
    uri : str
        As of :func:`download_model`.
    tracking_uri : str, optional
        Where it is registered; default: the environment's ``MLFLOW_TRACKING_URI``.
    allow_pickle : bool
        Admit a model that was saved by pickle or brings code of its own. Either runs whatever its author put there.
    device : str or torch.device
        Where the module computes.

    Returns
    -------
    nn.Module
        Takes the inputs its author exported it for. Its mode is fixed: ``train`` and ``eval`` change nothing.

    Raises
    ------
    TeacherError
        When it does not exist, is no PyTorch model, is pickled although `allow_pickle` is not set, or does not load.
    """
    with tempfile.TemporaryDirectory(prefix="faculty-model-") as folder:
        path = download_model(uri, tracking_uri=tracking_uri, folder=folder)
        return _module(path, uri, allow_pickle, device)


def fetch_teacher(
    uri: str, tracking_uri: str | None = None, *, allow_pickle: bool = False, device: str | torch.device = "cpu"
) -> Fetched:
    """Load a registered model together with what it says of itself; as :func:`load_mlflow_module` otherwise."""
    with tempfile.TemporaryDirectory(prefix="faculty-model-") as folder:
        path = download_model(uri, tracking_uri=tracking_uri, folder=folder)
        net = _module(path, uri, allow_pickle, device)
        try:
            about = read_description(_mlmodel(path, uri), _tags(uri, tracking_uri))
        except Refused as error:
            raise TeacherError(f"the model {redact(uri)} can't be used: {error}") from None
        program = path / _pytorch_conf(path, uri)["model_data"] / "model.pt2"
        return Fetched(net, about, file_sha256(program) if program.is_file() else None)


def describe(uri: str, tracking_uri: str | None = None) -> Description:
    """Return what a registered model says of itself; of its files only ``MLmodel`` is read.

    Raises
    ------
    TeacherError
        When it does not exist, can't be read or is no PyTorch model.
    """
    with tempfile.TemporaryDirectory(prefix="faculty-model-") as folder:
        path = download_model(uri, tracking_uri=tracking_uri, folder=folder, only="MLmodel")
        try:
            return read_description(_mlmodel(path, uri), _tags(uri, tracking_uri))
        except Refused as error:
            raise TeacherError(f"the model {redact(uri)} can't be used: {error}") from None


def location(uri: str, store: str) -> str:
    """Resolve a ``models:/`` URI in a given store to where its files are; MLflow would ask the process's global one.

    Raises
    ------
    MlflowException
        When there is no such model.
    TeacherError
        When the URI names no version.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store, registry_uri=store)
    rest = uri.removeprefix("models:").strip("/")
    if match := re.fullmatch(r"([^/@]+)@([^/@]+)", rest):
        version = client.get_model_version_by_alias(match[1], match[2])
        return client.get_model_version_download_uri(version.name, str(version.version))
    if match := re.fullmatch(r"([^/@]+)/(\d+)", rest):
        return client.get_model_version_download_uri(match[1], match[2])
    if re.fullmatch(r"m-\w+", rest):
        return client.get_logged_model(rest).artifact_location
    raise TeacherError(
        f"{redact(uri)} names no version of a model; write models:/name@alias, models:/name/3 or models:/<model id>"
    )


def _module(path: Path, uri: str, allow_pickle: bool, device: str | torch.device) -> nn.Module:
    conf = _pytorch_conf(path, uri)
    exported = (path / conf["model_data"] / "model.pt2").is_file()
    if not allow_pickle and (not exported or conf.get("code")):
        form = "brings code of its own" if exported else "was saved by pickle"
        raise TeacherError(
            f"the model {redact(uri)} {form}, which runs whatever its author put there; log it with "
            "serialization_format='pt2' and without code_paths, or, if you trust it, name the teacher in "
            "`zoo.allow_pickle`"
        )
    if not exported:
        return _unpickle(path, uri).to(device).eval()
    try:
        return _FixedMode(load_program(path / conf["model_data"] / "model.pt2", device))
    except (ValueError, OSError) as error:
        raise TeacherError(f"the model {redact(uri)} can't be loaded: its program {error}") from None


def _tags(uri: str, tracking_uri: str | None) -> dict[str, str]:
    """Return the tags of the version that a URI names; {} of what is no version."""
    match = re.fullmatch(r"models:/+([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if match is None or not store:
        return {}
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client, (name, number, alias) = MlflowClient(store, registry_uri=store), match.groups()
    try:
        if number is not None:
            return dict(client.get_model_version(name, number).tags)
        return dict(client.get_model_version_by_alias(name, alias).tags)
    except MlflowException as error:
        raise TeacherError(f"the model {redact(uri)} can't be used: {one_line(error)}") from None


class _FixedMode(nn.Module):
    """A traced graph has the mode it was exported in; torch raises where one asks for another."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Any) -> Any:
        return self.graph(*inputs)

    def train(self, mode: bool = True) -> _FixedMode:
        return self


def _mlmodel(path: Path, uri: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load((path / "MLmodel").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise TeacherError(f"the model {redact(uri)} can't be loaded: its MLmodel file is damaged")
    return content


def _pytorch_conf(path: Path, uri: str) -> dict[str, Any]:
    try:
        conf = _mlmodel(path, uri)["flavors"]["pytorch"]
        return {**conf, "model_data": str(conf["model_data"])}
    except (KeyError, TypeError):
        raise TeacherError(f"the model {redact(uri)} is no PyTorch model of MLflow; a teacher must be one") from None


def _unpickle(path: Path, uri: str) -> nn.Module:
    import mlflow.pytorch

    try:
        with environment(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true"):
            return mlflow.pytorch.load_model(str(path), weights_only=False)
    except Exception as error:
        raise TeacherError(f"the model {redact(uri)} can't be loaded: {one_line(error)}") from None

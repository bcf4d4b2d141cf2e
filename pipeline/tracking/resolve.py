"""Teachers that live in a model registry: downloaded by alias and loaded without unpickling anything."""

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
from pipeline.tracking.quiet import environment, prepare
from pipeline.tracking.redact import redact


def download_model(uri: str, *, tracking_uri: str | None = None, folder: str | Path | None = None) -> Path:
    """Bring a logged model to this machine.

    Parameters
    ----------
    uri : str
        ``models:/name@alias``, ``models:/name/version``, ``models:/<model id>``, or the folder of a logged model.
    tracking_uri : str, optional
        Where it is registered; default: the environment's ``MLFLOW_TRACKING_URI``.
    folder : str or Path, optional
        Where to; default: a new temporary folder.

    Returns
    -------
    Path
        The folder that holds the ``MLmodel`` file.

    Raises
    ------
    TeacherError
        When there is no such model or it can't be downloaded.
    """
    prepare()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.mlflow import one_line

    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if uri.startswith("models:") and not store:
        # Without a store MLflow would make a database of its own in the working folder and look there.
        raise TeacherError(f"the model {redact(uri)} can't be loaded: set `tracking.uri` or MLFLOW_TRACKING_URI")
    target = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="faculty-model-"))
    target.mkdir(parents=True, exist_ok=True)
    try:
        path = Path(
            download_artifacts(
                artifact_uri=_location(uri, store) if uri.startswith("models:") else uri,
                dst_path=str(target),
                tracking_uri=store or None,
                registry_uri=store or None,
            )
        )
    except (MlflowException, OSError) as error:
        raise TeacherError(
            f"the model {redact(uri)} can't be loaded: {one_line(error)}; correct the teacher's `uri` or `tracking.uri`"
        ) from None
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
        conf = _pytorch_conf(path, uri)
        exported = (path / conf["model_data"] / "model.pt2").is_file()
        if not allow_pickle and (not exported or conf.get("code")):
            form = "brings code of its own" if exported else "was saved by pickle"
            raise TeacherError(
                f"the model {redact(uri)} {form}, which runs whatever its author put there; log it with "
                "serialization_format='pt2' and without code_paths, or set `allow_pickle` if you trust it"
            )
        if not exported:
            return _unpickle(path, uri).to(device).eval()
        try:
            return _FixedMode(load_program(path / conf["model_data"] / "model.pt2", device))
        except (ValueError, OSError) as error:
            raise TeacherError(f"the model {redact(uri)} can't be loaded: its program {error}") from None


def _location(uri: str, store: str) -> str:
    """Resolve a ``models:/`` URI in a given store; MLflow itself would ask the process's global one."""
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


class _FixedMode(nn.Module):
    """A traced graph has the mode it was exported in; torch raises where one asks for another."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Any) -> Any:
        return self.graph(*inputs)

    def train(self, mode: bool = True) -> _FixedMode:
        return self


def _pytorch_conf(path: Path, uri: str) -> dict[str, Any]:
    try:
        flavors = yaml.safe_load((path / "MLmodel").read_text(encoding="utf-8"))["flavors"]
        conf = flavors["pytorch"]
        return {**conf, "model_data": str(conf["model_data"])}
    except (yaml.YAMLError, KeyError, TypeError):
        raise TeacherError(f"the model {redact(uri)} is no PyTorch model of MLflow; a teacher must be one") from None


def _unpickle(path: Path, uri: str) -> nn.Module:
    import mlflow.pytorch

    from pipeline.tracking.mlflow import one_line

    try:
        with environment(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true"):
            return mlflow.pytorch.load_model(str(path), weights_only=False)
    except Exception as error:
        raise TeacherError(f"the model {redact(uri)} can't be loaded: {one_line(error)}") from None

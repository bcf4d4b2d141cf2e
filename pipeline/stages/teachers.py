"""Teachers on workers, and where what they say is kept: shared by the stages that run teachers over images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TrialResources
from pipeline.data.mirror import here, share
from pipeline.errors import ConfigError, StageError
from pipeline.models.spec import TeacherSpec
from pipeline.places import own
from pipeline.stages.base import Run
from pipeline.stages.ingest import table_path
from pipeline.stages.own import code_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.table import ImageTable
    from pipeline.models.teacher import Teacher
    from pipeline.transport.bridge import Bridge

_BRIDGE = "bridge.safetensors"


@dataclass(frozen=True)
class TeacherJob:
    """What travels to a worker that runs a teacher over images: references, never weights.

    Attributes
    ----------
    teacher : TeacherSpec
    table : str
        The image table.
    folder : str
        Where the result goes.
    trusted_factories : tuple of str
    tracking_uri : str or None
        Where teachers from an MLflow registry are.
    gpu : bool
        Whether it has a GPU, or a share of one.
    allow_pickle : bool
        Whether the settings admit this teacher by name although its registered model was saved by pickle.
    """

    teacher: TeacherSpec
    table: str
    folder: str
    trusted_factories: tuple[str, ...]
    tracking_uri: str | None
    gpu: bool
    allow_pickle: bool = False

    @classmethod
    def of(cls, run: Run, name: str, folder: Path, resources: TrialResources) -> TeacherJob:
        """Describe the job of one teacher of the run's zoo."""
        return cls(
            teacher=run.zoo[name],
            table=str(table_path(run)),
            folder=str(folder),
            trusted_factories=run.settings.zoo.trusted_factories,
            tracking_uri=run.tracking_uri,
            gpu=resources.gpus > 0,
            allow_pickle=name in run.settings.zoo.allow_pickle,
        )

    def load(self) -> Teacher:
        """Load the teacher; on the worker."""
        import torch

        from pipeline.models.sources import load_teacher

        device = "cuda" if self.gpu and torch.cuda.is_available() else "cpu"
        pickled = {getattr(self.teacher.source, "uri", "")} if self.allow_pickle else set()
        options = source_options(self.trusted_factories, self.tracking_uri, pickled, device)
        return load_teacher(self.teacher, device=device, **options)

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """Write the result, whole or not at all; on the worker."""
        save_tensors(Path(self.folder), name, tensors, about)


def load_options(run: Run) -> dict[str, Any]:
    """Return what `load_teacher` may use for the teachers of a run: code that is trusted, and MLflow."""
    zoo = run.settings.zoo
    pickled = {getattr(run.zoo[name].source, "uri", "") for name in zoo.allow_pickle if name in run.zoo}
    return source_options(zoo.trusted_factories, run.tracking_uri, pickled)


def source_options(
    trusted_factories: tuple[str, ...], tracking_uri: str | None, pickled: Collection[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """Return what `load_teacher` may use.

    Parameters
    ----------
    trusted_factories : tuple of str
        Prefixes of the modules that code may come from.
    tracking_uri : str or None
        Where MLflow is; None: the environment's.
    pickled : collection of str
        URIs of registered models that may be unpickled.
    device : str
        Where they compute.
    """

    def from_mlflow(uri: str) -> Any:
        from pipeline.tracking.resolve import fetch_teacher

        return fetch_teacher(uri, tracking_uri, allow_pickle=uri in pickled, device=device)

    return {"trusted_factories": trusted_factories, "resolvers": {"mlflow": from_mlflow}}


def table_of(run: Run) -> ImageTable:
    """Open the run's image table."""
    from pipeline.data.table import ImageTable

    return ImageTable.open(str(table_path(run)))


def save_tensors(
    folder: Path, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    content = {key: value.contiguous() for key, value in tensors.items()}
    with whole_file(folder, name) as path:
        save_file(content, path, metadata=dict(about or {}))


def stream_tensors(folder: Path, name: str, parts: Mapping[str, Sequence[Any]]) -> None:
    """Write a safetensors file from slices of others, one in memory at a time.

    Parameters
    ----------
    folder, name
        Of the file; it is written whole or not at all.
    parts : mapping of str to sequence of safetensors slice
        Tensors (V, n_k, …), which become one of (V · Σ n_k, …), view by view. Those of other types than the first are
        converted to the widest.
    """
    import json

    import torch

    types = {"F16": torch.float16, "F32": torch.float32}
    header, offset, shapes = {}, 0, {}
    for key, slices in parts.items():
        # Half precision where all of them have it.
        kind = max((one.get_dtype() for one in slices), key=lambda one: types[one].itemsize)
        first = slices[0].get_shape()
        shape = [first[0] * sum(one.get_shape()[1] for one in slices), *first[2:]]
        size = math.prod(shape) * types[kind].itemsize
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        shapes[key], offset = (first[0], types[kind]), offset + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(folder, name) as path, path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for key, slices in parts.items():
            views, dtype = shapes[key]
            for view in range(views):
                for one in slices:
                    handle.write(one[view].to(dtype).contiguous().view(torch.uint8).numpy().tobytes())


@contextlib.contextmanager
def whole_file(folder: Path, name: str) -> Iterator[Path]:
    """Give a path to write to, which takes its name when the block ends well, and is sent where others see it.

    Raises
    ------
    StageError
        When the folder's disk is full or may not be written; no part of the file stays.
    """
    from safetensors import SafetensorError

    folder = own(folder)
    path = folder / f".{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield path
        path.replace(folder / name)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise StageError(f"{folder / name}: can't be written ({error}); free room or mend its permissions") from error
    share(folder / name)


def teacher_folder(run: Run, name: str) -> Path:
    """Return where a teacher's assessment is kept: keyed by the teacher, the table and the settings that decide it."""
    return run.part("teachers", name, _inputs(run, name) | {"assess": decisive(run), "version": 3})


def outputs_folder(run: Run, name: str) -> Path:
    """Return where a teacher's logits and features are kept, whatever is made of them."""
    settings = run.settings.assess
    about: dict[str, Any] = {"precision": settings.precision}
    if not has_labels(run):
        about["unlabelled"] = settings.unlabelled
    return run.part("outputs", name, _inputs(run, name) | about)


def has_labels(run: Run) -> bool:
    """Return whether the task has labelled images to assess teachers on."""
    return run.settings.task.splits.probe > 0


def vectors_identity(run: Run) -> dict[str, str]:
    """Return the hash of the file of word vectors; empty without one."""
    from pipeline.models.files import file_sha256

    path = run.settings.assess.names.path
    try:
        return {} if path is None else {"vectors": file_sha256(path)}
    except OSError as error:
        raise ConfigError(f"assess.names.path: {path} can't be read ({error.strerror}); check the path") from None


def decisive(run: Run) -> dict[str, Any]:
    """Return the settings that a teacher's scores depend on: not how the search thins the zoo, nor the resources."""
    excluded = {"resources": True, "search": True, "reference": True, "names": True}
    return scoring(run, excluded) | vectors_identity(run)


def scoring(run: Run, excluded: Any) -> dict[str, Any]:
    """Return the settings of the assessment, and the code of the scores that are one's own."""
    found = run.settings.assess.model_dump(mode="json", exclude=excluded)
    named = found.pop("own")
    return found | {"own": named, "code": code_of(named)} if named else found


def kept(run: Run) -> dict[str, Any]:
    """Return how exactly outputs of teachers are kept, on which all that is made of them depends a little."""
    return {"precision": run.settings.cache.precision, "top_k": run.settings.cache.top_k}


def _inputs(run: Run, name: str) -> dict[str, Any]:
    return {"teacher": run.fingerprint(name), "table": run.records["ingest"].digest, "kept": kept(run)}


def save_bridge(job: TeacherJob, bridge: Bridge, carried: Mapping[str, Tensor]) -> None:
    """Keep a bridge, and what the teacher says of some splits, carried to the task's classes; on the worker."""
    tensors = {f"bridge.{name}": value for name, value in bridge.state().items()}
    job.save(_BRIDGE, tensors | dict(carried))


def load_bridge(folder: Path) -> Bridge:
    """Return the bridge of an assessed teacher, see `pipeline.transport.bridge`."""
    from safetensors.torch import load_file

    from pipeline.transport.bridge import Bridge

    tensors = load_file(here(folder / _BRIDGE))
    return Bridge.from_state({name[7:]: value for name, value in tensors.items() if name.startswith("bridge.")})


def carried(run: Run, name: str, split: str) -> Tensor:
    """Return what an assessed teacher says of a split, carried to the task's classes: (N, C_s) tensor."""
    from safetensors import safe_open

    with safe_open(here(teacher_folder(run, name) / _BRIDGE), "pt") as handle:
        return handle.get_tensor(split)

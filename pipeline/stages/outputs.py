"""What teachers say of images, through the cache that stages, runs and trials share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.config import Settings
from pipeline.places import cache_folder, is_remote
from pipeline.report.console import Display
from pipeline.stages.artefacts import digest_of
from pipeline.stages.base import Run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.cache.entry import Entry
    from pipeline.cache.spec import Precision
    from pipeline.data.spec import AugmentSpec
    from pipeline.models.teacher import Teacher

    _Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CLEAN = "clean"
_VERSION = 1  # raised when the same teacher says something else of the same image: preprocessing, views, features


@dataclass(frozen=True)
class CachedTeacher:
    """Where a teacher's outputs are kept, and under what name; travels to workers.

    Teachers whose weights are a file that was read, or whose hash the zoo declares, are known to all runs. Of one that
    a registry, a library or a factory gives by name, what it says is of use to its own run alone: the name may stand
    for something else elsewhere.

    Attributes
    ----------
    root : str
        The cache's folder.
    fingerprint : str
        Of the teacher: weights, architecture and preprocessing.
    precision : str
        Of what is kept, see `pipeline.cache.store.compact`.
    top_k : int or None
        Classes of which logits are kept.
    """

    root: str
    fingerprint: str
    precision: Precision
    top_k: int | None

    @classmethod
    def of(cls, run: Run, name: str) -> CachedTeacher:
        """Describe a teacher of the run's zoo."""
        settings, spec = run.settings.cache, run.zoo[name]
        fingerprint = run.fingerprint(name)
        if spec.sha256 is None and (spec.path is None or not Path(spec.path).exists()):
            fingerprint = f"{fingerprint} of {run.files.identity}"
        return cls(str(cache_root(run.settings)), fingerprint, settings.precision, settings.top_k)

    def entry(self, view: str, autocast: str) -> Entry:
        """Return the entry of one view, computed in one precision."""
        from pipeline.cache.store import OutputStore, output_key

        key = output_key(
            teacher=f"{self.fingerprint} version {_VERSION}",
            view=view,
            taps=("features",) if self.top_k is None else ("features", "lost"),
            autocast=autocast,
            precision=self.precision,
            top_k=self.top_k,
        )
        return OutputStore(Path(self.root)).entry(key)


@dataclass(frozen=True)
class Output:
    """What a teacher says of some images, as the cache gives it back.

    Attributes
    ----------
    logits : (n, C_t) float32 tensor
        Log-probabilities where only the largest are kept.
    features : (n, D) float32 tensor
    computed : int
        How many of the images the teacher had to be run over.
    seconds : float
        How long that took.
    note : str
        Why they could not be kept; "" where they were.
    lost : float
        Mean KL divergence of what is kept of the logits from what the teacher said [nats]; 0 where all are kept.
    """

    logits: torch.Tensor
    features: torch.Tensor
    computed: int
    seconds: float
    note: str = ""
    lost: float = 0.0


def cache_root(settings: Settings) -> Path:
    """Return the cache's folder: that of the settings, or one beside the runs; with these in a store, the node's."""
    given = settings.cache.path
    if not given and is_remote(settings.run_dir):
        return cache_folder() / "teacher-outputs"
    return (
        Path(given).expanduser().absolute() if given else Path(settings.run_dir).absolute().parent / ".teacher-outputs"
    )


def look_after(
    settings: Settings, *, verify: bool = False, as_json: bool = False, display: Display | None = None
) -> int:
    """Bring the cache within its quota and print what is in it; with `verify` read all of it first.

    Returns
    -------
    dropped : int
        Files that were not what had been written, and are deleted.
    """
    from pipeline.cache.store import OutputStore

    display = display or Display(Console(quiet=True) if as_json else None)
    store = OutputStore(cache_root(settings), settings.cache.quota_bytes)
    dropped = 0
    if verify:
        keys = store.keys()
        with display.bar("cache", len(keys), "entries") as advance:
            for key in keys:
                dropped += len(store.entry(key).verify())
                advance(1)
    evicted = store.evict()
    if as_json:
        told = {"path": str(store.root), "entries": len(store.keys()), "bytes": store.size(), "evicted": len(evicted)}
        print(json.dumps(told | {"quota_bytes": settings.cache.quota_bytes, "damaged": dropped if verify else None}))
    display.note(
        f"{store.root}: {len(store.keys())} entries (a view of a teacher each), {store.size() / 1e9:.2f} of "
        f"{settings.cache.quota_gb:g} GB; {len(evicted)} evicted"
        + (f", {dropped} damaged files deleted" if verify else "")
    )
    return dropped


def tidy_cache(run: Run) -> None:
    """Bring the cache within its quota: what was not used for the longest time goes first."""
    from pipeline.cache.store import CacheError, OutputStore

    try:
        OutputStore(cache_root(run.settings), run.settings.cache.quota_bytes).evict()
    except (CacheError, OSError) as error:  # someone else's files, say: no reason to end a run whose work is done
        run.display.warn(f"the cache of teacher outputs can't be tidied: {error}")


def tell_kept(run: Run, told: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Tell the user why outputs were not kept, and what was lost where only the largest logits are.

    Parameters
    ----------
    run : Run
    told : iterable of (str, mapping)
        Teachers, each with ``rows`` images and what `Output` says of them: ``note`` and ``lost``.
    """
    top_k, rows, lost = run.settings.cache.top_k, Counter[str](), Counter[str]()
    notes = set()
    for name, part in told:
        notes.add(part["note"])
        rows[name] += part["rows"]
        lost[name] += part["lost"] * part["rows"]
    for note in sorted(notes - {""}):
        run.display.warn(f"what teachers say is not kept for other runs: {note}")
    means = {name: lost[name] / count for name, count in rows.items() if count}
    if top_k is not None and means:
        worst = max(means, key=lambda name: means[name])
        run.display.note(
            f"cache.top_k={top_k}: an image's logits lose {sum(means.values()) / len(means):.2g} nats on average "
            f"(KL divergence), at most {means[worst]:.2g} ({worst})"
        )


def outputs_of(
    cached: CachedTeacher,
    teacher: Callable[[], Teacher],
    ids: np.ndarray,
    read: Callable[[torch.Tensor], torch.Tensor],
    *,
    view: str = CLEAN,
    batch_size: int,
    autocast: torch.dtype | None,
) -> Output:
    """Return what a teacher says of some images; run it over those alone of which nothing is kept.

    What comes back has gone through the cache's precision in any case, so that a result does not depend on what
    was kept, but for rounding. A cache that can't be read or written (a full disk) is done without.

    Parameters
    ----------
    cached : CachedTeacher
    teacher : callable
        Loads it, if need be.
    ids : (n, 16) uint8 array
        The images' sample ids.
    read : callable
        Given positions (m,), returns the images (m, C, H, W) in the view that is asked for.
    view : str
        What tells it from other views, see `view_name`.
    batch_size : int
    autocast : torch.dtype or None
        What the teacher computes in.
    """
    import time

    import numpy as np
    import torch

    from pipeline.cache.store import CacheError
    from pipeline.models.teacher import predict

    everything, seconds = torch.arange(len(ids)), 0.0

    def computed(rows: torch.Tensor) -> tuple[_Given, dict[str, torch.Tensor]]:
        nonlocal seconds
        net = teacher()
        began = time.perf_counter()
        said = predict(net, (read(part) for part in rows.split(batch_size)), autocast=autocast)
        seconds += time.perf_counter() - began
        kept = _stored(cached, said.logits, said.features)
        return _given(kept.__getitem__, said.logits.shape[1]), kept

    try:
        entry = cached.entry(view, "none" if autocast is None else str(autocast).removeprefix("torch."))
        missing = torch.from_numpy(entry.missing(ids))
        there = np.setdiff1d(np.arange(len(ids)), missing.numpy())
        reader = entry.reader(ids[there]) if len(there) else None
    except (CacheError, OSError) as error:
        (logits, features, lost), _ = computed(everything)
        return Output(logits, features, len(ids), seconds, str(error), float(lost.mean()))
    parts, note = [], ""
    if reader is not None:
        found = torch.arange(len(there))
        known = reader
        classes = int(known.about()["classes"])
        parts.append((torch.from_numpy(there), _given(lambda name: known.gather(name, found), classes)))
    if len(missing):
        given, kept = computed(missing)
        parts.append((missing, given))
        try:
            entry.put(ids[missing.numpy()], kept, {"classes": str(given[0].shape[1])})
        except CacheError as error:
            note = str(error)
    order = torch.cat([rows for rows, _ in parts]).argsort()
    logits, features, lost = (torch.cat([given[place] for _, given in parts])[order] for place in range(3))
    return Output(logits, features, len(missing), seconds, note, float(lost.mean()))


def view_name(augment: AugmentSpec, view: int) -> str:
    """Return what tells a kept view from others: the augmentation's settings and its number; `CLEAN` for view 0."""
    if view == 0:
        return CLEAN
    return f"{digest_of(augment.model_dump(mode='json', exclude={'views'}))}-{view}"


def _stored(cached: CachedTeacher, logits: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
    from pipeline.cache.store import compact
    from pipeline.cache.topk import compress_logits, compression_error

    kept = {"features": compact(features, cached.precision)}
    if cached.top_k is None or cached.top_k >= logits.shape[1]:
        return kept | {"logits": compact(logits, cached.precision)}
    parts = compress_logits(logits, cached.top_k) | {"lost": compression_error(logits, cached.top_k).float()}
    return kept | {name: compact(value, cached.precision) for name, value in parts.items()}


def _given(part: Callable[[str], torch.Tensor], classes: int) -> _Given:
    """Return logits and features from what is kept of them, and what was lost of each image's logits."""
    from pipeline.cache.topk import expand_logits

    features = part("features").float()
    try:
        return part("logits").float(), features, features.new_zeros(len(features))
    except KeyError:
        logits = expand_logits(part("values").float(), part("indices"), part("rest").float(), classes)
        return logits, features, part("lost").float()

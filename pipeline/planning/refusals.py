"""What can't be: each with the remedy. And what should worry."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.places import is_remote, local_place
from pipeline.planning.described import GIB, Cluster, is_shared
from pipeline.planning.memory import Memory
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import worker_resources
from pipeline.stages.outputs import cache_root
from pipeline.stages.together import choice_of


@dataclass(frozen=True)
class Refusal:
    """Why a run would not do what it is to do.

    Attributes
    ----------
    what : str
    remedy : str
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def refusals(
    settings: Settings,
    cluster: Cluster,
    memory: Sequence[Memory],
    disk: Mapping[str, int],
    stages: Sequence[str],
) -> list[Refusal]:
    """Return all that stands against running these stages on a cluster."""
    return [
        *_unschedulable(settings, cluster, stages),
        *_too_large(settings, memory),
        *_places(settings, cluster, disk, stages),
        *_contradictions(settings, stages),
    ]


def warnings(
    teachers: Sequence[TeacherSize], settings: Settings, cluster: Cluster, weights: Collection[Path] = ()
) -> list[str]:
    """Return what would not stop a run, but should be known before it; `weights` are folders of teachers' files."""
    found = [f"teacher {one.name}: {one.problem}" for one in teachers if one.problem]
    if cluster.here and not settings.cluster.local:
        found.append(
            f"cluster.address {settings.cluster.address!r} is not asked: this machine stands for each of its nodes"
        )
    if not cluster.here and cluster.nodes > 1 and settings.cluster.local:
        found.append("cluster.address is null: a run would use one machine, not the nodes described")
    apart = sorted(str(folder) for folder in weights if is_shared(folder) is False)
    if apart and _several(settings, cluster) and cluster.shared is not True:
        found.append(
            f"weights in {apart[0]} lie on a disk of this machine: every node needs them at that path (a shared path, "
            "its image), or give s3://… in the zoo"
        )
    return found


def _several(settings: Settings, cluster: Cluster) -> bool:
    """Whether other machines than this one are to work."""
    return not settings.cluster.local and (cluster.nodes > 1 or cluster.here)


def _unschedulable(settings: Settings, cluster: Cluster, stages: Sequence[str]) -> list[Refusal]:
    if settings.cluster.autoscaling:
        return []  # what is asked for is waited for
    found = []
    for section, stage in ((settings.assess, "assess"), (settings.amalgamate, "amalgamate")):
        asked = {"CPU": section.resources.cpus, "GPU": section.resources.gpus}
        if stage in stages and cluster.slots(asked) == 0:
            found.append(
                Refusal(
                    f"{stage}: a teacher asks for {_written(asked)}, more than a node has ({cluster.describe()})",
                    f"lower {stage}.resources, or take larger nodes",
                )
            )
    resources = settings.distill.resources
    least = resources.counts[0]
    asked = worker_resources(resources)
    room = cluster.slots(asked)
    if {"distill", "evaluate"} & set(stages) and room is not None and least > room:
        found.append(
            Refusal(
                f"distill: {least} workers of {_written(asked)} each, but the cluster has room for {room} "
                f"({cluster.describe()})",
                f"set distill.resources.num_workers={room}, or lower what a worker asks for"
                if room
                else "lower what a worker asks for, or take larger nodes",
            )
        )
    return found


def _too_large(settings: Settings, memory: Sequence[Memory]) -> list[Refusal]:
    found = []
    for one in memory:
        if one.limit is None or one.together:
            continue
        place = "a GPU" if one.on == "GPU" else "a node"
        size = f"{one.bytes / GIB:.1f} GiB"
        if not one.fits:
            what = f"{one.stage}: {one.process} needs {size}, and {place} has {one.limit / GIB:.1f} GiB"
            found.append(Refusal(what, _smaller(one)))
        else:
            fit = max(1, int(one.limit // one.bytes))
            found.append(
                Refusal(
                    f"{one.stage}: {one.beside} processes share {place} of {one.limit / GIB:.1f} GiB and may need "
                    f"{one.all / GIB:.1f} GiB; {one.process} alone needs {size}",
                    _fewer(one, fit),
                )
            )
    return found


def _smaller(one: Memory) -> str:
    if one.process.startswith("student"):
        return "raise distill.loop.parts, lower distill.loop.batch_size, or take more workers"
    weights = one.parts.get("weights", 0)
    if one.limit is not None and weights < one.limit:
        return f"lower {one.stage}.batch_size"
    return "leave it out with zoo.only, or take devices with more memory"


def _fewer(one: Memory, fit: int) -> str:
    if one.process.startswith("student"):
        return "take fewer workers a node, or raise distill.loop.parts"
    if one.on == "GPU":
        return f"set {one.stage}.resources.gpus={1 / fit:.2g} or lower {one.stage}.batch_size"
    return f"raise {one.stage}.resources.cpus, or lower {one.stage}.batch_size"


def _places(settings: Settings, cluster: Cluster, disk: Mapping[str, int], stages: Sequence[str]) -> list[Refusal]:
    found = []
    folder, remote = local_place(settings.run_dir), is_remote(settings.run_dir)
    shared = cluster.shared if cluster.shared is not None else is_shared(folder)
    if _several(settings, cluster) and not remote and shared is False:
        found.append(
            Refusal(
                f"run_dir {folder} lies on a disk of this machine, and cluster.address is {settings.cluster.address!r}",
                "every node must see it: put run_dir on a shared path (NFS, Lustre, …) or in a store (s3://…), or say "
                "--cluster …,shared=yes if it is one",
            )
        )
    needed = disk.get("cache", 0)
    if needed > settings.cache.quota_bytes:
        found.append(
            Refusal(
                f"cache: the stages keep {needed / 1e9:.1f} GB of teacher outputs, cache.quota_gb is "
                f"{settings.cache.quota_gb:g}: what is over it would be computed again",
                f"set cache.quota_gb={needed * 1.1 / 1e9:.3g}, or keep less with cache.top_k",
            )
        )
    size = sum(size for name, size in disk.items() if name not in ("cache", "object store"))
    found += _full(folder, size, "FACULTY_CACHE" if remote else "run_dir")
    root = cache_root(settings)
    found += _full(root, min(needed, settings.cache.quota_bytes), "cache.path")
    store = settings.cluster.object_store_mb
    if store is not None and disk.get("object store", 0) > store * 2**20:
        found.append(
            Refusal(
                f"assess: the probe takes {disk['object store'] / 2**20:.0f} MiB of the object store, "
                f"cluster.object_store_mb is {store}",
                "raise it, or label fewer images (task.splits)",
            )
        )
    return found


def _full(folder: Path, needed: int, field: str) -> list[Refusal]:
    there = folder
    while not there.exists():
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return []
    if needed <= free:
        return []
    return [
        Refusal(
            f"{field} {folder}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
            f"set another {field}",
        )
    ]


def _contradictions(settings: Settings, stages: Sequence[str]) -> list[Refusal]:
    if "amalgamate" not in stages:
        return []
    try:
        choice_of(settings)
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        return [Refusal(what, remedy or "see its message")]
    return []


def _written(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {key}" for key, value in resources.items() if value > 0)

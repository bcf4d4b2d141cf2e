"""The cluster that a plan is for: this machine, or one that is described in a line. Imports neither ray nor torch."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.spec import ClusterSpec
from pipeline.errors import ConfigError

GIB = 2**30
_ETHERNET = 1.25e9  # bytes a second between nodes where none are given: 10 Gbit/s
_KEYS = {
    "nodes": "nodes, all alike",
    "cpus": "processors of a node",
    "mem": "main memory of a node, GiB",
    "gpus": "GPUs of a node",
    "gpu_mem": "memory of a GPU, GiB",
    "tflops": "what one device really does, 10¹² operations a second",
    "network": "between two nodes, Gbit/s",
    "shared": "whether all nodes see the run folder: yes or no",
}


@dataclass(frozen=True)
class Cluster:
    """Nodes that are all alike. What is None is not known, and limits nothing.

    Attributes
    ----------
    nodes : int
    cpus : float or None
        Processors of a node.
    memory : int or None
        Bytes of a node.
    gpus : int
        Of a node.
    gpu_memory : int or None
        Bytes of a GPU.
    flops : float or None
        Floating-point operations a second that one device achieves: a GPU where there are any, else a processor.
    network : float
        Bytes a second between two nodes.
    shared : bool or None
        Whether all nodes see the run folder; None: to be found out.
    here : bool
        Whether it is this machine.
    """

    nodes: int = 1
    cpus: float | None = None
    memory: int | None = None
    gpus: int = 0
    gpu_memory: int | None = None
    flops: float | None = None
    network: float = _ETHERNET
    shared: bool | None = None
    here: bool = False

    @property
    def all_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus

    def a_node(self, resources: Mapping[str, float]) -> int | None:
        """Return how many times resources (``CPU``, ``GPU``) fit on one node; None where nothing known limits them."""
        have = {"CPU": self.cpus, "GPU": float(self.gpus)}
        wanted = {key: value for key, value in resources.items() if value > 0}
        counts = [
            math.floor(room / wanted[key] + 1e-9) for key, room in have.items() if key in wanted and room is not None
        ]
        return min(counts, default=None)

    def slots(self, resources: Mapping[str, float]) -> int | None:
        """Return how many times resources fit on all nodes, as `pipeline.cluster.session.slots` counts them."""
        each = self.a_node(resources)
        return None if each is None else self.nodes * each

    def describe(self) -> str:
        """Write it as a person would."""
        parts = [] if self.cpus is None else [f"{self.cpus:g} processors"]
        parts += [] if self.memory is None else [f"{self.memory / GIB:.0f} GiB"]
        if self.gpus:
            size = "" if self.gpu_memory is None else f" of {self.gpu_memory / GIB:.0f} GiB"
            parts.append(f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}{size}")
        else:
            parts.append("no GPU")
        return (
            f"{self.nodes} node{'s' if self.nodes > 1 else ''}, {'each ' if self.nodes > 1 else ''}{', '.join(parts)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def parse_cluster(text: str) -> Cluster:
    """Read a description such as ``gpus=8,gpu_mem=80,cpus=64,mem=256,nodes=4``; figures are of one node.

    Raises
    ------
    ConfigError
        For what is no key, no number, out of range, or given twice; names the nearest key.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not key or not value:
            raise ConfigError(
                f"--cluster: {part.strip()!r} is not of the form key=value, for example gpus=8,gpu_mem=80"
            )
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"valid: {', '.join(_KEYS)}"
            raise ConfigError(f"--cluster: `{key}` is not known; {hint}")
        if key in found:
            raise ConfigError(f"--cluster: `{key}` is given twice; keep one")
        found[key] = value
    shared = found.pop("shared", None)
    if shared not in (None, "yes", "no"):
        raise ConfigError(f"--cluster: `shared` is {shared!r}; give yes or no: {_KEYS['shared']}")
    numbers = {key: _number(key, value, whole=key in ("nodes", "gpus")) for key, value in found.items()}
    gpus = int(numbers.get("gpus", 0))
    if not gpus and "gpu_mem" in numbers:
        raise ConfigError("--cluster: `gpu_mem` is given without GPUs; add gpus=")
    memory, gpu_memory, flops = numbers.get("mem"), numbers.get("gpu_mem"), numbers.get("tflops")
    return Cluster(
        nodes=int(numbers.get("nodes", 1)),
        cpus=numbers.get("cpus"),
        memory=None if memory is None else int(memory * GIB),
        gpus=gpus,
        gpu_memory=None if gpu_memory is None else int(gpu_memory * GIB),
        flops=None if flops is None else flops * 1e12,
        network=numbers["network"] * 1e9 / 8 if "network" in numbers else _ETHERNET,
        shared=None if shared is None else shared == "yes",
    )


def _number(key: str, value: str, *, whole: bool) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"--cluster: `{key}` is {value!r}; give a number: {_KEYS[key]}") from None
    least = 0 if key == "gpus" else 1
    good = number >= least and number == int(number) if whole and math.isfinite(number) else number > 0
    if not good or not math.isfinite(number):
        wanted = f"a whole number from {least}" if whole else "a number above 0"
        raise ConfigError(f"--cluster: `{key}` is {value}; give {wanted}: {_KEYS[key]}")
    return number


def this_machine(spec: ClusterSpec) -> Cluster:
    """Return this machine as one node: what a local Ray under these settings would have."""
    gpus, gpu_memory = _gpus_here()
    if spec.local and spec.num_gpus is not None:
        gpus = spec.num_gpus
    cpus = spec.num_cpus if spec.local and spec.num_cpus is not None else _processors()
    return Cluster(
        cpus=float(cpus), memory=_memory(), gpus=gpus, gpu_memory=gpu_memory if gpus else None, shared=None, here=True
    )


def is_shared(folder: Path) -> bool | None:
    """Say whether a folder lies on a network file system, going by the mount table; None where there is no such table.

    Of a folder that does not exist yet, its nearest parent counts.
    """
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    place, best, kind = there.resolve(), -1, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        root = Path(point.replace("\\040", " "))
        if place.is_relative_to(root) and len(root.parts) >= best:
            best, kind = len(root.parts), found
    return kind.startswith(_NETWORK)


_NETWORK = (
    "nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "fuse.", "9p", "afs", "orangefs", "wekafs",
    "pvfs", "virtiofs", "efs", "daos",
)  # fmt: skip


def _gpus_here() -> tuple[int, int | None]:
    import torch

    if not torch.cuda.is_available():
        return 0, None
    count = torch.cuda.device_count()
    return count, min(torch.cuda.get_device_properties(number).total_memory for number in range(count))


def _processors() -> int:
    """Return the processors that Ray finds, a container's share of them where it has one."""
    count = os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        count = min(count, max(1, int(int(quota[0]) / int(quota[1]))))
    return count


def _memory() -> int | None:
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(physical, int(limit)) if limit.isdigit() else physical


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""

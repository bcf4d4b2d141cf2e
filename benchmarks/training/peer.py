"""The same distillation with torchdistill, driven as its own example script drives it, without its logging.

Its release 1.1.5 takes one teacher that looks at every batch. Several teachers are one module that holds them, with a
forward hook and a loss on each. It keeps no teacher outputs; what a user can add through its registries is measured as
"replayed": a data set wrapper that hands out logits beside the images.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, RandomSampler

from benchmarks.training.bare import normalised, views
from benchmarks.training.world import BATCH, CLASSES, LR, MEAN, STD, WEIGHT_DECAY, Run, Task

TEMPERATURE = 4.0
REPLAY = "benchmark_replay"  # under this name the wrapper and the forward function are registered

# "samples": a data set of images and a transform each, as in its sample configurations; "batches": a data set that is
# asked for whole batches and augments them at once, as the bare loop does.
Style = Literal["samples", "batches"]


def version() -> str | None:
    """Return the installed release; None where there is none."""
    if importlib.util.find_spec("torchdistill") is None:
        return None
    return importlib.metadata.version("torchdistill")


class Samples(Dataset):
    """Images one by one, through torchvision's transforms.

    Parameters
    ----------
    task : Task
    """

    def __init__(self, task: Task) -> None:
        from torchvision import transforms

        height = task.world.shape[1]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(height, padding=task.world.shift),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([MEAN] * task.world.shape[0], [STD] * task.world.shape[0]),
            ]
        )
        self.images, self.labels = task.images.permute(0, 2, 3, 1).contiguous().numpy(), task.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = self.images[row]
        return self.transform(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)), self.labels[row]


class Batches(Dataset):
    """Whole batches, made on the device as the bare loop makes them; its index is the rows of a batch.

    Parameters
    ----------
    task : Task
    device : torch.device
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.images, self.labels = task.images.to(device), task.labels.to(device)
        self.shift = task.world.shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(rows, device=self.labels.device)
        return normalised(views(self.images[chosen], self.shift)), self.labels[chosen]


class Replayed(Dataset):
    """A data set wrapper in torchdistill's sense: logits of teachers go along in the supplementary dictionary.

    Parameters
    ----------
    org_dataset : Batches
    logits : (T, N, C) tensor
    """

    def __init__(self, org_dataset: Batches, logits: Tensor) -> None:
        self.org_dataset, self.logits = org_dataset, logits

    def __len__(self) -> int:
        return len(self.org_dataset)

    def __getitem__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        images, labels = self.org_dataset[rows]
        return images, labels, {"logits": self.logits[:, torch.tensor(rows, device=self.logits.device)]}


class Together(nn.Module):
    """Teachers side by side, so that a hook finds each of them.

    Parameters
    ----------
    parts : sequence of nn.Module
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of each."""
        return [part(images) for part in self.parts]


class Replay(Together):
    """In place of teachers: passes on what they said, part by part."""

    def __init__(self, teachers: int) -> None:
        super().__init__([nn.Identity() for _ in range(teachers)])

    def forward(self, logits: Tensor) -> list[Tensor]:
        """Return the logits (T, B, C), one by one."""
        return [part(one) for part, one in zip(self.parts, logits, strict=True)]


class Peer:
    """Trains through torchdistill's `DistillationBox`.

    Parameters
    ----------
    task : Task
    device : torch.device
    workers : sequence of int
        How many worker processes its data loader may have; the fastest number is taken, for single samples.
    """

    def __init__(self, task: Task, device: torch.device, workers: Sequence[int]) -> None:
        self.task, self.device, self.workers = task, device, tuple(workers)
        self.chosen: int | None = None

    def live(self, teachers: int, style: Style) -> Run:
        """Return the training by teachers that look at every batch."""
        nets = [self.task.world.teacher_net(number) for number in range(teachers)]
        if style == "batches":
            return self._run(Together(nets).eval(), self._box_of_batches(None))
        if self.chosen is None:
            self.chosen = self._fastest(nets[:1]) if len(self.workers) > 1 else self.workers[0]
        return self._run(Together(nets).eval(), self._loader_of_samples(self.chosen))

    def replayed(self, teachers: int) -> Run:
        """Return the training by what teachers said before, through a wrapper of one's own."""
        from torchdistill.core.interfaces.registry import register_forward_proc_func
        from torchdistill.datasets.registry import register_dataset_wrapper

        register_dataset_wrapper(Replayed, key=REPLAY)
        register_forward_proc_func(_replay, key=REPLAY)
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(teachers, len(self.task), CLASSES, generator=generator)
        loader = self._box_of_batches({"key": REPLAY, "kwargs": {"logits": logits.to(self.device)}})
        return self._run(Replay(teachers), loader, forward=REPLAY)

    def _fastest(self, nets: Sequence[nn.Module]) -> int:
        seconds = {}
        for workers in self.workers:
            run = self._run(Together(nets).eval(), self._loader_of_samples(workers))
            run()  # starts the workers
            began = time.perf_counter()
            run()
            seconds[workers] = time.perf_counter() - began
        return min(seconds, key=lambda workers: seconds[workers])

    def _loader_of_samples(self, workers: int) -> dict[str, Any]:
        loader = {
            "batch_size": BATCH,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": self.device.type == "cuda",
        }
        return {"dataset": Samples(self.task), "sampler": {"class_or_func": RandomSampler}, "kwargs": loader}

    def _box_of_batches(self, wrapper: dict[str, Any] | None) -> dict[str, Any]:
        def in_batches(dataset: Dataset) -> BatchSampler:
            return BatchSampler(RandomSampler(dataset), BATCH, drop_last=False)  # type: ignore[arg-type]

        loader: dict[str, Any] = {"sampler": {"class_or_func": in_batches}, "kwargs": {"batch_size": None}}
        return loader | {"dataset": Batches(self.task, self.device), "dataset_wrapper": wrapper}

    def _run(self, teacher: Together, loader: dict[str, Any], forward: str = "forward_batch_only") -> Run:
        from torchdistill.core.distillation import get_distillation_box

        student = self.task.world.student_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        paths = [f"parts.{number}" for number in range(len(teacher.parts))]
        config = {
            "num_epochs": 1,
            "train_data_loader": {"dataset_id": "train"} | {k: v for k, v in loader.items() if k != "dataset"},
            "teacher": {"forward_proc": forward, "requires_grad": False, "forward_hook": {"output": paths}},
            "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
            "optimizer": {"key": "AdamW", "kwargs": {"lr": LR, "weight_decay": WEIGHT_DECAY, "fused": True}},
            "scheduler": {
                "key": "CosineAnnealingLR",
                "kwargs": {"T_max": self.task.steps},
                "scheduling_step": 1,
            },
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": _terms(paths)}},
        }
        box = get_distillation_box(
            teacher, student, {"train": loader["dataset"]}, config, self.device, None, distributed=False, lr_factor=1
        )

        def run() -> None:
            box.pre_epoch_process(epoch=0)
            for images, labels, more in box.train_data_loader:
                images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
                box.post_forward_process(loss=box.forward_process(images, labels, more))
            box.post_epoch_process()

        return run


def _terms(paths: Sequence[str]) -> dict[str, Any]:
    """Return the loss: cross-entropy, and the mean of the divergences to the teachers, as in its sample configs."""
    labels = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    terms: dict[str, Any] = {
        "ce": {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {"input": labels, "target": {"uses_label": True}},
            },
            "weight": 1.0,
        }
    }
    for path in paths:
        settings = {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": path,
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": 0.0,  # the cross-entropy is a term of its own
            "beta": 1.0,
            "reduction": "batchmean",
        }
        weight = TEMPERATURE**2 / len(paths)
        terms[path] = {"criterion": {"key": "KDLoss", "kwargs": settings}, "weight": weight}
    return terms


def _replay(model: nn.Module, images: Tensor, targets: Tensor, supp_dict: dict[str, Tensor], **_: Any) -> Any:
    return model(supp_dict["logits"])

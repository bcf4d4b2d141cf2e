"""The loop that one would write by hand for this task and no other: plain PyTorch, nothing of ours but the net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.world import BATCH, LR, MEAN, STD, WEIGHT_DECAY, Run, Task


def views(images: Tensor, shift: int) -> Tensor:
    """Move every image of a batch by up to `shift` pixels in each direction, and mirror half of them.

    Parameters
    ----------
    images : (B, C, H, W) uint8 tensor
    shift : int

    Returns
    -------
    (B, C, H, W) uint8 tensor on the same device.
    """
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * shift + 1, (2, count), device=device)
    windows = F.pad(images, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    moved = windows[torch.arange(count, device=device), :, top, left]
    mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    return torch.where(mirrored, moved.flip(3), moved)


def normalised(images: Tensor) -> Tensor:
    """Return (x / 255 − mean) / std of uint8 images, float32."""
    return images.float().mul_(1 / (255 * STD)).sub_(MEAN / STD)


class Bare:
    """Trains without teachers; the data set lies on the device, as whole data sets of this size may.

    Parameters
    ----------
    task : Task
    device : torch.device
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        self.images, self.labels = task.images.to(device), task.labels.to(device)

    def train(self) -> Run:
        """Return the training; it goes on with the same net at every call."""
        net = self.task.world.student_net().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

        def run() -> None:
            net.train()
            optimiser = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=self.task.steps)
            for rows in torch.randperm(len(self.task), device=self.device).split(BATCH):
                x = normalised(views(self.images[rows], self.task.world.shift))
                loss = F.cross_entropy(net(x), self.labels[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()

        return run

    def forward(self, teacher: nn.Module, count: int, batch: int) -> Run:
        """Return a pass of a teacher over `count` images, its logits kept on the CPU: the least that it costs."""
        teacher = teacher.to(self.device)

        def run() -> Tensor:
            with torch.inference_mode():
                return torch.cat([teacher(normalised(part)).cpu() for part in self.images[:count].split(batch)])

        return run

"""A world small enough for tests: images of four shapes, and teachers that know some of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from pipeline.models.nets import mlp

SHAPES = ("bar", "post", "block", "slash")
SIDE = 12


def images(per_class: int, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images (N, 12, 12) uint8 of shapes at random places, and their classes."""
    random = np.random.default_rng(seed)
    made, labels = [], []
    for label in classes:
        for _ in range(per_class):
            image = random.integers(0, 120, (SIDE, SIDE))
            row, column = random.integers(2, 7, 2)
            if SHAPES[label] == "bar":
                image[row : row + 2, column - 2 : column + 5] += 130
            elif SHAPES[label] == "post":
                image[row - 2 : row + 5, column : column + 2] += 130
            elif SHAPES[label] == "block":
                image[row : row + 4, column : column + 4] += 130
            else:
                for k in range(-2, 5):
                    image[row + k, column + k] += 130
            made.append(image)
            labels.append(label)
    order = random.permutation(len(made))
    return np.stack(made).clip(0, 255).astype(np.uint8)[order], np.array(labels)[order]


class TinyClassifier(nn.Module):
    """Two classes by an image's mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 images (B, 3, H, W) to logits (B, 2)."""
        return self.classifier(images.float().mean((2, 3)) / 255)


def train_teacher(classes: tuple[int, ...], seed: int, steps: int = 150) -> nn.Module:
    """An MLP that tells some of the shapes apart; untrained with 0 steps, and with -1 one that sees nothing at all."""
    torch.manual_seed(seed)
    net = mlp(len(classes), in_channels=1, width=32, grid=SIDE)
    pixels, labels = images(120, seed=1000 + seed, classes=classes)
    inputs = torch.from_numpy(pixels)[:, None].float() / 255 - 0.5
    targets = torch.tensor([classes.index(int(label)) for label in labels])
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(steps):
        rows = torch.arange(step * 32, step * 32 + 32) % len(targets)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(inputs[rows]), targets[rows]).backward()
        optimiser.step()
    if steps < 0:
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
    return net.eval()


TEACHERS: dict[str, tuple[tuple[int, ...], int]] = {
    "flat": ((0, 1), 150),
    "solid": ((2, 3), 150),
    "mixed": ((1, 2, 3), 150),
    "untrained": ((0, 1, 2, 3), 0),
    "blind": ((0, 1), -1),
}


def make_zoo(folder: Path, names: tuple[str, ...] = tuple(TEACHERS)) -> Path:
    """Write a zoo of tiny teachers; return its file."""
    (folder / "teachers").mkdir(parents=True, exist_ok=True)
    entries = []
    for seed, name in enumerate(names):
        classes, steps = TEACHERS[name]
        path = folder / "teachers" / f"{name}.safetensors"
        save_file(train_teacher(classes, seed, steps).state_dict(), path)
        entries.append(
            {
                "name": name,
                "source": {
                    "type": "safetensors",
                    "path": f"teachers/{name}.safetensors",
                    "factory": "pipeline.models.nets:mlp",
                    "kwargs": {"width": 32, "grid": SIDE},
                },
                "classes": [SHAPES[k] for k in classes],
                "preprocessing": {"size": SIDE, "channels": 1, "mean": [0.5], "std": [1.0]},
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "licence": "Apache-2.0",
            }
        )
    return write_zoo(folder / "zoo.yaml", entries)


def write_zoo(path: Path, entries: list[dict]) -> Path:
    """Write a zoo file."""
    path.write_text(yaml.safe_dump({"teachers": entries}, sort_keys=False), encoding="utf-8")
    return path


def make_data(folder: Path, per_class: int = 100) -> Path:
    """Write the target task as a NumPy archive."""
    pixels, labels = images(per_class, seed=7)
    path = folder / "shapes.npz"
    np.savez(path, images=pixels, labels=labels, classes=np.array(SHAPES))
    return path


def make_settings(folder: Path, **changes: object) -> Path:
    """Write settings for the tiny world in `folder`, trained in this process unless `changes` say otherwise."""
    settings = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "task": {
            "source": {"type": "numpy", "path": "shapes.npz"},
            "image": {"size": SIDE, "channels": 1},
            "splits": {"train_labelled": 4, "probe": 8, "validation": 8, "test": 20},
        },
        "zoo": {"path": "zoo.yaml"},
        "cluster": {"num_cpus": 2},
        "distill": {
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": 4, "batch_size": 32, "labelled_batch": 16},
            "augment": {"shift": 1},
            "resources": {"num_workers": 0},
        },
    }
    settings |= changes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path

"""Builds the demo's data and its zoo of teachers from the raw Fashion-MNIST and MNIST files.

    python conf/demo/build.py --fashion-mnist DIR --mnist DIR [--only data|zoo] [--threads 2]

Both directories hold the four idx files of their data set, gzipped or not. The student's images all come from
Fashion-MNIST's *test* file, the teachers' from the *train* files, so that no teacher has seen an image of the demo.
Seeded; on other hardware or another version of torch the weights may differ in the last digits, and so may sha256.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models import nets

HERE = Path(__file__).resolve().parent
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple(str(digit) for digit in range(10))
# Images of the demo: 650 a class of the test file, in two shards that stay below 3 MB.
PER_CLASS, SHARDS = 650, 2
MEAN, STD = {"fashion": 0.286, "mnist": 0.131}, {"fashion": 0.353, "mnist": 0.308}


@dataclass(frozen=True)
class Recipe:
    """What one teacher is: a net, and a label space whose classes each merge some classes of a source data set."""

    name: str
    net: str
    source: str
    classes: dict[str, tuple[str, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    epochs: int = 5
    per_class: int = 6000


def own(*names: str) -> dict[str, tuple[str, ...]]:
    """Return classes that are those of the source."""
    return {name: (name,) for name in names}


ZOO = (
    Recipe("shoes", "resnet8", "fashion", own("sandal", "sneaker", "ankle boot"), {"width": 12}),
    Recipe(
        "footwear_openness",
        "small_cnn",
        "fashion",
        {"open shoe": ("sandal",), "closed shoe": ("sneaker", "ankle boot")},
        {"width": 16},
    ),
    Recipe("tops", "resnet8", "fashion", own("t-shirt", "pullover", "shirt"), {"width": 12}),
    Recipe("outerwear", "small_vgg", "fashion", own("pullover", "coat", "shirt"), {"width": 12}),
    Recipe("upper_or_legs", "mlp", "fashion", {"upper body": ("t-shirt", "shirt", "coat"), "legs": ("trouser",)}),
    Recipe("bags_and_dresses", "small_mobilenet", "fashion", own("bag", "dress", "trouser")),
    Recipe("one_piece", "small_cnn", "fashion", own("dress", "t-shirt"), {"width": 16}),
    Recipe("digits", "small_cnn", "mnist", own(*DIGITS), {"width": 16}),
    Recipe("even_digits", "resnet8", "mnist", own("0", "2", "4", "6", "8"), {"width": 8}, epochs=3),
    Recipe("untrained", "resnet8", "fashion", own("t-shirt", "trouser", "bag", "sneaker"), {"width": 8}, epochs=0),
)


def read_idx(directory: Path, name: str) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzipped or not."""
    for path in (directory / f"{name}.gz", directory / name):
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    raise SystemExit(f"{directory}: neither {name}.gz nor {name} is there")


def png(image: np.ndarray) -> bytes:
    """Encode one grey image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def build_data(fashion: Path) -> None:
    """Write `data/fashion-*.parquet` in the layout of Hugging Face image data sets."""
    images, labels = read_idx(fashion, "t10k-images-idx3-ubyte"), read_idx(fashion, "t10k-labels-idx1-ubyte")
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:PER_CLASS] for c in range(len(FASHION))])
    rows = rng.permutation(rows)
    features = {"image": {"_type": "Image"}, "label": {"names": list(FASHION), "_type": "ClassLabel"}}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", struct), ("label", pa.int64())]).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (HERE / "data").mkdir(exist_ok=True)
    for shard, part in enumerate(np.array_split(rows, SHARDS)):
        cells = [{"bytes": png(images[row]), "path": f"t10k/{row:05d}.png"} for row in part]
        table = pa.table([pa.array(cells, struct), pa.array(labels[part].astype(np.int64))], schema=schema)
        path = HERE / "data" / f"fashion-{shard:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)
        print(f"{path.relative_to(HERE)}: {len(part)} images, {path.stat().st_size:,} bytes")


def task_of(recipe: Recipe, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the images of a teacher's classes and their labels, at most `per_class` of each class of the source."""
    rows, targets = [], []
    for target, members in enumerate(recipe.classes.values()):
        for member in members:
            found = np.flatnonzero(labels == names.index(member))[: recipe.per_class]
            rows.append(found)
            targets.append(np.full(len(found), target))
    chosen = torch.from_numpy(images[np.concatenate(rows)])[:, None]
    return chosen, torch.from_numpy(np.concatenate(targets))


def train(recipe: Recipe, images: Tensor, targets: Tensor, seed: int) -> nn.Module:
    """Train one teacher: AdamW, one-cycle rate, random shifts by up to two pixels and, for clothes, flips."""
    torch.manual_seed(seed)
    net: nn.Module = getattr(nets, recipe.net)(num_classes=len(recipe.classes), in_channels=1, **recipe.kwargs)
    net = net.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    if not recipe.epochs:
        return net.eval()
    mean, std, batch = 255 * MEAN[recipe.source], 255 * STD[recipe.source], 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    steps = recipe.epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    net.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))
        for rows in order[: len(order) // batch * batch].split(batch):
            x = (images[rows].float() - mean) / std
            down, right = torch.randint(-2, 3, (2,)).tolist()
            x = torch.roll(x, (down, right), (2, 3))
            if recipe.source == "fashion" and torch.rand(()) < 0.5:
                x = x.flip(3)
            x = x.contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(net(x), targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, recipe: Recipe, images: Tensor, targets: Tensor) -> float:
    """Return the share of images that the teacher classifies rightly within its own label space."""
    mean, std = 255 * MEAN[recipe.source], 255 * STD[recipe.source]
    hits = sum(
        int((net((x.float() - mean) / std).argmax(1) == y).sum())
        for x, y in zip(images.split(500), targets.split(500), strict=True)
    )
    return hits / len(targets)


def build_zoo(fashion: Path, mnist: Path) -> None:
    """Train every teacher, write its weights and the catalogue `zoo.yaml`."""
    raw = {}
    for source, directory in (("fashion", fashion), ("mnist", mnist)):
        raw[source] = {
            part: (read_idx(directory, f"{part}-images-idx3-ubyte"), read_idx(directory, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        }
    (HERE / "teachers").mkdir(exist_ok=True)
    entries = []
    for seed, recipe in enumerate(ZOO):
        start = time.perf_counter()
        names = FASHION if recipe.source == "fashion" else DIGITS
        net = train(recipe, *task_of(recipe, *raw[recipe.source]["train"], names), seed)
        score = accuracy(net, recipe, *task_of(recipe, *raw[recipe.source]["t10k"], names))
        path = HERE / "teachers" / f"{recipe.name}.safetensors"
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
        parameters = sum(p.numel() for p in net.parameters())
        print(
            f"{recipe.name:18s} {recipe.net:15s} {parameters:7,d} parameters  {path.stat().st_size:8,d} bytes  "
            f"accuracy {score:.3f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        entries.append(entry(recipe, path, parameters, score))
    header = "# The demo's repository of teachers. Written by build.py; README.md says what each one is.\n"
    text = yaml.safe_dump({"teachers": entries}, sort_keys=False, width=120, default_flow_style=None)
    (HERE / "zoo.yaml").write_text(header + text, encoding="utf-8")


def entry(recipe: Recipe, path: Path, parameters: int, score: float) -> dict[str, Any]:
    """Return the teacher's entry of the catalogue."""
    trained = (
        f"accuracy {score:.3f} on its own classes of the {recipe.source} test file" if recipe.epochs else "untrained"
    )
    mean, std = MEAN[recipe.source], STD[recipe.source]
    return {
        "name": recipe.name,
        "source": {
            "type": "safetensors",
            "path": f"teachers/{path.name}",
            "factory": f"pipeline.models.nets:{recipe.net}",
            "kwargs": {"num_classes": len(recipe.classes), "in_channels": 1, **recipe.kwargs},
        },
        "classes": list(recipe.classes),
        "preprocessing": {"size": 28, "channels": 1, "mean": [mean], "std": [std]},
        "features": "classifier",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": "Apache-2.0 (weights trained by this project)",
        "notes": f"{recipe.net}, {parameters:,} parameters; {trained}.",
    }


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Builds the demo's data and its zoo of teachers.")
    parser.add_argument("--fashion-mnist", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="needed for the zoo")
    parser.add_argument("--only", choices=("data", "zoo"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only != "zoo":
        build_data(arguments.fashion_mnist)
    if arguments.only != "data":
        if arguments.mnist is None:
            parser.error("--mnist is needed for the zoo")
        build_zoo(arguments.fashion_mnist, arguments.mnist)


if __name__ == "__main__":
    main()

"""Bytes on paper, against files that the cache and the stages really write."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.cache.store import OutputStore, compact
from pipeline.cache.topk import compress_logits, compression_error
from pipeline.data.ingest import build_table
from pipeline.data.spec import ImageSpec, NumpySource, SplitSpec
from pipeline.engine.optim import build_optimiser
from pipeline.engine.spec import OptimSpec
from pipeline.models import nets
from pipeline.planning.nets import NetSize
from pipeline.planning.sizes import (
    cache_bytes,
    output_columns,
    outputs_bytes,
    probe_bytes,
    shard_bytes,
    spoken_bytes,
    table_bytes,
    training_state_bytes,
)
from pipeline.planning.teachers import TeacherSize
from tests.tiny import SIDE, make_data


def teacher(classes: int, features: int) -> TeacherSize:
    net = NetSize(10, 40, 40, flops=1.0, forward_bytes=1, features=features, outputs=classes)
    return TeacherSize("t", "net", "key", classes, (1, SIDE, SIDE), net)


@pytest.mark.parametrize("rows", [1, 7, 200, 4096])
@pytest.mark.parametrize(("classes", "features", "top_k"), [(3, 48, None), (1000, 512, None), (100, 64, 5), (4, 8, 9)])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_shard_is_as_large_as_the_one_that_is_written(
    tmp_path: Path, rows: int, classes: int, features: int, top_k: int | None, precision
) -> None:
    entry = OutputStore(tmp_path).entry("0" * 64)
    logits, given = torch.randn(rows, classes), torch.randn(rows, features)
    tensors = {"features": compact(given, precision)}
    if top_k is None or top_k >= classes:
        tensors["logits"] = compact(logits, precision)
    else:
        parts = compress_logits(logits, top_k) | {"lost": compression_error(logits, top_k)}
        tensors |= {name: compact(value, precision) for name, value in parts.items()}
    ids = np.random.default_rng(0).integers(0, 256, (rows, 16), dtype=np.uint8)
    written = (entry.path / entry.put(ids, tensors, {"classes": str(classes)})).stat().st_size
    columns = output_columns(classes, features, precision=precision, top_k=top_k)
    # The names of types in the metadata are a few bytes longer or shorter.
    assert abs(shard_bytes(rows, columns, classes=classes) - written) <= 64


def test_the_cache_adds_up_its_shards() -> None:
    columns = output_columns(3, 48, precision="fp16", top_k=None)
    one = sum(shard_bytes(rows, columns, classes=3) for rows in (100, 50))
    assert cache_bytes([teacher(3, 48)] * 2, [100, 0, 50], precision="fp16", top_k=None) == 2 * one


def test_a_teacher_of_unknown_widths_is_not_counted() -> None:
    unknown = dataclasses.replace(teacher(3, 48), net=None)
    assert cache_bytes([unknown], [100], precision="fp16", top_k=None) == 0


def test_a_table_is_as_large_as_the_one_that_is_written(tmp_path: Path) -> None:
    make_data(tmp_path, per_class=300)
    splits = SplitSpec(train_labelled=20, probe=20, validation=20, test=100)
    image = ImageSpec(size=SIDE, channels=1)
    report = build_table(NumpySource(path=str(tmp_path / "shapes.npz")), image, splits, 0, tmp_path / "table")
    written = Path(report.path).stat().st_size
    assert table_bytes(report.rows, image.shape) == pytest.approx(written, abs=6000)  # schema, classes, record batches


def test_the_probe_is_what_its_arrays_take() -> None:
    images, count = np.zeros((40, 1, SIDE, SIDE), np.uint8), 40
    arrays = [images, np.zeros((count, 16), np.uint8), np.zeros(count, np.int64), np.zeros(count, np.int8)]
    arrays.append(np.zeros(count, np.int8))
    assert probe_bytes(count, (1, SIDE, SIDE)) == sum(array.nbytes for array in arrays)


def test_what_is_said_is_as_large_as_the_files(tmp_path: Path) -> None:
    views, images, own, task, features = 2, 50, 7, 4, 16
    half = torch.float16
    save_file(
        {
            "p": torch.zeros(views, images, task, dtype=half),
            "carried": torch.zeros(views, images, task, dtype=half),
        },
        tmp_path / "spoken.safetensors",
    )
    save_file(
        {
            "logits": torch.zeros(views, images, own, dtype=half),
            "features": torch.zeros(views, images, features, dtype=half),
        },
        tmp_path / "raw.safetensors",
    )
    plain = (tmp_path / "spoken.safetensors").stat().st_size
    both = plain + (tmp_path / "raw.safetensors").stat().st_size
    for raw, written in ((False, plain), (True, both)):
        counted = spoken_bytes(own, features, task, task, images=images, views=views, raw=raw)
        assert abs(counted - written) <= 1024


def test_outputs_of_the_assessment_are_as_large_as_their_file(tmp_path: Path) -> None:
    images, classes, features = 90, 7, 32
    tensors = {
        "rows": torch.arange(images),
        "logits": torch.zeros(images, classes),
        "features": torch.zeros(images, features),
        "classifier_weight": torch.zeros(classes, features),
    }
    save_file(tensors, tmp_path / "o.safetensors")
    assert (
        abs(outputs_bytes([teacher(classes, features)], images) - (tmp_path / "o.safetensors").stat().st_size) <= 1024
    )


@pytest.mark.parametrize(("name", "momentum", "ema"), [("adamw", 0.9, False), ("sgd", 0.9, True), ("sgd", 0.0, False)])
def test_the_state_of_a_training_is_what_the_optimiser_really_keeps(name, momentum: float, ema: bool) -> None:
    net = nets.small_cnn(4, 1, 8)
    optimiser = build_optimiser(list(net.parameters()), OptimSpec(name=name, momentum=momentum))
    net(torch.zeros(2, 1, SIDE, SIDE)).sum().backward()
    optimiser.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimiser.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    )
    weights = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    parameters = sum(value.numel() * value.element_size() for value in net.parameters())
    expected = kept + weights * (2 if ema else 1)
    assert training_state_bytes(parameters, weights, name, momentum, ema) == expected


def test_encoded_tables_count_what_an_image_takes() -> None:
    assert table_bytes(10, (3, 8, 8), encoded=100.0) == 10 * (100 + 4 + 21)
    assert table_bytes(10, (3, 8, 8)) == 10 * (math.prod((3, 8, 8)) + 21)

"""The text of the files that `faculty init` writes: YAML with a word on every line that a user may change."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.spec import SplitSpec
from pipeline.models.spec import TRUSTED_FACTORIES
from pipeline.start.images import Images
from pipeline.start.splits import batch_sizes, epochs_for, shown_counts
from pipeline.start.teachers import FILL_IN, Draft

SCHEMA = "run.schema.json"
_LARGE = 4 << 30  # bytes of raw pixels above which they are stored encoded
_COLUMN = 48  # where comments start


def zoo_text(drafts: Sequence[Draft], folder: Path) -> str:
    """Return a zoo file: what is known of each teacher, what must be filled in, and what is to be checked.

    Parameters
    ----------
    drafts : sequence of Draft
    folder : Path
        Where the file will lie; paths under it become relative to it.
    """
    lines = [
        "# The teachers. Written by `faculty init`; `faculty zoo check` loads each and says what is wrong with whom.",
        *_legend(drafts),
        "teachers:",
    ]
    for draft in drafts:
        lines += _teacher_lines(draft, folder)
    return "\n".join(lines) + "\n"


def _legend(drafts: Sequence[Draft]) -> list[str]:
    told = [f"# {FILL_IN}: nobody but you can know it; the zoo is refused as long as it stands there."]
    told = [] if all(draft.complete for draft in drafts) else told
    return [*told, "# CHECK: a guess that runs, but a wrong one makes the teacher worse without a word."]


def _teacher_lines(draft: Draft, folder: Path) -> list[str]:
    source = draft.source
    lines = [f"- name: {scalar(draft.name)}", "  source:", f"    type: {source['type']}"]
    lines.append(f"    path: {scalar(path_from(draft.path, folder))}")
    for key, value in source.items():
        if key == "type":
            continue
        comment = ""
        if value == FILL_IN:
            comment = "module:callable that builds the net, for example my_nets:resnet; or another `type`"
        elif key in ("model", "factory") and draft.recognised:
            comment = "told by the names and shapes of the weights"
        lines.append(_line(f"    {key}: {scalar(value)}", comment))
    if draft.classes is None:
        outputs = "" if draft.outputs is None else f"{draft.outputs} outputs; "
        comment = f"CHECK: {outputs}their names in order, [robin, wren], help where labels are few"
        lines.append(_line("  classes: null", comment))
    else:
        value = draft.classes if isinstance(draft.classes, str) else list(draft.classes)
        given = "CHECK: 1,000 outputs" if draft.classes == "imagenet-1k" and draft.outputs == 1000 else ""
        lines.append(_line(f"  classes: {scalar(value)}", given or "in the order of the outputs"))
    lines += _preprocessing_lines(draft)
    lines.append(_line(f"  sha256: {draft.sha256}", "of the file; another one is refused"))
    lines.append(_line('  licence: ""', "what the weights may be used for; goes into the student's lineage"))
    return lines


def _preprocessing_lines(draft: Draft) -> list[str]:
    if draft.preprocessing is None:
        return [_line("  preprocessing: null", "the program takes images as they are stored")]
    told = draft.preprocessing
    size = (
        "told by the program" if draft.size_told else "CHECK: pixels, as it was trained; null: as the task stores them"
    )
    return [
        "  preprocessing:",
        _line(f"    size: {told['size']}", size),
        _line(f"    channels: {told['channels']}", "1: grey, 3: RGB"),
        _line(f"    mean: {scalar(told['mean'])}", "CHECK: of pixels in [0, 1], as it was trained"),
        _line(f"    std: {scalar(told['std'])}", "CHECK"),
    ]


def settings_text(
    name: str,
    images: Images,
    splits: SplitSpec,
    zoo: Path,
    out: Path,
    *,
    gpus: int = 0,
    trusted: Sequence[str] = (),
) -> str:
    """Return a settings file.

    Parameters
    ----------
    name : str
        Of the run.
    images : Images
    splits : SplitSpec
    zoo : Path
        The zoo file.
    out : Path
        Where the text will lie: paths under its folder become relative to it.
    gpus : int
        GPUs of this machine.
    trusted : sequence of str
        Module prefixes that a zoo's `factory` may come from, besides the built-in ones.
    """
    folder = out.absolute().parent
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        "# Written by `faculty init`. All settings: docs/settings.md, or faculty schema --markdown",
        f"#   faculty plan -c {out.name}          what it takes, before anything runs",
        f"#   faculty run -c {out.name}           all stages; what is up to date is not run again",
        f"#   faculty run -c {out.name} --status  fresh, stale (and what changed), missing",
        _line(f"name: {scalar(name)}", f"artefacts go to runs/{name}, below the folder you run it in"),
        _line("seed: 0", "of the splits, the weights and the batches"),
        *_task_lines(images, splits, folder),
        "zoo:",
        _line(f"  path: {scalar(path_from(zoo.absolute(), folder))}", "the teachers"),
    ]
    if trusted:
        prefixes = scalar([*TRUSTED_FACTORIES, *trusted])
        lines.append(_line(f"  trusted_factories: {prefixes}", "modules whose code a zoo may run"))
    lines += _training_lines(images, splits, gpus, name)
    return "\n".join(lines) + "\n"


def _task_lines(images: Images, splits: SplitSpec, folder: Path) -> list[str]:
    counts = shown_counts(list(images.counts.values()))
    classes = len(images.counts)
    lines = [
        "task:",
        "  source:",
        _line("    type: image_folder", "a folder for each class; also: parquet, numpy, torchvision"),
        _line(
            f"    path: {scalar(path_from(images.folder.absolute(), folder))}",
            f"{classes} classes, {counts} images each",
        ),
    ]
    if images.unlabelled is not None:
        count = f"{images.unlabelled_count:,} images without a label"
        lines.append(_line(f"    unlabelled: {scalar(images.unlabelled)}", f"the folder of {count}"))
    if images.test_folder is not None:
        path = path_from(images.test_folder.absolute(), folder)
        shown = shown_counts(list(images.test_counts.values()))
        lines += [
            "  test_source:",
            "    type: image_folder",
            _line(f"    path: {scalar(path)}", f"the test split alone, {shown} images a class"),
        ]
    side = images.stored_side
    size = images.total * images.channels * side * side
    storage = "encoded" if size > _LARGE else "raw"
    said = "as PNG: less disk, slower" if storage == "encoded" else f"{size / 1e6:,.1f} MB; encoded: less disk, slower"
    lines += [
        "  image:",
        _line(
            f"    size: {side}", f"pixels; scaled until it is covered, the middle cut out (found: about {images.side})"
        ),
        _line(f"    channels: {images.channels}", "1: grey, 3: RGB"),
        _line(f"    storage: {storage}", said),
        *_split_lines(splits, images),
    ]
    return lines


def _split_lines(splits: SplitSpec, images: Images) -> list[str]:
    if splits.train_labelled == 0:
        return [
            _line("  splits:", "no class has an image: a task without labels"),
            "    train_labelled: 0",
            "    probe: 0",
            "    validation: 0",
            "    test: 0",
            _line("    train_unlabelled: null", "all images"),
        ]
    smallest = min(images.counts, key=lambda name: images.counts[name])
    test = "all of the test source" if splits.test is None else "seen by evaluate alone"
    return [
        _line("  splits:", f"images of each class; the smallest, {smallest}, has {images.counts[smallest]:,}"),
        _line(f"    train_labelled: {splits.train_labelled}", "what every student is trained on"),
        _line(f"    probe: {splits.probe}", "ranks the teachers, with the former"),
        _line(f"    validation: {splits.validation}", "chooses the set of teachers, with both"),
        _line(f"    test: {scalar(splits.test)}", test),
        _line("    train_unlabelled: null", "in total; null: all the rest, used without labels"),
    ]


def _training_lines(images: Images, splits: SplitSpec, gpus: int, name: str) -> list[str]:
    taught, labelled = batch_sizes(splits, len(images.counts), images.total)
    epochs = epochs_for(splits, len(images.counts), images.total)
    student = "small_cnn" if images.stored_side <= 64 else "torchvision:resnet18"
    workers = 1 << (min(gpus, 4, taught, labelled).bit_length() - 1) if gpus else 1
    lines = [
        "distill:",
        "  student:",
        _line(f"    name: {student}", "also: resnet8, resnet20, mlp, torchvision:NAME, your_module:callable"),
        "  loop:",
        _line(f"    epochs: {epochs}", "passes over the images that teachers teach"),
        _line(f"    batch_size: {taught}", "images that teachers teach in a step"),
        _line(f"    labelled_batch: {labelled}", "labelled images in a step"),
        "  augment:",
        _line(f"    shift: {max(1, images.stored_side // 14)}", "pixels, at random, in each direction"),
        _line("    flip: false", "true where a mirrored image is of the same class"),
        "  resources:",
        _line(f"    num_workers: {workers}", "data-parallel processes; 0: in this process"),
    ]
    if gpus:
        lines += [
            "    gpus_per_worker: 1",
            "assess:",
            _line("  resources: {gpus: 0.25}", "four teachers share a GPU"),
            "amalgamate:",
            "  resources: {gpus: 0.25}",
        ]
    model = "faculty-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    lines += [
        "evaluate:",
        _line("  seeds: 1", "3 give a spread: every training is repeated"),
        _line(
            "  controls: [no_teacher, best_single]", "the same student taught by nobody, and by the best teacher alone"
        ),
        "register:",
        _line(f"  name: {scalar(model)}", "the model in the registry; it must beat no teacher"),
        "tracking:",
        _line("  uri: null", "MLflow: http://host:5000; null: MLFLOW_TRACKING_URI, or a database in the run folder"),
    ]
    return lines


def scalar(value: Any) -> str:
    """Return a value as YAML that stands in one line and is read back as the same value."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def path_from(path: Path, folder: Path) -> str:
    """Return a path relative to `folder` where it lies under it, else as it is."""
    return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)


def _line(text: str, comment: str = "") -> str:
    return f"{text:<{_COLUMN - 2}}  # {comment}" if comment else text


def given_by_name(values: Sequence[str] | None) -> Mapping[str, str]:
    """Return what options give for a teacher: ``NAME=VALUE``, or ``VALUE`` for all (under the name "")."""
    found: dict[str, str] = {}
    for value in values or ():
        name, separator, rest = value.partition("=")
        found[name if separator else ""] = rest if separator else value
    return found

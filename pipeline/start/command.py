"""What `faculty init` does: look, propose, check that the result loads, write, and say what comes next."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from pipeline.data.whole import replacing
from pipeline.errors import ConfigError, UserError
from pipeline.models.files import missing
from pipeline.models.spec import TRUSTED_FACTORIES
from pipeline.reference.command import schema_text
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.start.images import Images, look_at_images
from pipeline.start.splits import propose_splits, shown_counts
from pipeline.start.teachers import Ask, Draft, draft_teachers
from pipeline.start.text import SCHEMA, given_by_name, settings_text, zoo_text


@dataclass(frozen=True)
class Wanted:
    """What the user said.

    Attributes
    ----------
    images : Path or None
        Folder of images; asked for where a terminal is there.
    zoo : Path or None
        A zoo file that is there.
    teachers : sequence of Path
        Weight files, for a zoo file that is written beside `out`.
    out : Path
        The settings file to write.
    name : str or None
        Of the run; by default the image folder's.
    labels : int or None
        Labelled images a class to train on.
    unlabelled : str or None
        Folder of images without labels.
    architectures, classes : sequence of str
        ``TEACHER=VALUE``, or ``VALUE`` for all.
    force : bool
        Whether files that are there may be overwritten.
    """

    images: Path | None
    zoo: Path | None = None
    teachers: Sequence[Path] = ()
    out: Path = Path("run.yaml")
    name: str | None = None
    labels: int | None = None
    unlabelled: str | None = None
    architectures: Sequence[str] = ()
    classes: Sequence[str] = ()
    force: bool = False


def initialise(wanted: Wanted, display: Display | None = None, *, interactive: bool | None = None) -> int:
    """Write settings with comments for a folder of images and a zoo; return the exit code.

    Parameters
    ----------
    wanted : Wanted
    display : Display, optional
    interactive : bool, optional
        Whether questions may be asked; by default where input and output are a terminal.

    Raises
    ------
    UserError
        When something needed is not given and can't be asked for, can't be read, or would be overwritten.
    """
    display = display or Display()
    if interactive is None:
        interactive = sys.stdin.isatty() and display.console.is_terminal
    ask: Ask | None = (
        (lambda question: display.console.input(f"  {escape(question)}\n  > ").strip()) if interactive else None
    )
    folder = _folder(wanted, ask)
    zoo, teachers = _teachers(wanted, ask)
    made = [wanted.out, wanted.out.with_name(SCHEMA)] + ([] if zoo is not None else [wanted.out.with_name("zoo.yaml")])
    _check_free(made, wanted.force)
    with display.working("looking at the images"):
        images = look_at_images(folder, wanted.unlabelled)
    _tell(images, display)
    splits = propose_splits(images.counts, test_apart=images.test_folder is not None, labels=wanted.labels)
    drafts: list[Draft] = []
    if zoo is None:
        zoo = wanted.out.with_name("zoo.yaml")
        with display.working("looking at the teachers") if ask is None else contextlib.nullcontext():
            drafts = draft_teachers(
                teachers,
                architectures=given_by_name(wanted.architectures),
                classes=given_by_name(wanted.classes),
                side=images.stored_side,
                channels=images.channels,
                ask=ask,
            )
    name = wanted.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.absolute().name).strip("-_.") or "task"
    text = settings_text(name, images, splits, zoo, wanted.out, gpus=_gpus(), trusted=_trusted(drafts))
    told = {wanted.out: text, wanted.out.with_name(SCHEMA): schema_text()}
    if drafts:
        told[zoo] = zoo_text(drafts, zoo.absolute().parent)
    _write(told, wanted.out)
    return _closing(wanted.out, zoo, drafts, display)


def _folder(wanted: Wanted, ask: Ask | None) -> Path:
    given = wanted.images
    if given is None and ask is not None:
        answer = ask("Folder of images, with a folder for each class?")
        given = Path(answer).expanduser() if answer else None
    if given is None:
        raise UserError("--images is not given; name the folder that holds a folder of images for each class")
    return given


def _teachers(wanted: Wanted, ask: Ask | None) -> tuple[Path | None, list[Path]]:
    """Return the zoo file, or the weight files that a zoo is written for."""
    zoo, teachers = wanted.zoo, list(wanted.teachers)
    if zoo is None and not teachers and ask is not None:
        given = [
            Path(part).expanduser()
            for part in ask("Zoo file, or weight files of teachers (with blanks between)?").split()
        ]
        if len(given) == 1 and given[0].suffix in (".yaml", ".yml", ".parquet"):
            zoo = given[0]
        else:
            teachers = given
    if zoo is not None and teachers:
        raise UserError("--zoo and --teachers are two zoos; keep one")
    if zoo is None and not teachers:
        raise UserError("no teachers: give a zoo file with --zoo, or weight files with --teachers (may be repeated)")
    if zoo is not None and not zoo.is_file():
        raise UserError(f"--zoo {zoo}: there is no such file; a zoo for weight files is written with --teachers")
    return zoo, teachers


def _check_free(files: Sequence[Path], force: bool) -> None:
    parent = files[0].absolute().parent
    if not parent.is_dir():
        raise UserError(f"--out {files[0]}: the folder {parent} does not exist; make it first")
    there = [file for file in files if file.exists() and file.name != SCHEMA]
    if there and not force:
        raise UserError(f"{there[0]} exists; --force overwrites it, --out writes to another file")


def _tell(images: Images, display: Display) -> None:
    classes = f"{len(images.counts)} classes with {shown_counts(list(images.counts.values()))} images each"
    extra = f", {images.unlabelled_count:,} without a label" if images.unlabelled is not None else ""
    extra += f", a test folder {images.test_folder.name}" if images.test_folder is not None else ""
    kind = "grey" if images.grey else "colour"
    display.note(escape(f"images      {classes}{extra}; {kind}, about {images.side} pixels"))
    for problem in images.unreadable[:3]:
        display.warn(escape(f"can't be read: {problem}"))
    if len(images.unreadable) > 3:
        display.warn(f"and {len(images.unreadable) - 3} more of those that were opened")


def _gpus() -> int:
    import torch  # costs seconds

    return torch.cuda.device_count()


def _trusted(drafts: Sequence[Draft]) -> list[str]:
    """Return the modules whose code the user has named as an architecture, where they are not trusted anyway."""
    modules = [str(draft.source.get("factory", "")).partition(":")[0] for draft in drafts if draft.complete]
    own = [module for module in modules if module and not f"{module}.".startswith(TRUSTED_FACTORIES)]
    return sorted({module.split(".")[0] + "." for module in own})


def _write(told: dict[Path, str], out: Path) -> None:
    """Write the files when the settings among them load."""
    with tempfile.NamedTemporaryFile("w", dir=out.absolute().parent, suffix=".yaml", encoding="utf-8") as trial:
        trial.write(told[out])
        trial.flush()
        try:
            load_settings([trial.name])
        except ConfigError as error:  # a --name that is none, say
            raise ConfigError(str(error).replace(trial.name, str(out))) from None
    for path, text in told.items():
        with replacing(path) as sink:
            sink.write(text.encode())


def _closing(out: Path, zoo: Path, drafts: Sequence[Draft], display: Display) -> int:
    from pipeline.models.zoo import load_zoo

    display.note(escape(f"settings    {out}"))
    check = " ".join([f"faculty zoo check {shlex.quote(str(zoo))}", *(f"--trust {name}" for name in _trusted(drafts))])
    unfinished = [draft.name for draft in drafts if not draft.complete]
    if unfinished:
        display.warn(escape(f"teachers    {zoo}: replace FILL_IN for {', '.join(unfinished)}, and look at each CHECK"))
        display.note(escape(f"then        {check}"))
        return 0
    try:
        found = load_zoo(zoo)
    except ConfigError as error:
        raise UserError(f"{out} is written, but its zoo is not valid: {error}") from None
    absent = [name for name in found.names[:1000] if (path := found[name].path) is not None and missing(path)]
    display.note(escape(f"teachers    {zoo}: {len(found)}" + (", look at each CHECK in it" if drafts else "")))
    if absent:
        display.warn(escape(f"{zoo}: the weights of {', '.join(absent[:5])}{' …' * (len(absent) > 5)} are not there"))
    settings = shlex.quote(str(out))
    display.note(escape(f"next        {check}"))
    display.note(escape(f"            faculty plan -c {settings}"))
    display.note(escape(f"            faculty run -c {settings}"))
    return 0

"""A sweep: many runs that differ in some settings, the best of which becomes the run's student.

Everything that trials share lies in the run folder under what it depends on: images, what teachers say, students. A
trial so costs what it alone needs, and the best one is found there again by the stages that come after.
"""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import Settings
from pipeline.errors import Interrupted
from pipeline.report.console import Display
from pipeline.settings_files import apply, load_settings
from pipeline.stages import tables
from pipeline.stages.artefacts import RunFolder, write_json, write_settings
from pipeline.stages.base import Run
from pipeline.stages.ingest import Ingest
from pipeline.stages.recording import optional
from pipeline.stages.registered import zoo_of
from pipeline.stages.sweep_rows import SweepFolder, TrialRow, compared
from pipeline.stages.sweep_space import check_sweep, make_search, numbers_of, sweep_key, trial_settings
from pipeline.stages.sweep_training import advance, delete_stores, images_of, with_settings
from pipeline.stages.sweep_trials import Trials
from pipeline.strict import load_yaml
from pipeline.sweep_spec import SweepSpec

_SHOWN = 10  # trials in the table


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes
    ----------
    folder : Path
    rows : tuple of TrialRow
    best : TrialRow or None
        None where no trial came to its end.
    """

    folder: Path
    rows: tuple[TrialRow, ...]
    best: TrialRow | None


def sweep_files(files: Sequence[str | Path], overrides: Sequence[str], *, verbose: bool = False) -> Swept:
    """Read settings and run the sweep that they describe; an interruption becomes one line."""
    words = [word for file in files for word in ("-c", str(file))]
    given = " ".join(["", *map(shlex.quote, [*words, *(one for one in overrides if not one.startswith("sweep."))])])
    from pipeline.cluster.in_job import refuse_passing_folder

    settings = load_settings(files, overrides)
    refuse_passing_folder(settings.run_dir)
    return sweep(settings, file=_holder(files), given=given, verbose=verbose)


def _holder(files: Sequence[str | Path]) -> str:
    """Return the last file with a section `sweep`: the one to name in errors."""
    found = ""
    for file in files:
        data = load_yaml(file)
        if isinstance(data, dict) and "sweep" in data:
            found = str(file)
    return found


def sweep(
    settings: Settings, *, file: str = "", given: str = "", verbose: bool = False, display: Display | None = None
) -> Swept:
    """Run the trials that have not ended yet, and hand on the best.

    Parameters
    ----------
    settings : Settings
        With a section `sweep`.
    file : str
        That holds it, for errors.
    given : str
        What the command line has after its name, for the hint how to go on.
    verbose : bool
        Show Ray's and MLflow's logs.
    display : Display, optional

    Raises
    ------
    UserError
        For input that can't be used, before any compute.
    Interrupted
        When the user stops it; the same call goes on.
    """
    spec, display = check_sweep(settings, file), display or Display()
    files = RunFolder(settings.run_dir)
    files.pull("registered.json", "registered.parquet", "registered.cards.arrow")
    zoo = zoo_of(settings, display)
    files.prepare()
    with files.lock(display):
        own = trial_settings(settings, {})
        write_settings(files.root / "settings.yaml", own.dump())
        run = Run(settings=own, files=files, display=display, zoo=zoo, until="distill", verbose=verbose)
        content = [dict(Ingest().inputs(run)), {name: run.fingerprint(name) for name in zoo.names}]
        folder = SweepFolder(files.root / "sweep" / sweep_key(settings, spec, content))
        files.pull(*(f"sweep/{folder.root.name}/trials/*/{name}" for name in ("row.json", "member.json")))
        folder.begin(spec.model_dump(mode="json"))
        with run:
            return _run(run, spec, folder, given)


def _run(run: Run, spec: SweepSpec, folder: SweepFolder, given: str) -> Swept:
    run.open_tracker()
    known = {name: row for name, row in folder.rows().items() if row.final}
    key = folder.root.name
    delete_stores(run, ".sweep-*")  # Tune's own state, of a call that was killed: whole or not, rows are what counts
    display = run.display
    display.note(
        f"sweep {key}: {spec.count} trials by {spec.search} search over {len(spec.space)} settings, {spec.metric}"
        + (f"; {len(known)} have ended before" if known else "")
    )
    with run.tracker.run("sweep", key=f"sweep-{key}", tags={"sweep": key}) as tracker:
        with optional("the sweep"):
            tracker.params({"sweep": spec.model_dump(mode="json", exclude={"space"}), "space": _written(spec)})
            tracker.artifact(folder.root / "sweep.yaml")
        within = run.within(tracker)
        trials = Trials(within, spec, folder, make_search(spec), known)
        try:
            _go(within, spec, trials)
        except KeyboardInterrupt:
            rows = tuple(trials.rows.values())
            folder.finish(spec, rows, 0)
            ended = sum(row.final for row in rows)
            raise Interrupted(
                f"interrupted; {ended} of {spec.count} trials have ended and are kept in {folder.root}, the same "
                "command goes on with the others"
            ) from None
        rows = tuple(trials.rows.values())
        best = folder.finish(spec, rows, images_of(within, spec, rows))
        _record(within, spec, folder, rows, best)
        _show(run, spec, rows)
    if best is None:
        failed = [row for row in rows if row.error]
        display.warn(f"no trial came to its end: {escape(failed[0].error or '') if failed else 'none was run'}")
    else:
        _hand_on(run, spec, folder, best, len(rows), given)
    return Swept(folder.root, rows, best)


def _go(run: Run, spec: SweepSpec, trials: Trials) -> None:
    """Run what is left of the trials."""
    if spec.of_student:
        from pipeline.stages.sweep_fit import fit_trials

        trials.plan()
        fit_trials(run, spec, trials, quiet(run.display))
        return
    # Teachers are run over the labelled images once, for all trials.
    advance(with_settings(run, run.settings), "assess")
    with run.display.bar("trials", spec.count) as bar:
        trials.judge_all(bar, quiet(run.display))


def quiet(display: Display) -> Display:
    """Return a display for what goes on beneath a bar: it says nothing."""
    return Display(Console(file=io.StringIO(), width=display.console.width))


def _written(spec: SweepSpec) -> dict[str, str]:
    """Return each domain in a few words."""
    found = {}
    for path, domain in spec.space.items():
        told = domain.model_dump(mode="json", exclude_none=True)
        kind = told.pop("dist")
        found[path] = f"{kind} {told.get('values', '')}".strip() if kind == "choice" else f"{kind} {told}"
    return found


def _record(run: Run, spec: SweepSpec, folder: SweepFolder, rows: Sequence[TrialRow], best: TrialRow | None) -> None:
    """Draw the pictures, and record what came out."""
    with optional("the pictures of the sweep"):
        draw(spec, rows, folder.root)
    with optional("the sweep's result"):
        states = [row.state for row in rows]
        numbers: dict[str, float] = {f"trials.{state}": states.count(state) for state in ("done", "stopped", "failed")}
        if best is not None and best.metric is not None:
            numbers[f"best.{spec.metric}"] = best.metric
            run.tracker.tags({"best": best.trial} | {f"best.{path}": value for path, value in best.values.items()})
        run.tracker.metrics(numbers)
        for name in ("trials.parquet", "best.json", "best.yaml", "importance.json"):
            if (folder.root / name).exists():
                run.tracker.artifact(folder.root / name)
        for path in sorted(folder.root.glob("*.png")):
            run.tracker.artifact(path)


def draw(spec: SweepSpec, rows: Sequence[TrialRow], folder: Path) -> None:
    """Draw `parallel` and `importance`, each as SVG and PNG, and write `importance.json`."""
    from pipeline.report.sweep_plots import LEAST, Axis, importances, plot_importances, plot_parallel

    kept, outcome, epoch = compared(rows)
    if len(kept) < 2:
        return
    plain = [{"values": row.values} for row in kept]
    axes = []
    for path, domain in spec.space.items():
        labels = tuple(_label(one) for one in domain.ends) if domain.dist == "choice" else ()
        axes.append(Axis(path, numbers_of(spec.space, plain, path), labels, domain.log))
    title = spec.metric if epoch is None else f"{spec.metric} after {epoch} epochs"
    found = importances(axes, outcome)
    told = {
        "metric": spec.metric,
        "epoch": epoch,
        "trials": len(kept),
        "settings": [vars(one) for one in found],
        "note": "" if found else f"fewer than {LEAST} trials, or all with the same outcome: nothing can be said",
    }
    write_json(folder / "importance.json", told)
    for ending in (".svg", ".png"):
        plot_parallel(axes, outcome, folder / f"parallel{ending}", title=title, best=spec.direction)
        if found:
            plot_importances(found, folder / f"importance{ending}", title=title, trials=len(kept))


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name") or value.get("type") or value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _show(run: Run, spec: SweepSpec, rows: Sequence[TrialRow]) -> None:
    """Show the best trials, and what became of the others."""
    sign = -1.0 if spec.direction == "max" else 1.0
    order = {"done": 0, "stopped": 1, "failed": 2}

    def place(row: TrialRow) -> tuple[int, float, str]:
        return order[row.state], math.inf if row.metric is None else sign * row.metric, row.trial

    names = [path.rpartition(".")[2] for path in spec.space]
    titles = [path if names.count(name) > 1 else name for path, name in zip(spec.space, names, strict=True)]
    shown = tables.table("trial", "state", spec.metric, "epochs", "s", *titles, title=f"{len(rows)} trials")
    for row in sorted(rows, key=place)[:_SHOWN]:
        values = [_short_value(row.values.get(path)) for path in spec.space]
        metric = "" if row.metric is None else f"{row.metric:.4f}"
        shown.add_row(row.trial, row.state, metric, str(row.epochs or ""), f"{row.seconds:.1f}", *map(escape, values))
    run.display.table(shown)
    for row in [row for row in rows if row.state == "failed"][:3]:
        run.display.warn(f"trial {row.trial} failed: {escape(row.error or '')}")


def _short_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _label(value)


def _hand_on(run: Run, spec: SweepSpec, folder: SweepFolder, best: TrialRow, trials: int, given: str) -> None:
    """Say which trial is best, and how sure that is; make its student the run's."""
    display, metric = run.display, best.metric if best.metric is not None else float("nan")
    about = json.loads((folder.root / "best.json").read_text(encoding="utf-8"))
    doubt = ""
    if "standard_error" in about:
        doubt = (
            f" ± {about['standard_error']:.4f} on {about['images']} images; {about['within_one_error']} of {trials} "
            "trials are as good within that"
        )
    display.note(f"best trial {best.trial}: {spec.metric} {metric:.4f}{doubt}")
    overlay = folder.root / "best.yaml"
    if spec.of_student and spec.promote:
        chosen = apply(run.settings, best.values | spec.retrain)
        winner = with_settings(run, chosen)
        advance(winner, "distill")
        found = winner.records["distill"].summary
        told = f", validation accuracy {found['validation_accuracy']:.4f}" if "validation_accuracy" in found else ""
        if found.get("guard", {}).get("kept") == "no_teacher":
            told += "; the guard took the one without teachers, which is clearly better"
        how = "trained anew" if spec.retrain or spec.population else "taken over"
        display.note(f"student {how}: {winner.folder('distill')}{told}")
        write_json(folder.root / "promoted.json", {"trial": best.trial, "key": winner.records["distill"].key})
    display.note(f"settings of the best trial: {overlay}")
    display.note(f"go on with: faculty evaluate{given} -c {overlay}")

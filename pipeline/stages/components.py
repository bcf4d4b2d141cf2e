"""Component nets between teachers and student: teachers that share a sub-task teach one net of it (AKA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.mirror import here
from pipeline.errors import ConfigError, StageError
from pipeline.places import join
from pipeline.stages import training
from pipeline.stages.amalgamate import assign_carried, ground_cost, histograms, speaker, write_assignments
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Run
from pipeline.stages.heads import student_classes, subtasks_of
from pipeline.stages.ingest import table_path
from pipeline.stages.probe import classes_of
from pipeline.stages.recording_trainings import TrainingRuns
from pipeline.stages.speaking import SpeakPayload, speak, speak_all, spoken, views_seen
from pipeline.stages.teachers import save_tensors, table_of

if TYPE_CHECKING:
    import torch

    from pipeline.amalgamation.ambiguity import Assignment
    from pipeline.amalgamation.subtasks import Source, SubTask
    from pipeline.engine.spec import Arm, LoopSpec
    from pipeline.engine.teaching import Speaker
    from pipeline.models.teacher import Teacher

_WHOLE = "whole"  # what a single task is called in the names of folders


@dataclass(frozen=True)
class ComponentReference:
    """A trained component net, as a teacher of the student.

    Attributes
    ----------
    name, folder : str
    gpu : bool
        Whether it has a GPU, or a share of one.
    """

    name: str
    folder: str
    gpu: bool

    def load(self) -> Teacher:
        """Load it as a frozen teacher."""
        import torch

        from pipeline.models.student import load_student, saved_classes
        from pipeline.models.teacher import Teacher

        folder = here(self.folder)
        student = load_student(folder, trusted_factories=None)
        teacher = Teacher(
            student.net,
            name=self.name,
            classes=saved_classes(folder),
            preprocessing=student.preprocessing.spec,
        )
        return teacher.to("cuda" if self.gpu and torch.cuda.is_available() else "cpu")


def component_name(subtask: SubTask) -> str:
    """Return what the component net of a sub-task is called."""
    return f"component-{subtask.name or _WHOLE}"


def component_references(run: Run) -> dict[str, ComponentReference]:
    """Return the component nets of the finished stage, by name."""
    folders = run.records["amalgamate"].summary.get("components", {})
    return {name: ComponentReference(name, str(run.files.root / folder), False) for name, folder in folders.items()}


def amalgamate_components(run: Run, names: Sequence[str], folder: Path) -> tuple[str, dict[str, Any]]:
    """Assign, train the component nets side by side, and let them speak.

    Returns
    -------
    digest : str
        Of what the student is taught.
    summary : dict
        ``shares``: by sub-task how many images each teacher teaches; ``components``: folder of each component net.
    """
    from pipeline.amalgamation.subtasks import group
    from pipeline.engine.arms import TAUGHT

    subtasks, view = subtasks_of(run), view_of(run)
    known = [classes_of(run, name) for name in names]
    try:
        sources = group(subtasks, known) if view == "classes" else {}
    except ValueError as error:
        raise ConfigError(f"amalgamate.mode=components: {error}") from None
    speak(run, names, raw=True)
    found: dict[str, tuple[Sequence[str], Any, Any]] = {}
    arms: dict[str, Arm] = {}
    shares: dict[str, Any] = {}
    pictured: dict[str, Any] = {}
    split = table_of(run).split(*TAUGHT)
    for subtask in subtasks:
        own = sources.get(subtask.name, [])
        sharing = [names[source.teacher] for source in own] if view == "classes" else list(names)
        if view == "classes":
            assignment = _assign_by_names(run, subtask, own, sharing)
            taught_by = _speakers_by_names(run, subtask, own, sharing)
        else:
            assignment = assign_carried(run, sharing)
            taught_by = [speaker(run, name) for name in sharing], [ground_cost(run, name) for name in sharing]
        arms[component_name(subtask)] = _arm(run, subtask, *taught_by, assignment, split.ids)
        found[subtask.name] = sharing, assignment.teacher, assignment.ambiguity
        counts = assignment.teacher.bincount(minlength=len(sharing)).tolist()
        shares[subtask.name or _WHOLE] = dict(zip(sharing, counts, strict=True))
        pictured[subtask.name or _WHOLE] = histograms(
            sharing, assignment.ambiguity, assignment.teacher, assignment.target.argmax(1), subtask.classes
        )
    write_assignments(folder, split.ids, found)
    write_json(folder / "histograms.json", pictured)
    _train(run, subtasks, arms)
    digest = _teaching_of_components(run, subtasks, arms, split.ids, folder)
    root = run.files.root
    places = {name: str(Path(arm.folder).relative_to(root)) for name, arm in arms.items()}
    return digest, {"shares": shares, "components": places}


def view_of(run: Run) -> str:
    """Return how teachers say what they know of a sub-task, see `ComponentPart.view`."""
    given = run.settings.amalgamate.components.objective.view
    named = run.settings.task.subtasks is not None
    if given == "carried" and named:
        raise ConfigError("amalgamate.components.objective.view=carried: needs a single task; set it to classes")
    return given or ("classes" if named else "carried")


def _assign_by_names(run: Run, subtask: SubTask, sources: Sequence[Source], sharing: Sequence[str]) -> Assignment:
    from safetensors import safe_open

    from pipeline.amalgamation.subtasks import assign_subtask
    from pipeline.engine.arms import TAUGHT
    from pipeline.engine.spec import RAW

    logits, images = [], len(table_of(run).split(*TAUGHT))
    for name in sharing:
        with safe_open(here(spoken(run, name) / RAW), "pt") as handle:
            logits.append(handle.get_slice("logits")[:images].float())  # the first view is the image as it is
    return assign_subtask(logits, sources, len(subtask.classes))


def _speakers_by_names(
    run: Run, subtask: SubTask, sources: Sequence[Source], sharing: Sequence[str]
) -> tuple[list[Speaker], list[torch.Tensor]]:
    """Write what teachers say of a sub-task whose classes they know by name; return them and their ground costs."""
    import torch
    from safetensors import safe_open

    from pipeline.amalgamation.subtasks import subtask_distribution
    from pipeline.engine.spec import RAW, SPOKEN
    from pipeline.engine.teaching import Speaker

    speakers, size = [], len(subtask.classes)
    for name, source in zip(sharing, sources, strict=True):
        keyed = {"classes": subtask.classes, "spoken": spoken(run, name).name}
        home = run.part("subtasks", f"{subtask.name or _WHOLE}-{name}", keyed)
        if not here(home / SPOKEN).exists():
            with safe_open(here(spoken(run, name) / RAW), "pt") as handle:
                p = subtask_distribution(handle.get_tensor("logits").float(), source, size).half()
            save_tensors(home, SPOKEN, {"p": p, "carried": p.clone()})
        speakers.append(Speaker(name, classes_of(run, name), 1.0, str(home)))
    return speakers, [1 - torch.eye(size)] * len(sharing)


def _arm(
    run: Run,
    subtask: SubTask,
    speakers: Sequence[Speaker],
    costs: Sequence[torch.Tensor],
    assignment: Assignment,
    ids: Sequence[str],
) -> Arm:
    """Describe the training of one component net."""
    import torch

    from pipeline.engine.objective_spec import objective_of
    from pipeline.engine.teaching import Teaching

    settings, label, view = run.settings.amalgamate.components, subtask.name or _WHOLE, view_of(run)
    keyed = {"classes": subtask.classes, "spoken": [Path(one.folder).name for one in speakers], "view": view}
    folder = run.part("subtasks", label, keyed)
    shares = torch.nn.functional.one_hot(assignment.teacher, len(speakers)).t().float()
    views = run.settings.distill.augment.views
    digest = Teaching.save(folder, ids=ids, speakers=speakers, costs=costs, shares=shares, views=views)
    return training.arm(
        run,
        component_name(subtask),
        run.settings.seed,
        folder,
        digest,
        objective=objective_of(component=settings.objective.model_dump() | {"view": view}),
        student=settings.student or run.settings.distill.student,
        loop=settings.loop,
        part=label,
    )


def _train(run: Run, subtasks: Sequence[SubTask], arms: dict[str, Arm]) -> None:
    """Train the component nets that are missing: one data-parallel run each, side by side as the cluster allows."""
    missing = {name: arm for name, arm in arms.items() if not arm.done}
    loop = run.settings.amalgamate.components.loop or run.settings.distill.loop
    storage = {join(run.files.storage, _job_name(name, arm)): [arm] for name, arm in missing.items()}
    with TrainingRuns(run, list(arms.values()), loop=loop.model_dump(mode="json"), storage=storage) as runs:
        if missing:
            _fit(run, subtasks, missing, loop, runs)


def _job_name(name: str, arm: Arm) -> str:
    return f"{name}-{digest_of(arm.name)[:12]}"


def _fit(run: Run, subtasks: Sequence[SubTask], missing: dict[str, Arm], loop: LoopSpec, runs: TrainingRuns) -> None:
    from pipeline.cluster.many import FitJob, fit_many
    from pipeline.engine.arms import train_arms

    workers, classes = run.settings.distill.resources, {component_name(one): one.qualified for one in subtasks}
    jobs = [
        FitJob(
            _job_name(name, arm),
            training.payload_of(run, [arm], loop=loop, classes=classes[name], heads=()),
        )
        for name, arm in missing.items()
    ]
    if workers.num_workers:
        run.open_cluster()
    run.files.push()
    done = dict.fromkeys((job.name for job in jobs), 0)
    trained = dict(zip(done, missing.values(), strict=True))
    images = {job: training.images_of(run, arm, loop) for job, arm in trained.items()}
    with run.display.bar(
        "components", len(jobs) * loop.epochs, "images", work=float(sum(images.values()) * loop.epochs)
    ) as advance:

        def on_report(job: str, metrics: dict[str, Any]) -> None:
            if "epoch" not in metrics:  # of a checkpoint within an epoch
                return
            epoch, title = int(metrics["epoch"]), job.rpartition("-")[0]
            for step in range(done[job], epoch):
                took = metrics.get("seconds") if step == epoch - 1 else 0.0
                advance(1, f"{title}, loss {metrics['loss']:.3f}", images[job], took)
            done[job] = max(done[job], epoch)
            runs.report(trained[job], metrics)

        results = fit_many(
            train_arms,
            jobs,
            num_workers=workers.num_workers,
            storage=run.files.storage,
            resources_per_worker=training.resources_per_worker(run),
            use_gpu=workers.gpus_per_worker > 0,
            max_failures=workers.max_failures,
            on_report=on_report,
            on_term=True,
            verbose=run.verbose,
        )
    for name, (_, error) in zip(missing, results, strict=True):
        if error is None:  # the others are none the worse for one that failed
            runs.end(missing[name])
    for name, (_, error) in zip(missing, results, strict=True):
        if error is not None:
            raise StageError(f"amalgamate: {name} could not be trained: {error}")


def _teaching_of_components(
    run: Run, subtasks: Sequence[SubTask], arms: dict[str, Arm], ids: Sequence[str], folder: Path
) -> str:
    """Let the component nets speak of the training images; return the digest of what the student is taught."""
    import torch
    from safetensors.torch import load_file

    from pipeline.engine.spec import RAW, SPOKEN
    from pipeline.engine.teaching import Speaker, Teaching

    settings, classes = run.settings.amalgamate, student_classes(run)
    payloads = {
        name: SpeakPayload(
            ComponentReference(name, arm.folder, settings.resources.gpus > 0),
            str(table_path(run)),
            str(run.part("spoken", name, {"trained": Path(arm.folder).name} | views_seen(run))),
            settings.batch_size,
            None,
            True,
            run.settings.distill.augment,
        )
        for name, arm in arms.items()
    }
    speak_all(run, payloads)
    speakers, costs = [], []
    for subtask in subtasks:
        name = component_name(subtask)
        places = torch.tensor([classes.index(one) for one in subtask.qualified])
        home = folder / f"{name}-{Path(payloads[name].folder).name}"
        p = load_file(here(Path(payloads[name].folder) / SPOKEN))["p"]
        save_tensors(home, SPOKEN, {"p": p, "carried": p.new_zeros(len(p), len(classes)).index_copy(1, places, p)})
        if not (home / RAW).exists():
            (home / RAW).hardlink_to(here(Path(payloads[name].folder) / RAW))
        speakers.append(Speaker(name, subtask.qualified, 1.0, str(home)))
        costs.append(1 - torch.nn.functional.one_hot(places, len(classes)).float())
    shares = torch.full((len(speakers), len(ids)), 1 / len(speakers))
    views = run.settings.distill.augment.views
    digest = Teaching.save(folder, ids=ids, speakers=speakers, costs=costs, shares=shares, views=views)
    return digest_of([digest, list(arms)])

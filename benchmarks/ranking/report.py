"""Scores of every teacher on every task, and how well each score ranks the students that the teachers make.

python -m benchmarks.ranking score --work DIR     writes scores.parquet, from what `build` has left in DIR
python -m benchmarks.ranking report               writes benchmarks/results/ranking.{json,md,svg} from the tables
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import weightedtau

from benchmarks.ranking.build import (
    NO_TEACHER,
    TRUTH,
    Said,
    outputs_of,
    reach_code,
    table_of,
    teachers,
    write_zoo,
)
from benchmarks.ranking.world import CALIBRATION, TASKS, Task
from benchmarks.results import RESULTS, goal, write
from pipeline.assessment.probe import Said as SaidOfProbe
from pipeline.assessment.probe import score_labelled
from pipeline.assessment.unlabelled import information
from pipeline.data.table import ImageTable
from pipeline.models.class_names import class_names
from pipeline.models.sources import load_teacher
from pipeline.models.zoo import Zoo, load_zoo
from pipeline.transport.bridge import fit_bridge, given_bridge
from pipeline.transport.cost import transport_gain
from pipeline.transport.names import names_cost

SCORES = Path(__file__).parent / "scores.parquet"
OURS, GAIN, COST = "score", "transport_gain", "transport_cost"
# Ours too, or parts of it; every other score is a baseline.
NOT_BASELINES = (OURS, "bridge_gain", GAIN, "information")
TITLES = {
    OURS: "**combined score (ours)**",
    "bridge_gain": "bridge gain (ours)",
    GAIN: "transport gain (ours)",
    COST: "transport cost (negative)",
    "knn": "k-NN",
    "leep": "LEEP",
    "nce": "NCE",
    "logme": "LogME",
    "h_score": "H-score",
    "gbc": "GBC",
    "otce": "OTCE",
    "source_accuracy": "source accuracy",
    "num_parameters": "number of parameters",
    "information": "information, names (no labels)",
}


def score_teacher(
    work: Path, zoo: Zoo, parameters: int, task: Task, world: tuple[int, int], name: str
) -> dict[str, Any]:
    """Return every score of one teacher on one (budget, seed) of a task, by the functions that the product calls."""
    table = ImageTable.open(str(table_of(work, task, *world)))
    said = Said(outputs_of(work, name, task.name))
    split = table.split("train_labelled", "probe")
    logits, features = said.of(split.ids)
    fitted = torch.isin(
        torch.arange(len(split)), torch.tensor([split.ids.index(one) for one in table.split("train_labelled").ids])
    )
    spec, classes = zoo[name], len(table.classes)
    estimate, scores = score_labelled(
        SaidOfProbe(logits, features, split.labels, fitted, said.classifier_weight, parameters, spec.accuracy), classes
    )
    bridge = fit_bridge(
        "centres", logits=None, features=features[fitted], labels=split.labels[fitted], num_classes=classes
    )
    p = bridge.distribution(None, features[~fitted])
    scores["bridge_gain"] = transport_gain(p, split.labels[~fitted], bridge.M)
    unlabelled, seen = said.of(table.split("train_unlabelled").ids[:512])
    names = class_names(spec.classes) if isinstance(spec.classes, str) else spec.classes
    by_name = given_bridge(names_cost(names or (), table.classes))
    scores["information"] = information(by_name.carry(by_name.distribution(unlabelled, seen)))
    scores[COST] = -scores[COST]  # higher is better, as for all
    return {
        "task": task.name,
        "budget": world[0],
        "seed": world[1],
        "teacher": name,
        OURS: estimate.value,
        "score_low": estimate.low,
        "score_high": estimate.high,
        **scores,
    }


def score(arguments: list[str]) -> None:
    """Score every teacher on every task; write the table."""
    parser = argparse.ArgumentParser(description="Scores the benchmark's teachers.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    work = parser.parse_args(arguments).work.absolute()
    reach_code(work / "raw")
    zoo = load_zoo(write_zoo(work / "raw", work))
    trusted = ("pipeline.models.", "benchmarks.ranking.")
    parameters = {name: load_teacher(spec, trusted_factories=trusted).num_parameters for name, spec in zoo.items()}
    rows = [
        score_teacher(work, zoo, parameters[name], task, world, name)
        for task in (*CALIBRATION, *TASKS)
        for world in task.worlds
        for name in teachers()
    ]
    pq.write_table(pa.Table.from_pylist(rows), SCORES)
    print(f"{SCORES.name}: {len(rows)} rows")


def judge(scores: list[dict[str, Any]], truth: dict[tuple[str, int], dict[str, float]], name: str) -> dict[str, Any]:
    """Return how a score ranks the teachers of every task and budget: weighted τ and the regret of its first.

    A teacher that the score does not apply to comes last. The truth of a task and budget is a teacher's mean student
    over the seeds; the score is judged on each seed's labels.
    """
    found: dict[tuple[str, int, int], tuple[float, float]] = {}
    for key in sorted({(row["task"], row["budget"], row["seed"]) for row in scores}):
        accuracy = truth[key[:2]]
        rows = [row for row in scores if (row["task"], row["budget"], row["seed"]) == key]
        values = np.array([row[name] if row[name] is not None else np.nan for row in rows], dtype=float)
        values = np.where(np.isnan(values), np.nanmin(values) - 1, values)
        reached = np.array([accuracy[row["teacher"]] for row in rows])
        # Of teachers that share the first place any may be taken: the mean of them.
        regret = float(reached.max() - reached[values == values.max()].mean())
        found[key] = (float(weightedtau(values, reached)[0]), regret)
    tasks = {task for task, _, _ in found}
    by_task = {task: statistics.fmean(t for key, (t, _) in found.items() if key[0] == task) for task in sorted(tasks)}
    return {
        "score": name,
        "tau": statistics.fmean(tau for tau, _ in found.values()),
        "regret": statistics.fmean(regret for _, regret in found.values()),
        **{f"tau_{task}": value for task, value in by_task.items()},
        "worlds": {"/".join(map(str, key)): value for key, value in found.items()},
    }


def load() -> tuple[list[dict[str, Any]], dict[tuple[str, int], dict[str, float]]]:
    """Return the scores, and per (task, budget) every teacher's mean student accuracy over the seeds."""
    students: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in pq.read_table(TRUTH).to_pylist():
        world = students.setdefault((row["task"], row["budget"]), {})
        world.setdefault(row["teacher"], []).append(row["accuracy"])
    truth = {key: {name: statistics.fmean(v) for name, v in world.items()} for key, world in students.items()}
    return pq.read_table(SCORES).to_pylist(), truth


def report(arguments: list[str]) -> None:
    """Write the table, the goals and the plot."""
    scores, truth = load()
    judged = {task.name for task in TASKS}
    mine = [row for row in scores if row["task"] in judged]
    rows = sorted((judge(mine, truth, name) for name in TITLES), key=lambda row: -row["tau"])
    calibration = [row for row in scores if row["task"] not in judged]
    for row in rows:
        row["title"] = TITLES[row["score"]]
        row["tau_calibration"] = judge(calibration, truth, row["score"])["tau"]
        row["regret_points"] = 100 * row["regret"]
    by_name = {row["score"]: row for row in rows}
    baselines = [row for row in rows if row["score"] not in NOT_BASELINES]
    best, least = baselines[0], min(baselines, key=lambda row: row["regret"])
    ours = by_name[OURS]
    ahead, error = _paired(ours, best, 0)
    goals = [
        goal(f"combined score's mean τ, less the best baseline's ({best['score']})", ours["tau"] - best["tau"], 0, "τ"),
        goal(
            f"combined score's mean regret, less the least baseline's ({least['score']})",
            ours["regret"] - least["regret"],
            0,
            "accuracy",
            at_most=True,
        ),
        goal(
            "worlds in which the transport gain is ahead of the raw cost, of 16", *_wins(by_name[GAIN], by_name[COST])
        ),
    ]
    helped = sum(
        accuracy[name] > accuracy[NO_TEACHER]
        for key, accuracy in truth.items()
        if key[0] in judged
        for name in teachers()
    )
    count = len(teachers()) * sum(len(task.budgets) for task in TASKS)
    columns = {"title": "score", "tau": "mean τ", "regret_points": "regret [points]"}
    columns |= {f"tau_{task.name}": f"τ {task.name}" for task in TASKS} | {"tau_calibration": "τ calibration"}
    note = (
        f"Weighted Kendall τ between a score and the accuracy of the student that each of {len(teachers())} teachers "
        "makes alone, and how far the student of the teacher in first place is behind the best one. Mean over "
        f"{len(TASKS)} tasks, 2 label budgets (5 and 20 a class to train on, and as many again) and 2 draws of the "
        "labels; all scores see all labelled images. Truth: test accuracy by the default objective, last epoch, of "
        f"2 students on average. Combined score less {best['title']}, paired over worlds: {ahead:+.3f} ± {error:.3f} "
        f"(2 SE; worlds of one task share images). {helped} of {count} make a better student than no teacher. The "
        "weights of the combined score were chosen on the calibration tasks alone (last column), which have other "
        "images."
    )
    write("ranking", rows, goals, columns, note)
    plot(rows, RESULTS / "ranking.svg")
    for one in goals:
        print(f"{'met ' if one['met'] else 'MISS'} {one['name']}: {one['value']:.3f}")


def _paired(one: dict[str, Any], other: dict[str, Any], part: int) -> tuple[float, float]:
    differences = [one["worlds"][key][part] - other["worlds"][key][part] for key in one["worlds"]]
    return statistics.fmean(differences), 2 * statistics.stdev(differences) / math.sqrt(len(differences))


def _wins(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, str]:
    wins = sum(one["worlds"][key][0] > other["worlds"][key][0] for key in one["worlds"])
    return float(wins), float(len(one["worlds"])), "worlds"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a row a score: its τ in every world, and the mean."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "ranking", "font.size": 10}
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = dict(zip([task.name for task in TASKS], ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
    for place, row in enumerate(reversed(rows)):
        for key, (tau, _) in row["worlds"].items():
            axis.plot(tau, place, "o", color=colours[key.split("/")[0]], ms=5, alpha=0.55, mew=0)
        axis.plot(row["tau"], place, "|", color="black", ms=18, mew=2.5)
    axis.set_yticks(range(len(rows)), [row["title"].strip("*") for row in reversed(rows)])
    axis.set_xlabel("weighted Kendall τ with the students' accuracy (bar: mean)")
    axis.axvline(0, color="0.6", lw=0.8)
    axis.grid(True, axis="x", color="0.9", lw=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(left=False)
    for name, colour in colours.items():
        axis.plot([], [], "o", color=colour, ms=6, label=name)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"score": score, "report": report}

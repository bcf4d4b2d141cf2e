"""Batches of transport problems under one cost, against POT's solvers: `make bench-transport`. About a quarter hour."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ot
import psutil
import torch
from torch import Tensor

from benchmarks.results import RESULTS, ROOT, goal, write
from pipeline.transport.ground_cost import cosine_cost
from pipeline.transport.sinkhorn import sinkhorn, transport_loss

Size = tuple[int, int, int]  # B, C_t, C_s
SIZES: tuple[Size, ...] = ((64, 10, 10), (128, 100, 100), (128, 1000, 100), (256, 1000, 1000), (256, 21841, 1000))
SMALLEST: Size = (2, 3, 3)
GOAL_SIZE, LARGEST = SIZES[2], SIZES[4]
REG = 0.05
ITERATIONS = 50
NEVER = 1e-30  # a tolerance that no solver meets: all of them use all their iterations
ACCURACY = 1e-4  # of the converged cost
LADDER = (5, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000)
LIMIT = 60.0  # seconds that a peer may take for one pass over a batch
SLICE = 1 << 21  # entries of (B, C_t, C_s) from which a peer's time is projected
EXACT_SIZES: tuple[Size, ...] = ((16, 10, 10), (16, 100, 100), (16, 1000, 100))
EXACT_REGS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


# glibc gives large blocks back as soon as they are free, and the system clears them anew: as long as the arithmetic, or
# longer, for solvers with large temporaries. Times are taken without that; memory is measured as it is by default.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 36), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


class Problem(NamedTuple):
    p: Tensor  # (B, C_t)
    q: Tensor  # (B, C_s)
    M: Tensor  # (C_t, C_s)


def problem(size: Size, rows: int | None = None) -> Problem:
    """Classes are random directions in 16 dimensions; their cost is half a cosine distance, in [0, 1]."""
    batch, teacher, target = size
    g = torch.Generator().manual_seed(0)
    M = cosine_cost(torch.randn(teacher, 16, generator=g), torch.randn(target, 16, generator=g))
    p = torch.softmax(3 * torch.randn(batch, teacher, generator=g), 1)
    q = torch.softmax(2 * torch.randn(batch, target, generator=g), 1)
    return Problem(p[:rows], q[:rows], M)


def in_double(x: Problem) -> Problem:
    p, q = (side.double() / side.double().sum(1, keepdim=True) for side in (x.p, x.q))
    return Problem(p, q, x.M.double())


def gradient(q: Tensor) -> Tensor:
    assert q.grad is not None
    return q.grad


# Each solver: forward gives the costs ⟨P, M⟩, a (B,) tensor; backward gives the gradient in q, a (B, C_s) tensor.


def ours_forward(x: Problem, iterations: int) -> Tensor:
    return sinkhorn(x.p, x.q, x.M, REG, max_iter=iterations, tol=NEVER, warn=False).cost


def ours_backward(x: Problem, iterations: int) -> Tensor:
    q = x.q.clone().requires_grad_()
    transport_loss(x.p, q, x.M, REG, "sum", max_iter=iterations, tol=NEVER).backward()
    return gradient(q)


def batch_forward(method: str) -> Callable[[Problem, int], Tensor]:
    def forward(x: Problem, iterations: int) -> Tensor:
        M = x.M.expand(len(x.p), -1, -1)
        return ot.solve_batch(
            M, REG, x.p, x.q, max_iter=iterations, tol=NEVER, method=method, grad="detach"
        ).value_linear

    return forward


def batch_backward(method: str) -> Callable[[Problem, int], Tensor]:
    def backward(x: Problem, iterations: int) -> Tensor:
        q, M = x.q.clone().requires_grad_(), x.M.expand(len(x.p), -1, -1)
        # Its "envelope" gives the gradient in M alone.
        solved = ot.solve_batch(M, REG, x.p, q, max_iter=iterations, tol=NEVER, method=method, grad="autodiff")
        solved.value.sum().backward()
        return gradient(q)

    return backward


def loop_forward(x: Problem, iterations: int) -> Tensor:
    p, q, M = (tensor.numpy() for tensor in x)
    plans = (
        ot.sinkhorn(a, b, M, REG, numItermax=iterations, stopThr=NEVER, warn=False) for a, b in zip(p, q, strict=True)
    )
    return torch.tensor([float((plan * M).sum()) for plan in plans])


def loop_backward(x: Problem, iterations: int) -> Tensor:
    q = x.q.clone().requires_grad_()
    for a, b in zip(x.p, q, strict=True):
        ot.sinkhorn2(a, b, x.M, REG, numItermax=iterations, stopThr=NEVER, warn=False).backward()
    return gradient(q)


def exact_forward(x: Problem, iterations: int = 0) -> Tensor:
    p, q, M = (tensor.numpy() for tensor in in_double(x))
    return torch.tensor(
        [float(ot.emd2(a, b, M, numItermax=10**8)) for a, b in zip(p, q, strict=True)], dtype=torch.float64
    )


def exact_backward(x: Problem, iterations: int = 0) -> Tensor:
    p, q, M = in_double(x)
    q.requires_grad_()
    for a, b in zip(p, q, strict=True):
        ot.emd2(a, b, M, numItermax=10**8).backward()
    return gradient(q)


@dataclass(frozen=True)
class Solver:
    title: str
    forward: Callable[[Problem, int], Tensor]
    backward: Callable[[Problem, int], Tensor]
    # (B, C_t, C_s) float32 tensors that are alive at once, forward and with the backward pass.
    copies: tuple[float, float]
    colour: str
    marker: str
    entropic: bool = True


SOLVERS = {
    "ours": Solver("ours", ours_forward, ours_backward, (0, 0), "#0072B2", "o"),
    "batch_log": Solver(
        "ot.solve_batch", batch_forward("auto"), batch_backward("auto"), (5, 2 * ITERATIONS + 5), "#D55E00", "s"
    ),
    "batch": Solver(
        "ot.solve_batch, no logs", batch_forward("sinkhorn"), batch_backward("sinkhorn"), (4, 8), "#E69F00", "D"
    ),
    "loop": Solver("loop of ot.sinkhorn", loop_forward, loop_backward, (0, 0), "#009E73", "^"),
    "exact": Solver("loop of ot.emd2", exact_forward, exact_backward, (0, 0), "#CC79A7", "v", entropic=False),
}
PASSES = ("forward", "backward")
COLUMNS = {
    "size": "B, C_t, C_s",
    "title": "solver",
    "forward": "forward",
    "backward": "forward and backward",
    "accurate": "forward, to 1e-4",
    "memory": "extra memory",
    "error": "relative error",
}


def resident(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def child(size: Size, solver: str, part: str, rows: int) -> dict[str, float]:
    """Run one pass in this process, which ran nothing before; return its time and what it took beyond its inputs."""
    run, x = getattr(SOLVERS[solver], part), problem(size, rows)
    # Loads what is loaded once. A time is that of a second pass, the memory that of a first.
    run(*((x, ITERATIONS) if KEPT.keys() <= os.environ.keys() else (problem(SMALLEST), 2)))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = resident("VmRSS:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run(x, ITERATIONS)
    seconds = time.perf_counter() - start
    after = resident("VmHWM:")
    if after is None:  # macOS; the largest so far, in bytes
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "bytes": max(after - before, 0)}


def fresh(request: list[Any], *, kept: bool, limit: float | None = None) -> Any:
    """Return what this module answers to a request in a process of its own, or None when it takes too long."""
    environment = {key: value for key, value in os.environ.items() if key not in KEPT} | (KEPT if kept else {})
    command = [sys.executable, "-m", "benchmarks.transport", json.dumps(request)]
    timeout = None if limit is None else limit + 30  # for the imports
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


def obstacle(size: Size, solver: str, part: str) -> tuple[str | None, float | None]:
    """Return why a peer is not run at a size, if it is not, and the seconds that it would have taken, where known."""
    batch, entries = size[0], size[1] * size[2]
    needed = 4 * batch * entries * SOLVERS[solver].copies[PASSES.index(part)]
    available = psutil.virtual_memory().available
    if needed > available:
        return f"needs {needed / 2**30:,.0f} GiB, {available / 2**30:.0f} are free", None
    if batch * entries <= SLICE:
        return None, None
    rows = max(1, SLICE // entries)
    found = fresh([size, solver, part, rows], kept=True, limit=LIMIT)
    if found is None:
        return f"{rows} of {batch} rows take more than {LIMIT:.0f} s", None
    projected = found["seconds"] * batch / rows
    return (f"would take {projected:,.0f} s" if projected > LIMIT else None), projected


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(*runs: Callable[[], object]) -> list[list[float]]:
    """Return the times of each, all of them in turn: the same noise falls on every one."""
    first = sum(seconds_of(run) for run in runs)
    repeats = max(3, min(21, int(10 / first)))
    return [list(times) for times in zip(*([seconds_of(run) for run in runs] for _ in range(repeats)), strict=True)]


def converged(size: Size) -> tuple[Problem, Tensor]:
    """Return a few rows of a problem and their costs from POT in float64, converged."""
    rows = 4 if size[1] * size[2] <= SLICE else 1
    x = problem(size, rows)
    # At the largest size the log domain takes minutes a row; the plain iteration in float64 has the same limit.
    method = "sinkhorn_log" if size[1] * size[2] <= SLICE else "sinkhorn"
    p, q, M = (tensor.numpy() for tensor in in_double(x))
    costs = [
        float(ot.sinkhorn2(a, b, M, REG, method=method, numItermax=20_000, stopThr=1e-11))
        for a, b in zip(p, q, strict=True)
    ]
    return x, torch.tensor(costs, dtype=torch.float64)


def relative(costs: Tensor, expected: Tensor) -> float:
    return float(((costs.double() - expected) / expected).abs().max())


def iterations_to(solver: Solver, x: Problem, expected: Tensor) -> int:
    for iterations in LADDER:
        if relative(solver.forward(x, iterations), expected) <= ACCURACY:
            return iterations
    raise RuntimeError(f"{solver.title} is not within {ACCURACY} after {LADDER[-1]} iterations")


def measure(size: Size) -> list[dict[str, Any]]:
    """Return a row for each solver; ours comes first."""
    x, few, expected = problem(size), *converged(size)
    ours = SOLVERS["ours"]
    steps = iterations_to(ours, few, expected)
    solved = sinkhorn(few.p, few.q, few.M, REG, max_iter=10_000, tol=1e-6, warn=False)
    mine: dict[str, Any] = {"B": size[0], "C_t": size[1], "C_s": size[2], "solver": "ours"}
    mine |= {"relative_error": relative(solved.cost, expected), "iterations_to_accuracy": steps}
    pooled: dict[str, list[float]] = {"forward": [], "backward": [], "accurate": []}
    rows = [mine]
    for name, solver in SOLVERS.items():
        if name == "ours":
            continue
        row: dict[str, Any] = {"B": size[0], "C_t": size[1], "C_s": size[2], "solver": name}
        for part in PASSES:
            reason, projected = obstacle(size, name, part)
            row |= {f"{part}_not_run": reason, f"{part}_projected_s": projected}
            if reason is None:
                runs = [partial(getattr(s, part), x, ITERATIONS) for s in (ours, solver)]
                compare(row, part, pooled, *in_turn(*runs))
        if row["forward_not_run"] is None and solver.entropic:
            need = iterations_to(solver, few, expected)
            row["iterations_to_accuracy"] = need
            runs = [partial(ours.forward, x, steps), partial(solver.forward, x, need)]
            compare(row, "accurate", pooled, *in_turn(*runs))
        if row["backward_not_run"] is None:
            row["extra_bytes"] = fresh([size, name, "backward", size[0]], kept=False)["bytes"]
        rows.append(row)
    for part, iterations in (("forward", ITERATIONS), ("backward", ITERATIONS), ("accurate", steps)):
        run = ours.backward if part == "backward" else ours.forward
        times = pooled[part] or in_turn(partial(run, x, iterations))[0]
        mine[f"{part}_s"] = statistics.median(times)
    mine["extra_bytes"] = fresh([size, "ours", "backward", size[0]], kept=False)["bytes"]
    return rows


def compare(
    row: dict[str, Any], part: str, pooled: dict[str, list[float]], mine: list[float], theirs: list[float]
) -> None:
    row[f"{part}_s"] = statistics.median(theirs)
    row[f"{part}_ratio"] = statistics.median(theirs) / statistics.median(mine)
    pooled[part] += mine


def measure_exact(size: Size) -> list[dict[str, Any]]:
    """Return how near the cost comes to that of exact transport as ε shrinks."""
    x = problem(size)
    expected, exact_s = exact_forward(x), seconds_of(lambda: exact_forward(x))
    rows = []
    for reg in EXACT_REGS:
        start = time.perf_counter()
        solved = sinkhorn(x.p, x.q, x.M, reg, max_iter=2000, tol=1e-4, warn=False)
        seconds = time.perf_counter() - start
        above = (solved.cost.double() - expected) / expected
        rows.append(
            {
                "size": ", ".join(map(str, size)),
                "reg": reg,
                "above": float(above.mean()),
                "marginal_error": float(solved.marginal_error.max()),
                "iterations": solved.iterations,
                "seconds": seconds,
                "exact_seconds": exact_s,
            }
        )
    return rows


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Add the cells of the table to a row."""
    cells: dict[str, Any] = {"size": f"{row['B']}, {row['C_t']}, {row['C_s']}"}
    cells["title"] = SOLVERS[row["solver"]].title
    for part in (*PASSES, "accurate"):
        cells[part] = ""
        if f"{part}_s" in row:
            cells[part] = duration(row[f"{part}_s"])
            if f"{part}_ratio" in row:
                cells[part] += f" ({row[f'{part}_ratio']:.3g} x)"
        elif row.get(f"{part}_not_run"):
            cells[part] = f"not run: {row[f'{part}_not_run']}"
    if "iterations_to_accuracy" in row and cells["accurate"]:
        cells["accurate"] += f", {row['iterations_to_accuracy']} iterations"
    if row.get("extra_bytes") is not None:
        cells["memory"] = f"{row['extra_bytes'] / 2**20:,.0f} MiB" if row["extra_bytes"] >= 2**20 else "< 1 MiB"
    if "relative_error" in row:
        cells["error"] = f"{row['relative_error']:.0e}"
    return row | cells


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw seconds against B · C_t · C_s; hollow marks are projected from a part of the batch."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "transport", "font.size": 10}
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 4.6), sharey=True, layout="constrained")
    for axis, part, title in zip(axes, PASSES, ("forward", "forward and backward"), strict=True):
        for name, solver in SOLVERS.items():
            mine = [row for row in rows if row["solver"] == name]
            points = [
                (row["B"] * row["C_t"] * row["C_s"], row.get(f"{part}_s", row.get(f"{part}_projected_s")), row)
                for row in mine
            ]
            points = [point for point in points if point[1] is not None]
            solid = [point for point in points if f"{part}_s" in point[2]]
            style = {"color": solver.colour, "marker": solver.marker, "markersize": 7 if name == "ours" else 6}
            width = 2.6 if name == "ours" else 1.5
            if len(points) > len(solid):
                tail = points[max(len(solid) - 1, 0) :]
                axis.plot(*zip(*[t[:2] for t in tail], strict=True), ls=":", lw=1.2, markerfacecolor="white", **style)
            axis.plot(*zip(*[s[:2] for s in solid], strict=True), lw=width, zorder=3, **style)
        axis.set(xscale="log", yscale="log", xlabel=r"$B \cdot C_t \cdot C_s$", title=title)
        axis.grid(True, which="major", color="0.9", lw=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("seconds a batch")
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, lw=2.6 if name == "ours" else 1.5, label=s.title)
        for name, s in SOLVERS.items()
    ]
    handles.append(Line2D([], [], color="0.4", marker="o", ls=":", markerfacecolor="white", label="projected, not run"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def publish(rows: list[dict[str, Any]], exact: list[dict[str, Any]]) -> None:
    def row_of(size: Size, solver: str) -> dict[str, Any]:
        return next(row for row in rows if (row["B"], row["C_t"], row["C_s"]) == size and row["solver"] == solver)

    peer, largest = row_of(GOAL_SIZE, "batch_log"), row_of(LARGEST, "ours")
    memory = largest["extra_bytes"] / 2**30
    worst = max(row["relative_error"] for row in rows if row["solver"] == "ours")
    goals = [
        goal(f"time of ot.solve_batch over ours, forward, {GOAL_SIZE}", peer.get("forward_ratio", 0.0), 50, "ratio"),
        goal(f"the same, forward and backward, {GOAL_SIZE}", peer.get("backward_ratio", 0.0), 50, "ratio"),
        goal(f"extra memory at {LARGEST}", memory, 4, "GiB", at_most=True),
        goal("relative error of the converged cost", worst, 1e-4, "ratio", at_most=True),
    ]
    threads = f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"
    write(
        "transport",
        [shown(row) | {"threads": torch.get_num_threads()} for row in rows],
        goals,
        COLUMNS,
        f"Time of a batch and, in brackets, how many times ours it is: medians, both in turn, {threads}, POT "
        f"{ot.__version__}. Costs are half cosine distances, ε = {REG}, float32, {ITERATIONS} iterations in all but "
        '`ot.emd2`, which is exact, in float64 and on one thread. "No logs" is `method="sinkhorn"`; the default is '
        '`log_sinkhorn`. "To 1e-4": as many iterations as bring the cost within 1e-4 of the converged one. The '
        "gradient is that in q, in ours and `ot.emd2` from the dual potentials, in the others through the iterations. "
        "Extra memory: the peak of a forward and backward pass beyond its inputs, in a process of its own. The times "
        "are with an allocator that keeps what is freed, without which the peers' large temporaries cost more. "
        "Relative error: of our converged cost in float32, to `ot.sinkhorn2` in float64. Not run: what does not fit "
        f"into memory or would take more than {LIMIT:.0f} s, by a part of the batch.",
    )
    cells = [
        row
        | {
            "shown": f"{100 * row['above']:.2g} %",
            "left": f"{row['marginal_error']:.0e}",
            "time": duration(row["seconds"]),
            "exact": duration(row["exact_seconds"]),
        }
        for row in exact
    ]
    columns = {
        "size": "B, C_t, C_s",
        "reg": "ε",
        "shown": "cost above the exact one",
        "left": "marginal error",
        "iterations": "iterations",
        "time": "ours",
        "exact": "loop of ot.emd2",
    }
    write(
        "transport_exact",
        cells,
        [],
        columns,
        "Our cost ⟨P, M⟩ above that of exact transport as ε shrinks, mean over the batch. It stops at a marginal error "
        f"of 1e-4 or after 2,000 iterations. {threads}.",
    )
    plot(rows, RESULTS / "transport.svg")


def main() -> None:
    if len(sys.argv) > 1:
        size, *rest = json.loads(sys.argv[1])
        print(json.dumps(child(tuple(size), *rest) if rest else measure(tuple(size))))
        return
    rows = []
    for size in SIZES:
        for row in fresh([size], kept=True):
            cells = shown(row)
            print(" | ".join(str(cells.get(key, "")) for key in COLUMNS))
            rows.append(row)
    publish(rows, [row for size in EXACT_SIZES for row in measure_exact(size)])


if __name__ == "__main__":
    main()

"""The training loop on two ranks: the weights of one rank, parts of batches, and a step that fails on one of them."""

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distillation.step import Objective
from pipeline.engine.context import LocalContext
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.loop import fit
from pipeline.engine.spec import LoopSpec, OptimSpec
from tests.ddp import run_ranks
from tests.unit.test_engine_resume import Both, Pictures, Spoken, Student

CPU = torch.device("cpu")


class Ranked(LocalContext):
    """One of several processes that have joined a group."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(device=CPU)
        self.rank, self.world_size = rank, world_size

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


class FailsOn(Both):
    """Not finite in one step, on one rank alone."""

    def __init__(self, fails: bool, step: int) -> None:
        super().__init__()
        self.fails, self.step = fails, step

    def forward(self, step):
        parts = super().forward(step)
        if self.fails and round(step.progress * 15) == self.step:
            parts["loss"] = parts["loss"] * float("nan")
        return parts


def trained(rank: int, world_size: int, objective: Objective, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    student = Student(norm=False)
    student.drop = nn.Identity()
    student.double()
    taught = Pictures(40, 1)
    fields = {"epochs": 3, "batch_size": 8, "labelled_batch": 4, "optim": OptimSpec(name="sgd", lr=0.1)}
    lesson = Lesson("small", Pictures(12, 0), taught, Spoken(taught.labels))
    learner = Learner(student, objective.double())
    history = fit(learner, lesson, LoopSpec(**(fields | changes)), Ranked(rank, world_size), seed=3)
    return {name: value.detach().clone() for name, value in student.state_dict().items()} | {
        "skipped": torch.tensor(history[-1].get("skipped", 0))
    }


VARIANTS = {"plain": {}, "parts": {"parts": 2}, "within": {"checkpoint_steps": 2, "ema": 0.5}}


def on_a_rank(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    found = {name: trained(rank, world_size, Both(), **changes) for name, changes in VARIANTS.items()}
    found["fails"] = trained(rank, world_size, FailsOn(rank == 1, 7), checkpoint_steps=4)
    distributed.barrier()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_ranks(on_a_rank, 2, Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_give_the_weights_of_one(ranks, variant) -> None:
    alone = trained(0, 1, Both(), **VARIANTS[variant])
    for rank in ranks:
        for name, value in alone.items():
            torch.testing.assert_close(rank[variant][name], value, rtol=0, atol=1e-8)


def test_a_step_that_fails_on_one_rank_is_left_out_on_all(ranks) -> None:
    alone = trained(0, 1, FailsOn(True, 7), checkpoint_steps=4)
    assert int(alone["skipped"]) == 1
    for rank in ranks:
        for name, value in alone.items():
            torch.testing.assert_close(rank["fails"][name], value, rtol=0, atol=1e-8)

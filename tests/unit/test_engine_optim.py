"""The optimisers: torch's own, without what torch loads for its compiler."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline.engine.optim import build_optimiser
from pipeline.engine.spec import OptimSpec
from pipeline.models import nets

KNOWN = {
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True),
}


def step(net: nn.Module, optimiser: torch.optim.Optimizer, images: torch.Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    net(images).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize("name", KNOWN)
def test_a_step_is_torch_s_own_also_from_a_state(name: str) -> None:
    ours = nets.mlp(3, 1, width=8)
    theirs = copy.deepcopy(ours)
    images = torch.rand(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    known, spec = KNOWN[name](theirs), OptimSpec(name=name, lr=0.01, weight_decay=0.1, momentum=0.9)
    optimiser = build_optimiser(list(ours.parameters()), spec)
    step(ours, optimiser, images[0])
    step(theirs, known, images[0])
    again = build_optimiser(list(ours.parameters()), spec)
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for batch in images[1:]:
        step(ours, again, batch)
        step(theirs, known, batch)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_training_process_does_not_load_the_compiler() -> None:
    code = """
import sys, torch
from pipeline.engine.optim import build_optimiser
from pipeline.engine.spec import OptimSpec
for name in ("adamw", "sgd"):
    weight = torch.nn.Parameter(torch.ones(2))
    optimiser = build_optimiser([weight], OptimSpec(name=name))
    optimiser.zero_grad(set_to_none=True)
    weight.sum().backward()
    optimiser.step()
    optimiser.load_state_dict(optimiser.state_dict())
    assert weight[0] < 1 and torch.is_grad_enabled() and "torch._dynamo" not in sys.modules, name
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr

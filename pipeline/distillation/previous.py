"""A module as it was some steps ago, and how far its output has moved since (knowledge flow)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd


def previous_output_kl(previous_logits: Tensor, logits: Tensor) -> Tensor:
    """Return L_KL = mean_b KL(softmax(previous_b) ‖ softmax(now_b)), at least in single precision.

    It holds the output while the teachers fade [1]_. No gradient flows to the previous logits.

    Parameters
    ----------
    previous_logits, logits : (B, C_s) tensor

    Raises
    ------
    ValueError
        For shapes that differ or are not (B, C).

    References
    ----------
    .. [1] Liu, Peng, Schwing, "Knowledge flow: improve upon your teachers", ICLR 2019 (arXiv 1904.05878).
    """
    if logits.ndim != 2 or previous_logits.shape != logits.shape:
        raise ValueError(
            "previous_logits and logits must have one shape (B, C), got "
            f"{tuple(previous_logits.shape)} and {tuple(logits.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    before = torch.log_softmax(previous_logits.detach().to(dtype), dim=1)
    now = torch.log_softmax(logits.to(dtype), dim=1)
    return F.kl_div(now, before, reduction="none", log_target=True).sum() / max(len(logits), 1)


class Previous(nn.Module):
    """A module as it was some steps of the optimiser ago.

    Every k steps a copy of parameters and buffers is made; the one before it is what `logits` uses. What it knows is
    thus k to 2 k − 1 steps old (younger ones only in the first k steps, when it is the start), and never the present
    itself, to which the divergence would be 0. That "previous" means this is ours.

    Both copies are buffers, and the count is part of the state: with a ``state_dict`` the training goes on exactly.

    Parameters
    ----------
    module : nn.Module
        Not a part of this one: its parameters are neither listed nor saved again.
    every : int
        k ≥ 1.
    """

    def __init__(self, module: nn.Module, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.every, self.count = every, 0
        self._module = (module,)  # a tuple, because an attribute would be a part
        for name, tensor in self._present():
            for age in ("previous", "newest"):
                self.register_buffer(_key(age, name), tensor.detach().clone())

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._module[0].named_parameters()
        yield from self._module[0].named_buffers()

    @torch.no_grad()
    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the module with its previous parameters, without a gradient.

        It stays in its mode, so that BatchNorm normalises as in the pass that this is compared to (ours): by the batch
        in training. Its running statistics move neither in the module nor in the copy. Dropout is off (ours): what
        the output is held to has no noise, and no random number is drawn.

        Parameters
        ----------
        *args, **kwargs
            The module's.
        """
        module = self._module[0]
        buffers = {name for name, _ in module.named_buffers()}
        state = {name: self.get_buffer(_key("previous", name)) for name, _ in self._present()}
        # A pass in training counts batches and moves statistics in place: in copies that nobody keeps.
        state |= {name: state[name].clone() for name in buffers}
        dropping = [one for one in module.modules() if isinstance(one, _DropoutNd) and one.training]
        try:
            for one in dropping:
                one.training = False
            logits: Tensor = functional_call(module, state, args, kwargs)
        finally:
            for one in dropping:
                one.training = True
        return logits.detach()

    def copy_of(self, name: str) -> Tensor:
        """Return a parameter or buffer of the module as `logits` uses it."""
        return self.get_buffer(_key("previous", name))

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimiser; after every k of them, make a new copy."""
        self.count += 1
        if self.count % self.every:
            return
        for name, tensor in self._present():
            newest = self.get_buffer(_key("newest", name))
            self.get_buffer(_key("previous", name)).copy_(newest)
            newest.copy_(tensor)

    def get_extra_state(self) -> Tensor:
        """Return the count of steps; a state_dict holds it."""
        return torch.tensor(self.count)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the count of steps from a state_dict."""
        self.count = int(state)


def _key(age: str, name: str) -> str:
    return f"{age}/{name.replace('.', '/')}"  # names of buffers have no dots

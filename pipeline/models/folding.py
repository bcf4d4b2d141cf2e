"""Batch norms of a frozen net, folded into the convolutions before them: the same function with less to compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def fold_batch_norms(net: nn.Module, *, outputs: Collection[str] = (), inputs: Collection[str] = ()) -> int:
    """Fold every batch norm that alone takes what a convolution gives into that convolution, in place.

    In evaluation mode a batch norm is γ (x − μ) / √(σ² + ε) + β with constants alone, so that

        W' = W γ / √(σ² + ε),    b' = (b − μ) γ / √(σ² + ε) + β

    give the same but for rounding. The constants are computed in double precision. A module `nn.Identity` stays where
    the batch norm was, so that its path and what comes out of it are the same; what comes out of the convolution is
    not. A net whose forward pass can't be followed symbolically, as its course depends on values, stays as it is.

    Parameters
    ----------
    net : nn.Module
        In evaluation mode.
    outputs, inputs : collection of str
        Paths of modules whose output, or input, is wanted besides: a convolution whose own output is, and a batch norm
        whose input is, stay.

    Returns
    -------
    int
        How many were folded.
    """
    try:
        graph = symbolic_trace(net).graph
    except Exception:  # whatever foreign code raises when it is given symbols
        return 0
    pairs = [(conv, norm) for conv, norm in _pairs(net, graph) if conv not in outputs and norm not in inputs]
    for conv_path, norm_path in pairs:
        conv: Any = net.get_submodule(conv_path)
        norm: Any = net.get_submodule(norm_path)
        given = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        w: list[Any] = [None if value is None else value.double() for value in given]
        weight, bias = fuse_conv_bn_weights(w[0], w[1], w[2], w[3], norm.eps, w[4], w[5])
        layout = torch.channels_last if isinstance(conv, nn.Conv2d) else torch.contiguous_format
        folded = weight.to(conv.weight.dtype).contiguous(memory_format=layout)
        conv.weight = nn.Parameter(folded, requires_grad=False)
        conv.bias = nn.Parameter(bias.to(folded.dtype), requires_grad=False)
        net.set_submodule(norm_path, nn.Identity())
    return len(pairs)


def _pairs(net: nn.Module, graph: Graph) -> list[tuple[str, str]]:
    """Return paths of convolutions and of the batch norms that may be folded into them."""
    modules = dict(net.named_modules(remove_duplicate=False))
    places = Counter(id(module) for module in modules.values())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    # A layer whose weights are looked at besides, is in two places, or runs twice, has more to give than this pair.
    looked_at = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def once(path: str) -> bool:
        module = modules[path]
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        return calls[path] == places[id(module)] == 1 and path not in looked_at and not hooks

    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv_path, norm_path = str(before.target), str(node.target)
        conv, norm = modules[conv_path], modules[norm_path]
        if type(conv) not in _CONVOLUTIONS or type(norm) not in _NORMS:
            continue
        constant = isinstance(norm, _NORMS) and not norm.training and norm.running_mean is not None
        if constant and once(conv_path) and once(norm_path):
            found.append((conv_path, norm_path))
    return found

"""Reading programs of ``torch.export`` without running code that hides in the file.

``torch.export.load`` (torch 2.13) unpickles what a file asks it to: payloads marked ``use_pickle``, opaque and custom
objects, weights in the legacy layout, sample inputs that ``weights_only`` refuses. It also evaluates the file's
symbolic expressions as Python, resolves operators to any attribute below ``torch``, pastes names into generated code
and loads compiled libraries. A program that plain layers make needs none of this, so a file which does is refused
before torch reads it. What is left, arithmetic of ``torch.ops.aten``, can still be wrong or slow; pin a file you rely
on with `sha256`.
"""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.models.factories import Refused, one_line

# The records that torch.export.save writes for a net of plain layers; compiled libraries, opaque and custom objects and
# the legacy .pt records have other names.
_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[\w.]+|extra/.*|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!__|from_file)\w+\.(?!__)\w+|torch\.sym_(max|min|not|float|int|ite|sum)|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Abs Max Min Eq Ne Lt Le Gt Ge And Or Not Piecewise ceiling floor "
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural "
    "FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity".split()
)
_EXPRESSION = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.keyword,
    ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
# Strings that torch keeps as text or quotes before it uses them.
_FREE_TEXT = frozenset({"metadata", "as_string", "as_strings", "torch_version", "guards_code"})
_PLAIN = re.compile(r"[\w.]*", re.ASCII)
_CONTAINERS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})


def load_program(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Read a program of ``torch.export.save`` that consists of weights and plain operators.

    Returns
    -------
    nn.Module
        The program's callable form. Its weights are parameters; it has no modes and no inner modules.

    Raises
    ------
    ValueError
        When the file is no such program, is damaged or holds anything that could run code; one line.
    OSError
        When it can't be read.
    """
    # Inspected and loaded from the same bytes by the same reader, so that what is checked is what is used.
    content = Path(path).read_bytes()
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        _inspect({name: reader.get_record(name) for name in _names(reader)})
    except Refused:
        raise
    except Exception as error:
        raise ValueError(f"is damaged or no program of torch.export ({one_line(error)})") from None

    from torch.export.passes import move_to_device_pass
    from torch.export.pt2_archive._package import load_pt2

    try:
        programs = load_pt2(io.BytesIO(content)).exported_programs
        program = programs["model"]
        if torch.device(device).type != "cpu":
            # Moving the weights is not enough: operators that make tensors name the device they were exported on.
            program = move_to_device_pass(program, str(device))
        # Guards are Python code in the file; a shape that does not fit fails in the operators anyway.
        return program.module(check_guards=False)
    except Exception as error:
        raise ValueError(f"can't be loaded by torch {torch.__version__} ({one_line(error)})") from None


def output_widths(program: nn.Module) -> list[int | None]:
    """Return the last dimension of each output of a program, None where it is not fixed."""
    graph = getattr(program, "graph", None)
    if graph is None:
        return []
    (outputs,) = graph.output_node().args
    widths: list[int | None] = []
    for node in outputs:
        shape = tuple(getattr(getattr(node, "meta", {}).get("val"), "shape", ()))
        widths.append(shape[-1] if shape and isinstance(shape[-1], int) else None)
    return widths


def _names(reader: Any) -> list[str]:
    names = reader.get_all_records()
    if len(set(names)) < len(names):
        raise Refused("is refused: it holds two records of one name")
    for name in names:
        if not _RECORDS.fullmatch(name):
            raise Refused(f"is refused: it holds {name!r}, which is no part of a program of plain operators")
    return names


def _inspect(records: dict[str, bytes]) -> None:
    for kind in ("weights", "constants"):
        config = json.loads(records[f"data/{kind}/model_{kind}_config.json"])["config"]
        pickled = [name for name, payload in config.items() if payload.get("use_pickle") is not False]
        if pickled:
            raise Refused(f"is refused: it holds {pickled[0]!r} as a pickle, which can run any code")
        _check_strings(config, key="config")
    samples = records["data/sample_inputs/model.pt"]
    if samples:
        try:
            torch.load(io.BytesIO(samples), weights_only=True)
        except Exception:
            raise Refused("is refused: its sample inputs are a pickle of more than tensors") from None
    program = json.loads(records["models/model.json"])
    _check_strings(program, key="program")


def _check_strings(value: Any, key: str) -> None:
    """Refuse every string of a program's JSON that torch could run, whatever field it sits in."""
    if key in _FREE_TEXT:
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            if not _PLAIN.fullmatch(name):
                raise Refused(f"is refused: the name {name[:60]!r} is no identifier")
            _check_strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner, key)
    elif isinstance(value, str):
        if key == "target":
            allowed = _OPERATORS.fullmatch(value) is not None
        elif key == "expr_str":
            allowed = _is_arithmetic(value)
        elif key in ("in_spec", "out_spec"):
            allowed = _is_plain_tree(json.loads(value))
        else:
            allowed = _PLAIN.fullmatch(value) is not None
        if not allowed:
            raise Refused(f"is refused: `{key}` is {value[:60]!r}, which is more than a plain operator, name or number")


def _is_arithmetic(expression: str) -> bool:
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    symbols: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS):
                return False
            if node.func.id == "Symbol":
                symbols.update(map(id, node.args))
        elif not isinstance(node, _EXPRESSION):
            return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in symbols or not re.fullmatch(r"[a-z]\w*", node.value, re.ASCII):
                return False
        elif isinstance(node, ast.Name) and node.id.startswith("_"):
            return False
    return True


def _is_plain_tree(value: Any) -> bool:
    """Tell whether a serialised structure of arguments is made of tuples, lists and dictionaries alone."""
    if isinstance(value, dict):
        return value.get("type") in _CONTAINERS and all(map(_is_plain_tree, value.get("children_spec", [])))
    if isinstance(value, list):  # [version of the protocol, tree]
        return all(
            isinstance(inner, (int, dict)) and (isinstance(inner, int) or _is_plain_tree(inner)) for inner in value
        )
    return False

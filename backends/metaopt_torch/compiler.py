"""How passes are run: compiled to one loop over memory, or eagerly in chunks of it."""

import importlib
import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from metaopt.arrays import namespace
from metaopt.rules import Rule
from metaopt_torch.passes import Pass

__all__ = ["compiled", "in_chunks", "missing"]

#: Numbers that an eager pass takes at a time: on a CPU what its cache holds, elsewhere what makes
#: a launch worth its while.
CHUNK, LARGE_CHUNK = 2**17, 2**24
#: Rules, dtypes, and sizes of 0 and 1, for which the compiler specializes.
LIMIT = 64


def missing(device: torch.device) -> str | None:
    """Return what `torch.compile` lacks for this kind of device, None if nothing is known to."""
    if device.type == "cpu":
        named = os.environ.get("CXX")
        known = [named] if named else ["g++", "clang++", "cl"]
        if not any(shutil.which(name) for name in known):
            return f"a C++ compiler ({', '.join(known)})"
    elif find_spec("triton") is None:
        return "Triton"
    return None


def compiled(function: Pass) -> Pass:
    """Return the pass compiled once for all sizes and steps."""
    namespace(torch.empty(0))  # the compiler warns of the caches inside the first look-up
    return torch.compile(
        function,
        fullgraph=True,
        dynamic=True,
        backend=_backend,
        isolate_recompiles=True,
        recompile_limit=LIMIT,
    )


def _backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile with Inductor, with all that depends on numbers alone computed before the loop.

    Inductor would compute a bias correction anew for every few weights. A number is kept out of the
    loop by what keeps the product in memory of its own: see `metaopt_torch.passes.fused`.
    """
    for node in list(graph.graph.nodes):
        loops = [user for user in node.users if _axes(user)]
        if node.op in ("call_function", "call_method") and _axes(node) == 0 and loops:
            with graph.graph.inserting_after(node):
                kept = graph.graph.call_function(torch.as_strided, (node, (), ()))
            kept.meta = dict(node.meta)
            for user in loops:
                user.replace_input_with(node, kept)
    graph.recompile()
    # imported here, for it takes a second
    return importlib.import_module("torch._inductor.compile_fx").compile_fx(graph, inputs)


def _axes(node: torch.fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else None


def in_chunks(function: Pass) -> Pass:
    """Return the pass run on a chunk of the buffers after the other, its results added up.

    Temporaries are of the size of a chunk, and stay in the cache of a CPU. Arguments that are
    cut are those with as many entries along the first axis as the first of them.
    """

    def run(rule: Rule, *arguments: Any) -> Any:
        first = arguments[0]
        rows, row = first.shape[0], max(1, first[:1].numel())
        step = max(1, (CHUNK if first.device.type == "cpu" else LARGE_CHUNK) // row)
        if rows <= step:
            return function(rule, *arguments)
        results = [
            function(rule, *(_cut(argument, rows, slice(at, at + step)) for argument in arguments))
            for at in range(0, rows, step)
        ]
        return _joined(results)

    return run


def _cut(argument: Any, rows: int, part: slice) -> Any:
    if isinstance(argument, Mapping):
        return {key: _cut(value, rows, part) for key, value in argument.items()}
    if isinstance(argument, Tensor) and argument.dim() and argument.shape[0] == rows:
        return argument[part]
    return argument


def _joined(results: list[Any]) -> Any:
    """Add sums, join those of rows, and say whether any flag is set."""
    if results[0] is None:
        return None
    if isinstance(results[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*results, strict=True))
    if results[0].dim():
        return torch.cat(results)
    stacked = torch.stack(results)
    return stacked.any() if stacked.dtype == torch.bool else stacked.sum()

"""How passes are run: compiled to one loop over memory, or eagerly in chunks of it."""

import importlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metaopt.rules import Rule
from metaopt.warning import warn
from metaopt_torch.passes import Arrays, Pass

__all__ = ["Compiled", "Eager", "Once", "chosen", "in_chunks", "placement"]

#: Numbers that an eager pass takes at a time: on a CPU what its cache holds and malloc keeps,
#: elsewhere what makes a launch worth its while.
CHUNK, LARGE_CHUNK = 2**16, 2**24

_lock = threading.RLock()


@contextmanager
def _compiling() -> Iterator[None]:
    """Keep other threads from compiling meanwhile, and let them call what is compiled.

    Tracing and Inductor are not thread-safe: take `torch.compile`'s lock, and mark this as an
    internal session.
    """
    frames = importlib.import_module("torch._dynamo.convert_frame")
    mark = getattr(torch.compiler, "_compile_session_context", nullcontext)
    with getattr(frames, "compile_lock", _lock), mark():
        yield


def chosen(compile: bool | None, devices: Iterable[torch.device]) -> bool | None:
    """Return whether to compile, None for where it works; warn where it cannot be."""
    if compile is not None:
        return compile
    lacking = [text for device in devices if (text := _missing(device)) is not None]
    if lacking:
        warn(
            f"torch.compile lacks {lacking[0]}: steps are run eagerly, several times "
            "slower. Pass `compile=False` for that without this warning."
        )
    return False if lacking else None


def _missing(device: torch.device) -> str | None:
    """Return what `torch.compile` lacks for this kind of device, None if nothing is known to."""
    if device.type == "cpu":
        named = os.environ.get("CXX")
        known = [named] if named else ["g++", "clang++", "cl"]
        if not any(shutil.which(name) for name in known):
            return f"a C++ compiler ({', '.join(known)})"
    elif find_spec("triton") is None:
        return "Triton"
    return None


class Kernel(NamedTuple):
    """A compiled graph, and its symbolic inputs, whose guards say for which sizes it holds."""

    run: Callable[..., Any]
    inputs: list[Any]

    def takes(self, arrays: Arrays) -> bool:
        """Return whether it holds for arrays of these sizes and strides.

        Sizes that were equal, or 1, when it was made may be specialized on.
        """
        env = self.inputs[0].fake_mode.shape_env
        given = [_outline(array) for array in arrays.values()]
        return bool(env.evaluate_guards_for_args(self.inputs, given, ignore_static=False))


class Once:
    """Emits a warning at most once per optimizer, whose passes share it."""

    def __init__(self) -> None:
        self._done = False

    def warn(self, message: str) -> None:
        """Warn, unless it has."""
        if not self._done:
            warnings.warn(message, stacklevel=2)
            self._done = True  # not where the warning is made an error


class Compiled:
    """A pass compiled by Inductor, once for each rule and for all sizes and steps.

    Without Dynamo: a step calls a pass for every large tensor, and checking Dynamo's guards takes
    longer than a small pass itself. Here a kernel is looked up by the identity of the rule, and by
    device, dtypes, shapes, strides and the number of threads; when these are new, kernels that were
    made before are asked whether they hold for them.

    `otherwise` runs, with a warning, where compilation or a first launch fails; without it the
    error is raised. Either way nothing has been written to yet.
    """

    def __init__(
        self, function: Pass, otherwise: "Eager | None" = None, warning: Once | None = None
    ) -> None:
        self._function, self._otherwise = function, otherwise
        self._warning = Once() if warning is None else warning
        self._failed: set[Hashable] = set()
        self._ready: dict[Hashable, tuple[Callable[..., Any], Rule]] = {}
        self._kernels: dict[Hashable, list[Kernel]] = {}

    def prepared(self, rule: Rule, arrays: Arrays) -> Callable[..., Any]:
        """Return what is called with the values of `arrays`, which it may write to."""
        # every step comes by here for every bucket: nothing slower than a lookup
        values = arrays.values()
        kinds = tuple([(type(a), a.dtype, a.shape, a.stride()) for a in values])
        device, threads = next(iter(values)).device, torch.get_num_threads()
        key = (id(rule), tuple(arrays), kinds, placement(arrays), device, threads)
        ready = self._ready.get(key)
        if ready is None:
            with _compiling():
                # with the rule, whose id no other object gets while it is kept
                ready = self._ready[key] = self._found(rule, arrays), rule
        return ready[0]

    def _found(self, rule: Rule, arrays: Arrays) -> Callable[..., Any]:
        same = rule if isinstance(rule, Hashable) else id(rule)  # a user's own may not be
        dtypes = tuple([(array.dtype, array.device, array.dim()) for array in arrays.values()])
        key = (same, tuple(arrays), dtypes, torch.get_num_threads())  # Inductor bakes these in
        kernels = self._kernels.setdefault(key, [])
        kind = key, tuple(map(type, arrays.values()))
        try:
            for name, array in arrays.items():
                if is_traceable_wrapper_subclass(array) or is_fake(array):
                    msg = f"{name!r} is a {type(array).__name__}, of whose memory nothing is known"
                    raise TypeError(msg)
            for kernel in kernels:
                if kernel.takes(arrays):
                    return kernel.run
            if kind not in self._failed:
                kernels.append(_tried(self._made(rule, arrays), arrays))
                return kernels[-1].run
        except Exception as error:  # whatever it is that a toolchain does not manage
            if self._otherwise is None:
                raise
            self._warning.warn(
                f"torch.compile failed ({type(error).__name__}: {error}): steps are run eagerly, "
                "several times slower. Pass `compile=False` for that without this warning, "
                "`compile=True` for the error."
            )
            self._failed.add(kind)  # other sizes would fail as well, after as many seconds
        assert self._otherwise is not None
        return self._otherwise.prepared(rule, arrays)

    def _made(self, rule: Rule, arrays: Arrays) -> Kernel:
        # imported here, for they take a second
        tracer = importlib.import_module("torch.fx.experimental.proxy_tensor")
        shapes = importlib.import_module("torch.fx.experimental.symbolic_shapes")
        inductor = importlib.import_module("torch._inductor.compile_fx")
        functorch = importlib.import_module("torch._functorch.config")
        names = tuple(arrays)

        def function(*values: Tensor) -> Any:
            return self._function(rule, dict(zip(names, values, strict=True)))

        # in a mode of our own: the tracer's would burn a float64 of a CPU in as a constant
        mode = FakeTensorMode(shape_env=shapes.ShapeEnv())
        outlines = [mode.from_tensor(_outline(array)) for array in arrays.values()]
        with mode:
            values = [
                _laid_out(outline, outline.storage_offset(), array.device)
                for outline, array in zip(outlines, arrays.values(), strict=True)
            ]
        graph = tracer.make_fx(function, tracing_mode="symbolic")(*values)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        results = _results(list(graph.graph.nodes))
        _hoist(graph)
        made: list[tuple[Any, list[Any]]] = []

        def inner(functional: torch.fx.GraphModule, *given: Any, **more: Any) -> Any:
            nodes = list(functional.graph.nodes)  # compiling changes them
            kernel = inductor.compile_fx_inner(functional, *given, **more)
            made.append((kernel, nodes))
            return kernel

        with functorch.patch(enable_autograd_cache=False):  # its hits go past `inner`
            options = {"size_asserts": True}  # torch 2.14 defines some sizes for these alone
            whole = inductor.compile_fx(graph, inputs, inner, options)
        (kernel, nodes), *_ = made
        arguments = [node for node in nodes if node.op == "placeholder"]
        if len(arguments) != len(inputs) or _results(nodes) != results:
            # constants became arguments, or buffers became results: leave these to AOTAutograd
            return Kernel(whole, inputs)
        copied = [node.args[0] for node in nodes if node.target is torch.ops.aten.copy_.default]
        return Kernel(_directly(kernel, [arguments.index(node) for node in copied]), inputs)


class Eager:
    """A pass run as it is."""

    def __init__(self, function: Pass) -> None:
        self._function = function

    def prepared(self, rule: Rule, arrays: Arrays) -> Callable[..., Any]:
        """Return what is called with the values of `arrays`, which it may write to."""
        names, function = tuple(arrays), self._function

        def run(*values: Tensor) -> Any:
            return function(rule, dict(zip(names, values, strict=True)))

        return run


def _tried(kernel: Kernel, arrays: Arrays) -> Kernel:
    """Return a kernel that has been launched once, on small arrays of its own.

    Code that compiles may still fail to run; it is to fail before it writes to any of `arrays`.
    """
    device = next(iter(arrays.values())).device
    trial = {
        name: torch.zeros([min(n, 2) for n in array.shape], dtype=array.dtype, device=device)
        for name, array in arrays.items()
    }
    if not kernel.takes(trial):  # made for the very sizes of `arrays`, or for other strides
        trial = {name: _laid_out(array, 0, device).zero_() for name, array in arrays.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        kernel.run(*trial.values())
    return kernel


def placement(arrays: Arrays) -> tuple[bool, ...]:
    """Return which arrays begin where a GPU reads several numbers at once; kernels differ by it."""
    if next(iter(arrays.values())).device.type == "cpu":
        return ()
    return tuple([_aligned(array) for array in arrays.values()])


def _outline(array: Tensor) -> Tensor:
    """Return an array without its memory as a kernel is made for it, wherever it begins.

    The count of every leaf is another entry of one vector. Code for a GPU may differ by whether an
    array is aligned, which no number is taken to be.
    """
    start = 0 if array.device.type == "cpu" or (array.dim() > 0 and _aligned(array)) else 1
    return _laid_out(array, start, torch.device("meta"))


def _aligned(array: Tensor) -> bool:
    return array.storage_offset() * array.itemsize % 16 == 0


def _laid_out(array: Tensor, start: Any, device: torch.device) -> Tensor:
    """Return a new tensor with an array's sizes and strides that begins at an entry of memory."""
    pairs = zip(array.shape, array.stride(), strict=True)
    extent = 1 + sum((length - 1) * step for length, step in pairs)
    memory = torch.empty(start + extent, dtype=array.dtype, device=device)
    return memory.as_strided(array.shape, array.stride(), start)


def _results(nodes: Sequence[torch.fx.Node]) -> int:
    """Return how many results a graph has."""
    returned = nodes[-1].args[0]
    return len(returned) if isinstance(returned, tuple | list) else 1


def _directly(kernel: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """Return what calls Inductor's code without the wrappers that autograd needs around it.

    They take longer than a pass over a small tensor. Of what they do, the one thing that is called
    for is to tell autograd which arguments are written to.
    """

    def run(*values: Tensor) -> Any:
        results = kernel(list(values))
        for index in written:
            increment_version(values[index])
        return tuple(results)

    return run


def _hoist(graph: torch.fx.GraphModule) -> None:
    """Have all that depends on numbers alone computed before the loop, and once.

    Inductor would compute a bias correction anew for every few weights. A number is kept out of the
    loop by what keeps the trace in memory of its own: see `metaopt_torch.passes.fused`. What
    several discounts have in common is one expression in the loop only if its numbers are the same.
    """
    known: dict[Any, torch.fx.Node] = {}
    for node in _numbers(graph):
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            same = known.setdefault((node.target, node.args, *node.kwargs.items()), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.graph.erase_node(node)
    for node in _numbers(graph):
        loops = [user for user in node.users if _axes(user)]
        if loops:
            with graph.graph.inserting_after(node):
                kept = graph.graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))
            kept.meta = dict(node.meta)
            for user in loops:
                user.replace_input_with(node, kept)
    graph.recompile()


def _numbers(graph: torch.fx.GraphModule) -> list[Any]:
    """Return the nodes that compute numbers."""
    return [node for node in graph.graph.nodes if node.op == "call_function" and _axes(node) == 0]


def _axes(node: torch.fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def in_chunks(function: Pass) -> Pass:
    """Return the pass run on a chunk of the buffers after the other, its results added up.

    Temporaries are of the size of a chunk, and stay in the cache of a CPU. Arrays that are cut are
    those with as many entries along the first axis as the first of them.
    """

    def run(rule: Rule, arrays: Arrays) -> Any:
        first = next(iter(arrays.values()))
        rows, row = first.shape[0], max(1, first[:1].numel())
        step = max(1, (CHUNK if first.device.type == "cpu" else LARGE_CHUNK) // row)
        if rows <= step:
            return function(rule, arrays)
        results = [
            function(
                rule,
                {
                    name: array[at : at + step] if array.shape[:1] == (rows,) else array
                    for name, array in arrays.items()
                },
            )
            for at in range(0, rows, step)
        ]
        return _joined(results)

    return run


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

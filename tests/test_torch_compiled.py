"""Compiled passes: one loop over memory, one graph for all sizes, the numbers of the eager ones."""

import copy
import dataclasses
import gc
import re
import shutil
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from metaopt_conformance.table import BASES
from metaopt_conformance.translate import values_of

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import (  # noqa: E402
    relative_error,
    rounding,
    spacing,
    without,
)
from metaopt_torch import MetaOptimizer, buckets, compiler, passes  # noqa: E402
from metaopt_torch.state_keys import horizon_keys  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.arrays import map_leaves, to_numpy  # noqa: E402
from tests.on_demand import slow_but  # noqa: E402

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    # the compiler's own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

RULES = {name: rule for name, rule in BASES.items() if rule.slots}
OPTIONS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "tensor": {"blocks": "tensor", "meta": mo.AdamW()},
    "node": {"blocks": "node"},
    "two passes": {"meta_first": True, "skip_nonfinite": True, "blocks": "tensor"},
    "softplus": {"sigma": "softplus", "discount": 0.9},
    "several": {"discount": (0.9, 1.0), "blocks": "tensor", "meta": mo.FastStart(mo.AdamW())},
    "several, two passes": {"discount": (0.9, 1.0), "skip_nonfinite": True, "blocks": "node"},
    "several, softplus": {"discount": (0.9, 0.99, 1.0), "sigma": "softplus"},
}


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(20, 300), torch.nn.LayerNorm(300), torch.nn.Tanh(), torch.nn.Linear(300, 3)
    )


def trained(opt: Any, net: Any, steps: int) -> None:
    for t in range(steps):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(t))
        opt.zero_grad()
        (net(x) - x[:, :3]).square().mean().backward()
        if t == 2:
            net[1].bias.grad = None
        opt.param_groups[0]["lr"] = (1.0, 0.5, 0.0, 1.0)[t % 4]
        opt.step()


def options_of(name: str) -> dict[str, Any]:
    defaults = {
        "base": RULES["AdamW"],
        "meta": mo.Lion(),
        "step_size": 1e-2,
        "meta_lr": 1e-2,
        "discount": 1.0,
    }
    return defaults | OPTIONS[name]


@pytest.mark.parametrize("small", slow_but([0], [0, 2**16]))
@pytest.mark.parametrize("name", slow_but(["scalar", "two passes", "several"], OPTIONS))
def test_compiled_and_eager_steps_agree(name: str, small: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(buckets.SMALL, "cpu", small)
    monkeypatch.setattr(compiler, "CHUNK", 2**10)  # several chunks in the eager one
    nets = [network() for _ in range(2)]
    opts = [
        MetaOptimizer(net.named_parameters(), compile=flag, **options_of(name))
        for net, flag in zip(nets, (True, False), strict=True)
    ]
    for net, opt in zip(nets, opts, strict=True):
        trained(opt, net, 6)
    allowed = rounding("float32", operations=60, steps=6)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < allowed
    states = [values_of(opt.core_state()) for opt in opts]
    for field in ("beta", "slots", "trace", "average", "count", "meta_count", "skipped"):
        map_leaves(
            lambda a, b: _close(to_numpy(a), to_numpy(b), allowed),
            states[0][field],
            states[1][field],
        )


def _close(got: Any, want: Any, allowed: float) -> None:
    assert relative_error(got, want, 1e-6) < allowed


def arrays(rule: Any, size: int, kept: str = "trace", horizons: Any = ()) -> dict[str, Any]:
    """Return what a flat pass is called with."""
    generator = torch.Generator().manual_seed(0)
    names = ("param", "grad", *horizon_keys(kept, horizons))
    found = {name: torch.randn(size, generator=generator) for name in names}
    found |= {slot: torch.ones(size) for slot in rule.slots}
    return found | {
        "count": torch.tensor(3, dtype=torch.int32),
        "alpha": torch.tensor(1e-3),
        "mask": torch.tensor(True),
        **{key: torch.tensor(1.0) for key in horizon_keys("discount", horizons)},
    }


LOOPS: list[Any] = [(name, "trace", ()) for name in RULES]
LOOPS += [("AdamW", "average", ()), ("AdamW", "trace", (2,)), ("AdamW", "average", (3,))]
LOOPS += [(name, "average", (2,)) for name in ("AdamW", "SGDm", "Lion")]
KIND = passes.Kind(maximize=False, rounding="nearest", axes=None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let loops be parallel, whatever other tests have asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("name", "kept", "horizons"), LOOPS)
def test_a_pass_is_one_loop_over_memory(name: str, kept: str, horizons: Any) -> None:
    """With the sums in it, and all of it vectors; and the bias corrections out of it.

    Several discounts read and write one array each beside what one does, and have the step in
    common.
    """
    given = arrays(RULES[name], 10**6, kept, horizons)
    run = compiler.Compiled(passes.fused(dataclasses.replace(KIND, horizons=horizons)))
    with torch.no_grad():
        _, (code,) = run_and_get_code(lambda: run.prepared(RULES[name], given)(*given.values()))
    assert len(re.findall(r"#pragma omp for", code)) == 1
    loop = code.partition("#pragma omp for")[2].partition("'''")[0]  # to the end of the kernel
    assert "loadu" in loop
    assert "tmpbuf" not in loop  # what Inductor computes number by number
    assert "expm1" not in loop
    vectors = loop.partition("C10_UNLIKELY")[0]  # before what is left over at the end
    own = len(RULES[name].slots) + len(horizon_keys(kept, horizons))
    assert vectors.count("loadu(") == 2 + own
    assert vectors.count(".store(") == 1 + own
    assert vectors.count(".sqrt()") == ("exp_avg_sq" in RULES[name].slots)


@pytest.mark.usefixtures("two_threads")
def test_a_pass_with_what_rounding_loses_is_one_loop_of_vectors() -> None:
    given = arrays(RULES["AdamW"], 10**6)
    given |= {name: given[name].bfloat16() for name in ("param", "grad")}
    given["compensation"] = torch.zeros(10**6)
    run = compiler.Compiled(passes.fused(dataclasses.replace(KIND, rounding="kahan")))
    with torch.no_grad():
        _, (code,) = run_and_get_code(lambda: run.prepared(RULES["AdamW"], given)(*given.values()))
    assert len(re.findall(r"#pragma omp for", code)) == 1
    assert "Vectorized<at::BFloat16>" in code
    assert "tmpbuf" not in code


@pytest.mark.usefixtures("two_threads")
def test_plain_compilation_makes_two_loops() -> None:
    """What the arrangement of the pass is there for; where it is needed no more it can go."""

    def plain(w: Any, g: Any, h: Any) -> Any:
        z = (h * g).sum()
        step = 0.1 * (g + 0.1 * w)
        w.copy_(w - step)
        h.copy_(0.9 * h - step)
        return z

    vectors = [torch.randn(10**6) for _ in range(3)]
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(plain, fullgraph=True), *vectors)
    assert len(re.findall(r"#pragma omp for", code)) == 2


def made(monkeypatch: Any) -> list[Any]:
    """Return a list that graphs are noted in from now on, as they are compiled."""
    plain, found = compiler.Compiled._made, []

    def noting(self: Any, rule: Any, given: Any) -> Any:
        found.append(given)
        return plain(self, rule, given)

    monkeypatch.setattr(compiler.Compiled, "_made", noting)
    return found


def test_steps_and_sizes_and_schedules_do_not_recompile(monkeypatch: Any) -> None:
    net = network()
    options = options_of("tensor") | {"weight_decay": 0.2}  # another than the rule's: an argument
    opt = MetaOptimizer(net.named_parameters(), compile=True, **options)
    trained(opt, net, 2)
    graphs = made(monkeypatch)
    for decay in (0.05, 0.0):
        opt.param_groups[0]["weight_decay"] = decay
        trained(opt, net, 2)
    assert not graphs
    wider = torch.nn.Sequential(torch.nn.Linear(20, 301), torch.nn.Linear(301, 3))
    other = MetaOptimizer(wider.named_parameters(), compile=True, **options)
    wider(torch.randn(4, 20)).square().mean().backward()
    engines: Any = other._engine, opt._engine
    engines[0]._passes = engines[1]._passes
    other.step()
    meta_update_of_another_size = 1
    assert len(graphs) <= meta_update_of_another_size


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
def test_one_graph_serves_arrays_wherever_in_their_memory_they_begin(
    blocks: str, monkeypatch: Any
) -> None:
    """As counts of leaves, step sizes of blocks and gradients in one buffer do."""
    graphs = made(monkeypatch)
    monkeypatch.setitem(buckets.SMALL, "cpu", 0)
    options: dict[str, Any] = {
        "base": RULES["AdamW"],
        "meta": mo.Lion(),
        "step_size": 1e-2,
        "discount": 1.0,
    }
    nets = [
        [torch.ones(4, size, requires_grad=True) for size in (30, 33, 41, 50)] for _ in range(2)
    ]
    for net, flag in zip(nets, (True, False), strict=True):
        groups = [{"params": net[:2]}, {"params": net[2:]}]
        opt = MetaOptimizer(groups, compile=flag, blocks=blocks, **options)
        for step in range(3):
            sizes = [param.numel() for param in net]
            buffer = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step))
            for param, piece in zip(net, buffer.split(sizes), strict=True):
                param.grad = piece.view_as(param)
            opt.step()
    assert sum("param" in given for given in graphs) == 1
    allowed = rounding("float32", operations=60, steps=3)
    for a, b in zip(*nets, strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < allowed


@pytest.mark.parametrize("order", [1, -1])
def test_graphs_of_one_size_are_not_taken_for_another(order: int, monkeypatch: Any) -> None:
    """Sizes that are equal, or 1, might be taken for always equal, or always 1; strides too."""
    graphs = made(monkeypatch)
    monkeypatch.setitem(buckets.SMALL, "cpu", 0)
    options: dict[str, Any] = {
        "base": RULES["AdamW"],
        "meta": mo.Lion(),
        "blocks": "node",
        "discount": 1.0,
    }
    shapes = [(40, 40), (40, 30), (1, 30), (30, 1), (1, 1), (30, 40)][::order]
    allowed = rounding("float32", operations=60, steps=1)
    passed = None
    for shape in shapes:
        params = [torch.ones(shape, requires_grad=True) for _ in range(2)]
        for param, flag in zip(params, (True, False), strict=True):
            opt = MetaOptimizer([param], compile=flag, step_size=1e-2, **options)
            if flag:
                engine: Any = opt._engine
                engine._passes = passed = passed or engine._passes
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                param.grad = torch.randn(shape, generator=generator)
                opt.step()
        assert relative_error(params[0].detach().numpy(), params[1].detach().numpy()) < allowed
    passes_made = [given for given in graphs if "param" in given]
    assert len(passes_made) < len(shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_compiled_steps_of_long_loops_are_the_cores(name: str, dtype: Any) -> None:
    """Of parameters of several sizes, one of them a single number, the smallest first."""
    shapes: list[tuple[int, ...]] = [(), (1,), (300, 300), (7, 3)]
    params = [torch.full(shape, 0.5, dtype=dtype, requires_grad=True) for shape in shapes]
    options: dict[str, Any] = {
        "meta": mo.AdamW(),
        "step_size": 1e-2,
        "meta_lr": 1e-2,
        "discount": 1.0,
    }
    opt = MetaOptimizer(params, base=RULES[name], compile=True, **options)
    config = opt.config
    twins = {str(i): param.detach().clone() for i, param in enumerate(params)}
    state = config.init(twins)
    for t in range(4):
        generator = torch.Generator().manual_seed(t)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        opt.step()
        grads = {str(i): param.grad for i, param in enumerate(params)}
        twins, state = config.step(twins, grads, state)
    narrow = str(dtype).removeprefix("torch.")
    computed = "float64" if narrow == "float64" else "float32"
    allowed = rounding(computed, operations=60, steps=4)
    for param, twin in zip(params, twins.values(), strict=True):
        got, want = param.detach().double().numpy(), twin.double().numpy()
        # what is rounded at last may be on one side of a tie here, on the other there
        slack = spacing(narrow, want) if narrow != computed else 0.0
        assert relative_error(without(slack, got, want), want) < allowed
    for leaf, want in state.trace.items():
        got = opt.core_state().trace[leaf]
        assert relative_error(got.numpy(), want.numpy()) < allowed
    sizes = [float(config.step_sizes(state)["all"]), float(opt.step_sizes()["all"])]
    assert relative_error(*sizes) < allowed


def test_a_schedule_of_one_groups_weight_decay_recompiles_nothing(monkeypatch: Any) -> None:
    net = network()
    groups = [
        {"params": [net[0].weight, net[0].bias], "weight_decay": 0.1},
        {"params": [*net[1].parameters(), *net[3].parameters()]},
    ]
    opt = MetaOptimizer(groups, compile=True, **options_of("tensor"))
    trained(opt, net, 2)
    graphs = made(monkeypatch)
    for t in range(3):
        opt.param_groups[0]["weight_decay"] = 0.01 * (t + 1)
        trained(opt, net, 1)
        opt.diagnostics()
    opt.load_state_dict(opt.state_dict())
    trained(opt, net, 1)
    assert not graphs


def test_gradients_know_of_the_step() -> None:
    """What a graph of gradients has kept of a parameter is no longer true after a step."""
    param = torch.ones(10, requires_grad=True)
    opt = MetaOptimizer([param], base=RULES["AdamW"], meta=mo.Lion(), compile=True, discount=1.0)
    loss = param.square().sum()
    param.grad = torch.ones(10)
    kept = {key: value for key, value in opt.state[param].items() if key != "step"}
    before = {key: value._version for key, value in kept.items()}
    opt.step()
    assert all(value._version > before[key] for key, value in kept.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_that_is_replaced_is_let_go() -> None:
    param = torch.ones(70_000, requires_grad=True)
    opt = MetaOptimizer([param], base=RULES["AdamW"], meta=mo.Lion(), compile=True, discount=1.0)
    param.grad = torch.ones(70_000)
    opt.step()
    old = [weakref.ref(value) for value in opt.state[param].values()]
    opt.load_state_dict(opt.state_dict() | {"state": copy.deepcopy(opt.state_dict()["state"])})
    opt.step()
    gc.collect()
    assert [reference() for reference in old] == [None] * len(old)


def test_threads_may_compile_at_once() -> None:
    def trained(number: int) -> Any:
        param = torch.full((70_000 + number,), 1.0, requires_grad=True)
        opt = MetaOptimizer([param], base=mo.AdamW(), meta=mo.Lion(), compile=True, discount=1.0)
        for _ in range(3):
            param.grad = param.detach().clone()
            opt.step()
        return param.detach()

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(trained, range(3)))
    assert all(torch.equal(one[:70_000], found[0]) for one in found)


def test_others_may_call_what_they_have_compiled_while_a_first_step_is_made() -> None:
    """Tracing is seen by all threads."""
    theirs = torch.compile(lambda x: (3.0 * x).cos().sum(), backend="eager")
    theirs(torch.ones(10))
    made = threading.Event()

    def called() -> int:
        calls = 0
        while not made.is_set():
            theirs(torch.ones(10))
            calls += 1
        return calls

    with ThreadPoolExecutor(1) as threads:
        calling = threads.submit(called)
        param = torch.ones(70_003, requires_grad=True)
        param.grad = torch.ones(70_003)
        opt = MetaOptimizer([param], base=mo.RMSprop(), meta=mo.Lion(), compile=True, discount=1.0)
        try:
            opt.step()
        finally:
            made.set()
        assert calling.result() > 0


def test_code_is_made_anew_for_another_number_of_threads(monkeypatch: Any) -> None:
    graphs, before = made(monkeypatch), torch.get_num_threads()
    param = torch.ones(70_000, requires_grad=True)
    param.grad = torch.ones(70_000)
    opt = MetaOptimizer([param], base=mo.SGD(), meta=mo.SGD(), compile=True, discount=1.0)
    try:
        for threads, so_far in ((2, 2), (1, 4), (2, 4)):
            torch.set_num_threads(threads)
            opt.step()
            assert len(graphs) == so_far, "one of the weights, one of the step sizes"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(70_000,), (100, 200)], ids=["alone", "packed"])
def test_gradients_may_change_their_dtype_from_step_to_step(sizes: tuple[int, ...]) -> None:
    found = []
    for compile in (True, False):
        params = [torch.ones(size, requires_grad=True) for size in sizes]
        opt = MetaOptimizer(
            params,
            base=mo.SGD(momentum=0.9),
            meta=mo.Lion(),
            step_size=0.1,
            compile=compile,
            discount=1.0,
        )
        for step, dtype in enumerate((torch.float32, torch.bfloat16) * 2):
            for param in params:
                param.grad, param.grad_dtype = None, None
                param.grad = torch.full(param.shape, 1.0 + step, dtype=dtype)
            opt.step()
        found.append(torch.cat([param.detach() for param in params]))
    _close(found[0], found[1], rounding("float32", 10, 4))


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.1}, {"maximize": True}], ids=lambda c: next(iter(c))
)
def test_what_fails_to_compile_later_changes_nothing(
    change: dict[str, Any], monkeypatch: Any
) -> None:
    param = torch.ones(70_000, requires_grad=True)
    param.grad = torch.ones(70_000)
    opt = MetaOptimizer([param], base=mo.AdamW(), meta=mo.Lion(), compile=True, discount=1.0)
    opt.step()

    def failing(*_: Any) -> Any:
        msg = "no toolchain"
        raise RuntimeError(msg)

    monkeypatch.setattr(compiler.Compiled, "_made", failing)
    opt.param_groups[0].update(change)

    def held() -> list[Any]:
        shared = [
            value for value in opt.param_groups[0].values() if isinstance(value, torch.Tensor)
        ]
        return copy.deepcopy([param.detach(), *opt.state[param].values(), *shared])

    before = held()
    with pytest.raises(RuntimeError, match="no toolchain"):
        opt.step()
    assert all(torch.equal(one, other) for one, other in zip(held(), before, strict=True))


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_after_a_regrouping_that_failed_the_next_step_is_whole(
    failing: int, monkeypatch: Any
) -> None:
    """Its leaves are views of new buffers, some of them."""

    def made() -> tuple[list[Any], Any]:
        params = [
            torch.full((5,), 1.0 + index, dtype=dtype, requires_grad=True)
            for dtype in (torch.float32, torch.float64)
            for index in range(3)
        ]
        return params, MetaOptimizer(
            params,
            base=mo.AdamW(),
            meta=mo.AdamW(),
            step_size=0.1,
            meta_lr=0.1,
            compile=False,
            discount=1.0,
        )

    def stepped(params: list[Any], opt: Any, resting: tuple[int, ...] = ()) -> None:
        for index, param in enumerate(params):
            param.grad = None if index in resting else param.detach().clone()
        opt.step()

    plain, calls = buckets.Bucket._adopted, []

    def out_of_memory(self: Any, key: str) -> Any:
        calls.append(key)
        if len(calls) == failing:
            raise torch.OutOfMemoryError
        return plain(self, key)

    params, opt = made()
    stepped(params, opt)
    with monkeypatch.context() as full:
        full.setattr(buckets.Bucket, "_adopted", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            stepped(params, opt, (2, 5))
    twins, other = made()
    stepped(twins, other)
    for resting in ((), (2, 5), ()):
        stepped(params, opt, resting)
        stepped(twins, other, resting)
    allowed = rounding("float32", 10, 4)  # sums are over other packs
    for param, twin in zip(params, twins, strict=True):
        _close(param.detach(), twin.detach(), allowed)
        for key, value in other.state[twin].items():
            _close(opt.state[param][key], value, allowed)


@pytest.mark.parametrize("change", ["maximize", "gradient"])
def test_after_a_step_that_failed_to_compile_the_next_is_whole(
    change: str, monkeypatch: Any
) -> None:
    def made_of(compile: bool) -> tuple[list[Any], Any]:
        dtypes = torch.float32, torch.float64
        params = [torch.ones(70_000, dtype=dtype, requires_grad=True) for dtype in dtypes]
        opt = MetaOptimizer(
            params,
            base=mo.SGD(),
            meta=mo.Lion(),
            step_size=0.1,
            meta_lr=1e-3,
            compile=compile,
            discount=1.0,
        )
        return params, opt

    def stepped(params: list[Any], opt: Any) -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()

    params, opt = made_of(compile=True)
    stepped(params, opt)
    with monkeypatch.context() as broken:
        plain, calls = compiler.Compiled._made, []

        def failing(self: Any, rule: Any, given: Any) -> Any:
            calls.append(given)
            if len(calls) == 2 or change == "gradient":
                msg = "no toolchain"
                raise RuntimeError(msg)
            return plain(self, rule, given)

        broken.setattr(compiler.Compiled, "_made", failing)
        if change == "maximize":
            opt.param_groups[0]["maximize"] = True
        else:  # from here on of another dtype, alone
            params[0].grad_dtype = None
            params[0].grad = torch.ones(70_000, dtype=torch.bfloat16)
            params[1].grad = None
        with pytest.raises(RuntimeError, match="no toolchain"):
            opt.step()
    opt.param_groups[0]["maximize"] = False
    params[0].grad = None
    stepped(params, opt)
    twins, other = made_of(compile=False)
    for _ in range(2):
        stepped(twins, other)
    for param, twin in zip(params, twins, strict=True):
        _close(param.detach(), twin.detach(), rounding("float32", 10, 4))


def test_a_gradient_that_is_negated_by_a_bit_alone() -> None:
    param = torch.ones(70_000, requires_grad=True)
    opt = MetaOptimizer(
        [param], base=mo.SGD(), meta=mo.SGD(), step_size=0.1, compile=True, discount=1.0
    )
    param.grad = torch._neg_view(torch.ones(70_000))
    opt.step()
    assert torch.allclose(param, torch.full((), 1.1))


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("blocks", ["scalar", "node"])
def test_a_gradient_may_share_its_parameters_memory(blocks: str, skip_nonfinite: bool) -> None:
    """As that of half the square does, in the same place, and in one buffer in another."""
    options: dict[str, Any] = {"blocks": blocks, "skip_nonfinite": skip_nonfinite}
    options |= {"base": RULES["AdamW"], "meta": mo.Lion(), "step_size": 1e-2, "discount": 1.0}
    found = []
    for flag in (True, False):
        buffer = torch.linspace(-1.0, 1.0, 4 * 70_000)
        whole, half = buffer[: 2 * 70_000], buffer[2 * 70_000 :]
        params = [whole.view(2, -1), half[:70_000].view(2, -1)]
        grads = [whole.view(2, -1), half[70_000:].view(2, -1)]
        opt = MetaOptimizer(params, compile=flag, **options)
        for _ in range(3):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            opt.step()
        found.append(buffer)
    assert relative_error(*found) < rounding("float32", operations=60, steps=3)


def test_a_step_in_a_compiled_function_is_left_as_it_is() -> None:
    """The function around it is compiled in two parts."""
    nets = [network() for _ in range(2)]
    opts = [MetaOptimizer(net.parameters(), compile=True, **options_of("tensor")) for net in nets]

    def trained_on(x: Any, net: Any, opt: Any) -> None:
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    whole = torch.compile(trained_on, backend="eager")
    for _ in range(3):
        whole(x, nets[0], opts[0])
        trained_on(x, nets[1], opts[1])
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        allowed = rounding("float32", operations=60, steps=3)
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < allowed


def test_tensors_without_memory_are_not_compiled_for() -> None:
    """With a reason; left to the optimizer, their steps are eager."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for flag in (True, None):
            param = torch.ones(3, requires_grad=True)
            opt = MetaOptimizer([param], base=mo.SGD(), meta=mo.Lion(), compile=flag, discount=1.0)
            param.grad = torch.ones(3)
            if flag:
                with pytest.raises(TypeError, match="'param' is a FakeTensor, of whose memory"):
                    opt.step()
                continue
            with pytest.warns(UserWarning, match="is a FakeTensor, of whose memory nothing"):
                opt.step()


def test_what_does_not_compile_is_known_before_anything_moves(monkeypatch: Any) -> None:
    """Also if it is the meta update, which runs last."""
    plain = compiler.Compiled._made

    def all_but_the_last(self: Any, rule: Any, given: Any) -> Any:
        if "param" in given:
            return plain(self, rule, given)
        msg = "no such toolchain"
        raise RuntimeError(msg)

    monkeypatch.setattr(compiler.Compiled, "_made", all_but_the_last)
    param = torch.ones(300, 300, requires_grad=True)
    opt = MetaOptimizer([param], base=mo.SGD(), meta=mo.Lion(), compile=True, discount=1.0)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="no such toolchain"):
        opt.step()
    assert torch.all(param.detach() == 1.0)


def failing(*_: Any) -> Any:
    with warnings.catch_warnings():  # as torch does: it makes Python forget what was warned of
        pass
    msg = "no such toolchain"
    raise RuntimeError(msg)


def test_where_compilation_fails_steps_are_eager_with_a_warning(monkeypatch: Any) -> None:
    monkeypatch.setattr(compiler.Compiled, "_made", failing)
    nets = [network() for _ in range(2)]
    opt = MetaOptimizer(nets[0].named_parameters(), **options_of("tensor"))
    with pytest.warns(
        UserWarning, match="torch.compile failed .*no such toolchain.*eagerly"
    ) as got:
        trained(opt, nets[0], 3)
    assert len(got) == 1  # for all passes, and whatever else the toolchain has warned of
    trained(
        MetaOptimizer(nets[1].named_parameters(), compile=False, **options_of("tensor")), nets[1], 3
    )
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    opt = MetaOptimizer(nets[0].named_parameters(), compile=True, **options_of("tensor"))
    before = [param.detach().clone() for param in nets[0].parameters()]
    with pytest.raises(RuntimeError, match="no such toolchain"):
        trained(opt, nets[0], 1)
    assert all(torch.equal(a, b) for a, b in zip(before, nets[0].parameters(), strict=True))


@pytest.mark.parametrize("sizes", [(70_000,), (3, 4)], ids=["alone", "packed"])
def test_where_a_kernel_fails_at_its_first_launch_steps_are_eager_with_a_warning(
    sizes: tuple[int, ...], monkeypatch: Any
) -> None:
    """Whatever the kernel has written until then is no array of the optimizer's."""

    def broken(*_: Any) -> Any:
        def run(*values: Any) -> Any:
            for value in values:
                value.fill_(7)
            msg = "name 's26' is not defined"
            raise NameError(msg)

        return run

    monkeypatch.setattr(compiler, "_directly", broken)

    def made_of(flag: bool | None) -> tuple[list[Any], Any]:
        params = [torch.ones(size, requires_grad=True) for size in sizes]
        for param in params:
            param.grad = torch.ones_like(param)
        return params, MetaOptimizer(params, compile=flag, **options_of("tensor"))

    params, opt = made_of(None)
    with pytest.warns(UserWarning, match=r"torch.compile failed \(NameError.*eagerly") as got:
        opt.step()
    assert len(got) == 1
    opt.step()
    twins, other = made_of(False)
    for _ in range(2):
        other.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
        for key, value in other.state[twin].items():
            assert torch.equal(opt.state[param][key], value), key
    params, opt = made_of(True)
    with pytest.raises(NameError, match="s26"):
        opt.step()
    assert all(torch.all(param == 1.0) for param in params)
    for param in params:
        state = dict(opt.state[param])
        assert torch.equal(state.pop("average"), param)
        assert not any(torch.any(value) for value in state.values())


def test_a_first_launch_draws_no_random_numbers() -> None:
    """The same seed gives the same run, whether or not its kernels are new."""
    param = torch.ones(70_000, dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.ones_like(param)
    opt = MetaOptimizer(
        [param], base=mo.SGD(), meta=mo.Lion(), rounding="stochastic", compile=True, discount=1.0
    )
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        opt.step()
        found.append(torch.rand(()))
    assert found[0] == found[1]


def test_what_does_not_compile_is_not_tried_again_for_other_sizes(monkeypatch: Any) -> None:
    tried = []

    def noting(_: Any, __: Any, given: Any) -> Any:
        tried.append(tuple(given))
        return failing()

    monkeypatch.setattr(compiler.Compiled, "_made", noting)
    params = [torch.ones(side, side, requires_grad=True) for side in (300, 400, 500)]
    opt = MetaOptimizer(params, base=mo.SGD(), meta=mo.Lion(), discount=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="torch.compile failed"):
        opt.step()
    assert len(tried) == len(set(tried)) == 2  # the parameters' pass, and that of the step sizes


def test_what_is_compiled_stays_in_use_after_a_size_that_failed(monkeypatch: Any) -> None:
    rule = RULES["SGDm"]
    run = compiler.Compiled(passes.fused(KIND), compiler.Eager(passes.fused(KIND)))
    compiled = run.prepared(rule, arrays(rule, 300))
    monkeypatch.setattr(compiler.Compiled, "_made", failing)
    with pytest.warns(UserWarning, match="torch.compile failed .*no such toolchain"):
        eager = run.prepared(rule, arrays(rule, 1))  # for which another graph is needed
    assert eager is not compiled
    assert run.prepared(rule, arrays(rule, 400)) is compiled


def test_a_warning_that_is_an_error_comes_again(monkeypatch: Any) -> None:
    monkeypatch.setattr(compiler.Compiled, "_made", failing)
    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer([param], base=mo.SGD(), meta=mo.Lion(), discount=1.0)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"torch.compile failed"):
                opt.step()
    assert torch.all(param.detach() == 1.0)


def test_without_a_compiler_steps_are_eager_with_one_warning(monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    net = network()
    with pytest.warns(UserWarning, match=r"lacks a C\+\+ compiler") as said:
        opt = MetaOptimizer(net.parameters(), base=mo.SGD(), meta=mo.Lion(), discount=1.0)
    assert said[0].filename == __file__
    trained(opt, net, 1)
    MetaOptimizer(net.parameters(), base=mo.SGD(), meta=mo.Lion(), compile=False, discount=1.0)


# --- what a device would not have to wait for


class WithoutCuda(TorchFunctionMode):
    """Does on fake CUDA tensors what a torch that is built for the CPU alone refuses to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            return args[0].masked_fill_(*args[1:])
        if func is torch.Tensor.copy_:
            torch._foreach_copy_([args[0]], [args[1]])
            return args[0]
        if func is torch.Tensor.to and args[0].device.type == "cuda":
            given = [*args[1:], *(kwargs or {}).values()]
            dtypes = [value for value in given if isinstance(value, torch.dtype)]
            return args[0].type(dtypes[0]) if dtypes else args[0]
        return func(*args, **(kwargs or {}))


def indexed(tensor: Any, key: Any) -> Any:
    """Return `tensor[key]` for integers, slices, None and an ellipsis."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        rest = tensor.dim() - sum(part is not None for part in keys) + 1
        keys[at : at + 1] = [slice(None)] * rest
    axis = 0
    for part in keys:
        if isinstance(part, int):
            tensor = tensor.select(axis, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(axis)
        else:
            start, stop, _ = part.indices(tensor.shape[axis])
            tensor = tensor.narrow(axis, start, stop - start)
        axis += 1
    return tensor


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_no_step_waits_for_the_device(name: str, lr: str) -> None:
    """On fake CUDA tensors, of which no value is known, so that looking at one is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCuda():
        params = [
            torch.zeros(shape, device="cuda", requires_grad=True)
            for shape in ((400, 300), (7,), ())
        ]
        opt = MetaOptimizer(params, compile=False, **options_of(name))
        if lr == "tensor":
            opt.param_groups[0]["lr"] = torch.ones((), device="cuda")
        for step in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            if step == 1:
                params[1].grad = None
            opt.step()
        sizes, found = opt.step_sizes(), opt.diagnostics()
    assert all(size.device.type == "cuda" for size in sizes.values())
    assert found["skipped"].device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_captured_in_a_graph(name: str, compiled: bool) -> None:
    nets = [network().cuda() for _ in range(2)]
    opts = [
        MetaOptimizer(net.named_parameters(), compile=compiled, **options_of(name)) for net in nets
    ]
    x = torch.randn(16, 20, device="cuda")
    for net in nets:
        net(x).square().mean().backward()
    for opt in opts:
        for _ in range(3):
            opt.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opts[0].step()
    for _ in range(4):
        graph.replay()
        opts[1].step()
    torch.cuda.synchronize()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


# --- memory


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node"])
@pytest.mark.parametrize("name", RULES)
def test_state_is_the_rules_own_and_one_number_a_weight(name: str, blocks: str) -> None:
    params = [torch.zeros(512, 256, requires_grad=True), torch.zeros(256, requires_grad=True)]
    opt = MetaOptimizer(
        params, base=RULES[name], meta=mo.Lion(), blocks=blocks, compile=False, discount=1.0
    )
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    weights = sum(param.numel() for param in params)
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for entry in opt.state.values()
        for tensor in entry.values()
    }
    padding = 4 * buckets.ROW * len(params)
    own = 4 * weights * (len(RULES[name].slots) + 1)
    assert own <= sum(storages.values()) <= own + padding * 4


def test_temporaries_of_an_eager_step_are_of_the_size_of_a_chunk() -> None:
    """Counted by the largest tensor that a step makes, over many weights in many tensors."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            given = {
                t.untyped_storage()._cdata
                for t in torch.utils._pytree.tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor)
            }
            new = [t.numel() for t in made if t.untyped_storage()._cdata not in given]
            largest[0] = max(largest[0], *new, 0)
            return out

    params = [torch.zeros(1000, 1000, requires_grad=True)]
    params += [torch.zeros(300, requires_grad=True) for _ in range(200)]
    opt = MetaOptimizer(
        params, base=RULES["AdamW"], meta=mo.Lion(), blocks="tensor", compile=False, discount=1.0
    )
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    with Watch():  # type: ignore[no-untyped-call]
        opt.step()
    assert 0 < largest[0] <= compiler.CHUNK


def test_launches_do_not_grow_with_the_number_of_small_tensors() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not func.is_view:
                self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (10, 100):
        params = [torch.zeros(30, requires_grad=True) for _ in range(number)]
        opt = MetaOptimizer(
            params,
            base=RULES["AdamW"],
            meta=mo.Lion(),
            blocks="tensor",
            compile=False,
            discount=1.0,
        )
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        with Count() as counted:  # type: ignore[no-untyped-call]
            opt.step()
        counts.append(counted.calls)
    assert counts[1] == counts[0]

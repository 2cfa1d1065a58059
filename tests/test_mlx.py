"""metaopt_mlx: steps of the core on MLX's arrays, in an optimizer that is at home in MLX."""

import copy
import doctest
import importlib
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from metaopt_conformance.backends import find  # noqa: E402
from metaopt_conformance.cases import Case  # noqa: E402
from metaopt_conformance.suite import run  # noqa: E402
from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_mlx import MetaOptimizer, from_config  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.pages import ROOT  # noqa: E402

STEPS = 12


def network() -> Any:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def loss(model: Any, x: Any) -> Any:
    return (model(x) - x.sum(axis=1, keepdims=True)).square().mean()


def batches(steps: int = STEPS) -> list[Any]:
    keys = mx.random.split(mx.random.key(1), steps)
    return [mx.random.normal((16, 4), key=key) for key in keys]


def trained(model: Any, opt: Any, steps: int = STEPS, skip: int = 0) -> None:
    loss_and_grads = nn.value_and_grad(model, loss)
    for x in batches(steps)[skip:]:
        _, grads = loss_and_grads(model, x)
        opt.update(model, grads)
        mx.eval(model.state, opt.state)


def arrays(tree: Any) -> dict[str, Any]:
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def same(one: Any, other: Any) -> None:
    first, second = arrays(one), arrays(other)
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize(
    "options",
    [
        {"base": mo.AdamW(weight_decay=0.1), "blocks": "tensor"},
        {"base": "lion", "meta": "lion", "blocks": "node"},
        {"base": mo.SGD(momentum=0.9), "meta": "adam", "blocks": "weight", "discount": 0.9},
        {"base": mo.AdamW(weight_decay=mo.Learned(0.1)), "recover": True},
    ],
    ids=["adamw", "lion", "sgd", "learned"],
)
def test_steps_are_those_of_numpy(options: dict[str, Any]) -> None:
    opt = MetaOptimizer(step_size=1e-2, lr=0.5, **options)
    core = mo.MetaOptimize(step_size=1e-2, **options)
    rng = np.random.default_rng(0)
    shapes = {"layers.0.weight": (3, 4), "layers.0.bias": (3,), "scale": ()}
    params = {name: np.asarray(rng.normal(size=of), "float32") for name, of in shapes.items()}
    tree = tree_unflatten([(name, mx.array(param)) for name, param in params.items()])
    opt.init(tree)
    state = core.init(params)
    for _ in range(STEPS):
        grads = {name: 0.3 * param - np.sin(param) for name, param in params.items()}
        moved = tree_unflatten([(name, mx.array(grad)) for name, grad in grads.items()])
        tree = opt.apply_gradients(moved, tree)
        params, state = core.step(params, grads, state, lr=0.5)
    allowed = rounding("float32", operations=60, steps=STEPS)
    for name, array in arrays(tree).items():
        assert relative_error(array, params[name]) < allowed, name
    for name, size in core.step_sizes(state).items():
        assert relative_error(np.array(opt.step_sizes()[name]), size) < allowed, name


def test_a_few_cases_of_the_suite_pass() -> None:
    cases = [
        "base=AdamW,meta=Adam,blocks=tensor,discount=0.9 and 1.0,dtype=float32,steps=2",
        "base=SGDm,meta=RMSprop,curvature=exact,approximation=2x2,blocks=node,dtype=float32,steps=2",
        "base=Lion,meta=Lion,blocks=weight,dtype=bfloat16,steps=2",
        "base=SGD,meta=Adam,curvature=rectified,dtype=float32,steps=2",
    ]
    outcomes = [
        outcome
        for outcome in run(find("mlx"), families=["step"], cases=[Case.parse(c) for c in cases])
        if outcome.status != "skipped"
    ]
    assert {outcome.family for outcome in outcomes} == {"step", "adapter's step"}
    assert len(outcomes) >= 2 * len(cases)
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []


def test_compiled_steps_are_the_same() -> None:
    def after(*, compiled: bool) -> Any:
        model = network()
        opt = MetaOptimizer(
            base="sgd", meta="sgd", step_size=0.1, discount=1.0, lr=optim.cosine_decay(1.0, 9)
        )
        opt.init(model.trainable_parameters())
        loss_and_grads, state = nn.value_and_grad(model, loss), [model.state, opt.state]

        def step(x: Any) -> None:
            _, grads = loss_and_grads(model, x)
            opt.update(model, grads)

        if compiled:
            step = partial(mx.compile, inputs=state, outputs=state)(step)
        for x in batches(5):
            step(x)
            mx.eval(state)
        return state

    first, second = arrays(after(compiled=False)), arrays(after(compiled=True))
    allowed = rounding("float32", operations=60, steps=5)
    assert [*first] == [*second]
    assert first["1.step"] == 5
    for name, array in first.items():
        if not name.endswith("compensation"):  # what rounding took
            assert relative_error(second[name].astype(float), array.astype(float)) < allowed, name


def test_a_schedule_multiplies_what_is_learned() -> None:
    model = network()
    opt = MetaOptimizer(
        base="sgd", step_size=0.5, meta_lr=0.0, lr=optim.linear_schedule(0.5, 1.0, 4)
    )
    loss_and_grads = nn.value_and_grad(model, loss)
    for at, x in enumerate(batches(3)):
        _, grads = loss_and_grads(model, x)
        before = arrays(model.parameters())
        opt.update(model, grads)
        for name, array in arrays(grads).items():
            step = 0.5 * (0.5 + 0.125 * at) * array
            np.testing.assert_allclose(
                arrays(model.parameters())[name], before[name] - step, rtol=1e-5, atol=1e-6
            )
        following = 0.5 * (0.5 + 0.125 * (at + 1))
        assert opt.effective_lr()["all"].item() == pytest.approx(following)
    constant = MetaOptimizer(step_size=0.5)
    constant.init(model.trainable_parameters())
    constant.learning_rate = 0.5
    assert constant.effective_lr()["all"].item() == 0.25
    with pytest.warns(UserWarning, match="multiplies the learned step sizes"):
        MetaOptimizer(lr=1e-3)
    with pytest.raises(ValueError, match="`lr` must be a finite number"):
        MetaOptimizer(lr=-1.0)


def test_what_multiplies_is_checked_where_it_is_set() -> None:
    opt = MetaOptimizer(lr=0.5)
    for wrong in (-1, float("nan"), float("inf"), [1.0, 2.0], "fast", mx.ones(2)):
        with pytest.raises(ValueError, match="`learning_rate` must be a"):
            opt.learning_rate = wrong
    assert opt.learning_rate.item() == 0.5
    for right in (1, mx.array(0.25)):
        opt.learning_rate = right
        assert opt.learning_rate.dtype == mx.float32
        assert opt.learning_rate.item() == float(right)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("base", ["adamw", mo.AdamW(weight_decay=mo.Learned(0.1))])
def test_a_copy_goes_on_as_the_optimizer_does(way: Any, base: Any) -> None:
    model, opt = network(), MetaOptimizer(base=base, blocks="tensor", lr=0.5)
    trained(model, opt, 6)
    other = network()
    other.update(tree_map(mx.array, model.parameters()))
    copied = way(opt)
    assert copied.config == opt.config
    trained(model, opt, skip=6)
    kept = arrays(copied.state)
    assert kept["step"] == 6, "it has a state of its own"
    trained(other, copied, skip=6)
    same(other.parameters(), model.parameters())
    same(copied.state, opt.state)


def test_a_run_goes_on_from_files(tmp_path: Path) -> None:
    model, opt = network(), MetaOptimizer(blocks="tensor")
    trained(model, opt, 6)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "opt.safetensors"), dict(tree_flatten(opt.state)))
    mo.save(tmp_path / "run.safetensors", opt.config, opt.core_state())
    trained(model, opt, STEPS, skip=6)
    again, loaded = network(), MetaOptimizer(blocks="tensor")
    again.update(tree_unflatten([*weights.items()]))
    loaded.state = tree_unflatten([*mx.load(str(tmp_path / "opt.safetensors")).items()])
    trained(again, loaded, STEPS, skip=6)
    same(again.parameters(), model.parameters())
    same(loaded.state, opt.state)
    third = network()
    third.update(tree_unflatten([*weights.items()]))
    config, state = mo.load(tmp_path / "run.safetensors", weights)
    other = from_config(config)
    other.init(third.trainable_parameters())
    other.load_core_state(state)
    trained(third, other, STEPS, skip=6)
    same(third.parameters(), model.parameters())
    stranger = MetaOptimizer(blocks="tensor", discount=1.0)
    stranger.state = opt.state
    with pytest.raises(ValueError, match=r"`state` must have 'meta_slots.*another configuration"):
        stranger.init(third.trainable_parameters())


def test_what_has_no_gradient_rests() -> None:
    model, opt = network(), MetaOptimizer(step_size=1e-2)
    opt.init(model.trainable_parameters())
    model.layers[0].freeze()
    before = arrays(model.parameters())
    trained(model, opt, 3)
    after = arrays(model.parameters())
    for name, array in before.items():
        assert (array == after[name]).all() == name.startswith("layers.0"), name
    model.unfreeze()
    trained(model, opt, 3)
    assert (arrays(model.parameters())["layers.0.bias"] != after["layers.0.bias"]).any()


def test_bad_calls_are_refused() -> None:
    model, opt = network(), MetaOptimizer()
    with pytest.raises(ValueError, match="There is no state yet: call `init`"):
        opt.step_sizes()
    with pytest.raises(ValueError, match="`gradients` has 'v', which `parameters` has not"):
        opt.apply_gradients({"v": mx.ones(2)}, {"w": mx.ones(2)})
    opt.init({"w": mx.ones(2)})
    with pytest.raises(ValueError, match="`gradients` has 'v', which has no state"):
        opt.apply_gradients({"v": mx.ones(2)}, {"w": mx.ones(2), "v": mx.ones(2)})
    with pytest.raises(ValueError, match=r"`grads\['w'\]` has shape \(3,\)"):
        opt.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(2)})
    with pytest.raises(TypeError, match=r"`params\['w'\]` must be real and floating"):
        MetaOptimizer().init({"w": mx.arange(3)})
    with pytest.raises(ValueError, match="`meta_grads`"):
        opt.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)}, meta_grads={"w": mx.ones(2)})
    with pytest.raises(TypeError, match="`config` must be a metaopt"):
        from_config({"base": "adamw"})  # type: ignore[arg-type]
    assert opt.state["step"].item() == 0
    trained(model, MetaOptimizer(), 1)


def test_held_out_gradients_decide() -> None:
    model, opt = network(), MetaOptimizer(held_out=True, discount=1.0, step_size=1e-2)
    loss_and_grads = nn.value_and_grad(model, loss)
    for x in batches(3):
        _, grads = loss_and_grads(model, x)
        opt.update(model, grads)
    assert opt.step_sizes()["all"].item() == pytest.approx(1e-2)
    _, grads = loss_and_grads(model, x)
    opt.update(model, grads, meta_grads=grads)
    assert opt.step_sizes()["all"].item() != pytest.approx(1e-2, rel=1e-4)


def test_averages_and_the_log() -> None:
    model, opt = network(), MetaOptimizer(discount=(0.5, 1.0))
    trained(model, opt)
    averaged = opt.averaged_params(model.parameters())
    assert [name for name, _ in tree_flatten(averaged)] == [*arrays(model.parameters())]
    state = opt.core_state()
    want = opt.config.averaged_params(state, dict(tree_flatten(model.parameters())))
    same(averaged, tree_unflatten([*want.items()]))
    log = mo.Log()
    scalars = log.add(opt, params=model, loss=mx.array(0.5))
    assert scalars["step_size/all"] == pytest.approx(opt.step_sizes()["all"].item())
    assert scalars["loss"] == 0.5
    with pytest.raises(ValueError, match="`params` is needed"):
        log.add(opt)


@pytest.mark.parametrize("module", ["metaopt_mlx.optimizer", "metaopt_mlx.state"])
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_the_example_trains(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("loop", ROOT / "examples/mlx/plain_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, opt = module.main(60, str(tmp_path / "run.html"))
    x = mx.random.normal((256, 8))
    assert module.loss(model, x).item() < 1.2  # 1.5 without training
    assert opt.step_sizes()["layers.0.weight"].item() > 1e-3
    assert "<svg" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_the_page_runs_as_it_is_printed() -> None:
    page = (ROOT / "docs" / "mlx.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(found) == 5
    for program in found:
        exec(program.replace("range(300)", "range(30)"), names)
    assert names["score"].item() < 2.0


def test_an_init_that_fails_leaves_what_there_was() -> None:
    model = nn.Linear(2, 1)
    opt = MetaOptimizer(lr=optim.linear_schedule(1.0, 0.0, 10))
    opt.init(model.trainable_parameters())
    with pytest.raises(ValueError, match=r".+"):
        opt.init({"other": mx.zeros(3)})
    opt.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    (size,) = opt.step_sizes().values()
    (taken,) = opt.effective_lr().values()
    assert float(taken) == pytest.approx(0.9 * float(size)), "what the next step takes"

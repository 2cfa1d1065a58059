"""metaopt_keras: steps of the core on Keras's variables, in an optimizer that is at home in Keras.

All of it runs on the backend that KERAS_BACKEND names, by default torch; a test runs the rest on
JAX in a process of its own, as Keras has one backend in each.
"""

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
if keras.backend.backend() not in ("torch", "jax"):
    pytest.skip("needs Keras's backend torch or jax: KERAS_BACKEND", allow_module_level=True)

import metaopt_keras  # noqa: E402
from metaopt_conformance.backends import find  # noqa: E402
from metaopt_conformance.cases import Case  # noqa: E402
from metaopt_conformance.suite import run  # noqa: E402
from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_keras import MetaOptimizer, from_config  # noqa: E402
from metaopt_keras.callbacks import AverageCallback, LogCallback  # noqa: E402
from metaopt_keras.state import assign  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.state import arrays_of  # noqa: E402
from tests.pages import ROOT  # noqa: E402

ops = keras.ops
JAX = keras.backend.backend() == "jax"
STEPS = 12
#: Of what runs on both backends: there, JAX compiles.
both = pytest.mark.both
# Keras's own, of a variable that becomes an array of NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
#: A configuration that is soon compiled.
SMALL: dict[str, Any] = {"base": "sgd", "meta": "sgd", "discount": 1.0, "step_size": 1e-2}
SHAPES: dict[str, tuple[int, ...]] = {"kernel": (4, 3), "bias": (3,), "scale": ()}


def to_numpy(array: Any) -> Any:
    return np.array(ops.convert_to_numpy(array))


def network() -> Any:
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(6, activation="tanh", use_bias=False, name="in"),
        keras.layers.Dense(1, use_bias=False, name="out"),
    ]
    return keras.Sequential([keras.Input((4,)), *layers], name="net")


def data(rows: int = 64) -> tuple[Any, Any]:
    x = np.random.default_rng(1).normal(size=(rows, 4)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def compiled(opt: Any) -> Any:
    model = network()
    model.compile(optimizer=opt, loss="mse")
    return model


def fit(model: Any, epochs: int = 1) -> list[float]:
    """Return the losses of so many epochs, of four steps each."""
    x, y = data()
    history = model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    return list(history.history["loss"])


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=of), "float32") for name, of in SHAPES.items()}


def variables(arrays: dict[str, Any]) -> list[Any]:
    return [keras.Variable(array, name=name) for name, array in arrays.items()]


def stepper(opt: Any, weights: list[Any]) -> Callable[[list[Any]], None]:
    """Return a function that makes a step with gradients: on JAX as `fit` does, compiled."""
    if not JAX:
        return lambda grads: opt.apply([ops.convert_to_tensor(grad) for grad in grads], weights)
    import jax

    opt.build(weights)
    apply = jax.jit(opt.stateless_apply)

    def step(grads: list[Any]) -> None:
        state = [variable.value for variable in opt.variables]
        new, after = apply(state, grads, [weight.value for weight in weights])
        for variable, value in zip([*weights, *opt.variables], [*new, *after], strict=True):
            variable.assign(value)

    return step


def same(first: Any, second: Any) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


def test_the_same_tests_pass_on_jax() -> None:
    if JAX:
        pytest.skip("this is that run")
    pytest.importorskip("jax")
    flags = os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "both", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
        | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2"}
        # it compiles in half the time, and imports nothing for plugins
        | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        {"base": mo.AdamW(weight_decay=0.1), "blocks": "tensor"},
        {"base": mo.SGD(momentum=0.9), "meta": "adam", "discount": 0.9, "blocks": "weight"},
        {"base": "lion", "discount": (0.9, 1.0)},
        {"base": mo.AdamW(weight_decay=mo.Learned(0.1)), "recover": True},
    ],
    ids=["adamw", "sgd", "lion", "learned"],
)
def test_steps_are_those_of_numpy(options: dict[str, Any]) -> None:
    opt = MetaOptimizer(step_size=1e-2, lr=0.5, **options)
    core = mo.MetaOptimize(step_size=1e-2, **options)
    params = start()
    weights, state = variables(params), core.init(params)
    step = stepper(opt, weights)
    for _ in range(STEPS):
        grads = {name: 0.3 * param - np.sin(param) for name, param in params.items()}
        step([*grads.values()])
        params, state = core.step(params, grads, state, lr=0.5)
    allowed = rounding("float32", operations=60, steps=STEPS)
    assert int(to_numpy(opt.core_state().step)) == STEPS
    for weight, (name, param) in zip(weights, params.items(), strict=True):
        assert relative_error(to_numpy(weight), param) < allowed, name
    for name, size in core.step_sizes(state).items():
        assert relative_error(to_numpy(opt.step_sizes()[name]), size) < allowed, name
    for name, blocks in core.hyperparameters(state).items():
        for block, value in blocks.items():
            found = to_numpy(opt.hyperparameters()[name][block])
            assert relative_error(found, value) < allowed, name


def test_a_few_cases_of_the_suite_pass() -> None:
    cases = [
        "base=AdamW,meta=Adam,blocks=tensor,discount=0.9 and 1.0,dtype=float64,steps=2",
        "base=SGDm,meta=RMSprop,curvature=exact,approximation=2x2,blocks=node,dtype=float32,steps=2",
        "base=Lion,meta=Lion,blocks=weight,dtype=bfloat16,steps=2",
        "base=SGD,meta=Adam,curvature=rectified,dtype=float32,steps=2",
    ]
    outcomes = [
        outcome
        for outcome in run(find("keras"), families=["step"], cases=[Case.parse(c) for c in cases])
        if outcome.status != "skipped"
    ]
    assert {outcome.family for outcome in outcomes} == {"step", "adapter's step"}
    assert len(outcomes) >= 2 * len(cases)
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []


@both
def test_a_saved_model_goes_on(tmp_path: Path) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(1.0, 100)
    options = SMALL | {"base": "adamw", "blocks": "tensor"}
    options["step_size"] = {"net/in/kernel": 1e-2, "net/out/kernel": 2e-2}
    model = compiled(MetaOptimizer(**options, lr=schedule))
    opt, first = model.optimizer, fit(model)[0]
    model.save(tmp_path / "model.keras")
    mo.save(tmp_path / "run.safetensors", opt.config, opt.core_state())
    weights = model.get_weights()
    assert fit(model)[0] < 0.9 * first
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.config == opt.config
    assert [*loaded.optimizer.step_sizes()] == ["net/in/kernel", "net/out/kernel"]
    fit(loaded)
    same(loaded.variables, model.variables)
    same(loaded.optimizer.variables, opt.variables)
    if JAX:
        return
    config, state = mo.load(tmp_path / "run.safetensors", opt.named())
    other = compiled(from_config(config, lr=schedule))
    other.set_weights(weights)
    other.optimizer.build(other.trainable_variables)
    other.optimizer.load_core_state(state)
    other.optimizer.iterations.assign(4)
    fit(other)
    same(other.variables, model.variables)
    same(other.optimizer.variables, opt.variables)


@both
def test_gradients_accumulate_as_keras_says() -> None:
    options: dict[str, Any] = {"base": mo.AdamW(weight_decay=0.1), "step_size": 1e-2}
    options["blocks"] = "tensor"
    opt = MetaOptimizer(**options, gradient_accumulation_steps=2, clipvalue=0.2)
    core = mo.MetaOptimize(**options)
    params = start()
    weights, state = variables(params), core.init(params)
    step = stepper(opt, weights)
    rng = np.random.default_rng(3)
    for _ in range(4):
        pair = [
            {name: rng.normal(size=of).astype("float32") for name, of in SHAPES.items()}
            for _ in range(2)
        ]
        for grads in pair:
            step([*grads.values()])
        mean = {name: np.clip((pair[0][name] + pair[1][name]) / 2, -0.2, 0.2) for name in SHAPES}
        params, state = core.step(params, mean, state)
    assert int(to_numpy(opt.core_state().step)) == 4
    for weight, param in zip(weights, params.values(), strict=True):
        assert relative_error(to_numpy(weight), param) < rounding("float32", 60, 4)


@both
def test_mixed_precision_keeps_weights_and_state_wide() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(MetaOptimizer(**SMALL))
    finally:
        keras.config.set_dtype_policy("float32")
    first, last = fit(model, 2)
    assert last < first
    inner = model.optimizer.inner_optimizer  # of one that scales losses
    assert 0 < int(to_numpy(inner.core_state().step)) <= 8
    kinds = {keras.backend.standardize_dtype(variable.dtype) for variable in inner.variables}
    assert kinds <= {"float32", "int32", "int64"}


@pytest.mark.skipif(not JAX, reason="Keras distributes no tensors of torch's")
@both
def test_state_lies_as_the_weights_do() -> None:
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["net/in/kernel"] = keras.distribution.TensorLayout((None, "model"), mesh)
    with keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
        model = compiled(MetaOptimizer(**SMALL | {"discount": (0.9, 1.0)}))
        fit(model)
        (kernel,) = [v for v in model.trainable_variables if v.path == "net/in/kernel"]
        (average,) = [v for v in model.optimizer.variables if v.name == "average_net_in_kernel"]
    assert tuple(kernel.value.sharding.spec) == (None, "model")
    assert tuple(average.value.sharding.spec) == (None, None, "model")


def test_fit_trains_and_the_log_sees_it() -> None:
    model = compiled(MetaOptimizer(base="adamw", step_size=1e-3, blocks="tensor"))
    losses = fit(model, 20)
    assert losses[-1] < 0.2 * losses[0]
    opt, log = model.optimizer, mo.Log()
    scalars = log.add(opt, loss=losses[-1])
    assert scalars["step_size/net/in/kernel"] > 3e-3
    assert scalars["effective_lr/net/in/kernel"] == scalars["step_size/net/in/kernel"]
    assert set(opt.diagnostics()["restarts"]) == set(opt.step_sizes())


def test_averages_are_there_for_a_while() -> None:
    model = compiled(MetaOptimizer(step_size=1e-2, discount=0.9))
    fit(model)
    opt, last = model.optimizer, model.get_weights()
    with opt.averaged_params():
        averaged = model.get_weights()
        with pytest.raises(RuntimeError, match="Steps must be made from the trained weights"):
            opt.apply([ops.ones(v.shape) for v in model.trainable_variables])
    same(model.get_weights(), last)
    values = {variable.path: variable.value for variable in model.trainable_variables}
    want = opt.config.averaged_params(opt.core_state(), values)
    assert [*want] == [variable.path for variable in model.trainable_variables]
    same(averaged, [*want.values()])
    assert any((one != other).any() for one, other in zip(averaged, last, strict=True))


@both
def test_callbacks_validate_at_averages_and_write_a_page(tmp_path: Path) -> None:
    model = compiled(MetaOptimizer(**SMALL | {"discount": 0.9}))
    x, y = data()
    log = LogCallback(tmp_path / "run.html", every=3)
    history = model.fit(
        *(x, y),
        batch_size=16,
        epochs=2,
        validation_data=(x, y),
        callbacks=[AverageCallback(), log],
        verbose=0,
    )
    last = model.get_weights()
    with model.optimizer.averaged_params():
        averaged = model.evaluate(x, y, verbose=0)
    assert history.history["val_loss"][-1] == pytest.approx(averaged, rel=1e-5)
    assert model.evaluate(x, y, verbose=0) < 0.999 * averaged
    same(model.get_weights(), last)
    assert [entry["step"] for entry in log.run_log.entries] == [3, 6]
    assert "<svg" in (tmp_path / "run.html").read_text(encoding="utf-8")
    if not JAX:
        predicted = model.predict(x, verbose=0, callbacks=[AverageCallback()])
        assert np.mean((predicted - y) ** 2) == pytest.approx(averaged, rel=1e-5)
        other = compiled("sgd")
        with pytest.raises(ValueError, match="must be compiled with a metaopt_keras"):
            other.evaluate(x, y, verbose=0, callbacks=[AverageCallback()])
        with pytest.raises(ValueError, match="`every` must be an integer of at least 1; got 0"):
            LogCallback(every=0)
        fresh = compiled(MetaOptimizer())
        fresh.evaluate(x, y, verbose=0, callbacks=[AverageCallback()])


def test_a_schedule_multiplies_what_is_learned() -> None:
    weight = keras.Variable(np.ones(2, "float32"), name="w")
    schedule = keras.optimizers.schedules.PolynomialDecay(0.5, 4, 1.0)
    opt = MetaOptimizer(base="sgd", step_size=0.5, meta_lr=0.0, lr=schedule)
    taken = []
    for _ in range(3):
        before = to_numpy(weight)
        opt.apply([ops.ones(2)], [weight])
        taken.append(float((before - to_numpy(weight))[0]))
    assert taken == pytest.approx([0.25, 0.3125, 0.375], rel=1e-6)
    assert float(opt.effective_lr()["all"]) == pytest.approx(0.4375)
    constant = MetaOptimizer(step_size=0.5)
    constant.build([weight])
    constant.learning_rate = 0.5
    assert float(constant.effective_lr()["all"]) == pytest.approx(0.25)
    called = MetaOptimizer(base="sgd", step_size=0.5, meta_lr=0.0, lr=lambda: 0.0)
    before = to_numpy(weight)
    called.apply([ops.ones(2)], [weight])
    same([weight], [before])
    with pytest.warns(UserWarning, match="multiplies the learned step sizes"):
        MetaOptimizer(lr=1e-3)
    with pytest.raises(ValueError, match="`lr` must be a finite number"):
        MetaOptimizer(lr=-1.0)


@dataclass(frozen=True)
class Signs:
    """A rule of one's own."""

    weight_decay: float = 0.0
    pair: tuple[float, ...] = (0.5, 1.0)
    slots = ()
    scope = "weight"

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:
        del count
        return self.pair[0] * grad, slots


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": {"*bias": "sgd", "*": {"name": "adamw", "betas": [0.8, 0.9]}}, "discount": 0.9},
        {"base": mo.AdamW(weight_decay=mo.Learned(0.1, name="decay")), "bounds": (1e-6, 0.1)},
        {"sigma": mo.Sigmoid(1e-5, 1.0), "curvature": mo.curvature.Diagonal(), "recover": False},
        {"blocks": {"head": "out/*", "rest": "*"}, "step_size": {"head": 0.1, "rest": 0.2}},
        {"blocks": "weight", "step_size": {"w": np.array([0.1, 0.2])}, "skip_nonfinite": True},
        {"base": mo.Averaged(Signs(weight_decay=0.5)), "meta": {"name": "fast_start"}},
    ],
    ids=["defaults", "patterns", "learned", "maps", "groups", "arrays", "own"],
)
def test_a_config_in_plain_values_makes_the_same(options: dict[str, Any]) -> None:
    opt = MetaOptimizer(**options, lr=0.5, clipnorm=1.0, name="mine")
    opt.learning_rate = 0.01
    written = json.loads(json.dumps(keras.saving.serialize_keras_object(opt)))
    again = keras.saving.deserialize_keras_object(written, custom_objects={"Signs": Signs})
    assert isinstance(again, MetaOptimizer)
    assert again.config == opt.config
    assert (again.name, again.clipnorm) == ("mine", 1.0)
    assert float(again.learning_rate) == pytest.approx(0.01)
    assert again.get_config().keys() == opt.get_config().keys()


def test_nothing_that_a_config_names_is_imported() -> None:
    spec = {"mapping": [["name", "subprocess.Popen"], ["args", "true"]]}
    patterns = {"mapping": [["*", "subprocess.Popen"]]}
    for option in ({"base": "subprocess.Popen"}, {"base": spec}, {"base": patterns}):
        with pytest.raises(ValueError, match="must not name a class to import"):
            MetaOptimizer.from_config(option)
    with pytest.raises(ValueError, match="an object of the class 'Unheard', which Keras does not"):
        MetaOptimizer.from_config({"meta": {"foreign": "Unheard", "options": []}})
    with pytest.raises(ValueError, match=r"`config\['base'\]` must be what `get_config` returns"):
        MetaOptimizer.from_config({"base": {"odd": 1}})
    options = MetaOptimizer(base=Signs()).get_config()
    assert MetaOptimizer.from_config(options, {"Signs": Signs}).config.base == Signs()
    assert MetaOptimizer.from_config({"base": "sgd"}).config.base == mo.SGD()


@pytest.mark.parametrize("around", ["averaged", "faststart"])
def test_nor_is_what_a_rule_within_another_names(around: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    inner = {"mapping": [["name", "subprocess.Popen"], ["args", ["touch", str(made)]]]}
    config = {"mapping": [["name", around], ["rule", inner]]}
    option = "base" if around == "averaged" else "meta"
    with pytest.raises(ValueError, match="must not name a class to import, 'subp"):
        MetaOptimizer.from_config({option: config})
    assert not made.exists()


@both
def test_a_state_that_is_handed_over_stays_the_callers() -> None:
    model = compiled(MetaOptimizer(**SMALL))
    fit(model)
    opt = model.optimizer
    state, weights = opt.core_state(), opt.named()
    opt.load_core_state(state)
    fit(model)
    assert int(state.step) == 4
    assert all(np.isfinite(to_numpy(weight)).all() for weight in weights.values())


@both
def test_steps_within_averages_are_told() -> None:
    model = compiled(MetaOptimizer(**SMALL | {"discount": 0.9}))
    fit(model)
    opt = model.optimizer
    with pytest.raises(RuntimeError, match="averaged_params"), opt.averaged_params():
        fit(model)
    with opt.averaged_params():
        with pytest.raises(RuntimeError, match="leave `averaged_params"), opt.averaged_params():
            pass
        with pytest.raises(RuntimeError, match="leave `averaged_params"):
            opt.apply([ops.zeros(variable.shape) for variable in model.trainable_variables])


def test_an_evaluation_that_failed_leaves_averages_until_training_begins() -> None:
    def fail(*_: Any, **__: Any) -> None:
        msg = "no such luck"
        raise RuntimeError(msg)

    failing = keras.callbacks.LambdaCallback()
    failing.on_test_batch_begin = fail
    model = compiled(MetaOptimizer(**SMALL | {"discount": 0.9}))
    fit(model)
    x, y = data()
    averages, last = AverageCallback(), model.get_weights()
    with pytest.raises(RuntimeError, match="no such luck"):
        model.evaluate(x, y, callbacks=[averages, failing], verbose=0)
    averages.restore()
    same(model.get_weights(), last)
    with pytest.raises(RuntimeError, match="no such luck"):
        model.evaluate(x, y, callbacks=[averages, failing], verbose=0)
    model.fit(x, y, callbacks=[averages], verbose=0)


@pytest.mark.parametrize(
    "other", [{"base": "rmsprop"}, {"sigma": "identity"}, {"blocks": "tensor"}], ids=str
)
def test_a_state_of_another_kind_is_not_loaded(other: dict[str, Any], tmp_path: Path) -> None:
    model = compiled(MetaOptimizer(base="lion", step_size=1e-2))
    fit(model)
    model.save_weights(tmp_path / "run.weights.h5")
    again = compiled(MetaOptimizer(**{"base": "lion", "step_size": 1e-2, **other}))
    fit(again)
    before = again.optimizer.core_state()
    with pytest.warns(UserWarning, match="is not loaded: the file has that of other"):
        again.load_weights(tmp_path / "run.weights.h5")
    same(arrays_of(before).values(), arrays_of(again.optimizer.core_state()).values())


def test_what_has_no_gradient_rests() -> None:
    arrays = start()
    weights, opt = variables(arrays), MetaOptimizer(step_size=1e-2)
    opt.build(weights)
    grads = [None, *(ops.ones(weight.shape) for weight in weights[1:])]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        opt.apply(grads)
    for weight, before in zip(weights, arrays.values(), strict=True):
        assert (to_numpy(weight) == before).all() == (weight.name == "kernel")
    assert [int(count) for count in opt.core_state().count.values()] == [0, 1, 1]


def test_variables_that_gradients_replace_have_no_state() -> None:
    weight, scale = variables({"w": np.ones(2, "float32"), "scale": np.ones((), "float32")})
    scale.overwrite_with_gradient = True
    opt = MetaOptimizer(step_size=1e-2)
    opt.apply([ops.ones(2), ops.full((), 7.0)], [weight, scale])
    assert [*opt.core_state().count] == ["w"]
    assert to_numpy(scale) == 7.0
    MetaOptimizer().build([])


def test_variables_of_one_path_have_names_of_their_own() -> None:
    weights = [keras.Variable(np.ones(2, "float32"), name="w") for _ in range(3)]
    opt = MetaOptimizer(blocks="tensor")
    opt.build(weights)
    assert [*opt.step_sizes()] == ["w", "w_1", "w_2"]


def test_names_of_a_file_stay_where_they_fit() -> None:
    inner, other = variables({"kernel": np.ones(2, "float32"), "bias": np.ones(2, "float32")})
    opt = MetaOptimizer(blocks="tensor")
    opt.build([inner, other])
    config = opt.get_config()
    for earlier, want in (
        (["net/kernel", "net/bias"], ["net/kernel", "net/bias"]),
        (["a/kernel_2", "b/bias"], ["a/kernel_2", "b/bias"]),
        (["net/kernel", "net/other"], ["kernel", "bias"]),
        (["net/bias", "net/kernel"], ["kernel", "bias"]),
        (["kernel"], ["kernel", "bias"]),
    ):
        again = MetaOptimizer.from_config(config | {"leaves": earlier})
        again.build([inner, other])
        assert [*again.step_sizes()] == want


def test_held_out_gradients_decide() -> None:
    weight = keras.Variable(np.ones(2, "float32"), name="w")
    opt = MetaOptimizer(held_out=True, discount=1.0, step_size=1e-2)
    for _ in range(3):
        opt.apply([ops.ones(2)], [weight])
    assert float(opt.step_sizes()["all"]) == pytest.approx(1e-2)
    opt.apply([ops.ones(2)], [weight], meta_grads=[ops.ones(2)])
    assert float(opt.step_sizes()["all"]) != pytest.approx(1e-2, rel=1e-4)
    with pytest.raises(
        ValueError, match="`meta_grads` must have an array or None for each of the 1"
    ):
        opt.apply([ops.ones(2)], [weight], meta_grads=[None, None])
    opt.apply([ops.ones(2)], [weight])  # and nothing is left of it
    assert int(opt.core_state().step) == 5


def test_curvature_is_followed() -> None:
    def trained(**given: Any) -> float:
        weight = keras.Variable(np.ones(2, "float32"), name="w")
        opt = MetaOptimizer(base="sgd", step_size=0.1, curvature="diagonal", discount=1.0)
        for _ in range(3):
            opt.apply([3.0 * weight.value], [weight], **given)
        return float(opt.step_sizes()["all"])

    flat, curved = (trained(hessian_diagonal=[ops.full((2,), h)]) for h in (0.0, 3.0))
    assert flat != curved
    with pytest.raises(ValueError, match="hessian_diagonal"):
        trained()


def test_bad_calls_are_refused() -> None:
    weight = keras.Variable(np.ones(2, "float32"), name="w")
    opt = MetaOptimizer()
    with pytest.raises(ValueError, match="There is no state yet: call `build`"):
        opt.step_sizes()
    with pytest.raises(TypeError, match=r"`params\['i'\]` must be real and floating"):
        opt.build([keras.Variable(np.arange(3), trainable=False, dtype="int32", name="i")])
    opt.build([weight])
    with pytest.raises(ValueError, match=r"that of 'w' has \(3,\), and the variable \(2,\)"):
        opt.apply([ops.ones(3)])
    with pytest.raises(ValueError, match="`meta_grads` must be left out without `held_out`"):
        opt.apply([ops.ones(2)], meta_grads=[ops.ones(2)])
    assert int(opt.iterations.value) == int(opt.core_state().step) == 0
    with pytest.raises(ValueError, match=r"`weight_decay` must be left out.*AdamW"):
        MetaOptimizer(weight_decay=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Say which rule variables have by patterns"):
        opt.exclude_from_weight_decay(var_names=["bias"])
    with pytest.raises(ValueError, match="`base` must have a formula"):
        MetaOptimizer(base=mo.Opaque())
    with pytest.raises(TypeError, match="`config` must be a metaopt"):
        from_config({"base": "adamw"})  # type: ignore[arg-type]
    for option in ("gradient_accumulation_steps", "loss_scale_factor"):
        for needs in ({"held_out": True}, {"curvature": "diagonal"}):
            options: dict[str, Any] = needs | {option: 2}
            with pytest.raises(ValueError, match=f"`{option}` must be left out with"):
                MetaOptimizer(**options)
    with pytest.raises(TypeError, match="`lr` must be a number or a schedule; got the class"):
        MetaOptimizer(lr=keras.optimizers.schedules.CosineDecay)
    for wrong in (-1.0, float("nan"), float("inf"), "a"):
        with pytest.raises((ValueError, TypeError), match="`learning_rate` must be"):
            opt.learning_rate = wrong
    assert float(opt.learning_rate) == 1.0
    scheduled = MetaOptimizer(lr=lambda: 0.5)
    with pytest.raises(TypeError, match="`learning_rate` must not be set to a number"):
        scheduled.learning_rate = 0.5
    with pytest.raises(ValueError, match="for each of the 1 variables; got 2"):
        opt.apply([ops.ones(2), ops.ones(2)])
    with pytest.raises(ValueError, match="must be different ones"):
        opt.apply([ops.ones(2), ops.ones(2)], [weight, weight])
    with pytest.raises(TypeError, match=r"`state` must be a metaopt.State; got 'x'"):
        opt.load_core_state("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`every` must be an integer"):
        LogCallback(every=2.5)  # type: ignore[arg-type]
    other = MetaOptimizer(discount=1.0)
    other.build([keras.Variable(np.ones(2, "float32"), name="w")])
    with pytest.raises(ValueError, match=r"`state` must have .*another configuration"):
        other.load_core_state(opt.core_state())
    other.build([keras.Variable(np.ones(2, "float32"), name="v")])
    stranger = MetaOptimizer()
    stranger.build([keras.Variable(np.ones(2, "float32"), name="v")])
    with pytest.raises(
        ValueError, match="`state` must be of the parameters v, in this order; got w"
    ):
        stranger.load_core_state(opt.core_state())


def test_values_in_each_others_memory_are_all_set() -> None:
    first, second = variables({"a": np.ones(2, "float32"), "b": np.zeros(2, "float32")})
    assign([(first, second.value.detach()), (second, first.value.detach())])
    same([first, second], [np.zeros(2), np.ones(2)])


def test_other_backends_are_refused_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import metaopt_keras"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"KERAS_BACKEND": "tensorflow"}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: metaopt_keras runs on Keras's backends torch and jax")


@pytest.mark.parametrize(
    "module", ["metaopt_keras.optimizer", "metaopt_keras.serialized", "metaopt_keras.state"]
)
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
    assert metaopt_keras.__doc__


def test_the_example_trains() -> None:
    spec = importlib.util.spec_from_file_location("fit", ROOT / "examples/keras/fit.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, history = module.main(3)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert history.history["val_loss"][-1] < 1.2  # 1.5 without training
    assert max(map(float, model.optimizer.step_sizes().values())) > 1e-3


def test_the_page_runs_as_it_is_printed() -> None:
    page = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(found) == 5
    for program in found:
        exec(program, names)
    assert names["score"] < 3.0
    assert int(names["opt"].core_state().step) == 4 * 15

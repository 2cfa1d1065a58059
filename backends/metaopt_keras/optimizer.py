"""MetaOptimizer, an optimizer of Keras whose step sizes tune themselves."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, NoReturn

import keras
import numpy as np

import metaopt as mo
from metaopt.arrays import is_number, map_leaves
from metaopt.configuration import BASE, META, META_LR, STEP_SIZE, RuleLike
from metaopt.inputs import check_formulas, multiplier, taken_for_step_size
from metaopt.metaoptimize import check_config
from metaopt.state import arrays_of, each_array
from metaopt.warning import warn
from metaopt_keras.serialized import options_of, to_options
from metaopt_keras.state import assign, check_alike, names_of, value_of

__all__ = ["MetaOptimizer", "from_config"]

#: Of a written configuration, the names of leaves.
LEAVES = "leaves"
#: Of written variables, what they are the state of.
MADE_WITH = "made_with"


def _eager(function: Callable[..., None]) -> Callable[..., None]:
    """Keep `torch.compile`, of a model with `jit_compile=True`, out of a function.

    It would trace all of it for minutes, and then run it uncompiled.
    """
    if keras.backend.backend() != "torch":
        return function
    return import_module("torch").compiler.disable(function)


@dataclass(frozen=True)
class _Given:
    """What a step is handed beside gradients.

    Parameters
    ----------
    variables : list of keras.Variable, optional
        Those that the lists are of; by default those that the optimizer is built of.
    hvp, third, hessian_diagonal, meta_grads
        As `MetaOptimizer.apply` takes them.
    """

    variables: Sequence[Any] | None = None
    hvp: Callable[..., Any] | None = None
    third: Callable[..., Any] | None = None
    hessian_diagonal: Sequence[Any] | None = None
    meta_grads: Sequence[Any] | None = None

    @property
    def names(self) -> list[str]:
        """The arguments that are there."""
        own = [one.name for one in fields(self) if one.name != "variables"]
        return [name for name in own if getattr(self, name) is not None]


def _multiplier(name: str, lr: Any) -> Any:
    """Return a multiplier as a float; a schedule or a function as it is."""
    if isinstance(lr, type):
        msg = f"`{name}` must be a number or a schedule; got the class {lr.__name__}: make one."
        raise TypeError(msg)
    if callable(lr):
        return lr
    return float(multiplier(name, keras.ops.convert_to_numpy(lr) if hasattr(lr, "dtype") else lr))


def _check_goes_with(config: mo.MetaOptimize, name: str, value: Any) -> None:
    """Raise where an option of Keras's changes gradients, and more is needed than gradients."""
    needs = "held_out" if config.held_out else "curvature"
    curved = getattr(config.curvature, "kind", config.curvature) != "none"
    if value is None or not (config.held_out or curved):
        return
    msg = (
        f"`{name}` must be left out with `{needs}`: Keras applies it to gradients, and not to what "
        f"a step is handed beside them; got {value!r}."
    )
    raise ValueError(msg)


@keras.saving.register_keras_serializable(package="metaopt_keras")
class MetaOptimizer(keras.optimizers.Optimizer):
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md; `metaopt.MetaOptimize` describes the options that both have. It is used as
    every optimizer of Keras, on the backends torch and JAX: `model.compile(optimizer=...)` and
    `fit`, or `apply` and `stateless_apply`. Its state is in variables, `opt.variables`, which go
    into `.keras` files. Leaves are named by the paths of variables, as "sequential/dense/kernel".

    Parameters
    ----------
    base, meta, step_size, meta_lr, discount, blocks, sigma, bounds
        As for `metaopt.MetaOptimize`.
    approximation, curvature, held_out, meta_first, skip_nonfinite, recover
        As for `metaopt.MetaOptimize`.
    lr : float, LearningRateSchedule or callable without arguments, default 1.0
        Multiplies the learned step sizes. What `learning_rate` returns and sets, and callbacks.
    weight_decay : None
        Refused: weight decay is an option of `base`, `metaopt.AdamW(weight_decay=0.1)`.
    clipnorm, clipvalue, global_clipnorm, loss_scale_factor, gradient_accumulation_steps, name
        As for `keras.optimizers.Optimizer`.
    use_ema, ema_momentum, ema_overwrite_frequency
        As for `keras.optimizers.Optimizer`. `averaged_params` needs none of them.

    Attributes
    ----------
    config : metaopt.MetaOptimize

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="out")], name="net")
    >>> model.compile(optimizer=MetaOptimizer(base="adamw", blocks="tensor"), loss="mse")
    >>> x = np.ones((64, 3), "float32")
    >>> history = model.fit(x, x.sum(axis=1, keepdims=True), verbose=0)
    >>> sorted(model.optimizer.step_sizes())
    ['net/out/bias', 'net/out/kernel']
    """

    def __init__(
        self,
        *,
        base: RuleLike = BASE,
        meta: RuleLike = META,
        step_size: float | Mapping[str, Any] = STEP_SIZE,
        meta_lr: float = META_LR,
        discount: float | tuple[float, ...] | None = None,
        blocks: Any = "scalar",
        sigma: Any = "exp",
        bounds: Any = None,
        approximation: str = "l",
        curvature: Any = "none",
        held_out: bool = False,
        meta_first: bool = False,
        skip_nonfinite: bool = False,
        recover: bool = False,
        lr: Any = 1.0,
        weight_decay: None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        config = mo.MetaOptimize(
            base=base,
            meta=meta,
            step_size=step_size,
            meta_lr=meta_lr,
            discount=discount,
            blocks=blocks,
            sigma=sigma,
            bounds=bounds,
            approximation=approximation,
            curvature=curvature,
            held_out=held_out,
            meta_first=meta_first,
            skip_nonfinite=skip_nonfinite,
            recover=recover,
        )
        check_formulas(
            config.base,
            "hand the steps of an optimizer of your own to `metaopt.MetaOptimize.step` as "
            "`unit_steps`.",
        )
        if weight_decay is not None:
            msg = (
                "`weight_decay` must be left out: Keras would decay by `lr`, whatever step size is "
                "learned. It is an option of the rule, as "
                f"base=metaopt.AdamW(weight_decay={weight_decay!r}); got {weight_decay!r}."
            )
            raise ValueError(msg)
        _check_goes_with(config, "gradient_accumulation_steps", gradient_accumulation_steps)
        _check_goes_with(config, "loss_scale_factor", loss_scale_factor)
        lr = _multiplier("lr", lr)
        if not callable(lr):
            advice = taken_for_step_size([lr])
            if advice is not None:
                warn(advice)
        super().__init__(
            learning_rate=lr,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
        )
        self.config = config
        self._names: tuple[str, ...] = ()  # before `build`, those of the file it comes from
        # of variables; no dict, as Keras takes for the optimizer's own what lies in one
        self._held: mo.State | None = None
        self._given, self._averaged = _Given(), False

    def build(self, variables: Sequence[Any]) -> None:
        """Make the state for these variables.

        Parameters
        ----------
        variables : list of keras.Variable
            Those that are trained: `model.trainable_variables`. `fit` and the first `apply` do it.

        Raises
        ------
        TypeError, ValueError
            As `metaopt.MetaOptimize.init`.
        """
        if self.built:
            return
        names = names_of(variables, self._names)
        leaves = {
            name: value_of(variable)
            for name, variable in zip(names, variables, strict=True)
            if not self._overwrite_variable_with_gradient(variable)
        }
        state = self.config.init(leaves) if leaves else None
        super().build(variables)
        self._names = names
        if state is not None:
            self._held = each_array(self._variable, state)

    def _variable(self, path: Sequence[str], array: Any) -> Any:
        """Return a variable of the optimizer's that holds an array of the first state."""
        spread = keras.distribution.distribution() is not None
        return self.add_variable(
            shape=tuple(array.shape),
            # a copy, as arrays of a state may share memory
            initializer=lambda shape, dtype: keras.ops.copy(array),  # noqa: ARG005
            dtype=keras.backend.standardize_dtype(array.dtype),
            layout=getattr(array, "sharding", None) if spread else None,
            name="_".join(path).replace("/", "_"),
        )

    def apply(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None = None,
        *,
        hvp: Callable[..., Any] | None = None,
        third: Callable[..., Any] | None = None,
        hessian_diagonal: Sequence[Any] | None = None,
        meta_grads: Sequence[Any] | None = None,
    ) -> None:
        """Make a step.

        Parameters
        ----------
        grads : list of arrays
            Where one is None the variable rests, and Keras warns.
        trainable_variables : list of keras.Variable, optional
            Those of the gradients; by default those that the optimizer is built of.
        hvp, third : optional
            As for `metaopt.MetaOptimize.step`, by names of leaves.
        hessian_diagonal, meta_grads : list of arrays like `grads`, optional
            As for `metaopt.MetaOptimize.step`.

        Raises
        ------
        ValueError, TypeError
            As `metaopt.MetaOptimize.step`, and with `gradient_accumulation_steps` where more than
            gradients is given. Weights and state are not changed then.
        """
        given = _Given(trainable_variables, hvp, third, hessian_diagonal, meta_grads)
        self._check_grads(grads, trainable_variables)
        with self._giving(given):
            super().apply(grads, trainable_variables)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
        *,
        hvp: Callable[..., Any] | None = None,
        third: Callable[..., Any] | None = None,
        hessian_diagonal: Sequence[Any] | None = None,
        meta_grads: Sequence[Any] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Return the variables after a step, without changing any, as under `jax.jit`.

        Parameters
        ----------
        optimizer_variables, trainable_variables : list of arrays
            Values of `opt.variables`, and of the variables that the optimizer is built of.
        grads, hvp, third, hessian_diagonal, meta_grads
            As for `apply`.

        Returns
        -------
        trainable_variables, optimizer_variables : list of arrays

        Raises
        ------
        ValueError, TypeError
            As `apply`, and before `build`.
        """
        with self._giving(_Given(None, hvp, third, hessian_diagonal, meta_grads)):
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _check_grads(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None) -> None:
        """Raise unless gradients are those of the variables."""
        variables = trainable_variables
        if variables is None:
            if not self.built:
                return  # of which Keras tells
            variables = self._trainable_variables
        grads = list(grads)
        if len(grads) != len(variables):
            msg = (
                f"`grads` must have an array or None for each of the {len(variables)} variables; "
                f"got {len(grads)}."
            )
            raise ValueError(msg)
        if len({id(variable) for variable in variables}) < len(variables):
            msg = "`trainable_variables` must be different ones; got one of them twice."
            raise ValueError(msg)
        for grad, variable in zip(grads, variables, strict=True):
            if grad is not None and tuple(grad.shape) != tuple(variable.shape):
                msg = (
                    f"`grads` must have the shapes of the variables; that of {variable.path!r} has "
                    f"{tuple(grad.shape)}, and the variable {tuple(variable.shape)}."
                )
                raise ValueError(msg)

    @contextmanager
    def _giving(self, given: _Given) -> Iterator[None]:
        """Have the next step find what it is handed beside gradients."""
        if self._averaged:
            msg = "Steps must be made from the trained weights: leave `averaged_params()` first."
            raise RuntimeError(msg)
        if not given.names:
            yield
            return
        if self.gradient_accumulation_steps:
            msg = (
                f"`{given.names[0]}` must be left out with `gradient_accumulation_steps`: it would "
                "be of one batch, and the step is of several."
            )
            raise ValueError(msg)
        self._given = given
        try:
            yield
        finally:
            self._given = _Given()

    @_eager
    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Step all variables at once: what Keras calls with gradients that have been clipped."""
        held, given = self._held, self._given
        assert held is not None
        variables = self._leaves()
        moved = {
            self._names[self._get_variable_index(variable)]: value_of(grad)
            for grad, variable in zip(grads, trainable_variables, strict=True)
        }
        params, state = self.config.step(
            self._weights(),
            {name: moved.get(name) for name in variables},
            self._live(),
            lr=learning_rate if is_number(learning_rate) else value_of(learning_rate),
            hvp=given.hvp,
            third=given.third,
            hessian_diagonal=self._by_name("hessian_diagonal"),
            meta_grads=self._by_name("meta_grads"),
        )
        after = arrays_of(state)
        new = [(variable, after[path]) for path, variable in arrays_of(held).items()]
        assign(new + [(variable, params[name]) for name, variable in variables.items()])

    def _by_name(self, argument: str) -> dict[str, Any] | None:
        """Return by name what was given as a list like the gradients."""
        arrays = getattr(self._given, argument)
        if arrays is None:
            return None
        given = self._given.variables
        variables = self._trainable_variables if given is None else given
        if len(arrays) != len(variables):
            msg = (
                f"`{argument}` must have an array or None for each of the {len(variables)} "
                f"variables; got {len(arrays)}."
            )
            raise ValueError(msg)
        return {
            self._names[self._get_variable_index(variable)]: None
            if array is None
            else value_of(array)
            for array, variable in zip(arrays, variables, strict=True)
        }

    def _leaves(self) -> dict[str, Any]:
        """Return the variables that have a state, by name."""
        if self._held is None:
            return {}
        known = zip(self._names, self._trainable_variables, strict=True)
        return {name: variable for name, variable in known if name in self._held.count}

    @property
    def learning_rate(self) -> Any:
        """The multiplier `lr` of the next step; it may be set between steps.

        Raises
        ------
        ValueError, TypeError
            If it is set to what `lr` cannot be, or to a number where `lr` is no number.
        """
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, lr: Any) -> None:
        lr = _multiplier("learning_rate", lr)
        if not callable(lr) and not isinstance(self._learning_rate, keras.Variable):
            msg = (
                f"`learning_rate` must not be set to a number, as `lr` is {self._learning_rate!r}; "
                f"got {lr!r}. Make the optimizer with a number, which can be set."
            )
            raise TypeError(msg)
        keras.optimizers.Optimizer.learning_rate.fset(self, lr)

    def save_own_variables(self, store: Any) -> None:
        """Write the variables to a file, and what they are the state of."""
        super().save_own_variables(store)
        store[MADE_WITH] = np.frombuffer(self._made_with().encode(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Take the variables of a file, all of them or, with a warning, none."""
        found = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118
        made_with = found.pop(MADE_WITH, None)
        arrays = [found.get(str(index)) for index in range(len(self.variables))]
        fits = len(found) == len(arrays) and all(
            array is not None and array.shape == tuple(variable.shape)
            for array, variable in zip(arrays, self.variables, strict=True)
        )
        if not fits or made_with is None or made_with.tobytes().decode() != self._made_with():
            warn(
                f"The state of {self.name!r} is not loaded: the file has that of other parameters "
                "or of another configuration, or this optimizer has not been built. It starts anew."
            )
            return
        for array, variable in zip(arrays, self.variables, strict=True):
            variable.assign(array)

    def _made_with(self) -> str:
        """Return what the state is of, whatever models and layers are called."""
        places = {name: str(index) for index, name in enumerate(self._names)}
        held = {} if self._held is None else arrays_of(self._held)
        paths = [[places.get(part, part) for part in path] for path in held]
        return json.dumps([paths, options_of(self.config)["sigma"]])

    def _live(self) -> mo.State:
        """Return the state in the core's form, in the memory of the variables."""
        if self._held is None:
            msg = "There is no state yet: call `build` with the variables, or make a step."
            raise ValueError(msg)
        return each_array(lambda _, variable: value_of(variable), self._held)

    def core_state(self) -> mo.State:
        """Return the state in the core's form, for `metaopt.save` and other libraries.

        Raises
        ------
        ValueError
            Before `build` and the first step.
        """
        return each_array(lambda _, array: keras.ops.copy(array), self._live())

    def load_core_state(self, state: mo.State) -> None:
        """Take a state in the core's form, such as `metaopt.load` returns, after `build`.

        Parameters
        ----------
        state : metaopt.State

        Raises
        ------
        ValueError
            If it is the state of another configuration or of other parameters, or before `build`.
        TypeError
            If it is no state.
        """
        if not isinstance(state, mo.State):
            msg = f"`state` must be a metaopt.State; got {state!r}."
            raise TypeError(msg)
        check_alike(state, self._live())
        assert self._held is not None
        arrays = arrays_of(state)
        for path, variable in arrays_of(self._held).items():
            variable.assign(keras.ops.copy(arrays[path]))  # JAX gives the memory away in a step

    def step_sizes(self) -> dict[str, Any]:
        """Return the learned step sizes by block, as `metaopt.MetaOptimize.step_sizes`."""
        return map_leaves(keras.ops.copy, self.config.step_sizes(self._live()))

    def effective_lr(self) -> dict[str, Any]:
        """Return the learned step sizes times the multiplier of the next step, by block."""
        lr = keras.ops.convert_to_tensor(self.learning_rate)
        return {
            name: size * keras.ops.cast(lr, keras.backend.standardize_dtype(size.dtype))
            for name, size in self.step_sizes().items()
        }

    def hyperparameters(self) -> dict[str, dict[str, Any]]:
        """Return the numbers of rules that are learned, by name and block."""
        return map_leaves(keras.ops.copy, self.config.hyperparameters(self._live()))

    def diagnostics(self) -> dict[str, Any]:
        """Return how the adaptation is doing, as `metaopt.MetaOptimize.diagnostics`."""
        return self.config.diagnostics(self.core_state(), self._weights())

    def named(self) -> dict[str, Any]:
        """Return copies of the weights by names of leaves, as `metaopt.load` takes them.

        None before `build`.
        """
        return {name: keras.ops.copy(value) for name, value in self._weights().items()}

    def _weights(self) -> dict[str, Any]:
        """Return the weights by name, in the memory of the variables."""
        return {name: value_of(variable) for name, variable in self._leaves().items()}

    @contextmanager
    def averaged_params(self) -> Iterator[None]:
        """Put weights averaged over the latest steps in the place of the last ones, for a while.

        As `metaopt.MetaOptimize.averaged_params`: better to evaluate, and to save. Training goes on
        from the last ones, which come back at the end.

        Raises
        ------
        ValueError
            If there is no `discount` below 1, or with curvature or another `sigma` than "exp";
            before `build`.
        RuntimeError
            Of a step that is made within, at its end where a compiled function made it; within
            another.

        Examples
        --------
        >>> import keras, numpy as np
        >>> weight = keras.Variable(np.array([1.0], "float32"))
        >>> opt = MetaOptimizer(base="sgd", step_size=0.5, meta_lr=0.0, discount=0.5)
        >>> for grad in (1.0, -1.0):
        ...     opt.apply([keras.ops.array([grad])], [weight])
        >>> with opt.averaged_params():
        ...     float(weight.numpy()[0])
        0.75
        >>> float(weight.numpy()[0])
        1.0
        """
        if self._averaged:
            msg = "The averaged weights are in place: leave `averaged_params()` first."
            raise RuntimeError(msg)
        averages = self.config.averaged_params(self._live(), self._weights())
        variables, last, step = self._leaves(), self.named(), self._steps()
        self._averaged = True
        try:
            assign((variable, averages[name]) for name, variable in variables.items())
            yield
        finally:
            self._averaged = False
            assign((variable, last[name]) for name, variable in variables.items())
        if self._steps() != step:  # a function that JAX compiled earlier looks at no flag
            msg = (
                "Steps were made within `averaged_params()`: the weights are those of before, and "
                "the state is not. Load both anew, and train outside."
            )
            raise RuntimeError(msg)

    def _steps(self) -> int:
        """Return how many steps have been made; waits for the device."""
        return int(keras.ops.convert_to_numpy(self._live().step))

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> NoReturn:
        """Raise ValueError: weight decay is the rule's, and patterns say of which variables."""
        msg = (
            "`exclude_from_weight_decay` is of Keras's own weight decay. Say which rule variables "
            'have by patterns of their paths: base={"*/bias": metaopt.AdamW(), "*": '
            f"metaopt.AdamW(weight_decay=0.1)}}; got {var_names or var_list!r}."
        )
        raise ValueError(msg)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes the optimizer of again, in plain values.

        Raises
        ------
        TypeError
            If a rule, a map or blocks of your own are no dataclass.
        """
        config = super().get_config()
        del config["weight_decay"]
        return config | options_of(self.config) | {LEAVES: list(self._names)}

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> "MetaOptimizer":
        """Return an optimizer of what `get_config` returned.

        Parameters
        ----------
        config : dict
        custom_objects : mapping of name to class, optional
            Rules of your own, which Keras also takes from a `keras.saving.custom_object_scope`.
            Nothing that a file names is imported.

        Raises
        ------
        ValueError, TypeError
            If `config` is not such a dict.
        """
        options = to_options(config, custom_objects)
        lr, leaves = options.pop("learning_rate", 1.0), options.pop(LEAVES, ())
        if isinstance(lr, dict):
            lr = keras.saving.deserialize_keras_object(lr, custom_objects=custom_objects)
        found = cls(**options, lr=lr if callable(lr) else 1.0)
        if not callable(lr):
            found.learning_rate = lr  # where a callback has left it, so without a warning
        found._names = tuple(leaves)
        return found


def from_config(
    config: mo.MetaOptimize,
    *,
    lr: Any = 1.0,
    weight_decay: None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
) -> MetaOptimizer:
    """Return an optimizer with a configuration of the core, such as one of `metaopt.presets`.

    Parameters
    ----------
    config : metaopt.MetaOptimize
    lr, weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum
        As `MetaOptimizer` takes them.
    ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name
        As `MetaOptimizer` takes them.

    Raises
    ------
    ValueError, TypeError
        As `MetaOptimizer` does.
    """
    check_config(config)
    return MetaOptimizer(
        **{one.name: getattr(config, one.name) for one in fields(config) if one.init},
        lr=lr,
        weight_decay=weight_decay,
        clipnorm=clipnorm,
        clipvalue=clipvalue,
        global_clipnorm=global_clipnorm,
        use_ema=use_ema,
        ema_momentum=ema_momentum,
        ema_overwrite_frequency=ema_overwrite_frequency,
        loss_scale_factor=loss_scale_factor,
        gradient_accumulation_steps=gradient_accumulation_steps,
        name=name,
    )

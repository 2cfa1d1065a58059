"""AlgoPerf, self-tuning ruleset, in JAX: metaopt as it is called without any option.

Evaluations are at the averaged weights. A step is compiled once, with the batch spread over all
devices along its first axis, and parameters, optimizer state and auxiliary state whole on each:
the sums that gradients and meta-gradients need are the compiler's.
"""

from collections import deque
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, NamedTuple

import jax
import optax
from algoperf import spec
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from metaopt_jax import metaoptimize

from benchmarks.algoperf.common import PASSES, RECENT, data_selection, get_batch_size

__all__ = [
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


class Compiled(NamedTuple):
    """Compiled functions, and batches: the part of `optimizer_state` that is not saved.

    Parameters
    ----------
    init : callable
        From parameters to the state of the optimizer.
    step : callable
        From optimizer state, parameters, auxiliary state, batch and random key to the first three.
    average : callable
        From optimizer state and parameters to averages.
    refresh : callable
        From parameters, auxiliary state, batch and random key to the next auxiliary state.
    batches : deque
        The latest, of a model with batch normalization.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    average: Callable[..., Any]
    refresh: Callable[..., Any]
    batches: deque[Any]


def init_optimizer_state(
    workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
) -> tuple[dict[str, Any], Compiled]:
    """Return the state, of which "weights" is for evaluations, and compiled functions."""
    tx = metaoptimize()
    mesh = Mesh(jax.devices(), ("batch",))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

    def forward(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return workload.model_fn(
            params,
            batch,
            model_state,
            spec.ForwardPassMode.TRAIN,
            rng,
            update_batch_norm=True,
        )

    def step(state: Any, params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        def mean_loss(params: Any) -> Any:
            logits, new_model_state = forward(params, model_state, batch, rng)
            loss = workload.loss_fn(
                label_batch=batch["targets"], logits_batch=logits, mask_batch=batch.get("weights")
            )
            return loss["summed"] / loss["n_valid_examples"], new_model_state

        grads, new_model_state = jax.grad(mean_loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates), new_model_state

    def refresh(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return forward(params, model_state, batch, rng)[1]

    compiled = Compiled(
        init=jax.jit(tx.init, out_shardings=whole),
        step=jax.jit(
            step,
            in_shardings=(whole, whole, whole, parts, whole),
            out_shardings=whole,
            donate_argnums=(0, 1, 2),
        ),
        average=jax.jit(tx.averaged_params, in_shardings=whole, out_shardings=whole),
        refresh=jax.jit(refresh, in_shardings=(whole, whole, parts, whole), out_shardings=whole),
        batches=deque(maxlen=RECENT),
    )
    return {"optimizer": compiled.init(model_params), "weights": None}, compiled


def update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Any],
    loss_type: Any,
    optimizer_state: tuple[dict[str, Any], Compiled],
    eval_results: Any,
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[tuple[dict[str, Any], Compiled], Any, Any]:
    """Make a step with the gradient of the mean loss of the batch's valid examples."""
    state, compiled = optimizer_state
    params = current_param_container if state["weights"] is None else state["weights"]
    if jax.tree.leaves(model_state):
        compiled.batches.append(batch)
    new, params, model_state = compiled.step(state["optimizer"], params, model_state, batch, rng)
    return ({"optimizer": new, "weights": None}, compiled), params, model_state


def prepare_for_eval(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: tuple[dict[str, Any], Compiled],
    eval_results: Any,
    global_step: int,
    rng: Any,
) -> tuple[tuple[dict[str, Any], Compiled], Any, Any]:
    """Return the averages as parameters, and keep the weights for the next step."""
    state, compiled = optimizer_state
    if state["weights"] is not None:
        return optimizer_state, current_param_container, model_state
    averages = compiled.average(state["optimizer"], current_param_container)
    for batch in islice(cycle(compiled.batches), PASSES):
        model_state = compiled.refresh(averages, model_state, batch, rng)
    return ({**state, "weights": current_param_container}, compiled), averages, model_state

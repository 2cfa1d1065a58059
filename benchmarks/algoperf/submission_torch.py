"""AlgoPerf, self-tuning ruleset, in PyTorch: metaopt as it is called without any option.

Evaluations are at the averaged weights. The harness calls the functions below, and keeps between
them the `optimizer_state` that they return, the model and its auxiliary state. With several
processes (DistributedDataParallel) every one makes the same steps: gradients are averaged by the
model's own hooks, and meta-gradients are sums over whole parameters, equal everywhere.
"""

from collections import deque
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from algoperf import spec
from metaopt_torch import MetaOptimizer
from torch import Tensor, nn

from benchmarks.algoperf.common import PASSES, RECENT, data_selection, get_batch_size

__all__ = [
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


class Training:
    """The weights that training goes on from, while averages stand in their place.

    Its `state_dict` is what a checkpoint needs of it: the harness makes one after an evaluation,
    with the averages still in the model.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None
        self.batches: deque[Any] = deque(maxlen=RECENT)

    def evaluate(self, model: nn.Module, averages: Mapping[str, Tensor]) -> None:
        """Put averages in the place of the weights."""
        self.weights = {name: param.detach().clone() for name, param in model.named_parameters()}
        _write(model, averages)

    def go_on(self, model: nn.Module) -> None:
        """Put the weights back, to the last bit."""
        if self.weights is not None:
            _write(model, self.weights)
            self.weights = None

    def state_dict(self) -> dict[str, Any]:
        """Return the weights; None while they are in the model."""
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.weights = state["weights"]


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        param.copy_(values[name])


def init_optimizer_state(
    workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> dict[str, Any]:
    """Return the optimizer, and what lies beside it."""
    return {"optimizer": MetaOptimizer(model_params.named_parameters()), "training": Training()}


def update_params(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Tensor],
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: Any,
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """Make a step with the gradient of the mean loss of all processes' valid examples."""
    model, training = current_param_container, optimizer_state["training"]
    training.go_on(model)
    if _has_statistics(model):
        training.batches.append(batch)
    model.train()
    optimizer_state["optimizer"].zero_grad()
    logits, model_state = _forward(workload, model, batch, model_state, rng)
    loss = workload.loss_fn(
        label_batch=batch["targets"], logits_batch=logits, mask_batch=batch.get("weights")
    )
    summed = loss["summed"]
    (summed / _examples(loss["n_valid_examples"], summed)).backward()
    optimizer_state["optimizer"].step()
    return optimizer_state, model, model_state


def _examples(valid: Any, like: Tensor) -> Tensor:
    """Return the mean of the valid examples over processes, whose gradients DDP averages."""
    examples = torch.as_tensor(valid, dtype=like.dtype, device=like.device).clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(examples)
        examples /= dist.get_world_size()
    return examples


def _forward(workload: Any, model: nn.Module, batch: Any, model_state: Any, rng: Any) -> Any:
    """Return outputs and the next auxiliary state, as in training."""
    return workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=spec.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
    )


def _has_statistics(model: nn.Module) -> bool:
    return any(name.endswith("running_mean") for name, _ in model.named_buffers())


def prepare_for_eval(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: Any,
    global_step: int,
    rng: Any,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """Put the averages in the model, until the next step."""
    model, training = current_param_container, optimizer_state["training"]
    if training.weights is None:
        training.evaluate(model, optimizer_state["optimizer"].averaged_params(copy=True))
        model.train()
        with torch.no_grad():
            for batch in islice(cycle(training.batches), PASSES):
                _, model_state = _forward(workload, model, batch, model_state, rng)
    return optimizer_state, model, model_state

"""A small stand-in for AlgoPerf's harness: the digits as a workload, and its loop over steps.

What a submission meets is as there: arguments by keyword, an opaque `optimizer_state`, batches
with masked examples in them, evaluations of what `prepare_for_eval` returns, and checkpoints after
these. Where the package is installed its own `spec` is used.
"""

import copy
import io
import sys
from collections import deque
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.algoperf.common import RECENT
from metaopt.demo.data import load_digits

try:
    from algoperf import spec
except ImportError:

    class ForwardPassMode(Enum):
        """As the package has it."""

        TRAIN = 0
        EVAL = 1

    package: Any = ModuleType("algoperf")
    package.spec = SimpleNamespace(ForwardPassMode=ForwardPassMode)
    sys.modules["algoperf"] = package
    spec = package.spec

TRAIN = spec.ForwardPassMode.TRAIN


def submission(framework: str) -> Any:
    """Return the submission in "torch" or "jax"; it imports the package, or what stands in."""
    return import_module(f"benchmarks.algoperf.submission_{framework}")


BATCH, MASKED, HIDDEN = 64, 8, 32


class Digits:
    """What both frameworks have in common.

    Parameters
    ----------
    normalized : bool
        Whether the model has batch normalization.
    """

    metrics_logger = None
    model_params_types = None
    loss_type = None

    def __init__(self, normalized: bool = False) -> None:
        self.normalized = normalized
        self.digits = load_digits()

    def batches(self, seed: int, size: int = BATCH) -> Iterator[dict[str, Any]]:
        """Yield batches for ever; the last examples are masked, and where they may be, far off."""
        rng = np.random.default_rng(seed)
        images, labels = self.digits.train_images, self.digits.train_labels
        while True:
            at = rng.choice(len(labels), size, replace=False)
            inputs, weights = images[at].copy(), np.ones(size, np.float32)
            weights[size - MASKED :] = 0.0
            if not self.normalized:  # where they are part of the statistics
                inputs[size - MASKED :] = 9.0
            yield self.placed({"inputs": inputs, "targets": labels[at], "weights": weights})

    def start(self) -> dict[str, Any]:
        """Return the first weights, as NumPy arrays."""
        rng = np.random.default_rng(0)
        return {
            "hidden": rng.normal(size=(64, HIDDEN)).astype(np.float32) / 8.0,
            "shift": np.zeros(HIDDEN, np.float32),
            "out": rng.normal(size=(HIDDEN, 10)).astype(np.float32) / 6.0,
        }

    def placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch as arrays of the framework."""
        raise NotImplementedError

    def losses(self, logits: Any, labels: Any) -> Any:
        """Return the loss of each example."""
        raise NotImplementedError

    def loss_fn(
        self, label_batch: Any, logits_batch: Any, mask_batch: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Return the sum over examples that are not masked, and how many there are."""
        each = self.losses(logits_batch, label_batch)
        return {"summed": (each * mask_batch).sum(), "n_valid_examples": mask_batch.sum()}


class TorchDigits(Digits):
    """The workload in PyTorch."""

    def placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch as tensors."""
        import torch

        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def init_model_fn(self, rng: Any) -> tuple[Any, Any]:
        """Return the model, and no auxiliary state."""
        import torch
        from torch import nn

        weights = self.start()
        hidden, out = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 10, bias=False)
        with torch.no_grad():
            hidden.weight.copy_(torch.from_numpy(weights["hidden"]).T)
            hidden.bias.zero_()
            out.weight.copy_(torch.from_numpy(weights["out"]).T)
        norm = [nn.BatchNorm1d(HIDDEN, affine=False)] if self.normalized else []
        return nn.Sequential(hidden, *norm, nn.Tanh(), out), None

    def model_fn(
        self,
        params: Any,
        augmented_and_preprocessed_input_batch: Any,
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Any, Any]:
        """Return logits."""
        params.train(mode == TRAIN)
        return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def losses(self, logits: Any, labels: Any) -> Any:
        """Return the cross entropy of each example."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, labels, reduction="none")

    def accuracy(self, params: Any, model_state: Any) -> float:
        """Return the accuracy on the test images."""
        import torch

        images, labels = map(torch.from_numpy, (self.digits.test_images, self.digits.test_labels))
        with torch.no_grad():
            logits = params.eval()(images.to(next(params.parameters()).dtype))
        return float((logits.argmax(1) == labels).float().mean())


class JaxDigits(Digits):
    """The workload in JAX."""

    def placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch that is spread over the devices."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
        return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))

    def init_model_fn(self, rng: Any) -> tuple[Any, Any]:
        """Return parameters, and running statistics where there are any."""
        import jax.numpy as jnp

        found = {name: {"w": jnp.asarray(value)} for name, value in self.start().items()}
        zero, one = jnp.zeros(HIDDEN), jnp.ones(HIDDEN)
        return found, {"batch_stats": {"mean": zero, "var": one}} if self.normalized else None

    def model_fn(
        self,
        params: Any,
        augmented_and_preprocessed_input_batch: Any,
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Any, Any]:
        """Return logits, and the next running statistics."""
        import jax.numpy as jnp

        x = augmented_and_preprocessed_input_batch["inputs"] @ params["hidden"]["w"]
        if self.normalized:
            stats = model_state["batch_stats"]
            if mode == TRAIN:
                now = {"mean": x.mean(0), "var": x.var(0)}
                x = (x - now["mean"]) / jnp.sqrt(now["var"] + 1e-5)
                stats = {name: 0.9 * stats[name] + 0.1 * now[name] for name in now}
            else:
                x = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
            model_state = {"batch_stats": stats}
        return jnp.tanh(x + params["shift"]["w"]) @ params["out"]["w"], model_state

    def losses(self, logits: Any, labels: Any) -> Any:
        """Return the cross entropy of each example."""
        import optax

        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def accuracy(self, params: Any, model_state: Any) -> float:
        """Return the accuracy on the test images."""
        batch = {"inputs": self.digits.test_images}
        mode = spec.ForwardPassMode.EVAL
        logits, _ = self.model_fn(params, batch, model_state, mode, None, False)
        return float(np.mean(np.argmax(np.asarray(logits), 1) == self.digits.test_labels))


class Run:
    """One run of a submission, step by step.

    Parameters
    ----------
    submission : module
    workload : Digits
    """

    def __init__(self, submission: Any, workload: Any) -> None:
        self.submission, self.workload, self.step = submission, workload, 0
        self.params, self.model_state = workload.init_model_fn(self.rng)
        self.optimizer_state = submission.init_optimizer_state(
            workload, self.params, self.model_state, None, self.rng
        )

    def again(self) -> "Run":
        """Return a run from the start, with what this one has compiled."""
        run = Run.__new__(Run)
        if isinstance(self.workload, TorchDigits):
            run.__init__(self.submission, self.workload)  # type: ignore[misc]
            return run
        run.submission, run.workload, run.step = self.submission, self.workload, 0
        run.params, run.model_state = self.workload.init_model_fn(run.rng)
        compiled = self.optimizer_state[1]
        state = {"optimizer": compiled.init(run.params), "weights": None}
        run.optimizer_state = state, compiled._replace(batches=deque(maxlen=RECENT))
        return run

    @property
    def rng(self) -> Any:
        """What is drawn from in a step."""
        return np.array([0, self.step], np.uint32)

    def train(self, batches: Iterator[dict[str, Any]], steps: int) -> None:
        """Make steps."""
        for _ in range(steps):
            common: dict[str, Any] = {"workload": self.workload, "model_state": self.model_state}
            common |= {"optimizer_state": self.optimizer_state, "hyperparameters": None}
            common |= {"current_param_container": self.params, "global_step": self.step}
            common |= {"rng": self.rng}
            batch = self.submission.data_selection(input_queue=batches, **common)
            self.optimizer_state, self.params, self.model_state = self.submission.update_params(
                current_params_types=None,
                batch=batch,
                loss_type=None,
                eval_results=[],
                train_state=MappingProxyType({}),
                **common,
            )
            self.step += 1

    def evaluate(self) -> float:
        """Return the accuracy of what the submission wants to be judged by."""
        found = self.submission.prepare_for_eval(
            workload=self.workload,
            current_param_container=self.params,
            current_params_types=None,
            model_state=self.model_state,
            hyperparameters=None,
            loss_type=None,
            optimizer_state=self.optimizer_state,
            eval_results=[],
            global_step=self.step,
            rng=self.rng,
        )
        self.optimizer_state, self.params, self.model_state = found
        accuracy: float = self.workload.accuracy(self.params, self.model_state)
        return accuracy

    def checkpoint(self) -> Any:
        """Return what the harness saves after an evaluation, through a file."""
        if isinstance(self.workload, TorchDigits):
            import torch

            file = io.BytesIO()
            states = {key: part.state_dict() for key, part in self.optimizer_state.items()}
            torch.save({"params": self.params.state_dict(), "optimizer": states}, file)
            file.seek(0)
            return torch.load(file, weights_only=True)
        from flax import serialization

        arrays = {"params": self.params, "optimizer": self.optimizer_state[0]}
        return serialization.to_bytes(arrays | {"state": self.model_state})

    def restore(self, saved: Any, step: int) -> None:
        """Go on from a checkpoint, in a run that has made no step."""
        self.step = step
        if isinstance(self.workload, TorchDigits):
            self.params.load_state_dict(saved["params"])
            for key, part in self.optimizer_state.items():
                part.load_state_dict(copy.deepcopy(saved["optimizer"][key]))
            return
        from flax import serialization

        state, compiled = self.optimizer_state
        target = {"params": self.params, "optimizer": state, "state": self.model_state}
        found = serialization.from_bytes(target, saved)
        self.params, self.model_state = found["params"], found["state"]
        self.optimizer_state = found["optimizer"], compiled

    def weights(self) -> dict[str, Any]:
        """Return the parameters as NumPy arrays."""
        if isinstance(self.workload, TorchDigits):
            return {
                name: param.detach().numpy().copy()
                for name, param in self.params.named_parameters()
            }
        return {name: np.asarray(part["w"]).copy() for name, part in self.params.items()}

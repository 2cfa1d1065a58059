"""A callback of transformers' Trainer that logs what a MetaOptimizer learns, and writes a page."""

import os
from typing import Any

import transformers

import metaopt as mo
from metaopt_torch.tuned import TunedOptimizer

__all__ = ["LogCallback"]


class LogCallback(transformers.TrainerCallback):
    """Adds step sizes, and what `metaopt.Log` keeps beside them, to what the Trainer logs.

    They are in `trainer.state.log_history` and on the console, every `logging_steps`. Reporters,
    TensorBoard's say, come before the callbacks of users; to have them there too, put this one
    first: ``trainer.callback_handler.callbacks.insert(0, LogCallback())``.

    Parameters
    ----------
    path : path, optional
        Of an HTML page with the whole run, written when training ends.

    Attributes
    ----------
    run_log : metaopt.Log

    Raises
    ------
    TypeError
        In training, if the trainer's optimizer is not of `metaopt_torch`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path, self.run_log = path, mo.Log()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add an entry where the training loss is logged."""
        del args, control, kwargs
        seen = self.run_log.entries[-1]["step"] if self.run_log.entries else 0
        if logs is None or "loss" not in logs or state.global_step <= seen:
            return
        scalars = self.run_log.add(_tuned(optimizer), loss=logs["loss"], step=state.global_step)
        del scalars["loss"]  # which is there
        logs.update(scalars)
        state.log_history[-1].update(scalars)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page."""
        del args, control, kwargs
        if self.path is not None and state.is_world_process_zero and self.run_log.entries:
            self.run_log.write(self.path)


def _tuned(optimizer: Any) -> TunedOptimizer:
    """Return the optimizer within Accelerate's wrapper."""
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, TunedOptimizer):
        msg = (
            "The trainer's optimizer must be one of metaopt_torch, for LogCallback to log; got "
            f"{type(found).__name__}."
        )
        raise TypeError(msg)
    return found

"""Callbacks of `fit`: one logs what a MetaOptimizer learns, one evaluates at averaged weights."""

import os
from contextlib import AbstractContextManager
from typing import Any

import keras

import metaopt as mo
from metaopt_keras.optimizer import MetaOptimizer

__all__ = ["AverageCallback", "LogCallback"]


class LogCallback(keras.callbacks.Callback):
    """Logs step sizes and what `metaopt.Log` keeps beside them, and writes them as a page.

    Parameters
    ----------
    path : path, optional
        Of an HTML page with the whole run, written when training ends.
    every : int, default 10
        How many batches lie between two entries, each of which waits for the device. With
        `steps_per_execution`, on JAX, so many executions.

    Attributes
    ----------
    run_log : metaopt.Log
        Its losses are means since the epoch began, as `fit` shows them.

    Raises
    ------
    ValueError
        If `every` is not at least 1; in training, if the model's optimizer is no `MetaOptimizer`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, every: int = 10) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            msg = f"`every` must be an integer of at least 1; got {every!r}."
            raise ValueError(msg)
        self.path, self.every, self.run_log, self._batches = path, every, mo.Log(), 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Add an entry."""
        del batch
        self._batches += 1
        if self._batches % self.every:
            return
        opt = _tuned(self.model)
        step = int(keras.ops.convert_to_numpy(opt.iterations))
        entries = self.run_log.entries
        if not entries or step > entries[-1]["step"]:
            self.run_log.add(opt, loss=(logs or {}).get("loss"), step=step)

    def on_train_end(self, logs: Any = None) -> None:
        """Write the page."""
        del logs
        if self.path is not None and self.run_log.entries:
            self.run_log.write(self.path)


class AverageCallback(keras.callbacks.Callback):
    """Evaluates, validates and predicts at averaged weights; training goes on from the last ones.

    As `MetaOptimizer.averaged_params`. What other callbacks save of the model are the last weights.
    If an evaluation ends with an exception, the averages stay in the model until `restore`, or
    until training or an evaluation begins with this callback.

    Raises
    ------
    ValueError
        When it evaluates, if the model's optimizer is no `MetaOptimizer`, or keeps no averages.
    """

    def __init__(self) -> None:
        super().__init__()
        self._averaged: AbstractContextManager[None] | None = None

    def on_test_begin(self, logs: Any = None) -> None:
        """Put the averages in place."""
        del logs
        self.restore()  # of an evaluation that was not finished
        opt = _tuned(self.model)
        if opt.built:
            averaged = opt.averaged_params()
            averaged.__enter__()
            self._averaged = averaged

    def on_test_end(self, logs: Any = None) -> None:
        """Put the last weights in place."""
        del logs
        self.restore()

    def on_train_begin(self, logs: Any = None) -> None:
        """Put the last weights in place, where an evaluation was not finished."""
        del logs
        self.restore()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Put the last weights in place, where an evaluation was not finished."""
        del epoch, logs
        self.restore()

    def restore(self) -> None:
        """Put the last weights in place, where the averages are."""
        averaged, self._averaged = self._averaged, None
        if averaged is not None:
            averaged.__exit__(None, None, None)

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the averages in place."""
        self.on_test_begin(logs)

    def on_predict_end(self, logs: Any = None) -> None:
        """Put the last weights in place."""
        self.on_test_end(logs)


def _tuned(model: Any) -> MetaOptimizer:
    """Return a model's optimizer, the inner one where losses are scaled."""
    opt = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not isinstance(opt, MetaOptimizer):
        msg = (
            "The model must be compiled with a metaopt_keras.MetaOptimizer; it has "
            f"{type(opt).__name__}."
        )
        raise ValueError(msg)
    return opt

"""A callback of Lightning that logs what a MetaOptimizer learns, and writes it as a page."""

import os
from typing import Any

import lightning.pytorch as lightning

import metaopt as mo
from metaopt_torch.tuned import TunedOptimizer

__all__ = ["LogCallback"]


class LogCallback(lightning.Callback):
    """Logs step sizes and what `metaopt.Log` keeps beside them, to the trainer's loggers.

    Parameters
    ----------
    path : path, optional
        Of an HTML page with the whole run, written when training ends, also by an exception.
    every : int, default 10
        How many steps of the optimizer lie between two entries, each of which waits for the device.

    Attributes
    ----------
    run_log : metaopt.Log
        It goes into checkpoints, and on from there.

    Raises
    ------
    ValueError
        If `every` is not at least 1; in training, if the trainer has not exactly one optimizer of
        `metaopt_torch`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, every: int = 10) -> None:
        if every < 1:
            msg = f"`every` must be at least 1; got {every}."
            raise ValueError(msg)
        self.path, self.every, self.run_log = path, every, mo.Log()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add an entry, and hand it to the loggers."""
        del pl_module, batch, batch_idx
        step = trainer.global_step
        seen = self.run_log.entries[-1]["step"] if self.run_log.entries else 0
        if step <= seen or step % self.every:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        scalars = self.run_log.add(_tuned(trainer), loss=loss, step=step)
        for logger in trainer.loggers:  # on the first process alone, which they see to
            logger.log_metrics(scalars, step=step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the page."""
        del pl_module
        if self.path is not None and trainer.is_global_zero and self.run_log.entries:
            self.run_log.write(self.path)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the page as far as it goes."""
        del exception
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"entries": self.run_log.entries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.run_log = mo.Log(state_dict["entries"])


def _tuned(trainer: Any) -> TunedOptimizer:
    """Return the one optimizer that tunes its step sizes."""
    found = [one for one in trainer.optimizers if isinstance(one, TunedOptimizer)]
    if len(found) != 1:
        msg = f"The trainer must have one optimizer of metaopt_torch; it has {len(found)}."
        raise ValueError(msg)
    return found[0]

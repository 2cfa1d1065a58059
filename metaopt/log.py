"""What a run's step sizes did: collected while it trains, and shown on one page."""

import inspect
import itertools
import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.arrays import to_numpy
from metaopt.page import page

__all__ = ["Log"]

#: Keys of `diagnostics` whose values are booleans.
FLAGS = ("pinned", "collapsed", "asleep")
#: Keys that every entry has.
NEEDED = {"step", "discounts", "step_sizes", "restarts", "longer", "distance"}


class Log:
    """Collects what an optimizer learns, and writes it as one page to look at.

    Every adapter has what it asks for, `step_sizes`, `diagnostics` and `hyperparameters`. Each
    `add` copies a few numbers for each block to the host, which waits for the device: call it
    every ten steps or so.

    Parameters
    ----------
    entries : iterable of dict, optional
        Those of an earlier log, to go on from.

    Attributes
    ----------
    entries : list of dict
        What was added: plain numbers, which `json.dump` takes, and `Log(json.load(file))` again.

    Raises
    ------
    TypeError, ValueError
        If `entries` are not those of a log, or of logs with different numbers of discounts.

    Examples
    --------
    >>> import numpy as np, metaopt as mo
    >>> opt, log = mo.MetaOptimize(step_size=1e-3), mo.Log()
    >>> params = {"w": np.array([3.0, -2.0])}
    >>> state = opt.init(params)
    >>> for step in range(50):
    ...     loss = 0.5 * (params["w"] ** 2).sum()
    ...     params, state = opt.step(params, {"w": params["w"]}, state)
    ...     if step % 10 == 0:
    ...         scalars = log.add(opt, state, params, loss=loss, step=step)
    >>> sorted(scalars)[:3]
    ['asleep/all', 'collapsed/all', 'loss']
    >>> log.html().startswith("<!doctype html>")
    True
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.entries = list(entries)
        for entry in self.entries:
            if not isinstance(entry, Mapping) or not set(entry) >= NEEDED:
                msg = f"`entries` must be those of a metaopt.Log; got {entry!r}."
                raise TypeError(msg)
            self._check_discounts(entry["discounts"])

    def __repr__(self) -> str:
        """Return how much there is."""
        return f"Log of {len(self.entries)} entries"

    def add(
        self,
        opt: Any,
        state: Any = None,
        params: Any = None,
        *,
        loss: Any = None,
        averaged_loss: Any = None,
        step: int | None = None,
    ) -> dict[str, float]:
        """Add what `opt` says now, and return it as flat scalars for other loggers.

        Parameters
        ----------
        opt : optimizer or transformation
            `metaopt.MetaOptimize`, or an adapter's: `metaopt_torch.MetaOptimizer`, what
            `metaopt_jax.metaoptimize` returns, or what a `wrap` does.
        state, params : optional
            As `opt.diagnostics` takes them, where it does: both for `MetaOptimize` and in JAX, in
            MLX `params` alone.
        loss : number or array of shape (), optional
            That of this step.
        averaged_loss : number or array of shape (), optional
            That at the averaged weights, to be compared with `loss`.
        step : int, optional
            By default one more than that of the last entry, from 0.

        Returns
        -------
        dict of str to float
            As "step_size/all", "effective_lr/all" (times `lr`, in torch and JAX), "restarts/all",
            "loss": the median of a block that has several step sizes. Names are of letters, digits
            and ``_-./`` alone, others become ``_``; where two would be equal, the second ends in
            "_2".

        Raises
        ------
        TypeError
            If `opt` is no optimizer of metaopt's, or `step` no integer.
        ValueError
            If it needs `state` and `params`, or takes none; if a loss is more than one number; if
            `step` is not above the last one; if `opt` has more or fewer discounts than before.
        """
        own, given = _given(opt, state, params)
        last = self.entries[-1]["step"] if self.entries else -1
        try:
            step = last + 1 if step is None else operator.index(step)
        except TypeError:
            msg = f"`step` must be an integer; got {step!r}."
            raise TypeError(msg) from None
        if step <= last:
            msg = f"`step` must be above that of the last entry, {last}; got {step}."
            raise ValueError(msg)
        entry: dict[str, Any] = {"step": step, "discounts": _discounts(opt)}
        self._check_discounts(entry["discounts"])
        for name, value in (("loss", loss), ("averaged_loss", averaged_loss)):
            if value is not None:
                entry[name] = _single(name, value)
        entry["step_sizes"] = {block: _spread(size) for block, size in opt.step_sizes(*own).items()}
        entry["effective_lr"] = _effective(opt, *own)
        entry |= _of_diagnostics(opt.diagnostics(*given))
        learned = opt.hyperparameters(*own)
        if learned:
            entry["learned"] = {
                name: {block: _spread(value) for block, value in blocks.items()}
                for name, blocks in learned.items()
            }
        self.entries.append(entry)
        return _scalars(entry)

    def _check_discounts(self, discounts: Sequence[float]) -> None:
        """Raise unless earlier entries have as many discounts: a page shows them by position."""
        if self.entries and len(discounts) != len(self.entries[0]["discounts"]):
            msg = (
                f"`entries` have {len(self.entries[0]['discounts'])} discounts, and `discount` is "
                f"{tuple(discounts)!r} now: begin another metaopt.Log."
            )
            raise ValueError(msg)

    def html(self, title: str = "What the step sizes did") -> str:
        """Return the page as text: HTML with its pictures in it, and no script.

        Parameters
        ----------
        title : str

        Raises
        ------
        ValueError
            If nothing has been added.
        """
        if not self.entries:
            msg = "Nothing has been added to this log: call `add` after some steps."
            raise ValueError(msg)
        return page(self.entries, title)

    def write(self, path: str | os.PathLike[str], title: str = "What the step sizes did") -> None:
        """Write the page to one file, which a browser opens without a network.

        Parameters
        ----------
        path : path
            Of the HTML file, written anew each time.
        title : str

        Raises
        ------
        ValueError
            If nothing has been added.
        OSError
            If the file cannot be written.
        """
        Path(path).write_text(self.html(title), encoding="utf-8")


def _given(opt: Any, state: Any, params: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments of `opt.step_sizes`, and those of `opt.diagnostics`."""
    if not all(hasattr(opt, name) for name in ("step_sizes", "diagnostics", "hyperparameters")):
        msg = (
            "`opt` must be an optimizer of metaopt's or one of its adapters; got "
            f"{type(opt).__name__}. Of one within a wrapper, pass the inner one."
        )
        raise TypeError(msg)
    takes = inspect.signature(opt.diagnostics).parameters
    handed = {"state": state, "params": params}
    for name, value in handed.items():
        if name in takes and value is None:
            msg = f"`{name}` is needed, as {type(opt).__name__} does not keep it; got None."
            raise ValueError(msg)
        if name not in takes and value is not None:
            msg = f"`{name}` must be left out: {type(opt).__name__} has its own."
            raise ValueError(msg)
    own = () if state is None else (state,)
    return own, own if params is None else (*own, params)


def _discounts(opt: Any) -> list[float]:
    config = getattr(opt, "config", getattr(opt, "opt", opt))
    discount = config.discount
    return [float(each) for each in (discount if isinstance(discount, tuple) else (discount,))]


def _effective(opt: Any, *state: Any) -> dict[str, list[float]]:
    """Return the step sizes times `lr` by block; none where `opt` has no multiplier.

    Names of blocks begin with the number of the group if there are several groups.
    """
    found = opt.effective_lr(*state) if hasattr(opt, "effective_lr") else {}
    if isinstance(found, list):
        several = len(found) > 1
        found = {
            f"{index}/{block}" if several else block: size
            for index, group in enumerate(found)
            for block, size in group.items()
        }
    return {name: _spread(size) for name, size in found.items()}


def _single(name: str, value: Any) -> float:
    array = to_numpy(value)
    if array.size != 1:
        msg = f"`{name}` must be one number; got an array of shape {array.shape}."
        raise ValueError(msg)
    return float(array.reshape(()))


def _spread(array: Any) -> list[float]:
    """Return the least, the median and the largest number."""
    found = to_numpy(array).astype(float)
    if found.size == 0:
        return [math.nan] * 3
    return [float(found.min()), float(np.median(found)), float(found.max())]


def _of_diagnostics(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an entry that comes from `diagnostics`: sums or means by block."""
    entry: dict[str, Any] = {"restarts": _sums(found["restarts"])}
    for name in FLAGS:
        entry[name] = {
            block: float(to_numpy(flag).mean()) if to_numpy(flag).size else 0.0
            for block, flag in found[name].items()
        }
    if "recoveries" in found:
        entry["recoveries"] = _sums(found["recoveries"])
    several = "decided" in found
    entry["longer"] = {
        block: _per_discount(np.mean, to_numpy(z) < 0.0, several=several)
        for block, z in found["meta_grad"].items()
    }
    norms = [
        _per_discount(np.sum, to_numpy(norm).astype(float) ** 2, several=several)
        for norm in found["trace_norm"].values()
    ]
    entry["distance"] = [math.sqrt(sum(column)) for column in zip(*norms, strict=True)]
    if several:
        entry["decided"] = {
            block: _per_discount(np.sum, to_numpy(count), several=True)
            for block, count in found["decided"].items()
        }
    return entry


def _sums(blocks: Mapping[str, Any]) -> dict[str, int]:
    return {block: int(to_numpy(count).sum()) for block, count in blocks.items()}


def _per_discount(function: Any, array: Any, *, several: bool) -> list[float]:
    rows = array if several else array[None]
    return [float(function(row)) if row.size else 0.0 for row in rows]


def _scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    found = [(name, entry[name]) for name in ("loss", "averaged_loss") if name in entry]
    found += [
        (f"step_size/{block}", median) for block, (_, median, _) in entry["step_sizes"].items()
    ]
    found += [
        (f"effective_lr/{name}", median) for name, (_, median, _) in entry["effective_lr"].items()
    ]
    for name in ("restarts", "recoveries", *FLAGS):
        found += [(f"{name}/{block}", float(n)) for block, n in entry.get(name, {}).items()]
    for name, blocks in entry.get("learned", {}).items():
        found += [(f"{name}/{block}", median) for block, (_, median, _) in blocks.items()]
    return _under_names(found)


def _under_names(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return values under names that every logger takes; equal ones are numbered."""
    result: dict[str, float] = {}
    for given, value in pairs:
        plain = name = re.sub(r"[^\w\-./]", "_", given, flags=re.ASCII)
        for number in itertools.count(2):
            if name not in result:
                break
            name = f"{plain}_{number}"
        result[name] = value
    return result

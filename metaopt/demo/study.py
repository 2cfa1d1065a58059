"""All runs of a demonstration: which they are, and how they are spread over processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from metaopt.demo.data import Digits
from metaopt.demo.run import Result, Run, train

__all__ = ["GRID", "PAIRS", "Results", "Study", "execute"]

PAIRS = ("adamw+adam", "lion+lion", "rmsprop+adam", "sgdm+adam", "adamw+lion")
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
THREAD_LIMITS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
MOST_PROCESSES = 61  # what Windows can wait for


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of a demonstration.

    Parameters
    ----------
    pairs : tuple of str
        Of `PAIRS`.
    blocks : tuple of {"scalar", "tensor"}
    step_sizes : tuple of float
        Starts for MetaOptimize, and fixed step sizes to hold against them.
    meta_lr : float
    steps, seed : int
    """

    pairs: tuple[str, ...]
    blocks: tuple[str, ...]
    step_sizes: tuple[float, ...]
    meta_lr: float
    steps: int
    seed: int

    def fixed(self, pair: str, step_size: float) -> Run:
        """Return the run of a pair's base at a fixed step size, common to pairs of one base."""
        base, _ = pair.split("+")
        return Run(base=base, step_size=step_size, steps=self.steps, seed=self.seed)

    def tuned(self, pair: str, blocks: str, step_size: float) -> Run:
        """Return the run of a pair from an initial step size."""
        base, meta = pair.split("+")
        return Run(
            base=base,
            meta=meta,
            step_size=step_size,
            meta_lr=self.meta_lr,
            blocks=blocks,
            steps=self.steps,
            seed=self.seed,
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, each once."""
        fixed = (
            self.fixed(pair, size) for pair in self.pairs for size in (*self.step_sizes, *GRID)
        )
        tuned = (
            self.tuned(pair, blocks, size)
            for pair in self.pairs
            for blocks in self.blocks
            for size in self.step_sizes
        )
        return tuple(dict.fromkeys((*fixed, *tuned)))


@dataclass(frozen=True)
class Results:
    """What the runs of a study gave."""

    study: Study
    by_run: dict[Run, Result]

    def fixed(self, pair: str, step_size: float) -> Result:
        """Return the result of `Study.fixed`."""
        return self.by_run[self.study.fixed(pair, step_size)]

    def tuned(self, pair: str, blocks: str, step_size: float) -> Result:
        """Return the result of `Study.tuned`."""
        return self.by_run[self.study.tuned(pair, blocks, step_size)]

    def best_fixed(self, pair: str) -> Result:
        """Return the result of the fixed step size of `GRID` with the least training loss."""
        return min((self.fixed(pair, size) for size in GRID), key=lambda res: res.final_loss)


def execute(study: Study, digits: Digits, jobs: int, finished: Callable[[Run], object]) -> Results:
    """Return the results of all runs, found in `jobs` processes.

    Always in processes of their own, even for one job, and with one thread each: how a BLAS cuts
    its sums depends on its threads, and results shall not.

    Parameters
    ----------
    study : Study
    digits : Digits
    jobs : int
    finished : callable
        Called after every run.
    """
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        min(jobs, len(study.runs), MOST_PROCESSES),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(digits,),
    )
    try:
        with _inherited_by_workers():
            futures = [pool.submit(_train, run) for run in study.runs]
        for future in as_completed(futures):
            finished(future.result().run)
        return Results(study, {run: f.result() for run, f in zip(study.runs, futures, strict=True)})
    except BaseException:
        for worker in set(multiprocessing.active_children()) - set(others):
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """Limit threads and hold back Ctrl-C in the processes started meanwhile.

    Ctrl-C reaches all processes at a terminal, and is for the parent alone to answer.
    """
    before = {name: os.environ.get(name) for name in THREAD_LIMITS}
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if masks:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # and answer one that came meanwhile


_digits: Digits


def _start_worker(digits: Digits) -> None:
    global _digits
    _digits = digits
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Leave no process behind where the parent was killed and could not clean up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(run: Run) -> Result:
    return train(run, _digits)

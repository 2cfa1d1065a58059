"""Notices another package of this name, of which files lie between ours."""

import warnings
from pathlib import Path

__all__ = ["check_folder"]

HERE = Path(__file__).parent

#: What the metaopt of 2014 on PyPI, a tuner of hyperparameters, has in its folder and we have not.
OTHER = ("concurrent", "core", "optimizer")


def check_folder(folder: Path = HERE) -> None:
    """Warn where this package lies in one folder with another that is called metaopt.

    Whichever is installed last overwrites the `__init__.py` of the first, and whichever is
    uninstalled takes it along.

    Parameters
    ----------
    folder : path, default that of this package
    """
    found = [name for name in OTHER if (folder / name).is_dir()]
    if found:
        warnings.warn(
            f"{folder} holds files of another package, the `metaopt` of PyPI ({found[0]}). Run "
            "`pip uninstall metaopt metaoptimize`, and then install metaoptimize again.",
            stacklevel=3,
        )

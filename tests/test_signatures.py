"""One signature for all: the core's options, under their names and defaults, in every adapter."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import metaopt as mo

#: Where it stands, what it lacks of the core's options, and what it has beside them.
ADAPTERS: dict[str, tuple[set[str], set[str]]] = {
    "metaopt_torch.MetaOptimizer": (
        set(),
        {"lr", "weight_decay", "maximize", "hvp", "rounding", "compile", "process_group"},
    ),
    "metaopt_jax.metaoptimize": ({"recover"}, {"lr", "axis_name"}),
    "metaopt_kernels.MetaOptimizer": (set(), {"fused"}),
    "metaopt_mlx.MetaOptimizer": (set(), {"lr"}),
    "metaopt_keras.MetaOptimizer": (
        set(),
        {"lr", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "name"}
        | {"use_ema", "ema_momentum", "ema_overwrite_frequency"}
        | {"loss_scale_factor", "gradient_accumulation_steps"},
    ),
}
#: An optimizer that is known by its steps alone has no formula.
FORMULA = {"base", "sigma", "approximation", "curvature", "recover"}
WRAPPERS: dict[str, tuple[set[str], set[str]]] = {
    "metaopt_torch.wrap": (FORMULA, {"compile", "process_group"}),
    "metaopt_jax.wrap": (FORMULA - {"sigma"}, {"lr", "weight_decay", "axis_name"}),
}


def found(path: str) -> Callable[..., Any]:
    package, _, name = path.partition(".")
    needs = {
        "metaopt_torch": ["torch"],
        "metaopt_jax": ["jax", "optax"],
        "metaopt_mlx": ["mlx"],
        "metaopt_keras": ["keras"],
    }
    for needed in needs.get(package, []):
        pytest.importorskip(needed)
    return getattr(importlib.import_module(package), name)


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what is passed by keyword alone, with defaults, in order."""
    parameters = inspect.signature(function).parameters.values()
    assert not [one.name for one in parameters if one.kind is one.VAR_KEYWORD]
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


CORE = options(mo.MetaOptimize)


@pytest.mark.parametrize("path", [*ADAPTERS, *WRAPPERS])
def test_options_of_the_core_have_its_names_and_defaults_everywhere(path: str) -> None:
    lacks, own = (ADAPTERS | WRAPPERS)[path]
    here = options(found(path))
    assert set(here) == set(CORE) - lacks | own
    shared = [name for name in here if name in CORE]
    assert shared == [name for name in CORE if name not in lacks]  # in the core's order
    for name in shared:
        assert repr(here[name]) == repr(CORE[name]), name


@pytest.mark.parametrize("path", [*ADAPTERS, *WRAPPERS])
def test_only_what_is_optimized_may_be_passed_by_position(path: str) -> None:
    parameters = inspect.signature(found(path)).parameters.values()
    before = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
    without = (
        "metaopt_jax.metaoptimize",
        "metaopt_mlx.MetaOptimizer",
        "metaopt_keras.MetaOptimizer",
    )
    assert len(before) == (path not in without)


@pytest.mark.parametrize("path", ADAPTERS)
def test_a_configuration_of_the_core_goes_in_with_the_adapters_own_options(path: str) -> None:
    _, own = ADAPTERS[path]
    from_config = found(f"{path.partition('.')[0]}.from_config")
    assert set(options(from_config)) - {"meta_lr"} == own
    for name, default in options(from_config).items():
        assert name == "meta_lr" or default == options(found(path))[name]

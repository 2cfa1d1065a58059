"""Bad input is refused by the call that was given it, with what was given and what would be right.

Tables of calls, with the exception and literal parts of its message. Every bad step is also
checked to leave params, gradients, state and configuration as they were.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import pytest
from metaopt_conformance import table
from metaopt_conformance.translate import contents

import metaopt as mo
from metaopt.step_sizes import NAMED

SHAPES = {"w": (2, 3), "b": (3,)}
NAN, INF = math.nan, math.inf


def make(**options: Any) -> mo.MetaOptimize:
    defaults: dict[str, Any] = {"base": mo.SGD(), "meta": mo.SGD(), "step_size": 0.1}
    defaults["discount"] = 1.0
    return mo.MetaOptimize(**(defaults | options))


def start(dtype: Any = "float64") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


Errors: TypeAlias = type[Exception] | tuple[type[Exception], ...]


def refused(call: Any, error: Errors, *parts: str) -> None:
    """Assert that `call` raises `error` and no subclass, with the literal `parts` in order."""
    with pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts))) as caught:
        call()
    assert caught.type in (error if isinstance(error, tuple) else (error,))


ONE_TO_BE = "must lie in [0, 1); got"
NOT_NEGATIVE = "must be finite and not negative; got"
#: Of every rule with such an option: a value out of range, and what the message has.
REFUSED: dict[str, list[tuple[Any, tuple[str, ...]]]] = {
    "betas": [
        ((1.0, 0.9), ("`betas[0]`", ONE_TO_BE, "1.0.")),
        ((NAN, 0.9), ("`betas[0]`", ONE_TO_BE, "nan.")),
        ((0.9, -0.1), ("`betas[1]`", ONE_TO_BE, "-0.1.")),
        ((0.9, 1.5), ("`betas[1]`", ONE_TO_BE, "1.5.")),
        (0.9, ("`betas` must be two numbers", "got 0.9.")),
        (None, ("`betas` must be two numbers", "got None.")),
        ((0.9, 0.9, 0.9), ("`betas` must be two numbers in [0, 1); got (0.9, 0.9, 0.9).",)),
    ],
    "beta2": [(1, ("`beta2`", ONE_TO_BE, "1.")), (-0.5, ("`beta2`", ONE_TO_BE, "-0.5."))],
    "momentum": [
        (1.0, ("`momentum`", ONE_TO_BE, "1.0.")),
        (-0.9, ("`momentum`", ONE_TO_BE, "-0.9.")),
    ],
    "eps": [
        (-1e-8, ("`eps`", NOT_NEGATIVE, "-1e-08.")),
        (INF, ("`eps`", NOT_NEGATIVE, "inf.")),
        (NAN, ("`eps`", NOT_NEGATIVE, "nan.")),
    ],
    "weight_decay": [
        (-1, ("`weight_decay`", NOT_NEGATIVE, "-1.")),
        (NAN, ("`weight_decay`", NOT_NEGATIVE, "nan.")),
        (INF, ("`weight_decay`", NOT_NEGATIVE, "inf.")),
    ],
    "decay_step_size": [
        (-1e-3, ("`decay_step_size`", NOT_NEGATIVE, "-0.001.")),
        (NAN, ("`decay_step_size`", NOT_NEGATIVE, "nan.")),
    ],
}


def options_of(kind: type[Any]) -> list[str]:
    return [option.name for option in fields(kind) if option.init]


RULES: dict[str, tuple[type[Any], dict[str, Any], tuple[str, ...]]] = {
    **{
        f"{row.kind.__name__} {name}={value}": (row.kind, {name: value}, parts)
        for row in table.RULES
        for name in options_of(row.kind)
        for value, parts in REFUSED.get(name, ())
    },
    "SGD delayed without momentum": (
        mo.SGD,
        {"delayed": True},
        ("`delayed` must be False when `momentum` is 0",),
    ),
    "Sigmoid ends equal": (mo.Sigmoid, {"lo": 0.1, "hi": 0.1}, ("`lo` and `hi`", "0 < lo < hi")),
    "Sigmoid ends swapped": (mo.Sigmoid, {"lo": 1.0, "hi": 0.1}, ("got 1.0 and 0.1.",)),
    "Sigmoid from 0": (mo.Sigmoid, {"lo": 0.0, "hi": 0.1}, ("0 < lo < hi < inf; got 0.0",)),
    "Sigmoid to infinity": (mo.Sigmoid, {"lo": 0.1, "hi": INF}, ("0 < lo < hi < inf", "inf.")),
}


def test_every_option_that_is_a_number_is_refused_out_of_range() -> None:
    options = {name for row in table.RULES for name in options_of(row.kind)}
    assert options - {"delayed", "bias_correction"} == REFUSED.keys()


@pytest.mark.parametrize("case", RULES)
def test_rule_refuses(case: str) -> None:
    cls, options, parts = RULES[case]
    refused(lambda: cls(**options), ValueError, *parts)


# not of the documented kind, or out of range in a type the range check does not look at
RULES_OF_OTHER_TYPES: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "betas of text": (mo.AdamW, {"betas": ("a", 0.9)}, "betas"),
    "betas of NumPy's float32": (mo.AdamW, {"betas": (np.float32(1.5), 0.9)}, "betas"),
    "eps of text": (mo.AdamW, {"eps": "1e-8"}, "eps"),
    "decay of NumPy's float32": (mo.AdamW, {"weight_decay": np.float32("nan")}, "weight_decay"),
    "momentum of text": (mo.SGD, {"momentum": "0.9"}, "momentum"),
    "beta2 None": (mo.RMSprop, {"beta2": None}, "beta2"),
    "Sigmoid of text": (mo.Sigmoid, {"lo": "a", "hi": 1.0}, "`lo`"),
}


@pytest.mark.parametrize("case", RULES_OF_OTHER_TYPES)
def test_rule_refuses_other_types(case: str) -> None:
    cls, options, name = RULES_OF_OTHER_TYPES[case]
    with pytest.raises((TypeError, ValueError), match=name):
        cls(**options)


def test_betas_as_a_list_are_as_good_as_a_tuple() -> None:
    opt = make(base=mo.AdamW(betas=[0.9, 0.99]), curvature="exact")  # type: ignore[arg-type]
    assert set(opt.init(start()).slot_traces) == set(SHAPES)


A_RULE = "must be a rule such as metaopt.AdamW(); got"
CONSTRUCTOR: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "base a class": ({"base": mo.SGD}, TypeError, ("`base`", A_RULE, "SGD")),
    "base a list": ({"base": [mo.SGD()]}, TypeError, ("`base`", A_RULE, "[SGD(")),
    "base None": ({"base": None}, TypeError, ("`base`", A_RULE, "None.")),
    "base empty": ({"base": {}}, ValueError, ("`base` must be a rule or a mapping", "empty")),
    "base of classes": ({"base": {"*": mo.Lion}}, TypeError, ("`base['*']`", A_RULE, "Lion")),
    "meta a class": ({"meta": mo.Lion}, TypeError, ("`meta`", A_RULE, "Lion")),
    "meta a mapping": ({"meta": {"*": mo.SGD()}}, TypeError, ("`meta`", A_RULE, "{'*'")),
    "meta with decay": (
        {"meta": mo.AdamW(weight_decay=0.25)},
        ValueError,
        ("`meta` must have weight_decay 0", "got 0.25."),
    ),
    "meta_lr negative": (
        {"meta_lr": -1e-3},
        ValueError,
        ("`meta_lr` must be a finite number and at least 0; got -0.001.",),
    ),
    "meta_lr nan": ({"meta_lr": NAN}, ValueError, ("`meta_lr` must be a finite", "got nan.")),
    "meta_lr infinite": ({"meta_lr": INF}, ValueError, ("`meta_lr` must be a finite", "inf.")),
    "meta_lr text": ({"meta_lr": "1e-3"}, ValueError, ("`meta_lr` must be a finite", "'1e-3'.")),
    "meta_lr True": ({"meta_lr": True}, ValueError, ("`meta_lr` must be a finite", "True.")),
    "discount above 1": (
        {"discount": 1.01},
        ValueError,
        ("`discount` must be a finite number in [0, 1]; got 1.01.",),
    ),
    "discount negative": ({"discount": -0.1}, ValueError, ("`discount`", "[0, 1]; got -0.1.")),
    "discount nan": ({"discount": NAN}, ValueError, ("`discount`", "[0, 1]; got nan.")),
    "blocks unknown": (
        {"blocks": "layer"},
        ValueError,
        ("`blocks` must be one of 'scalar', 'tensor', 'node', 'weight', a mapping", "'layer'."),
    ),
    "blocks None": ({"blocks": None}, ValueError, ("`blocks` must be one of", "got None.")),
    "blocks uncalled": ({"blocks": mo.blocks.node}, ValueError, ("`blocks` must be one of",)),
    "blocks empty": ({"blocks": {}}, ValueError, ("`blocks` must name one group or more", "{}.")),
    "blocks empty group": (
        {"blocks": {"head": (), "rest": "*"}},
        ValueError,
        ("`blocks` must name one group or more, each with a pattern or more; got {'head': ()",),
    ),
    "sigma unknown": (
        {"sigma": "sigmoid"},
        ValueError,
        (f"`sigma` must be one of {', '.join(map(repr, NAMED))}, or a map", "'sigmoid'."),
    ),
    "sigma a class": ({"sigma": mo.Sigmoid}, ValueError, ("`sigma` must be one of", "Sigmoid")),
    "bounds swapped": (
        {"bounds": (1.0, 0.01)},
        ValueError,
        ("`bounds` must satisfy 0 <= lo < hi <= inf; got (1.0, 0.01).",),
    ),
    "bounds equal": ({"bounds": (0.1, 0.1)}, ValueError, ("`bounds` must satisfy",)),
    "bounds nan": ({"bounds": (NAN, 1.0)}, ValueError, ("`bounds` must satisfy", "(nan, 1.0).")),
    "bounds below exp": ({"bounds": (-1.0, 1.0)}, ValueError, ("`bounds` must satisfy 0 <= lo",)),
    "bounds above Sigmoid": (
        {"bounds": (0.05, 2.0), "sigma": mo.Sigmoid(0.01, 1.0)},
        ValueError,
        ("`bounds` must satisfy 0.01 <= lo < hi <= 1; got (0.05, 2.0).",),
    ),
    "bounds three": (
        {"bounds": (0.1, 0.2, 0.3)},
        ValueError,
        ("`bounds` must be None or a pair (lo, hi); got (0.1, 0.2, 0.3).",),
    ),
    "bounds one": ({"bounds": 0.1}, ValueError, ("`bounds` must be None or a pair", "0.1.")),
    "bounds by block": (
        {"bounds": {"all": (0.05, 2.0), "w": (2.0, 1.0)}},
        ValueError,
        ("`bounds['w']` must satisfy 0 <= lo < hi <= inf; got (2.0, 1.0).",),
    ),
    "bounds by block, one number": (
        {"bounds": {"all": 3.0}},
        ValueError,
        ("`bounds['all']` must be None or a pair (lo, hi); got 3.0.",),
    ),
    "step_size outside bounds of its block": (
        {"bounds": {"all": (0.2, 1.0)}},
        ValueError,
        ("`step_size` must lie within `bounds['all']` (0.2, 1.0); got", "0.1"),
    ),
    "step_size outside bounds": (
        {"bounds": (0.2, 1.0)},
        ValueError,
        ("`step_size` must lie within `bounds` (0.2, 1.0); got", "0.1"),
    ),
    "step_size 0": ({"step_size": 0.0}, ValueError, ("`step_size` must lie between 0 and inf",)),
    "step_size negative": (
        {"step_size": -0.5},
        ValueError,
        ("`step_size` must lie between 0 and inf, exclusively; got", "-0.5"),
    ),
    "step_size nan": (
        {"step_size": NAN, "sigma": "identity"},
        ValueError,
        ("`step_size` must lie between -inf and inf", "nan"),
    ),
    "step_size 0 for softplus": (
        {"step_size": 0.0, "sigma": "softplus"},
        ValueError,
        ("`step_size` must lie between 0 and inf",),
    ),
    "step_size at the end of Sigmoid": (
        {"step_size": 1.0, "sigma": mo.Sigmoid(0.01, 1.0)},
        ValueError,
        ("`step_size` must lie between 0.01 and 1, exclusively", "1."),
    ),
    "step_size of one block negative": (
        {"step_size": {"w": 0.1, "b": -0.5}, "blocks": "tensor"},
        ValueError,
        ("`step_size['b']` must lie between 0 and inf", "-0.5"),
    ),
    "step_size of one unit 0": (
        {"step_size": {"w": np.asarray([0.1, 0.0]), "b": 0.1}, "blocks": "node"},
        ValueError,
        ("`step_size['w']` must lie between 0 and inf", "0."),
    ),
    "approximation unknown": (
        {"approximation": "L"},
        ValueError,
        ("`approximation` must be one of 'l', '2x2', 'full'; got 'L'.",),
    ),
    "full without exact": (
        {"approximation": "full", "curvature": "diagonal"},
        ValueError,
        ('`approximation="full"` needs `curvature` "exact"; got \'diagonal\'.',),
    ),
    "full with meta_first": (
        {"approximation": "full", "curvature": "exact", "meta_first": True},
        ValueError,
        ('`approximation="full"` needs `meta_first` False; got True.',),
    ),
    "curvature unknown": (
        {"curvature": "full"},
        ValueError,
        ("`curvature` must be one of 'none', 'diagonal', 'exact' or", "Diagonal; got 'full'."),
    ),
    "curvature a class": (
        {"curvature": mo.curvature.Diagonal},
        ValueError,
        ("`curvature` must be one of", "Diagonal"),
    ),
    "rectified AdamW": (
        {"base": mo.AdamW(), "curvature": mo.curvature.Diagonal(rectified=True)},
        ValueError,
        ("`curvature` Diagonal(rectified=True) needs SGD without momentum", "got AdamW("),
    ),
    "rectified momentum": (
        {
            "base": {"w": mo.SGD(), "*": mo.SGD(momentum=0.9)},
            "curvature": mo.curvature.Diagonal(rectified=True),
        },
        ValueError,
        ("needs SGD without momentum as `base`; got SGD(momentum=0.9",),
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_constructor_refuses(case: str) -> None:
    options, error, parts = CONSTRUCTOR[case]
    refused(lambda: make(**options), error, *parts)


CONSTRUCTOR_OF_OTHER_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "step_size text": ({"step_size": "0.1"}, "`step_size`"),
    "step_size None": ({"step_size": None}, "`step_size`"),
    "step_size complex": ({"step_size": 0.1j}, "`step_size`"),
    "bounds of text": ({"bounds": ("a", 1.0)}, "`bounds`"),
    "group of numbers": ({"blocks": {"head": 3}}, "`blocks`"),
    "base pattern no text": ({"base": {0: mo.SGD()}}, "`base`"),
    "discount complex": ({"discount": np.complex128(0.5j)}, "`discount`"),
}


@pytest.mark.parametrize("case", CONSTRUCTOR_OF_OTHER_TYPES)
def test_constructor_refuses_other_types_by_name(case: str) -> None:
    options, name = CONSTRUCTOR_OF_OTHER_TYPES[case]
    with pytest.raises((TypeError, ValueError), match=name):
        make(**options)


def test_step_size_is_shown_as_it_was_given() -> None:
    refused(lambda: make(step_size=-0.5), ValueError, "`step_size`", "got -0.5.")


def test_paper_refuses_what_the_paper_does_not_report() -> None:
    paper = mo.presets.paper
    refused(lambda: paper("adamw", "lion", "mnist"), ValueError, "`experiment` must be", "'mnist'.")
    refused(lambda: paper("sgdm", "adam", "imagenet"), ValueError, "'imagenet' must be", "'sgdm'")


REAL = "must be real and floating; got dtype"
W = np.zeros((2, 3))
# options, params, exception, message
INIT: dict[str, tuple[dict[str, Any], Any, type[Exception], tuple[str, ...]]] = {
    "an array": ({}, W, TypeError, ("`params` must be a mapping of name to array", "array([")),
    "a list": ({}, [W], TypeError, ("`params` must be a mapping of name to array", "[array(")),
    "nothing": ({}, {}, TypeError, ("`params` must be a mapping", "at least one; got {}.")),
    "integers": ({}, {"w": W.astype(int)}, TypeError, ("`params['w']`", REAL, "int64.")),
    "booleans": ({}, {"w": W > 0}, TypeError, ("`params['w']`", REAL, "bool.")),
    "complex": ({}, {"b": W, "w": W + 0j}, TypeError, ("`params['w']`", REAL, "complex128.")),
    "objects": ({}, {"w": W.astype(object)}, TypeError, ("`params['w']`", REAL, "object.")),
    "a list in place of an array": (
        {},
        {"w": [1.0, 2.0]},
        TypeError,
        ("`params['w']` must be an array of a library that follows the array API", "got list."),
    ),
    "a number": ({}, {"w": 1.0}, TypeError, ("`params['w']` must be an array", "got float.")),
    "None": ({}, {"w": None}, TypeError, ("`params['w']` must be an array", "got NoneType.")),
    "nested": ({}, {"w": {"v": W}}, TypeError, ("`params['w']` must be an array", "got dict.")),
    "names that are no text": ({}, {0: W}, TypeError, ("`params` must have strings", "got 0.")),
    "named pattern of no leaf": (
        {"blocks": {"head": ("fc.*", "w"), "rest": "*"}},
        {"w": W, "b": W},
        ValueError,
        ("`blocks` pattern 'fc.*' of group 'head' is the first match of no leaf; leaves: w, b.",),
    ),
    "named pattern that never comes first": (
        {"blocks": {"rest": "*", "head": "w"}},
        {"w": W, "b": W},
        ValueError,
        ("`blocks` pattern 'w' of group 'head' is the first match of no leaf",),
    ),
    "leaf in no group": (
        {"blocks": {"head": "w"}},
        {"w": W, "b": W},
        ValueError,
        ("`blocks` has no pattern that matches leaf 'b'; add one",),
    ),
    "base pattern of no leaf": (
        {"base": {"fc.*": mo.Lion(), "*": mo.SGD()}},
        {"w": W, "b": W},
        ValueError,
        ("`base` pattern 'fc.*' is the first match of no leaf; leaves: w, b.",),
    ),
    "leaf without rule": (
        {"base": {"w": mo.SGD()}},
        {"w": W, "b": W},
        ValueError,
        ("`base` has no pattern that matches leaf 'b'; add one",),
    ),
    "step_size lacks a block": (
        {"step_size": {"w": 0.1}, "blocks": "tensor"},
        {"w": W, "b": W},
        ValueError,
        ("`step_size` lacks block 'b'; expected exactly: w, b.",),
    ),
    "step_size of an unknown block": (
        {"step_size": {"all": 0.1, "w": 0.1}},
        {"w": W},
        ValueError,
        ("`step_size` has unknown block 'w'; expected exactly: all.",),
    ),
    "bounds of an unknown block": (
        {"bounds": {"w": (0.01, 1.0)}},
        {"w": W},
        ValueError,
        ("`bounds` has unknown block 'w'; expected any of: all.",),
    ),
    "step_size empty": ({"step_size": {}}, {"w": W}, ValueError, ("lacks block 'all'",)),
    "step_size per leaf of more than one entry": (
        {"step_size": {"w": np.full(3, 0.1)}, "blocks": "tensor"},
        {"w": W},
        ValueError,
        ("`step_size['w']` has shape (3,); expected () or (1,).",),
    ),
    "step_size per node of other length": (
        {"step_size": {"w": np.full(3, 0.1)}, "blocks": "node"},
        {"w": W},
        ValueError,
        ("`step_size['w']` has shape (3,); expected () or (2,).",),
    ),
    "step_size per weight of other shape": (
        {"step_size": {"w": np.full((3, 2), 0.1)}, "blocks": "weight"},
        {"w": W},
        ValueError,
        ("`step_size['w']` has shape (3, 2); expected () or (2, 3).",),
    ),
    "node axis": (
        {"blocks": mo.blocks.node(2)},
        {"b": W[0], "w": W},
        ValueError,
        ("`axis` of the node partition is 2, but 'w' has shape (2, 3).",),
    ),
    "node axis negative": (
        {"blocks": mo.blocks.node(-3)},
        {"w": W},
        ValueError,
        ("`axis` of the node partition is -3, but 'w' has shape (2, 3).",),
    ),
    "dense traces too large": (
        {"curvature": "exact", "blocks": "weight"},
        {"w": np.zeros((2**7, 91)), "b": np.zeros(2)},
        ValueError,
        (
            f'`curvature` "exact" needs traces of {(2**7 * 91 + 2) ** 2} numbers for '
            f"{2**7 * 91 + 2} blocks, more than {2**27}. Use fewer `blocks`",
        ),
    ),
}


@pytest.mark.parametrize("case", INIT)
def test_init_refuses(case: str) -> None:
    options, params, error, parts = INIT[case]
    opt = make(**options)
    refused(lambda: opt.init(params), error, *parts)


def test_dense_traces_of_just_the_allowed_size_are_made() -> None:
    """2**27 numbers pass the check; looked at in the plan, for they would take half a gigabyte."""
    opt = make(curvature="exact", blocks="tensor")
    assert opt.plan({"w": np.broadcast_to(np.float32(0), (2**27,))}).layout.blocks.size == 1
    refused(
        lambda: opt.plan({"w": np.broadcast_to(np.float32(0), (2**27 + 1,))}),
        ValueError,
        f"needs traces of {2**27 + 1} numbers for 1 blocks",
    )


def test_init_refuses_arrays_of_two_libraries() -> None:
    torch = pytest.importorskip("torch")
    refused(
        lambda: make().init({"w": W, "b": torch.zeros(3)}),
        TypeError,
        "`params` must all be arrays of one library; got",
        "numpy",
        "torch",
    )


@pytest.mark.filterwarnings("ignore:Sparse :UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_torch_tensors_are_refused(layout: str) -> None:
    torch = pytest.importorskip("torch")
    dense = torch.eye(4)
    options = {"blocksize": (2, 2)} if layout.startswith("bs") else {}
    sparse = dense.to_sparse(layout=getattr(torch, f"sparse_{layout}"), **options)
    opt = make()
    refused(lambda: opt.init({"w": sparse}), TypeError, "`params['w']` must be a dense array")
    state = opt.init({"w": dense})
    refused(
        lambda: opt.step({"w": dense}, {"w": sparse}, state),
        TypeError,
        "`grads['w']` must be a dense array; got a sparse",
    )


@pytest.mark.parametrize("kind", ["csr_matrix", "coo_array"])
def test_sparse_scipy_matrices_are_refused(kind: str) -> None:
    sparse = getattr(pytest.importorskip("scipy.sparse"), kind)(np.eye(3))
    opt = make()
    refused(lambda: opt.init({"w": sparse}), TypeError, "`params['w']` must be a dense array", kind)
    params = {"w": np.eye(3)}
    refused(
        lambda: opt.step(params, {"w": sparse}, opt.init(params)),
        TypeError,
        "`grads['w']` must be a dense array",
        kind,
    )


def test_sparse_jax_arrays_are_refused() -> None:
    sparse = pytest.importorskip("jax.experimental.sparse")
    array = sparse.BCOO.fromdense(np.eye(3, dtype="float32"))
    refused(lambda: make().init({"w": array}), TypeError, "`params['w']` must be a dense array")


def test_floats_wider_than_double_are_refused_rather_than_rounded() -> None:
    """The state would hold them in float32."""
    if np.finfo(np.longdouble).bits <= 64:
        pytest.skip("long double is double here")
    params = {"w": np.ones(2, dtype=np.longdouble)}
    with pytest.raises(TypeError, match=r"`params\['w'\]`"):
        make().init(params)


@dataclass(frozen=True)
class View(mo.blocks.Partition):
    """Blocks of a fixed shape in every leaf."""

    view: tuple[int, ...]
    family: str = ""

    def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:  # noqa: ARG002
        return self.family or name, self.view


class PerLeaf(View):
    per_leaf = True


PARTITIONS: dict[str, tuple[mo.blocks.Partition, tuple[str, ...]]] = {
    "too few axes": (
        View((2,)),
        (
            "`blocks` gives leaf 'w' blocks of shape (2,), which must be () or have, for each axis "
            "of (2, 3), its length or 1.",
        ),
    ),
    "a length in between": (View((1, 2)), ("leaf 'w' blocks of shape (1, 2), which must be ()",)),
    "too many axes": (View((1, 1, 1)), ("leaf 'w' blocks of shape (1, 1, 1)", "(2, 3)")),
    "per leaf but not its shape": (
        PerLeaf((2, 1)),
        (
            "`blocks` with `per_leaf` must give leaf 'w' its own name and shape (2, 3); got 'w' "
            "and (2, 1).",
        ),
    ),
    "per leaf but not its name": (PerLeaf((2, 3), "all"), ("(2, 3); got 'all' and (2, 3).",)),
}


@pytest.mark.parametrize("case", PARTITIONS)
def test_partition_of_illegal_view_is_refused(case: str) -> None:
    partition, parts = PARTITIONS[case]
    refused(lambda: make(blocks=partition).init({"w": W}), ValueError, *parts)


def test_family_of_leaves_with_unequally_many_blocks_is_refused() -> None:
    class Shared(mo.blocks.Partition):
        def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:  # noqa: ARG002
            return "shared", shape

    refused(
        lambda: make(blocks=Shared()).init({"w": W, "b": W[0]}),
        ValueError,
        "`blocks` gives leaf 'b' 3 blocks in family 'shared', which has 6 by its first leaf",
    )


def test_reduce_of_nothing_is_refused() -> None:
    bound = mo.blocks.tensor().bind(SHAPES)
    refused(lambda: bound.reduce({}), ValueError, "`products` must hold at least one leaf")


def test_integer_probes_are_refused() -> None:
    probes = {"w": np.ones((2, 3)), "b": np.ones((2, 3), dtype=np.int32)}
    refused(
        lambda: mo.curvature.hutchinson(lambda tangents: tangents, probes),  # type: ignore[arg-type]
        ValueError,
        "`probes['b']` must be real and floating; got dtype int32.",
    )


@dataclass(frozen=True)
class BadStep:
    """A step to be refused: what differs from a good one, by argument; options of the run."""

    error: Errors
    parts: tuple[str, ...]
    change: Mapping[str, Any]
    options: Mapping[str, Any]
    state_of: Mapping[str, Any] | None = None


def bad(error: Errors, *parts: str, options: Any = None, **change: Any) -> BadStep:
    return BadStep(error, parts, change, options or {})


def of_another(options: Any, state_of: Any, *parts: str, **change: Any) -> BadStep:
    return BadStep((TypeError, ValueError), parts, change, options, state_of)


def without(name: str) -> Any:
    return {key: value for key, value in start().items() if key != name}


def swapped(**leaves: Any) -> Any:
    return start() | leaves


EXACT, DIAGONAL = {"curvature": "exact"}, {"curvature": "diagonal"}
FULL = EXACT | {"approximation": "full"}
MOMENTUM = {"base": mo.SGD(momentum=0.9)}
NEED_HVP = (
    '`hvp` is needed by `curvature="exact"`; got',
    "Pass a callable",
    "jax.vmap over jax.jvp",
    "torch.func",
    "metaopt.curvature.central_difference(grad_fn, params).",
)
PRODUCT = "`hvp` must return for 'w' an array of shape (1, 2, 3), a product per tangent of (2, 3);"
ONE_LR = "must be a number or an array of shape (); got"
STEP: dict[str, BadStep] = {
    "params without a leaf": bad(
        ValueError, "`params` lacks leaf 'b'; expected exactly: w, b.", params=without("b")
    ),
    "params with another leaf": bad(
        ValueError, "`params` has unknown leaf 'x'; expected exactly: w, b.", params=swapped(x=W)
    ),
    "params with a leaf renamed": bad(
        ValueError,
        "`params` lacks leaf 'b' and has unknown leaf 'x'; expected exactly: w, b.",
        params=without("b") | {"x": W},
    ),
    "params a list": bad(TypeError, "`params` must be a mapping", "list.", params=[W]),
    "params of another shape": bad(
        ValueError, "(2, 3)", "(3, 3)", "for these params.", params=swapped(w=np.zeros((3, 3)))
    ),
    "grads without a leaf": bad(
        ValueError, "`grads` lacks leaf 'b'; expected exactly: w, b.", grads=without("b")
    ),
    "grads with another leaf": bad(
        ValueError, "`grads` has unknown leaf 'x'; expected exactly", grads=swapped(x=W)
    ),
    "grads a list": bad(TypeError, "`grads` must be a mapping", "got list.", grads=[W, W[0]]),
    "grads None": bad(TypeError, "`grads` must be a mapping", "got NoneType.", grads=None),
    "gradient of another shape": bad(
        ValueError, "`grads['w']` has shape (3, 2); expected (2, 3).", grads=swapped(w=W.T)
    ),
    "gradient that would broadcast": bad(
        ValueError, "`grads['b']` has shape (1,); expected (3,).", grads=swapped(b=np.ones(1))
    ),
    "gradient of integers": bad(
        TypeError, "`grads['w']`", REAL, "int64.", grads=swapped(w=W.astype(int))
    ),
    "gradient complex": bad(
        TypeError, "`grads['b']`", REAL, "complex128.", grads=swapped(b=np.zeros(3) + 0j)
    ),
    "gradient a list": bad(
        TypeError, "`grads['b']` must be an array; got list.", grads=swapped(b=[0.0, 0.0, 0.0])
    ),
    "gradient a number": bad(
        TypeError, "`grads['b']` must be an array; got float.", grads=swapped(b=0.0)
    ),
    "lr negative": bad(
        ValueError, "`lr` must be a finite number and at least 0; got -0.5.", lr=-0.5
    ),
    "lr nan": bad(ValueError, "`lr` must be a finite number and at least 0; got nan.", lr=NAN),
    "lr infinite": bad(ValueError, "`lr` must be a finite number and at least 0; got inf.", lr=INF),
    "lr text": bad(ValueError, "`lr`", ONE_LR, "'1'.", lr="1"),
    "lr None": bad(ValueError, "`lr`", ONE_LR, "None.", lr=None),
    "lr complex": bad(ValueError, "`lr`", ONE_LR, "1j.", lr=1j),
    "lr of some shape": bad(ValueError, "`lr`", ONE_LR, "array([1.])", lr=np.ones(1)),
    "lr of a leaf negative": bad(
        ValueError, "`lr['b']` must be a finite number", "got -1.", lr={"w": 1.0, "b": -1}
    ),
    "lr of a leaf of some shape": bad(
        ValueError, "`lr['w']`", ONE_LR, "array([", lr={"w": np.ones((2, 3)), "b": 1.0}
    ),
    "lr without a leaf": bad(
        ValueError, "`lr` lacks leaf 'b'; expected exactly: w, b.", lr={"w": 1.0}
    ),
    "lr of another leaf": bad(
        ValueError, "`lr` has unknown leaf 'x'", lr={"w": 1.0, "b": 1.0, "x": 1.0}
    ),
    "exact without hvp": bad(ValueError, *NEED_HVP, options=EXACT),
    "exact with products in place of hvp": bad(ValueError, *NEED_HVP, options=EXACT, hvp=start()),
    "hvp of another shape": bad(
        ValueError,
        PRODUCT,
        "got shape (2, 3).",
        options=EXACT,
        hvp=lambda tangents: {name: tangent[0] for name, tangent in tangents.items()},
    ),
    "hvp without a leaf": bad(
        ValueError, PRODUCT, "got nothing.", options=EXACT, hvp=lambda t: {"b": t["b"]}
    ),
    "hvp None for a leaf with a gradient": bad(
        ValueError, PRODUCT, "got nothing.", options=EXACT, hvp=lambda t: {"w": None, "b": t["b"]}
    ),
    "hvp returns nothing": bad(
        ValueError, PRODUCT, "got nothing.", options=EXACT, hvp=lambda _: None
    ),
    "hvp returns a list": bad(ValueError, PRODUCT, "got list.", options=EXACT, hvp=lambda _: [W]),
    "full without third": bad(
        ValueError,
        '`third` is needed by `approximation="full"`; got None. Pass a callable',
        options=FULL,
        hvp=lambda tangents: tangents,
    ),
    "third of another shape": bad(
        ValueError,
        "`third` must return for 'w' an array of shape (1, 1, 2, 3)",
        "a product per pair of tangents of (2, 3); got shape (1, 2, 3).",
        options=FULL,
        hvp=lambda tangents: tangents,
        third=lambda tangents, _: tangents,
    ),
    "no hessian_diagonal": bad(
        ValueError,
        '`hessian_diagonal` is needed by `curvature="diagonal"`',
        "metaopt.curvature.hutchinson(hvp, probes).",
        options=DIAGONAL,
    ),
    "hessian_diagonal a list": bad(
        TypeError,
        "`hessian_diagonal` must be a mapping",
        "got list.",
        options=DIAGONAL,
        hessian_diagonal=[W],
    ),
    "hessian_diagonal without a leaf": bad(
        ValueError,
        "`hessian_diagonal` lacks leaf 'w'; expected exactly: w, b.",
        options=DIAGONAL,
        hessian_diagonal=without("w"),
    ),
    "hessian_diagonal of another leaf": bad(
        ValueError,
        "`hessian_diagonal` has unknown leaf 'x'",
        options=DIAGONAL,
        hessian_diagonal=swapped(x=W),
    ),
    "hessian_diagonal of another shape": bad(
        ValueError,
        "`hessian_diagonal['b']` has shape (2,); expected (3,).",
        options=DIAGONAL,
        hessian_diagonal=swapped(b=np.zeros(2)),
    ),
    "hessian_diagonal None for a leaf with a gradient": bad(
        ValueError,
        "`hessian_diagonal['b']` must be an array, as its gradient is; got None.",
        options=DIAGONAL,
        hessian_diagonal=swapped(b=None),
    ),
    "rectified without hessian_diagonal": bad(
        ValueError,
        "`hessian_diagonal` is needed",
        options={"curvature": mo.curvature.Diagonal(rectified=True)},
    ),
    "dense state in a condensed run": of_another(
        MOMENTUM | DIAGONAL,
        MOMENTUM | EXACT,
        "`state.trace['w']` has shape (1, 2, 3); expected (2, 3). Pass the state",
        hessian_diagonal=start(),
    ),
    "condensed state in a dense run": of_another(
        MOMENTUM | EXACT,
        MOMENTUM | DIAGONAL,
        "`state.trace['w']` has shape (2, 3); expected (1, 2, 3). Pass the state",
        hvp=lambda tangents: tangents,
    ),
    "state of a rule with other slots": of_another(
        MOMENTUM, {}, "`state.slots['w']` holds []; expected ['exp_avg']. Pass the state"
    ),
    "state of a rule with more slots": of_another(
        MOMENTUM,
        {"base": mo.AdamW()},
        "`state.slots['w']` holds ['exp_avg', 'exp_avg_sq']; expected ['exp_avg'].",
    ),
    "state of l in a run of 2x2": of_another(
        EXACT | {"approximation": "2x2"},
        EXACT,
        "`state.beta_trace` holds []; expected ['beta']. Pass the state",
        hvp=lambda tangents: tangents,
    ),
    "state of 2x2 in a run of l": of_another(
        DIAGONAL,
        DIAGONAL | {"approximation": "2x2"},
        "`state.beta_trace` holds ['beta']; expected []. Pass the state",
        hessian_diagonal=start(),
    ),
}

# states of the same trace shapes, slots and beta_trace: what else they hold does not fit
OTHER_STATES: dict[str, tuple[Any, Any]] = {
    "scalar in tensor": ({"blocks": "tensor"}, {}),
    "tensor in scalar": ({}, {"blocks": "tensor"}),
    "scalar in node": ({"blocks": "node"}, {}),
    "node in scalar": ({}, {"blocks": "node"}),
    "node in tensor": ({"blocks": "tensor"}, {"blocks": "node"}),
    "scalar in weight": ({"blocks": "weight"}, {}),
    "weight in scalar": ({}, {"blocks": "weight"}),
    "plain meta in Lion": ({"meta": mo.Lion()}, {}),
    "Lion meta in plain": ({}, {"meta": mo.Lion()}),
    "AdamW meta in Lion": ({"meta": mo.Lion()}, {"meta": mo.AdamW()}),
    "no curvature in diagonal": (MOMENTUM | DIAGONAL, MOMENTUM),
    "diagonal in no curvature": (MOMENTUM, MOMENTUM | DIAGONAL),
}
for _case, (_options, _state_of) in OTHER_STATES.items():
    STEP[f"state of {_case}"] = of_another(
        _options,
        _state_of,
        "`state",
        **({"hessian_diagonal": start()} if _options.get("curvature") == "diagonal" else {}),
    )

# refusals that name what was given wrong, in place of a library's own message or of none
EITHER = (TypeError, ValueError)
STEP |= {
    "params of integers": bad(
        EITHER, "`params['w']`", REAL, "int64.", params=swapped(w=W.astype(int))
    ),
    "params of another dtype": bad(EITHER, "float32", params=start("float32")),
    "params of a list": bad(
        EITHER, "`params['w']` must be an array", "got list.", params=swapped(w=[0.0])
    ),
    "params of None": bad(
        EITHER, "`params['w']` must be an array", "got NoneType.", params=swapped(w=None)
    ),
    "state None": bad(EITHER, "`state` must be", "got NoneType.", state=None),
    "state and grads swapped": bad(EITHER, "`state` must be", "got dict.", state=start()),
    "lr a complex NumPy scalar": bad(EITHER, "`lr`", lr=np.complex128(0.5j)),
    "lr a complex array": bad(EITHER, "`lr`", lr=np.asarray(0.5j)),
    "hvp of lists": bad(
        EITHER,
        PRODUCT,
        "got list.",
        options=EXACT,
        hvp=lambda tangents: {name: [0.0] for name in tangents},
    ),
    "hvp complex": bad(
        EITHER,
        "`hvp",
        "complex128",
        options=EXACT,
        hvp=lambda tangents: {name: tangent + 0j for name, tangent in tangents.items()},
    ),
    "hessian_diagonal complex": bad(
        EITHER,
        "`hessian_diagonal['w']`",
        "complex128",
        options=DIAGONAL,
        hessian_diagonal=swapped(w=W + 0j),
    ),
}


@pytest.mark.parametrize("case", STEP)
def test_step_refuses_and_changes_nothing(case: str) -> None:
    this = STEP[case]
    opt = make(**this.options)
    params = start()
    other = opt if this.state_of is None else make(**this.state_of)
    arguments: dict[str, Any] = {"params": params, "grads": start(), "state": other.init(params)}
    before = contents(params), contents(arguments["state"]), contents(arguments["grads"])
    options = vars(opt) | {"_plans": None}
    refused(lambda: opt.step(**(arguments | dict(this.change))), this.error, *this.parts)
    assert before == (contents(params), contents(arguments["state"]), contents(arguments["grads"]))
    assert vars(opt) | {"_plans": None} == options


@pytest.mark.parametrize("argument", ["params", "grads", "hessian_diagonal", "hvp"])
def test_arrays_of_another_library_are_refused_by_name(argument: str) -> None:
    torch = pytest.importorskip("torch")
    opt = make(curvature="exact" if argument == "hvp" else "diagonal")
    params = start()
    theirs: Any = {name: torch.asarray(value) for name, value in params.items()}
    arguments: dict[str, Any] = {"params": params, "grads": params, "state": opt.init(params)}
    arguments |= {"hessian_diagonal": params, "hvp": lambda tangents: tangents}
    arguments[argument] = (
        theirs
        if argument != "hvp"
        else lambda tangents: {name: torch.asarray(value) for name, value in tangents.items()}
    )
    with pytest.raises(EITHER, match=f"`{argument}"):
        opt.step(**arguments)


def test_a_refused_step_can_be_followed_by_a_good_one(backend: Any) -> None:
    opt = make(base=mo.AdamW(), meta=mo.Lion(), blocks="node")
    params = backend.tree(start("float32"))
    state = opt.init(params)
    want = opt.step(params, params, state)
    with pytest.raises(ValueError, match="`grads` lacks leaf 'b'"):
        opt.step(params, {"w": params["w"]}, state)
    with pytest.raises(ValueError, match="`lr` must be a finite number"):
        opt.step(params, params, state, lr=-1.0)
    with pytest.raises(TypeError, match=r"`grads\['b'\]` must be an array; got list"):
        opt.step(params, {"w": params["w"], "b": [0.0, 0.0, 0.0]}, state)
    got = opt.step(params, params, state)
    assert contents(got[0]) == contents(want[0])
    assert contents(got[1]) == contents(want[1])


def test_init_refuses_integers_of_every_library(backend: Any) -> None:
    params = backend.tree({"w": np.zeros((2, 2), dtype="int32")})
    refused(lambda: make().init(params), TypeError, "`params['w']`", REAL, "int32.")


def test_rules_are_checked_by_their_members_alone() -> None:
    """A class of one's own need not inherit from anything."""

    class Own:
        slots: tuple[str, ...] = ()
        weight_decay = 0.0

        def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
            return grad, {}

    opt = make(base=Own())
    params = start()
    new, _ = opt.step(params, params, opt.init(params))
    np.testing.assert_array_equal(new["b"], params["b"] - 0.1 * params["b"])


@pytest.mark.parametrize(
    ("copies", "parts"),
    [
        ({"v": 2}, ("`copies` has unknown leaf 'v'; expected any of: w, b.",)),
        ({"w": 0}, ("`copies['w']` must be a positive integer; got 0.",)),
        ({"b": 1.5}, ("`copies['b']` must be a positive integer; got 1.5.",)),
    ],
)
def test_copies_that_cannot_be_are_refused(copies: Any, parts: Any) -> None:
    opt, params = make(), start()
    state = opt.init(params)
    refused(lambda: opt.step(params, params, state, copies=copies), ValueError, *parts)


class Decaying:
    """A rule with a weight decay that is none."""

    scope = "weight"
    slots = ()

    def __init__(self, weight_decay: Any) -> None:
        self.weight_decay = weight_decay

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        return grad, {}


@pytest.mark.parametrize("decay", [None, "x", float("nan"), -1.0])
def test_a_weight_decay_of_ones_own_rule_is_checked(decay: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"`base\.weight_decay` must be"):
        mo.MetaOptimize(base=Decaying(decay), meta=mo.SGD())


def test_what_is_to_be_called_is_checked() -> None:
    opt = make()
    params = start()
    state = opt.init(params)
    with pytest.raises(TypeError, match="`reduce` must be callable; got 3"):
        opt.step(params, params, state, reduce=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`jvp` must be callable; got 3"):
        opt.project(params, state, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`copies` must be a mapping"):
        opt.step(params, params, state, copies=["w"])  # type: ignore[arg-type]


def test_an_unknown_option_is_reported_by_the_class_that_was_called() -> None:
    with pytest.raises(TypeError, match=r"MetaOptimize\.__init__\(\) got an unexpected"):
        mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), momentum=0.9)  # type: ignore[call-arg]

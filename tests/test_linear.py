"""Which optimizers make steps in proportion to their lr, measured, as docs/wrap.md has it."""

import functools
import inspect
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from metaopt_torch import wrap  # noqa: E402
from metaopt_torch.inner import DECOUPLED, NOT_LINEAR, read_options  # noqa: E402
from optax import contrib  # noqa: E402

import metaopt as mo  # noqa: E402

PAGE = (Path(__file__).parents[1] / "docs" / "wrap.md").read_text(encoding="utf-8")
#: Of a difference of weights about 1 and steps about 1e-3, in float64.
ROUNDING = 1e-9
LR = 1e-3


def said(library: str) -> dict[str, str]:
    """Return what the page says of each optimizer of a library."""
    return dict(re.findall(rf"^\| `{re.escape(library)}\.(\w+)` \| (.*?) \|$", PAGE, re.MULTILINE))


OF_TORCH: dict[str, Any] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
FORMS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in OF_TORCH]
FORMS += [
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("AdamW", {"amsgrad": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1}),
    ("Adafactor", {"weight_decay": 0.1}),
]


def params_of(name: str) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3)] if name == "Muon" else [(4, 3), (3,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def stepped(opt: Any, params: list[Any], t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for param in params:
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = noise + 0.3 * param.detach()
    if isinstance(opt, torch.optim.LBFGS):
        opt.step(lambda: torch.zeros(()))
    else:
        opt.step()


def after(name: str, options: dict[str, Any], warm: int, lr: float) -> tuple[list[Any], list[Any]]:
    """Return a step with `lr` after some with `LR`, and the numbers of the state behind it."""
    params = params_of(name)
    opt = OF_TORCH[name](params, lr=LR, **options)
    for t in range(warm):
        stepped(opt, params, t)
    for group in opt.param_groups:
        group["lr"] = lr
    before = [param.detach().clone() for param in params]
    stepped(opt, params, warm)
    steps = [old - param.detach() for old, param in zip(before, params, strict=True)]
    values = (value for param in params for value in opt.state[param].values())
    state = [torch.as_tensor(v) for v in values if isinstance(v, float | int | torch.Tensor)]
    return steps, state


def proportional(name: str, options: dict[str, Any], lr: float = LR, warm: int = 4) -> bool:
    """Say whether 2 lr makes twice the step, and leaves the same state."""
    found = []
    for steps_before in (0, warm):
        (one, state), (two, other) = (after(name, options, steps_before, k * lr) for k in (1, 2))
        steps = [(2 * x, y) for x, y in zip(one, two, strict=True)]
        states = list(zip(state, other, strict=True))
        for x, y in steps + states:
            found.append(float((x - y).abs().max()) <= ROUNDING * float(y.abs().max()))
    return all(found)


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_what_the_page_says_of_torchs_optimizers_is_so(name: str, options: Any) -> None:
    text = said("torch.optim")[name]
    if name == "SparseAdam":
        assert "refused" in text
        return
    linear = proportional(name, options)
    assert linear == (not text.startswith("no"))
    assert (name in NOT_LINEAR) == (not linear)


def test_the_page_has_every_optimizer_of_torch() -> None:
    assert said("torch.optim").keys() == OF_TORCH.keys()


def test_adafactor_is_proportional_up_to_what_the_page_says() -> None:
    assert proportional("Adafactor", {}, lr=0.2, warm=4)  # both below 1 / sqrt(5)
    assert not proportional("Adafactor", {}, lr=0.4, warm=4)
    assert "1 / sqrt(step)" in said("torch.optim")["Adafactor"]


@pytest.mark.parametrize("name", sorted({*OF_TORCH} & {*NOT_LINEAR}))
def test_those_that_are_not_are_refused(name: str) -> None:
    opt = OF_TORCH[name](params_of(name), lr=LR)
    with pytest.raises(ValueError, match=rf"proportional to its lr; those of {name} are not"):
        wrap(opt, meta=mo.AdamW(), compile=False)


def decay_of(name: str, options: dict[str, Any]) -> tuple[float, bool]:
    """Return the decay that is read, and whether weights that shrink by hand do the same."""
    decay, (params, others) = 0.25, (params_of(name), params_of(name))
    opt = OF_TORCH[name](params, lr=LR, weight_decay=decay, **options)
    plain = OF_TORCH[name](others, lr=LR, weight_decay=0.0, **options)
    for t in range(8):
        stepped(opt, params, t)
        for other, param in zip(others, params, strict=True):
            other.grad = param.grad.clone()
        with torch.no_grad():
            shrinking = [LR * decay * other for other in others]
            plain.step()
            for other, share in zip(others, shrinking, strict=True):
                other -= share
    pairs = zip(params, others, strict=True)
    decoupled = all(float((p - q).detach().abs().max()) <= 1e-12 for p, q in pairs)
    return read_options(opt, opt.param_groups[0])["weight_decay"], decoupled


WITH_DECAY = [name for name in OF_TORCH if name not in {*NOT_LINEAR, "SparseAdam"}]
FLAGS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in WITH_DECAY]
FLAGS += [(name, {"decoupled_weight_decay": True}) for name in ("NAdam", "RAdam")]
FLAGS += [("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "dampening": 0.9})]


@pytest.mark.parametrize(("name", "options"), FLAGS, ids=str)
def test_weight_decay_is_read_where_it_is_decoupled(name: str, options: Any) -> None:
    read, decoupled = decay_of(name, options)
    assert read == (0.25 if decoupled else 0.0)


def test_weight_decay_of_others_is_read_by_their_flags_and_names() -> None:
    class Own(torch.optim.Adam):  # type: ignore[misc, name-defined]
        pass

    class Lion(torch.optim.Adagrad):  # type: ignore[misc, name-defined]
        pass

    def read(kind: Any, **more: Any) -> float:
        opt = kind([torch.zeros(1, requires_grad=True)], lr=1.0, weight_decay=0.1)
        return read_options(opt, {**opt.param_groups[0], **more})["weight_decay"]

    assert read(Own) == 0.0
    assert read(Own, decoupled_weight_decay=True) == 0.1
    assert read(torch.optim.Adagrad) == 0.0
    assert read(torch.optim.Adagrad, weight_decouple=True) == 0.1
    assert read(torch.optim.Adagrad, decouple_wd=True) == 0.1
    assert read(Lion) == 0.1
    assert read(Lion, weight_decouple=False) == 0.0


def test_a_sign_that_an_optimizer_has_for_all_its_groups_is_read() -> None:
    opt = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], lr=1.0)
    group = {key: value for key, value in opt.param_groups[0].items() if key != "maximize"}
    assert not read_options(opt, group)["maximize"]
    opt.maximize = True
    assert read_options(opt, group)["maximize"]


# --- pytorch_optimizer


def of_others() -> dict[str, Any]:
    """Return the optimizers of pytorch_optimizer by the names of their classes."""
    po = pytest.importorskip("pytorch_optimizer")
    kinds = [po.load_optimizer(name) for name in po.get_supported_optimizers()]
    return {kind.__name__: kind for kind in kinds}


def said_of_others() -> list[set[str]]:
    """Return what the page has for proportional, for refused and for not measured."""
    (table,) = re.findall(r"^\| `pytorch_optimizer` .*?\n\n", PAGE, re.M | re.S)
    rows = [row.split("|")[2] for row in table.strip().splitlines()[2:]]
    return [{name.strip() for name in row.split(",")} for row in rows]


def of_matrices(name: str) -> bool:
    """Say whether one is of the kind of Muon, whose groups say for which of them it is."""
    return name in ("AdaGO", "SpectralSphere") or "muon" in name.lower()


def made(kind: Any, params: list[Any]) -> Any:
    """Return one without decay."""
    taken = inspect.signature(kind.__init__).parameters
    options = {"weight_decay": 0.0} if "weight_decay" in taken else {}
    groups = [{"params": params, "use_muon": True}]
    return kind(groups if of_matrices(kind.__name__) else params, lr=LR, **options)


def tensors(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors(one)]
    known = isinstance(value, float | int | torch.Tensor)
    return [torch.as_tensor(value).to(torch.float64)] if known else []


def of_other(kind: Any, warm: int, lr: float) -> tuple[list[Any], list[Any]]:
    """Return a step with `lr` after some with `LR`, and the numbers of the state behind it."""
    params = params_of("Muon" if of_matrices(kind.__name__) else kind.__name__)
    torch.manual_seed(0)
    opt = made(kind, params)
    for t in range(warm + 1):
        before = [param.detach().clone() for param in params]
        for group in opt.param_groups if t == warm else ():
            group["lr"] = lr
        torch.manual_seed(t)
        stepped(opt, params, t)
    steps = [old - param.detach() for old, param in zip(before, params, strict=True)]
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in opt.param_groups]
    kept = [*groups, *(opt.state[param] for param in params)]
    return steps, [tensor for one in kept for value in one.values() for tensor in tensors(value)]


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_what_the_page_says_of_pytorch_optimizer_is_so() -> None:
    others, (linear, refused, apart) = of_others(), said_of_others()
    assert linear | refused | apart == others.keys()
    wrong = set()
    for name in sorted(linear | refused):
        pairs = []
        for warm in (0, 4, 12):
            (one, state), (two, other) = (of_other(others[name], warm, k * LR) for k in (1, 2))
            pairs += [(2 * x, y) for x, y in zip(one, two, strict=True)]
            pairs += zip(state, other, strict=True)
        far = [
            float((x - y).abs().max()) > ROUNDING * float(y.abs().max())
            for x, y in pairs
            if x.numel()
        ]
        if any(far) != (name in refused):
            wrong.add(name)
    assert wrong == set()


@pytest.mark.filterwarnings("ignore")
def test_those_of_pytorch_optimizer_that_are_not_are_refused_alone() -> None:
    others, (linear, refused, _) = of_others(), said_of_others()
    for name in sorted(linear | refused):
        opt = made(others[name], params_of("Muon" if of_matrices(name) else name))
        if name in linear:
            wrap(opt, meta=mo.AdamW(), compile=False)
            continue
        with pytest.raises(ValueError, match=f"those of {name} are not"):
            wrap(opt, meta=mo.AdamW(), compile=False)


@pytest.mark.parametrize("name", [n for n in DECOUPLED if n not in OF_TORCH and n != "Lion"])
@pytest.mark.filterwarnings("ignore")
def test_weight_decay_of_pytorch_optimizer_is_read_where_groups_do_not_say_it(name: str) -> None:
    kind, decay = of_others()[name], 0.25
    params, others = params_of(name), params_of(name)
    opt, plain = (kind(some, lr=LR, weight_decay=d) for some, d in ((params, decay), (others, 0.0)))
    for t in range(8):
        stepped(opt, params, t)
        for other, param in zip(others, params, strict=True):
            other.grad = param.grad.clone()
        with torch.no_grad():
            before = [other.clone() for other in others]
            plain.step()
            rests = name == "SOAP" and t == 0  # whose first step looks at the gradient alone
            for other, old in zip(others, before, strict=True):
                decayed = old if name in ("DASH", "FlashAdamW") else other.clone()
                other -= LR * decay * decayed * (not rests)
    for p, q in zip(params, others, strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-12
    assert read_options(opt, opt.param_groups[0])["weight_decay"] == decay


# --- optax

#: What transformations need beside a learning rate.
GIVEN: dict[str, Any] = {
    "noisy_sgd": {"key": 0},
    "polyak_sgd": {"f_min": 0.9999},
}
#: Gradients, state and values with which each is called.
EXTRA: dict[str, Any] = {"value": 1.0, "value_fn": float}


def makers(module: Any) -> dict[str, Any]:
    """Return the functions of a module of optax's that take a learning rate, by name."""
    return {
        name: make
        for name, make in vars(module).items()
        if isinstance(make, functools.partial | types.FunctionType)
        and not name.startswith(("_", "scale_by", "schedule_free_eval"))
        and {"learning_rate", "max_learning_rate"} & {*inspect.signature(make).parameters}
    }


OF_OPTAX = {name: make for name, make in makers(optax).items() if name in said("optax")}
OF_CONTRIB = {name: make for name, make in makers(contrib).items() if name in said("optax.contrib")}
#: They need a loss of several points or a key for each: their steps are those of what they wrap.
APART = {"dpsgd", "sophia", "schedule_free"}


def of_optax(make: Any, name: str, warm: int, lr: float) -> tuple[Any, Any]:
    """Return an update with `lr` after some with `LR`, and the state behind it."""
    rate = "max_learning_rate" if name == "polyak_sgd" else "learning_rate"

    def transformation(lr: float) -> Any:
        return optax.with_extra_args_support(make(**{rate: lr}, **GIVEN.get(name, {})))

    rng = np.random.default_rng(0)
    params = {"w": jax.numpy.asarray(rng.normal(size=(4, 3))), "b": jax.numpy.ones(3)}
    state = transformation(LR).init(params)
    updates = params
    for t in range(warm + 1):
        rng = np.random.default_rng(100 + t)
        grads = jax.tree.map(lambda w, rng=rng: rng.normal(size=w.shape) + 0.3 * w, params)
        tx = transformation(LR if t < warm else lr)
        updates, state = tx.update(grads, state, params, grad=grads, **EXTRA)
        params = optax.apply_updates(params, updates)
    return updates, state


def numbers(tree: Any) -> list[Any]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return [np.asarray(x) for x in leaves if jax.numpy.issubdtype(x.dtype, jax.numpy.number)]


@pytest.mark.parametrize(
    ("library", "name"),
    [("optax", name) for name in OF_OPTAX] + [("optax.contrib", name) for name in OF_CONTRIB],
)
@pytest.mark.filterwarnings("ignore:Specifying a key")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_page_says_of_optax_is_so(library: str, name: str) -> None:
    text = said(library)[name]
    make = {"optax": OF_OPTAX, "optax.contrib": OF_CONTRIB}[library][name]
    if name == "lbfgs":
        assert text.startswith("no")
        return
    with jax.enable_x64(True):
        linear = True
        for warm in (0, 4):
            (one, state), (two, other) = (of_optax(make, name, warm, k * LR) for k in (1, 2))
            pairs = [(2 * x, y) for x, y in zip(numbers(one), numbers(two), strict=True)]
            pairs += zip(numbers(state), numbers(other), strict=True)
            linear &= all(np.allclose(x, y, rtol=ROUNDING, atol=0.0) for x, y in pairs)
    assert linear == (not text.startswith("no"))


def test_the_page_has_every_transformation_of_optax_that_takes_a_learning_rate() -> None:
    assert said("optax").keys() == makers(optax).keys() - APART
    assert said("optax.contrib").keys() == makers(contrib).keys() - APART

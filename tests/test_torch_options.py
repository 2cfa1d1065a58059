"""What groups may hold: options, hyperparameters of rules, keys of the user's own; schedulers."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error  # noqa: E402
from metaopt_torch import MetaOptimizer, wrap  # noqa: E402
from torch.optim import Optimizer  # noqa: E402
from torch.optim import lr_scheduler as schedulers  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.rules.rule import in_role  # noqa: E402

OPTIONS: dict[str, Any] = {
    "base": mo.AdamW(),
    "meta": mo.Lion(),
    "step_size": 1e-2,
    "meta_lr": 1e-2,
    "compile": False,
    "discount": 1.0,
}


def model() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).double()


def trained(net: Any, opt: Any, steps: int, scheduler: Any = None) -> None:
    for t in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).double()
        opt.zero_grad()
        (net(x) - x.sum(dim=1, keepdim=True).sin()).square().mean().backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal_params(nets: Any, allowed: float = 1e-12) -> None:
    one, other = nets
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < allowed, name


# --- keys of the user's own


def round_trips(opt: MetaOptimizer, fresh: MetaOptimizer) -> list[MetaOptimizer]:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return [fresh, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]


def test_keys_of_the_users_own_stay_in_their_groups() -> None:
    net = model()
    own: dict[str, Any] = {"name": "head", "lr_scale": 0.5, "rho": 0.05, "sigma": 1.0}
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), **own}]
    opt = MetaOptimizer(groups, **OPTIONS)
    trained(net, opt, 2)
    opt.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "name": "late"})
    fresh = MetaOptimizer(
        [{"params": group["params"]} for group in copy.deepcopy(opt.param_groups)], **OPTIONS
    )
    for other in (opt, *round_trips(opt, fresh)):
        assert {key: other.param_groups[1][key] for key in own} == own
        assert [group.get("name") for group in other.param_groups] == [None, "head", "late"]


def test_layer_decay_by_a_scale_in_each_group() -> None:
    """Scripts that decay step sizes by layer keep a scale in the groups and apply it themselves."""
    nets = [model(), model()]
    groups = [
        {"params": nets[0][index].parameters(), "lr_scale": scale, "lr": scale}
        for index, scale in ((0, 0.25), (2, 1.0))
    ]
    opts = [
        MetaOptimizer(groups, **OPTIONS),
        MetaOptimizer(
            [
                {"params": nets[1][0].parameters(), "lr": 0.25},
                {"params": nets[1][2].parameters()},
            ],
            **OPTIONS,
        ),
    ]
    for t in range(4):
        for group, scale in zip(opts[1].param_groups, (0.25, 1.0), strict=True):
            group["lr"] = scale * 0.5**t
        for group in opts[0].param_groups:
            group["lr"] = group["lr_scale"] * 0.5**t
        for net, opt in zip(nets, opts, strict=True):
            trained(net, opt, 1)
    assert_equal_params(nets, allowed=1e-15)


def test_groups_are_found_by_name_and_their_tensors_replaced() -> None:
    """As scripts do that grow and prune a cloud of points."""
    tensors = {"xyz": torch.randn(5, 3), "opacity": torch.randn(5, 1)}
    groups = [
        {"params": [torch.nn.Parameter(value)], "lr": 1.0, "name": name, "block": name}
        for name, value in tensors.items()
    ]
    opt = MetaOptimizer(groups, **OPTIONS)
    for group in opt.param_groups:
        if group["name"] == "xyz":
            group["lr"] = 0.0
    before = [group["params"][0].detach().clone() for group in opt.param_groups]
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    opt.step()
    after = [group["params"][0].detach() for group in opt.param_groups]
    assert torch.equal(before[0], after[0])
    assert torch.all(before[1] > after[1])


class Sharpness(Optimizer):
    """Steps of another optimizer with gradients from where the loss is higher.

    Like sharpness-aware minimization in common use, it is an optimizer itself, whose groups hold
    its arguments and those of the other, and are handed over as they are.
    """

    def __init__(self, params: Any, base_optimizer: Any, rho: float, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, "adaptive": False, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        closure()
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        rho = self.param_groups[0]["rho"]
        moved = [param.grad * (rho / norm) for param in params]
        with torch.no_grad():
            torch._foreach_add_(params, moved)
        loss = closure()
        with torch.no_grad():
            torch._foreach_sub_(params, moved)
        self.base_optimizer.step()
        return loss


def test_a_wrapper_may_hand_its_own_groups_over() -> None:
    nets = [model(), model()]
    sam = Sharpness(nets[0].parameters(), MetaOptimizer, rho=0.05, **OPTIONS)
    plain = MetaOptimizer(nets[1].parameters(), **OPTIONS)
    for t in range(5):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).double()
        grads: list[Any] = []
        for net, opt in zip(nets, (sam, plain), strict=True):

            def closure(net: Any = net, opt: Any = opt, x: Any = x) -> Any:
                opt.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                return loss

            if opt is sam:
                sam.step(closure)
                grads = [param.grad.clone() for param in net.parameters()]
            else:
                for param, grad in zip(net.parameters(), grads, strict=True):
                    param.grad = grad
                plain.step()
    assert_equal_params(nets, allowed=1e-15)
    assert sam.param_groups[0]["rho"] == 0.05
    torch.save(sam.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["rho"] == 0.05


REFUSED = {
    "stepsize": "unknown option 'stepsize'; is it `step_size`",
    "weight_decey": "unknown option 'weight_decey'; is it `weight_decay`",
    "bound": "unknown option 'bound'; is it `bounds`",
    "meta_rl": "unknown option 'meta_rl'; is it `meta_lr`",
    "meta_lr": "`meta_lr` 0.5, which all groups have in common; give it to the optimizer",
    "discount": "`discount` 0.5, which all groups have in common",
    "beta": "'beta', a name of this optimizer's state",
    "made_with": "'made_with', a name of this optimizer's state",
}


@pytest.mark.parametrize("value", ["yes", "default", 2, [True]])
def test_compile_is_a_choice_between_three(value: Any) -> None:
    with pytest.raises(TypeError, match="`compile` must be True, False or None; got"):
        MetaOptimizer([torch.zeros(2, requires_grad=True)], compile=value)
    inner = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    with pytest.raises(TypeError, match="`compile` must be True, False or None; got"):
        wrap(inner, compile=value)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_are_refused(key: str) -> None:
    param = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=REFUSED[key]):
        MetaOptimizer([{"params": [param], key: 0.5}], **OPTIONS)
    opt = MetaOptimizer([torch.zeros(2, requires_grad=True)], **OPTIONS)
    with pytest.raises(ValueError, match=REFUSED[key]):
        opt.add_param_group({"params": [param], key: 0.5})
    assert len(opt.param_groups) == 1


def test_patterns_have_to_fit_the_parameters_that_no_group_takes() -> None:
    groups = [
        {"params": [("a", torch.zeros(2))], "block": "own"},
        {"params": [("b", torch.zeros(2))]},
    ]
    with pytest.raises(ValueError, match="'a'"):
        MetaOptimizer(groups, **OPTIONS, blocks={"first": "b", "second": "a"})


def test_names_that_look_like_patterns_are_names() -> None:
    first = {"params": [("w[0]", torch.zeros(2))], "block": "one", "betas": (0.5, 0.9)}
    opt = MetaOptimizer([first, {"params": [("w0", torch.zeros(2))], "block": "two"}], **OPTIONS)
    assert list(opt.step_sizes()) == ["one", "two"]


@pytest.mark.parametrize("curvature", ["none", "diagonal"])
def test_a_multiplier_may_be_a_tensor(curvature: str) -> None:
    """Of shape () or (1,); 0 freezes traces, whatever the discount, as the number does."""
    options = OPTIONS | {"meta": mo.SGD()}
    params = [torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    opts = [
        MetaOptimizer([param], **(options | {"discount": 0.5}), curvature=curvature)
        for param in params
    ]
    diagonal = {"0": torch.ones(3)} if curvature == "diagonal" else None
    for lr in (1.0, 0.5, 0.0, 0.0, 1.0):
        for param, opt, shape in zip(params, opts, (None, (), (1,)), strict=True):
            opt.param_groups[0]["lr"] = lr if shape is None else torch.full(shape, lr)
            param.grad = param.detach().clone()
            opt.step(hessian_diagonal=diagonal)
    states = [opt.core_state() for opt in opts]
    for param, state in zip(params, states, strict=True):
        torch.testing.assert_close(param, params[0], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(state.beta, states[0].beta, rtol=1e-12, atol=0.0)
        assert state.meta_count.tolist() == [3]


# --- hyperparameters of the rules


def two_groups(net: Any, **own: Any) -> Any:
    named = list(net.named_parameters())
    return [{"params": named[:2], **own}, {"params": named[2:]}]


HYPERPARAMETERS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "betas": (mo.AdamW(), {"betas": (0.5, 0.9)}, mo.AdamW(betas=(0.5, 0.9))),
    "eps": (mo.AdamW(), {"eps": 0.1}, mo.AdamW(eps=0.1)),
    "momentum": (mo.SGD(momentum=0.9), {"momentum": 0.5}, mo.SGD(momentum=0.5)),
    "beta2": (
        mo.RMSprop(),
        {"beta2": 0.9, "weight_decay": 0.1},
        mo.RMSprop(beta2=0.9, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("extra", [{}, {"blocks": "weight"}], ids=["passes", "core"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_groups_have_hyperparameters_of_their_own(name: str, extra: dict[str, Any]) -> None:
    rule, own, other = HYPERPARAMETERS[name]
    nets = [model(), model()]
    given = two_groups(nets[0], **own)
    opts = [
        MetaOptimizer(given, **(OPTIONS | {"base": rule} | extra)),
        MetaOptimizer(
            nets[1].named_parameters(), **(OPTIONS | {"base": {"0.*": other, "*": rule}} | extra)
        ),
    ]
    for net, opt in zip(nets, opts, strict=True):
        trained(net, opt, 5)
    assert_equal_params(nets)
    for group, expected in zip(opts[0].param_groups, (other, rule), strict=True):
        for field in own:
            assert group[field] == getattr(in_role(expected, "base"), field)


def test_hyperparameters_may_change_in_mid_training() -> None:
    """Torch's AdamW does the same with the same betas."""
    nets = [model(), model()]
    opts: list[Any] = [
        torch.optim.AdamW(nets[0].parameters(), lr=1e-2, weight_decay=0.0),
        MetaOptimizer(nets[1].parameters(), **(OPTIONS | {"meta_lr": 0.0})),
    ]
    for t in range(6):
        for net, opt in zip(nets, opts, strict=True):
            opt.param_groups[0]["betas"] = (0.9 - 0.1 * t, 0.999)
            opt.param_groups[0]["eps"] = 10.0**-t
            trained(net, opt, 1)
    assert_equal_params(nets)


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_decay_with_a_step_size_of_its_own_is_torchs_whatever_the_step_size(size: float) -> None:
    """Under a schedule too: its product of lr and decay is what counts."""
    nets = [model(), model()]
    rule = mo.AdamW(weight_decay=0.3, decay_step_size=1e-2)
    options = OPTIONS | {"base": rule, "meta_lr": 0.0, "step_size": size}
    opts: list[Any] = [
        torch.optim.AdamW(nets[0].parameters(), lr=size, weight_decay=0.3 * 1e-2 / size),
        MetaOptimizer(nets[1].parameters(), **options),
    ]
    for net, opt in zip(nets, opts, strict=True):
        trained(net, opt, 4, schedulers.LambdaLR(opt, [0.5, 1.0, 0.0, 0.25, 1.0].__getitem__))
    assert_equal_params(nets)


def test_decay_apart_takes_the_groups_word_for_each_of_its_numbers() -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "weight_decay": 0.0},
        {"params": params[2:], "decay_step_size": 0.25, "lr": 0.5},
    ]
    rule = mo.SGD(weight_decay=0.5, decay_step_size=0.5)
    opt = MetaOptimizer(groups, **(OPTIONS | {"base": rule, "meta": mo.SGD()}))
    for param in params:
        param.grad = torch.zeros(2)
    opt.step()
    assert [float(param.detach()[0]) for param in params] == [0.75, 1.0, 1.0 - 0.5 * 0.25 * 0.5]


WRONG: dict[str, tuple[Any, str]] = {
    "betas": ((0.9, 1.5), r"`betas\[1\]` must lie in \[0, 1\); got 1.5"),
    "eps": (-1.0, "`eps` must be finite and not negative; got -1.0"),
    "momentum": (0.0, "`momentum` of a group cannot be 0.0"),
}


@pytest.mark.parametrize("curvature", ["none", "diagonal"])
@pytest.mark.parametrize("name", WRONG)
def test_hyperparameters_that_cannot_be_are_refused(name: str, curvature: str) -> None:
    value, message = WRONG[name]
    base = mo.SGD(momentum=0.9) if name == "momentum" else mo.AdamW()
    options = OPTIONS | {"base": base, "curvature": curvature}
    param = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        MetaOptimizer([{"params": [param], name: value}], **options)
    opt = MetaOptimizer([param], **options)
    opt.param_groups[0][name] = value
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        opt.step(hessian_diagonal={"0": torch.ones(2)})
    assert torch.equal(param.detach(), torch.ones(2))


def test_betas_may_be_a_list() -> None:
    """As files of options have them."""
    nets = model(), model()
    opts = [MetaOptimizer(net.parameters(), **OPTIONS) for net in nets]
    opts[0].param_groups[0]["betas"] = [0.8, 0.99]
    opts[1].param_groups[0]["betas"] = (0.8, 0.99)
    for net, opt in zip(nets, opts, strict=True):
        trained(net, opt, 3)
    assert_equal_params(nets, allowed=1e-15)


def test_a_rule_without_momentum_cannot_be_given_some() -> None:
    param = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"`momentum` of a group cannot be 0\.9"):
        MetaOptimizer([{"params": [param], "momentum": 0.9}], **(OPTIONS | {"base": mo.SGD()}))


# --- weight decay


def test_groups_hold_the_weight_decay_that_their_parameters_have() -> None:
    net = model()
    opt = MetaOptimizer(
        two_groups(net),
        **(OPTIONS | {"base": {"0.*": mo.SGD(), "2.*": mo.AdamW(weight_decay=0.1)}}),
    )
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
    opt = MetaOptimizer(net.parameters(), **(OPTIONS | {"base": mo.AdamW(weight_decay=0.2)}))
    assert opt.defaults["weight_decay"] == opt.param_groups[0]["weight_decay"] == 0.2
    mixed = {"*weight": mo.AdamW(weight_decay=0.1), "*": mo.AdamW()}
    opt = MetaOptimizer(net.named_parameters(), **(OPTIONS | {"base": mixed}))
    assert opt.param_groups[0]["weight_decay"] is None  # they differ


def test_what_a_group_says_of_weight_decay_counts_and_a_rules_that_is_none_is_told() -> None:
    """What the Trainer of transformers makes of a model and a rule."""
    options = OPTIONS | {"base": mo.AdamW(weight_decay=0.1)}
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    message = r"weight decay 0.1 of `base` .* their own, 0.01, 0.0"
    with pytest.warns(UserWarning, match=message) as warned:
        opt = MetaOptimizer(
            [
                {"params": params[:1], "weight_decay": 0.01},
                {"params": params[1:], "weight_decay": 0.0},
            ],
            **options,
        )
    assert len(warned) == 1
    config: Any = opt.config
    assert [config.base[name].weight_decay for name in ("0", "1")] == [0.01, 0.0]
    with pytest.warns(UserWarning, match=r"weight decay 0.1 of the optimizer is that of no"):
        MetaOptimizer([{"params": params, "weight_decay": 0.0}], weight_decay=0.1, **OPTIONS)


def test_a_group_without_weight_decay_beside_others_is_not_worth_a_word() -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    opt = MetaOptimizer(groups, **(OPTIONS | {"base": mo.AdamW(weight_decay=0.1)}))
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    MetaOptimizer(params, weight_decay=0.0, **(OPTIONS | {"base": mo.AdamW(weight_decay=0.1)}))


# --- schedulers

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 0.9**t),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda _: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 3),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, total_iters=3),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, end_factor=0.0, total_iters=8),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.9),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt,
        [schedulers.LinearLR(opt, 0.1, total_iters=3), schedulers.CosineAnnealingLR(opt, 6)],
        milestones=[3],
    ),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 8),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt), schedulers.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.1, 1.0, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 1.0, total_steps=10),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 8, 2.0),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.1, anneal_epochs=4),
}


def test_no_scheduler_of_torchs_is_forgotten() -> None:
    found = {
        name
        for name, value in vars(schedulers).items()
        if inspect.isclass(value)
        and issubclass(value, schedulers.LRScheduler)
        and not name.startswith("_")
    }
    assert found - {"LRScheduler"} <= {*SCHEDULERS}


@pytest.mark.parametrize("base", ["AdamW", "SGD"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_does_what_it_does_to_torchs_own(name: str, base: str) -> None:
    """With their defaults, momentum and betas that cycle among them; `lr` is a multiplier."""
    nets = [model(), model()]
    if base == "AdamW":
        theirs: Any = torch.optim.AdamW(nets[0].parameters(), lr=1.0, weight_decay=0.0)
        rule: Any = mo.AdamW()
    else:
        theirs = torch.optim.SGD(nets[0].parameters(), lr=1.0, momentum=0.9)
        rule = mo.SGD(momentum=0.9)
        # their momentum begins with the first gradient and sums them, ours averages them
        for param in nets[0].parameters():
            theirs.state[param]["momentum_buffer"] = torch.zeros_like(param)
    ours = MetaOptimizer(nets[1].parameters(), **(OPTIONS | {"base": rule, "meta_lr": 0.0}))
    both = [SCHEDULERS[name](opt) for opt in (theirs, ours)]
    for _ in range(9):
        group = theirs.param_groups[0]
        scheduled, group["lr"] = group["lr"], group["lr"] * 1e-2
        if base == "SGD":
            group["dampening"] = group["momentum"]
        trained(nets[0], theirs, 1)
        group["lr"] = scheduled
        trained(nets[1], ours, 1)
        for scheduler in both:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert ours.param_groups[0]["lr"] == pytest.approx(group["lr"], abs=1e-12)
    assert_equal_params(nets)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_schedule_that_ends_below_0_by_rounding_ends_at_0(tensor: bool) -> None:
    ends = set()
    for steps in (3, 5, 7, 10, 11, 13, 49, 100):
        param = torch.ones(2, dtype=torch.float64, requires_grad=True)
        lr: Any = torch.tensor(1.0, dtype=torch.float64) if tensor else 1.0
        opt = MetaOptimizer([param], lr=lr, **OPTIONS)
        linear = schedulers.LinearLR(opt, end_factor=0.0, total_iters=steps)
        for _ in range(steps):
            param.grad = torch.ones(2, dtype=torch.float64)
            opt.step()
            linear.step()
        ends.add(float(opt.param_groups[0]["lr"]) < 0.0)
        before = param.detach().clone(), opt.core_state()
        opt.step()
        assert torch.equal(param.detach(), before[0])
        assert torch.equal(opt.core_state().average["0"], before[1].average["0"])
    assert True in ends  # the input is what it is made for


@pytest.mark.parametrize("make", [float, torch.tensor])
@pytest.mark.parametrize("lr", [-1e-3, float("nan"), float("inf")])
def test_a_multiplier_that_is_none_is_told_as_number_and_as_tensor(lr: float, make: Any) -> None:
    param = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="`lr` must be a finite number and at least 0"):
        MetaOptimizer([param], lr=make(lr), **OPTIONS)
    opt = MetaOptimizer([param], **OPTIONS)
    opt.param_groups[0]["lr"] = make(lr)
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="`lr` must be a finite number and at least 0"):
        opt.step()
    assert torch.equal(param.detach(), torch.ones(2))


# --- monitors and trainers


@pytest.mark.filterwarnings("ignore")  # of the framework, about itself
def test_lightning_logs_what_groups_hold(tmp_path: Any) -> None:
    lightning: Any = pytest.importorskip("lightning")
    monitor = lightning.pytorch.callbacks.LearningRateMonitor(
        logging_interval="step", log_momentum=True, log_weight_decay=True
    )

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            named = list(self.net.named_parameters())
            groups = [
                {"params": named[:1], "name": "weight"},
                {"params": named[1:], "name": "bias", "weight_decay": 0.0},
            ]
            opt = MetaOptimizer(groups, **(OPTIONS | {"base": mo.AdamW(weight_decay=0.1)}))
            return [opt], [schedulers.OneCycleLR(opt, 1.0, total_steps=4)]

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    assert monitor.last_weight_decay_values == {
        "lr-MetaOptimizer/weight-weight_decay": 0.1,
        "lr-MetaOptimizer/bias-weight_decay": 0.0,
    }
    assert monitor.last_momentum_values["lr-MetaOptimizer/weight-momentum"] == 0.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_the_groups_of_transformers_trainer_say_the_weight_decay(
    weight_decay: float, tmp_path: Any
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), weight_decay=weight_decay, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(
        model=torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)),
        args=args,
        optimizer_cls_and_kwargs=(
            MetaOptimizer,
            OPTIONS | {"base": mo.AdamW(weight_decay=0.1)},
        ),
    )
    with pytest.warns(UserWarning, match=r"TrainingArguments\(weight_decay=\.\.\.\)"):
        opt = trainer.create_optimizer()
    config: Any = opt.config
    rules = config.base.values() if isinstance(config.base, dict) else [config.base]
    assert {rule.weight_decay for rule in rules} == {weight_decay, 0.0}
    assert {group["weight_decay"] for group in opt.param_groups} == {weight_decay, 0.0}


def test_a_group_cannot_have_a_step_size_for_decay_that_its_rule_does_not_know() -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(3))], "decay_step_size": 1.0}
    with pytest.raises(ValueError, match=r"`decay_step_size` of a group is 1\.0"):
        MetaOptimizer([group], base=mo.SGD(weight_decay=0.5), compile=False)
    param = torch.nn.Parameter(torch.ones(3))
    opt = MetaOptimizer([param], base=mo.SGD(weight_decay=0.5), compile=False)
    param.grad = torch.ones(3)
    opt.param_groups[0]["decay_step_size"] = 1.0
    for call in (opt.step, opt.diagnostics):
        with pytest.raises(ValueError, match=r"`decay_step_size` of a group is 1\.0"):
            call()
    assert param.tolist() == [1.0] * 3
    del opt.param_groups[0]["decay_step_size"]
    opt.step()


@pytest.mark.parametrize("bounds", [(1.0,), 3, "ab", (1.0, 2.0, 3.0), (2.0, 1.0)])
def test_bounds_of_a_group_are_checked_whenever_they_come(bounds: Any) -> None:
    one, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = MetaOptimizer([one], blocks="tensor", compile=False)
    with pytest.raises(ValueError, match=r"`bounds.*` must"):
        MetaOptimizer([{"params": [other], "bounds": bounds}], compile=False)
    with pytest.raises(ValueError, match=r"`bounds.*` must"):
        opt.add_param_group({"params": [other], "bounds": bounds})
    opt.param_groups[0]["bounds"] = bounds
    with pytest.raises(ValueError, match=r"`bounds.*` must"):
        opt.step()

"""Trainers make the optimizer of strings, numbers and mappings, and hand it their learning rate."""

import ast
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_torch import MetaOptimizer, from_config, wrap  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.trainers import (  # noqa: E402
    ABOUT_THEMSELVES,
    QUIET,
    lightning_module,
    network,
    transformers_trainer,
)

#: What a file may say, and what it means.
PLAIN: dict[str, Any] = {
    "base": {"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.1},
    "meta": {"name": "fast_start", "rule": "adam"},
    "step_size": 1e-3,
    "discount": [0.9, 1.0],
    "compile": False,
}
MEANT = mo.MetaOptimize(
    base=mo.AdamW(betas=(0.9, 0.99), weight_decay=0.1),
    meta=mo.FastStart(mo.AdamW()),
    step_size=1e-3,
    discount=(0.9, 1.0),
)

pytestmark = ABOUT_THEMSELVES


def made(net: Any = None, **options: Any) -> MetaOptimizer:
    net = network() if net is None else net
    return MetaOptimizer(net.named_parameters(), **({"compile": False} | options))


def stepped(opt: Any, net: Any) -> None:
    """Make a step, to see that the optimizer can."""
    opt.zero_grad()
    net(torch.ones(4, 3)).square().mean().backward()
    opt.step()


def is_meant(opt: Any) -> bool:
    """Say whether an optimizer has the configuration that `PLAIN` stands for."""
    return opt.config.base == MEANT.base and all(
        getattr(opt.config, name) == getattr(MEANT, name)
        for name in ("meta", "step_size", "discount")
    )


# --- plain values


def test_plain_values_stand_for_rules() -> None:
    assert is_meant(made(**PLAIN))
    assert is_meant(made(**json.loads(json.dumps(PLAIN))))


def test_a_wrapper_takes_the_name_of_its_meta_update() -> None:
    net = network()
    opt = wrap(torch.optim.AdamW(net.parameters(), lr=1.0), meta="adam", compile=False)
    assert opt.config.meta == mo.MetaOptimize(meta=mo.AdamW()).meta


def test_arguments_by_the_path_of_the_class_and_literals() -> None:
    """As kohya's trainers write them: `--optimizer_type` and `--optimizer_args`."""
    path, words = (
        "metaopt_torch.MetaOptimizer",
        [
            "base={'name': 'adamw', 'betas': (0.9, 0.99), 'weight_decay': 0.1}",
            "meta={'name': 'fast_start', 'rule': 'adam'}",
            "step_size=1e-3",
            "discount=[0.9, 1.0]",
            "compile=False",
        ],
    )
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    options = {key: ast.literal_eval(value) for key, value in (word.split("=") for word in words)}
    net = network()
    groups = [{"params": list(net.parameters()), "lr": 1.0}]
    opt = cls(groups, lr=1.0, **options)
    assert is_meant(opt)
    stepped(opt, net)


def test_hydra_instantiates() -> None:
    hydra = pytest.importorskip("hydra.utils")
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"_target_": "metaopt_torch.MetaOptimizer", **PLAIN})
    net = network()
    opt = hydra.instantiate(config, params=list(net.parameters()))
    assert is_meant(opt)
    stepped(opt, net)
    nested = {"_target_": "metaopt.AdamW", "betas": [0.9, 0.99], "weight_decay": 0.1}
    config.base = nested
    assert is_meant(hydra.instantiate(config, params=list(net.parameters())))


def test_the_command_line_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    pytest.importorskip("lightning.pytorch")
    cli = pytest.importorskip("lightning.pytorch.cli")
    monkeypatch.chdir(tmp_path)

    config = {
        "optimizer": {"class_path": "metaopt_torch.MetaOptimizer", "init_args": PLAIN},
        "trainer": {"max_epochs": 1, "logger": False, **QUIET},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    model = lightning_module(examples=8)
    found = cli.LightningCLI(model, args=["fit", "--config", "run.yaml"])
    assert is_meant(found.trainer.optimizers[0])


def test_the_registry_of_timm() -> None:
    try:
        optim = importlib.import_module("timm.optim")
    except (ImportError, RuntimeError) as error:  # torchvision of another torch
        pytest.skip(f"timm cannot be imported: {error}")
    registry = optim.OptimizerRegistry()
    registry.register(optim.OptimInfo(name="metaopt", opt_class=MetaOptimizer, has_eps=False))
    net = network()
    options = PLAIN | {"base": "adamw"}  # timm says the decay of each group
    opt = registry.create_optimizer(net, opt="metaopt", weight_decay=0.1, **options)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
    assert opt.config.meta == MEANT.meta
    stepped(opt, net)
    with lr_warning():  # what its training script passes
        registry.create_optimizer(net, opt="metaopt", lr=1e-3, **options)


def test_the_container_of_torchtitan() -> None:
    path = "torchtitan.components.optimizer.optimizer"
    module = pytest.importorskip(path, exc_type=ImportError)

    class Container(module.OptimizersContainer):  # type: ignore[misc, name-defined]
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            return {"MetaOptimizer": MetaOptimizer}[name]

    net = network()
    config = module.OptimizersContainer.Config(
        param_groups=[
            module.ParamGroupConfig(
                pattern=".*", optimizer_name="MetaOptimizer", optimizer_kwargs={"lr": 1.0}
            )
        ],
        implementation="for-loop",
        optimizer_factory_kwargs_by_name={"MetaOptimizer": PLAIN},
    )
    container = Container(config, model_parts=[net])
    assert is_meant(container.optimizers[0])
    stepped(container, net)
    container.load_state_dict(container.state_dict())
    stepped(container, net)


def test_the_trainer_of_transformers_by_class_and_options(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {"max_steps": 2, "warmup_steps": 1, "weight_decay": 0.1}
    trainer = transformers_trainer(tmp_path, (MetaOptimizer, PLAIN), **options)
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert opt.config.meta == MEANT.meta
    assert opt.config.discount == MEANT.discount


# --- the learning rate


def lr_warning() -> Any:
    return pytest.warns(UserWarning, match="multiplies the learned step sizes.*`step_size=0.001`")


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3, dtype=torch.float64)], ids=["n", "tensor"])
def test_a_learning_rate_of_a_trainer_warns_and_says_what_to_write(lr: Any) -> None:
    with lr_warning() as found:
        made(lr=lr)
    assert [Path(one.filename).name for one in found] == [Path(__file__).name]
    net = network()
    with lr_warning():
        MetaOptimizer([{"params": list(net.parameters()), "lr": lr}], compile=False)
    with lr_warning():
        wrap(torch.optim.AdamW(net.parameters(), lr=1e-3), compile=False)


def test_a_multiplier_among_larger_ones_is_one() -> None:
    net = network()
    groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.01}]
    MetaOptimizer(groups, compile=False)
    made(lr=0.1)
    made(lr=0.0)  # frozen


@pytest.mark.parametrize("kind", ["LinearLR", "OneCycleLR", "LambdaLR", "loaded", "added"])
def test_multipliers_of_schedules_may_be_small(kind: str) -> None:
    net = network()
    opt = made(net)
    schedulers = torch.optim.lr_scheduler
    if kind == "LinearLR":
        schedulers.LinearLR(opt, start_factor=1e-4)
    elif kind == "OneCycleLR":
        schedulers.OneCycleLR(opt, max_lr=1.0, total_steps=10, div_factor=1e4)
    elif kind == "LambdaLR":
        schedulers.LambdaLR(opt, lambda step: 1e-3 * (1 + step))
    else:
        opt.param_groups[0]["lr"] = 1e-3
    if kind == "loaded":
        other = made(network())
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0]["lr"] == 1e-3
    if kind == "added":
        more = torch.nn.Parameter(torch.ones(2))
        opt.add_param_group({"params": [("more", more)], "lr": 1e-3})
    assert 0.0 < opt.param_groups[0]["lr"] < 0.1
    stepped(opt, net)


def test_one_cycle_multiplies_what_is_learned() -> None:
    net = network()
    opt = made(net, base="adamw", meta_lr=0.0, step_size=0.5)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=2.0, total_steps=10)
    seen = []
    for _ in range(9):
        stepped(opt, net)
        cycle.step()
        (group,) = opt.effective_lr()
        seen.append(float(group["all"]))
        assert seen[-1] == pytest.approx(0.5 * opt.param_groups[0]["lr"])
    assert max(seen) == pytest.approx(1.0)


def test_the_effective_lr_of_groups_and_blocks() -> None:
    net = torch.nn.Sequential(network(), network())
    first, second = (list(part.named_parameters()) for part in net)
    groups = [
        {"params": [(f"0.{n}", p) for n, p in first], "lr": 0.5},
        {"params": [(f"1.{n}", p) for n, p in second], "lr": torch.tensor(0.25)},
    ]
    opt = MetaOptimizer(groups, step_size=0.5, blocks={"b": "*.bias", "w": "*"}, compile=False)
    found = [{key: float(lr) for key, lr in group.items()} for group in opt.effective_lr()]
    assert found == [{"w": 0.25, "b": 0.25}, {"w": 0.125, "b": 0.125}]
    assert opt.effective_lr()[0]["w"].dtype == opt.step_sizes()["w"].dtype


def test_the_effective_lr_of_weights_and_of_none() -> None:
    net = network()
    opt = made(net, blocks="weight", step_size=0.5, lr=0.5)
    (found,) = opt.effective_lr()
    assert [*found] == ["weight", "bias"]
    assert found["weight"].tolist() == [[0.25] * 3]
    assert MetaOptimizer([{"params": []}]).effective_lr() == [{}]


def test_the_effective_lr_of_a_wrapper() -> None:
    opt = wrap(torch.optim.AdamW(network().parameters(), lr=0.5), step_size=0.5, compile=False)
    assert [float(group["all"]) for group in opt.effective_lr()] == [0.25]


# --- presets, and what groups cannot say


@pytest.mark.parametrize(
    "config",
    [
        mo.presets.paper("adamw", "adam", "tinystories"),
        mo.presets.hypergradient(mo.SGD(), multiplicative=True),
        mo.MetaOptimize(
            blocks="tensor", bounds=(1e-6, 1.0), step_size={"weight": 0.1, "bias": 0.2}
        ),
    ],
    ids=["paper", "hypergradient", "own"],
)
def test_a_configuration_of_the_core_goes_in(config: mo.MetaOptimize) -> None:
    net = network()
    opt = from_config(config, net.named_parameters(), compile=False)
    assert opt._given == config
    stepped(opt, net)


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="`config` must be a metaopt"):
        from_config({"base": "adamw"}, network().parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["meta_lr", "discount"])
def test_numbers_of_the_whole_optimizer_are_no_groups(name: str) -> None:
    net = network()
    opt = made(net)
    before = net.weight.clone()
    opt.param_groups[0][name] = 0.5
    with pytest.raises(ValueError, match=f"`{name}` is the whole optimizer's.*got 0.5"):
        stepped(opt, net)
    assert torch.equal(net.weight, before)
    with pytest.raises(ValueError, match=f"`{name}` 0.5, which all groups have in common"):
        MetaOptimizer([{"params": [*net.parameters()], name: 0.5}])


def test_another_meta_lr_goes_on_from_a_state_dict() -> None:
    net = network()
    opt = made(net)
    stepped(opt, net)
    other = made(net, meta_lr=1e-3)
    other.load_state_dict(opt.state_dict())
    assert other.config.meta_lr == 1e-3
    assert other.step_sizes() == opt.step_sizes()
    stepped(other, net)


def test_no_warning_is_made_in_vain() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()

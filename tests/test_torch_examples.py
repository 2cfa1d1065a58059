"""Every example runs, and trains as a plain loop does."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "torch"
STEPS = 20
#: Float32 runs whose sums may be taken in another order.
ALLOWED = rounding("float32", operations=60, steps=STEPS)

pytestmark = [
    # of the frameworks, about themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::ImportWarning"),
]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not compile: what is compared here is who calls what."""
    plain = MetaOptimizer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **({"compile": False} | kwargs))

    monkeypatch.setattr(MetaOptimizer, "__init__", init)


def example(name: str, *needs: str) -> Any:
    """Return an example as a module, or skip where it needs what is not installed."""
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def plain_run(net: Any, batches: Any, *, cosine: bool, **options: Any) -> MetaOptimizer:
    """Train by a loop of the barest kind."""
    opt = MetaOptimizer(net.named_parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS) if cosine else None
    for x, y in batches:
        opt.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        opt.step()
        if schedule is not None:
            schedule.step()
    return opt


def same(got: Any, got_sizes: Any, want: Any, want_sizes: Any) -> None:
    for (name, a), b in zip(got.items(), want.values(), strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < ALLOWED, name
    assert [*got_sizes] == [*want_sizes]
    for name, size in want_sizes.items():
        assert relative_error(float(got_sizes[name]), float(size)) < ALLOWED, name


def in_order(steps: int) -> Any:
    """Yield the batches that the examples with a data set take."""
    x = torch.randn(64 * steps, 8, generator=torch.Generator().manual_seed(1))
    for part in x.split(64):
        yield part, torch.sin(part[:, :1]) + part[:, 1:2]


ADVISED: dict[str, Any] = {"base": mo.AdamW()}


def test_the_plain_loop_learns_from_step_sizes_that_are_too_small(capsys: Any) -> None:
    module = example("plain_loop")
    net, opt = module.main()
    assert max(float(size) for size in opt.step_sizes().values()) > 1e-4
    x, y = next(module.batches(1))
    with torch.no_grad():
        assert float((net(x) - y).square().mean()) < 0.5 * float(y.var())
    assert "step sizes: 0.weight" in capsys.readouterr().out


def test_step_sizes_are_logged_to_tensorboard(tmp_path: Any) -> None:
    module = example("tensorboard_logging", "tensorboard")
    _, opt = module.main(STEPS, str(tmp_path))
    events = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    log = events(str(tmp_path))
    log.Reload()
    for name, size in opt.step_sizes().items():
        scalars = log.Scalars(f"step_size/{name}")
        assert [entry.step for entry in scalars] == [9, 19]
        assert scalars[-1].value == pytest.approx(float(size), rel=1e-6)


def test_lightning_trains_as_a_plain_loop(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    module = example("lightning_module", "lightning")
    net, opt = module.main(STEPS)
    twin = network()
    twin_opt = plain_run(twin, in_order(STEPS), cosine=True, **ADVISED)
    same(net.state_dict(), opt.step_sizes(), twin.state_dict(), twin_opt.step_sizes())
    assert "<svg" in (tmp_path / "lightning_run.html").read_text(encoding="utf-8")


def test_accelerate_trains_as_a_plain_loop() -> None:
    module = example("accelerate_loop", "accelerate")
    net, opt = module.main(STEPS)
    twin = network()
    twin_opt = plain_run(twin, in_order(STEPS), cosine=True, **ADVISED)
    same(net.state_dict(), opt.step_sizes(), twin.state_dict(), twin_opt.step_sizes())


def test_the_trainer_of_transformers_trains_as_a_plain_loop() -> None:
    module = example("trainer", "transformers", "accelerate")
    net, opt, logs = module.main(STEPS)
    twin = network()
    twin_opt = plain_run(twin, in_order(STEPS), cosine=True, **ADVISED)
    same(net.state_dict(), opt.step_sizes(), twin.state_dict(), twin_opt.step_sizes())
    assert any("effective_lr/all" in entry for entry in logs)


def launched(script: Path, ranks: int, *words: str | Path) -> Any:
    """Run a script with torchrun and return what its first rank wrote to the last of `words`."""
    paths = [ROOT, ROOT / "backends"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, "--standalone", str(script), *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(words[-1], weights_only=True)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp_trains_as_one_process(ranks: int, tmp_path: Any) -> None:
    found = launched(EXAMPLES / "fsdp.py", ranks, tmp_path / "out.pt")
    module = example("fsdp")
    twin = module.model()
    options: dict[str, Any] = {"blocks": "tensor"}
    batches = (module.batch(step) for step in range(100))
    twin_opt = plain_run(twin, batches, cosine=False, **(ADVISED | options))
    same(found["net"], found["step sizes"], twin.state_dict(), twin_opt.step_sizes())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_accelerate_trains_as_one_process_on_several_ranks(ranks: int, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    found = launched(EXAMPLES / "accelerate_loop.py", ranks, tmp_path / "out.pt")
    module = example("accelerate_loop")
    twin = module.model()
    opt = MetaOptimizer(twin.named_parameters(), **ADVISED)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=300 * ranks)
    for x, y in in_order(300):
        opt.zero_grad()
        torch.nn.functional.mse_loss(twin(x), y).backward()
        opt.step()
        for _ in range(ranks):
            schedule.step()
    same(found["net"], found["step sizes"], twin.state_dict(), opt.step_sizes())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_accelerate_under_fsdp2_trains_as_one_process(tmp_path: Any) -> None:
    """Accelerate puts the shards of the parameters in the place of those that it was given."""
    pytest.importorskip("accelerate")
    found = launched(EXAMPLES / "accelerate_fsdp.py", 2, tmp_path / "out.pt")
    module = example("accelerate_fsdp")
    twin = module.model()
    batches = [module.batch(step) for step in range(50)]
    options: dict[str, Any] = {"blocks": "tensor"}
    twin_opt = plain_run(twin, batches, cosine=False, **(ADVISED | options))
    same(found["net"], found["step sizes"], twin.state_dict(), twin_opt.step_sizes())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_the_trainer_under_fsdp2_trains_as_one_process(tmp_path: Any) -> None:
    """It makes its optimizer before the model is sharded."""
    module = example("trainer", "transformers", "accelerate")
    script = ROOT / "tests" / "torch_trainer.py"
    found = launched(script, 2, EXAMPLES / "trainer.py", tmp_path / "out.pt")
    twin = module.Regression()
    twin_opt = plain_run(twin.net, in_order(STEPS), cosine=False, **ADVISED)
    same(found["net"], found["step sizes"], twin.state_dict(), twin_opt.step_sizes())


@pytest.mark.parametrize("how", ["kahan", "stochastic"])
def test_bfloat16_weights_learn(how: str, capsys: Any) -> None:
    example("bfloat16").main(800, how)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("hvp", ["autograd", "central"])
def test_curvature_learns(hvp: str, capsys: Any) -> None:
    example("curvature").main(301, hvp)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[2]) for line in lines]
    assert losses[-1] < 0.8 * losses[0]


def test_the_page_runs_as_it_is_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(found) > 5
    check = "assert loss.item() < 0.5 and max(opt.step_sizes().values()) > 1e-4"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([found[0], check, *found[1:]])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.safetensors").exists()


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}' in text, path.name

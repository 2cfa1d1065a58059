"""`python -m metaopt demo`: its network, its runs, and its command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metaopt
from metaopt.demo import network

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from metaopt.demo.data import load_digits
from metaopt.demo.report import number
from metaopt.demo.run import Run, train

SMALL = ("--steps", "30", "--pair", "adamw+adam", "--blocks", "scalar", "--step-size", "1e-4")
OPTIONS = ("pair", "blocks", "step-size", "meta-lr", "steps", "seed", "jobs", "output")


def package_path() -> dict[str, str]:
    here = str(Path(metaopt.__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", **package_path()}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        cwd=cwd,
        timeout=300,
        check=False,
    )


def metaopt_demo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "metaopt", "demo", *arguments, cwd=cwd)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def is_fixed(entry: Any) -> bool:
    return entry["run"]["meta"] is None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return what a tiny demonstration prints, and the folder with what it writes."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "on demand"
    done = metaopt_demo(*SMALL, "--output", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, folder


def test_gradients_are_those_of_central_differences() -> None:
    rng = np.random.default_rng(0)
    params = network.init(rng, "float64")
    images, labels = rng.random((5, 64)), rng.integers(10, size=5)
    value, grads = network.loss_and_grads(params, images, labels)
    assert value == network.loss(params, images, labels)
    assert {name: grad.shape for name, grad in grads.items()} == {
        name: param.shape for name, param in params.items()
    }
    for name, param in params.items():
        for _ in range(5):
            direction = rng.normal(size=param.shape)
            change = 1e-6 / np.linalg.norm(direction) * direction
            up = network.loss({**params, name: param + change}, images, labels)
            down = network.loss({**params, name: param - change}, images, labels)
            expected = 2 * np.sum(grads[name] * change)
            assert up - down == pytest.approx(expected, rel=1e-6, abs=1e-14), name


def test_initial_weights_have_the_dtype_and_the_seed_asked_for() -> None:
    first, again = (network.init(np.random.default_rng(3)) for _ in range(2))
    assert all(param.dtype == np.float32 for param in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_digits_are_split_the_same_way_every_time() -> None:
    digits, again = load_digits(), load_digits()
    assert digits.train_images.shape == (1437, 64)
    assert digits.test_images.shape == (360, 64)
    assert digits.train_images.dtype == np.float32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    assert np.array_equal(digits.test_images, again.test_images)
    assert set(np.bincount(digits.test_labels)) <= {34, 35, 36, 37}


def test_metaoptimize_learns_where_the_fixed_step_size_is_hopeless(tmp_path: Path) -> None:
    arguments = ("--pair", "adamw+adam", "--blocks", "scalar", "--step-size", "1e-6")
    assert metaopt_demo(*arguments, "--output", str(tmp_path)).returncode == 0
    runs = json.loads((tmp_path / "results.json").read_bytes())["runs"]
    (fixed,) = (entry for entry in runs if entry["run"]["step_size"] == 1e-6 and is_fixed(entry))
    (tuned,) = (entry for entry in runs if not is_fixed(entry))
    assert fixed["final_test_accuracy"] < 0.5
    assert fixed["steps_to_95"] is None
    assert tuned["final_test_accuracy"] > 0.95
    assert tuned["steps_to_95"] < tuned["run"]["steps"] / 2
    (step_sizes,) = tuned["step_sizes"].values()
    assert 1e-3 < step_sizes[-1] < 1e-1


def test_fixed_runs_are_plain_adamw() -> None:
    digits = load_digits()
    steps, decay, lr = 20, 0.1, 1e-3
    result = train(Run(base="adamw", step_size=lr, steps=steps, seed=5), digits)

    weights, batches = (np.random.default_rng(s) for s in np.random.SeedSequence(5).spawn(2))
    params = network.init(weights)
    mean = {name: np.zeros_like(param) for name, param in params.items()}
    square = {name: np.zeros_like(param) for name, param in params.items()}
    for count in range(1, steps + 1):
        batch = batches.integers(1437, size=128)
        _, grads = network.loss_and_grads(
            params, digits.train_images[batch], digits.train_labels[batch]
        )
        for name, grad in grads.items():
            mean[name] = 0.9 * mean[name] + 0.1 * grad
            square[name] = 0.999 * square[name] + 0.001 * grad**2
            scale = np.sqrt(square[name] / (1 - 0.999**count)) + 1e-8
            direction = mean[name] / (1 - 0.9**count) / scale
            params[name] = params[name] - lr * (direction + decay * params[name])
    expected = network.loss(params, digits.train_images, digits.train_labels)
    assert result.final_loss == pytest.approx(expected, rel=1e-3)


def test_divergence_is_a_result() -> None:
    result = train(Run(base="adamw", step_size=1e18, steps=40, seed=0), load_digits())
    assert result.diverged_at is not None
    assert result.final_loss == np.inf
    assert np.isnan(result.final_accuracy)
    assert np.isfinite(result.train_loss).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-6, "1e-6"), (3.24e-3, "3.2e-3"), (0.1, "1e-1"), (1.8, "1.8"), (1e3, "1e3"), (0.0, "0")],
)
def test_numbers_are_written_in_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_run_prints_settings_and_a_table(small: tuple[str, Path]) -> None:
    printed, folder = small
    for words in (
        "6 of 30 steps each, seed 0",
        "betas (0.9, 0.999), weight_decay 0.1",
        "0.01 for all pairs",
        "least final training loss of 1e-5, 1e-4, 1e-3, 1e-2, 1e-1",
        "AdamW + Adam",
        "best fixed",
        "6/6 runs",
        str(folder / "demo.png"),
        str(folder / "results.json"),
    ):
        assert words in printed
    assert re.search(r"fixed +1e-4 +[\d.]+ +\d+\.\d% +never +1e-4", printed)
    assert re.search(r"one step size +1e-4 +[\d.]+ +\d+\.\d% +never +\d[.\d]*e-3", printed)
    assert all(len(line) <= 80 for line in printed.splitlines() if str(folder) not in line)


def test_a_run_draws_a_picture(small: tuple[str, Path]) -> None:
    from PIL import Image

    with Image.open(small[1] / "demo.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == 1600
        assert picture.getextrema() != ((0, 0),)


def test_a_run_writes_all_numbers(small: tuple[str, Path]) -> None:
    document = json.loads((small[1] / "results.json").read_text(encoding="utf-8"))
    settings = document["settings"]
    assert settings["pairs"] == ["adamw+adam"]
    assert (settings["steps"], settings["seed"], settings["meta_lr"]) == (30, 0, 0.01)
    assert settings["base"]["adamw"]["weight_decay"] == 0.1
    runs = document["runs"]
    fixed = [entry for entry in runs if is_fixed(entry)]
    (tuned,) = (entry for entry in runs if not is_fixed(entry))
    assert [entry["run"]["step_size"] for entry in fixed] == [1e-4, 1e-5, 1e-3, 1e-2, 1e-1]
    best = min(fixed, key=lambda entry: entry["final_train_loss"])
    assert document["best_fixed"] == {"adamw+adam": best["run"]["step_size"]}
    assert tuned["steps"] == [0, 25, 30]
    (step_sizes,) = tuned["step_sizes"].values()
    assert step_sizes[0] == pytest.approx(1e-4)
    assert step_sizes[0] < step_sizes[1] < step_sizes[2]
    assert tuned["final_train_loss"] == tuned["train_loss"][-1]
    assert tuned["steps_to_95"] is None


def test_results_depend_on_the_seed_and_not_on_the_number_of_processes(
    small: tuple[str, Path], tmp_path: Path
) -> None:
    reference = (small[1] / "results.json").read_bytes()
    for jobs in ("1", "3"):
        metaopt_demo(*SMALL, "--jobs", jobs, "--output", str(tmp_path / jobs))
        assert (tmp_path / jobs / "results.json").read_bytes() == reference
    metaopt_demo(*SMALL, "--seed", "1", "--output", str(tmp_path / "other"))
    other = json.loads((tmp_path / "other" / "results.json").read_bytes())
    assert other["runs"][0]["train_loss"] != json.loads(reference)["runs"][0]["train_loss"]


def test_all_pairs_and_blocks_and_a_diverging_start(tmp_path: Path) -> None:
    arguments = ("--pair", "all", "--blocks", "both", "--step-size", "1e-4", "--step-size", "1e18")
    done = metaopt_demo(*arguments, "--steps", "3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("SGDm + Adam", "RMSprop + Adam", "AdamW + Lion", "one per tensor", "diverged"):
        assert words in done.stdout
    document = json.loads((tmp_path / "metaopt-demo" / "results.json").read_bytes())
    assert len(document["runs"]) == 4 * 6 + 5 * 2 * 2
    lost = [entry for entry in document["runs"] if entry["diverged_at"] is not None]
    assert lost
    assert all(entry["final_train_loss"] is None for entry in lost)


def test_help_explains_every_option() -> None:
    done = metaopt_demo("--help")
    assert done.returncode == 0
    for name in OPTIONS:
        assert re.search(rf"^  --{name} ", done.stdout, re.MULTILINE), name
    for words in ("learning rate", "handwritten digits", "best fixed", "less than a minute"):
        assert words in done.stdout


def test_without_a_command_the_help_is_shown() -> None:
    done = run_python("-m", "metaopt")
    assert done.returncode == 0
    assert "demo" in done.stdout
    done = run_python("-m", "metaopt", "--version")
    assert done.stdout == f"metaopt {metaopt.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "-3"), "argument --steps: must be at least 1; got -3"),
        (("--steps", "many"), "argument --steps: must be a whole number; got 'many'"),
        (("--jobs", "0"), "argument --jobs: must be at least 1; got 0"),
        (("--seed", "-1"), "argument --seed: must not be negative; got -1"),
        (("--step-size", "0"), "argument --step-size: must be a finite number above 0; got 0"),
        (("--step-size", "nan"), "argument --step-size: must be a finite number above 0; got nan"),
        (("--meta-lr", "inf"), "argument --meta-lr: must be a finite number above 0; got inf"),
        (("--pair", "adam"), "argument --pair: invalid choice: 'adam'"),
        (("--blocks", "row"), "argument --blocks: invalid choice: 'row'"),
        (("--output", __file__), "argument --output: cannot write to"),
    ],
)
def test_wrong_options_are_refused(
    arguments: tuple[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from metaopt.__main__ import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert f"metaopt demo: error: {message}" in capsys.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a test starts heeds SIGINT, even where the tests are a shell's background job.

    Such a job ignores it, and so would its children; a handler becomes the default in a child.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as at a POSIX terminal")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_an_interrupt_ends_all_processes_without_a_traceback(delay: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metaopt", "demo", "--steps", "1000000", "--output"]
    with subprocess.Popen(
        [*command, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **package_path()},
    ) as process:
        try:
            assert process.stdout is not None
            assert "network" in process.stdout.readline()
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
            _, errors = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode in (130, -signal.SIGINT)
    assert errors == "\nInterrupted.\n"
    deadline = time.monotonic() + 20  # the last, multiprocessing's own, end a little later
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_lives(process.pid)


@pytest.mark.parametrize(
    ("module", "name"),
    [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")],
)
def test_missing_extras_are_named(module: str, name: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None; "
        "from metaopt.__main__ import main; sys.exit(main(['demo', '--output', 'out']))"
    )
    done = run_python("-c", program, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install '.[demo]'" in done.stderr
    assert f"{name} is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_command_line_imports_no_extras() -> None:
    program = (
        "import sys, metaopt.__main__; "
        "print(sorted({'sklearn', 'scipy', 'matplotlib', 'rich', 'PIL'} & set(sys.modules)))"
    )
    assert run_python("-c", program).stdout == "[]\n"

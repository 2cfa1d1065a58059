"""The log of a run and its page: what the optimizer says is added, and is seen."""

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import metaopt as mo
from metaopt.svg import HEIGHT, Line, lines, number


def run(steps: int = 30, **options: Any) -> tuple[mo.Log, mo.MetaOptimize, Any, Any]:
    """Train on a parabola, and log every third step."""
    opt, log = mo.MetaOptimize(**options), mo.Log()
    params = {"w": np.array([[3.0, -2.0, 1.0], [0.5, 1.0, 2.0]]), "b": np.array([1.0, 4.0])}
    state = opt.init(params)
    for step in range(steps):
        grads = {name: 2.0 * param for name, param in params.items()}
        loss = sum((param**2).sum() for param in params.values())
        params, state = opt.step(params, grads, state)
        if step % 3 == 0:
            log.add(opt, state, params, loss=loss, step=step)
    return log, opt, state, params


def made_up(sizes: Any, **extra: Any) -> list[dict[str, Any]]:
    """Return entries of one discount with these step sizes, a mapping of block to list."""
    count = len(next(iter(sizes.values())))
    return [
        {
            "step": at,
            "discounts": [1.0],
            "step_sizes": {block: [of[at]] * 3 for block, of in sizes.items()},
            "restarts": dict.fromkeys(sizes, 0),
            **{flag: dict.fromkeys(sizes, 0.0) for flag in ("pinned", "collapsed", "asleep")},
            "longer": {block: [1.0] for block in sizes},
            "distance": [float(at)],
        }
        | {name: of[at] for name, of in extra.items()}
        for at in range(count)
    ]


def pictures(page: str) -> list[Any]:
    """Return the charts of a page as XML."""
    found = re.findall(r'<svg [^>]*role="img".*?</svg>', page, re.DOTALL)
    return [ElementTree.fromstring(text) for text in found]


def chart(page: str, about: str) -> Any:
    (found,) = [one for one in pictures(page) if one.attrib["aria-label"].startswith(about)]
    return found


def points(polyline: Any) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in polyline.attrib["points"].split()]  # type: ignore[misc]


# --- what is added


def test_an_entry_has_what_the_optimizer_says() -> None:
    log, opt, state, params = run(blocks="tensor", base="adamw", bounds=(1e-5, 2e-4))
    scalars = log.add(opt, state, params, loss=np.float32(0.5), averaged_loss=0.25)
    entry, found = log.entries[-1], opt.diagnostics(state, params)
    assert entry["step"] == log.entries[-2]["step"] + 1
    assert (entry["loss"], entry["averaged_loss"]) == (0.5, 0.25)
    for block, size in opt.step_sizes(state).items():
        assert entry["step_sizes"][block] == [float(size)] * 3
        assert scalars[f"step_size/{block}"] == float(size)
        assert entry["decided"][block] == found["decided"][block].tolist()
        assert entry["longer"][block] == (found["meta_grad"][block] < 0).tolist()
        assert scalars[f"pinned/{block}"] == float(found["pinned"][block]) == 1.0
    squares = sum(np.asarray(norm) ** 2 for norm in found["trace_norm"].values())
    np.testing.assert_allclose(entry["distance"], np.sqrt(squares))
    assert entry["discounts"] == [0.99, 1.0]


def test_blocks_of_several_numbers_are_summed_up() -> None:
    log, opt, state, _ = run(blocks="weight", discount=1.0)
    for block, sizes in opt.step_sizes(state).items():
        want = [sizes.min(), np.median(sizes), sizes.max()]
        opt_entry = log.add(opt, state, run(blocks="weight", discount=1.0)[3])
        assert log.entries[-1]["step_sizes"][block] == pytest.approx(want)
        assert opt_entry[f"step_size/{block}"] == pytest.approx(want[1])


def test_learned_numbers_are_logged_under_names_that_loggers_take() -> None:
    base = mo.AdamW(betas=(mo.Learned(0.9), 0.999), weight_decay=mo.Learned(0.1))
    log, opt, state, params = run(base=base)
    scalars = log.add(opt, state, params)
    learned = opt.hyperparameters(state)
    assert scalars["betas_0_/all"] == float(learned["betas[0]"]["all"])
    assert all(re.fullmatch(r"[\w\-./]+", name) for name in scalars)
    page = log.html()
    assert "betas[0]" in page
    assert "ends at" in chart(page, "weight_decay by block").attrib["aria-label"]


@pytest.mark.parametrize("called", ["step_size", "restarts", "step"])
def test_no_name_stands_for_two_numbers(called: str) -> None:
    blocks = {"a b": "w", "a_b": "b"}
    base = mo.AdamW(weight_decay=mo.Learned(0.1, name=called), eps=1e-3)
    log, opt, state, params = run(base=base, blocks=blocks, step_size={"a b": 1e-3, "a_b": 1e-2})
    scalars, entry = log.add(opt, state, params), log.entries[-1]
    by_block = ("step_sizes", "restarts", "pinned", "collapsed", "asleep")
    assert len(scalars) == 2 * (len(by_block) + 1)
    assert scalars["step_size/a_b"] == entry["step_sizes"]["a b"][1]
    assert scalars["step_size/a_b_2"] == entry["step_sizes"]["a_b"][1]
    assert {spread[1] for spread in entry["learned"][called].values()} < {*scalars.values()}
    assert f"<h2>{called}</h2>" in log.html()


def test_recoveries_are_counted() -> None:
    log, opt, state, params = run(recover=True)
    assert log.add(opt, state, params)["recoveries/all"] == 0.0
    assert "recoveries" in log.html()


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch(wrapped: bool) -> None:
    torch = pytest.importorskip("torch")
    adapter = pytest.importorskip("metaopt_torch")
    net = torch.nn.Linear(3, 1)
    if wrapped:
        opt = adapter.wrap(torch.optim.AdamW(net.parameters(), lr=1.0), compile=False)
    else:
        opt = adapter.MetaOptimizer(net.named_parameters(), blocks="tensor", compile=False)
    log = mo.Log()
    for _ in range(3):
        opt.zero_grad()
        loss = net(torch.ones(4, 3)).square().mean()
        loss.backward()
        opt.step()
        scalars = log.add(opt, loss=loss)
    assert scalars["loss"] == pytest.approx(float(loss.detach()))
    for block, size in opt.step_sizes().items():
        assert scalars[f"step_size/{block}"] == pytest.approx(float(size))
    assert len(pictures(log.html())) >= 4
    with pytest.raises(ValueError, match=r"`state` must be left out: .* has its own"):
        log.add(opt, {}, {})


@pytest.mark.parametrize("wrapped", [False, True])
def test_jax(wrapped: bool) -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    adapter = pytest.importorskip("metaopt_jax")
    tx = adapter.wrap(optax.sgd(1.0)) if wrapped else adapter.metaoptimize(blocks="tensor")
    params = {"w": jax.numpy.ones(3)}
    state, log = tx.init(params), mo.Log()
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        scalars = log.add(tx, state, params, loss=jax.numpy.ones(()))
    for block, size in tx.step_sizes(state).items():
        assert scalars[f"step_size/{block}"] == pytest.approx(float(size))
    with pytest.raises(
        ValueError, match="`state` is needed, as MetaOptimizeTransformation does not"
    ):
        log.add(tx)


def test_kernels() -> None:
    adapter = pytest.importorskip("metaopt_kernels")
    params = {"w": np.ones(3)}
    opt, log = adapter.MetaOptimizer(params, fused=False), mo.Log()
    opt.step({"w": np.ones(3)})
    assert log.add(opt)["step_size/all"] == float(opt.step_sizes()["all"])


def test_what_is_no_optimizer_is_refused() -> None:
    log, opt, state, params = run(6)
    with pytest.raises(TypeError, match=r"`opt` must be an optimizer of metaopt's.*got dict"):
        log.add({})
    with pytest.raises(ValueError, match="`params` is needed, as MetaOptimize does not keep it"):
        log.add(opt, state)
    with pytest.raises(
        ValueError, match=r"`loss` must be one number; got an array of shape \(2,\)"
    ):
        log.add(opt, state, params, loss=np.ones(2))
    with pytest.raises(ValueError, match="`step` must be above that of the last entry, 3; got 3"):
        log.add(opt, state, params, step=3)
    with pytest.raises(TypeError, match=r"`entries` must be those of a metaopt\.Log"):
        mo.Log([{"loss": 1.0}])
    with pytest.raises(ValueError, match="Nothing has been added"):
        mo.Log().html()
    assert len(log.entries) == 2


def test_a_log_goes_through_json() -> None:
    log, *_ = run(blocks="node")
    again = mo.Log(json.loads(json.dumps(log.entries)))
    assert again.entries == log.entries
    assert again.html() == log.html()
    assert repr(again) == "Log of 10 entries"


# --- the page


def test_a_page_needs_nothing_else_and_can_be_read_aloud(tmp_path: Path) -> None:
    log, *_ = run(blocks="tensor")
    log.write(tmp_path / "run.html", title="A <b>run</b>")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "<title>A &lt;b&gt;run&lt;/b&gt;</title>" in page
    assert 'name="viewport" content="width=device-width' in page
    for outside in ("<script", "http", "src=", "href=", "@import", "url("):
        assert outside not in page
    found = pictures(page)
    assert len(found) == 5
    assert all(len(one.attrib["aria-label"]) > 25 for one in found)
    assert len(re.findall("<h2>", page)) == 7


def test_a_line_goes_through_its_values() -> None:
    sizes = [1e-4, 1e-3, 1e-2, 1e-1]
    page = mo.Log(made_up({"all": sizes})).html()
    (line,) = chart(page, "Step sizes").findall("polyline")
    across, up = zip(*points(line), strict=True)
    assert np.ptp(np.diff(across)) < 0.2
    assert np.ptp(np.diff(up)) < 0.2  # decades are equally far apart
    assert up[0] > up[-1]
    assert all(0.0 <= y <= HEIGHT for y in up)
    assert "all ends at 0.1" in chart(page, "Step sizes").attrib["aria-label"]


def test_what_is_missing_or_not_finite_is_a_gap() -> None:
    drawn = lines(range(6), [Line("a", [1.0, 2.0, None, math.inf, 3.0, math.nan])], alt="A chart.")
    picture = ElementTree.fromstring(drawn)
    (line,) = picture.findall("polyline")
    assert len(points(line)) == 2
    assert len(picture.findall("circle")) == 1  # one alone
    assert "nan" not in drawn


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [5.0, 5.0], [-1.0, 1e6], [1e-30, 1e30], [math.nan] * 2]
)
@pytest.mark.parametrize("log", [False, True])
def test_charts_of_odd_values_have_axes(values: Any, log: bool) -> None:
    picture = ElementTree.fromstring(lines([0, 1], [Line("a", values)], alt="A chart.", log=log))
    for text in picture.findall("text"):
        assert 0.0 <= float(text.attrib["y"]) <= HEIGHT
    assert len(picture.findall("text")) < 20


def test_averages_are_compared_with_the_last_weights() -> None:
    entries = made_up({"all": [1e-3] * 9}, loss=[3.0, 2.0, 1.0] * 3)
    for at in (0, 4, 8):
        entries[at]["averaged_loss"] = 1.0 + at
    found = chart(mo.Log(entries).html(), "Loss")
    assert "1 at the last weights, 9 at the averaged weights" in found.attrib["aria-label"]
    _, averaged = found.findall("polyline")
    up = [y for _, y in points(averaged)]
    assert len(up) == 9  # straight between those that are known
    assert np.ptp(np.diff(up)) < 0.2


def test_many_blocks_are_the_ones_that_moved() -> None:
    sizes = {f"b{n}": [1e-3, 1e-3 * (1 + n)] for n in range(20)}
    page = mo.Log(made_up(sizes)).html()
    drawn = chart(page, "Step sizes").findall("polyline")
    assert [line.find("title").text for line in drawn] == [f"b{n}" for n in range(12, 20)]
    assert "The 8 of 20 blocks that moved the most" in page
    assert page.count("<tr>") == 21


def test_bands_show_the_spread_of_a_block() -> None:
    log, *_ = run(blocks="weight")
    assert len(chart(log.html(), "Step sizes").findall("polygon")) == 2


def test_who_decided_is_shown_in_shares() -> None:
    entries = made_up({"a": [1e-3] * 3, "b": [1e-3] * 3})
    for at, entry in enumerate(entries):
        entry["discounts"] = [0.99, 1.0]
        entry["longer"] = {"a": [1.0, 0.0], "b": [1.0, 0.0]}
        entry["distance"] = [1.0, 1.0]
        entry["decided"] = {"a": [3.0 * at, at], "b": [2.0 * at, 2.0 * at]}
    page = mo.Log(entries).html()
    label = chart(page, "Who decided").attrib["aria-label"]
    assert "discount 0.99: 62%, discount 1: 38%" in label
    assert "<td>75%</td><td>25%</td>" in page
    low, _ = chart(page, "Who decided").findall("polygon")
    top, bottom = points(low)[0][1], points(low)[-1][1]
    whole = HEIGHT - 48.0
    assert (bottom - top) / whole == pytest.approx(0.625, abs=0.01)


def test_events_are_shown_where_they_were() -> None:
    entries = made_up({"first": [1e-3] * 4, "second": [1e-3] * 4, "third": [1e-3] * 4})
    entries[2]["restarts"] = entries[3]["restarts"] = {"first": 1, "second": 0, "third": 0}
    for entry in entries[1:3]:
        entry["pinned"] = {"first": 0.0, "second": 0.75, "third": 0.25}
    page = mo.Log(entries).html()
    found = chart(page, "Events")
    assert found.attrib["aria-label"] == "Events by block. first: restarted; second: pinned."
    kinds = [
        mark.find("title").text for mark in found.findall("rect") if mark.find("title") is not None
    ]
    assert kinds == ["restarted", "pinned", "pinned"]
    assert "<td>1</td><td>0%</td>" in page  # restarts of the first
    assert "<td>0</td><td>38%</td>" in page


def test_a_calm_run_says_so() -> None:
    assert "No block restarted" in mo.Log(made_up({"all": [1e-3] * 3})).html()


def test_long_runs_make_small_pages() -> None:
    entries = made_up({"all": [1e-3] * 5000}, loss=[1.0] * 5000)
    assert len(mo.Log(entries).html()) < 50_000


def test_one_entry_is_enough() -> None:
    log, *_ = run(1)
    assert len(pictures(log.html())) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-4, "1e-4"), (3.21e-5, "3.2e-5"), (0.12345, "0.123"), (12345.6, "12346")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_log_is_of_one_number_of_discounts_and_counts_whole_steps() -> None:
    params = {"w": np.ones(2)}
    one, two = mo.MetaOptimize(discount=1.0), mo.MetaOptimize()
    log = mo.Log()
    log.add(two, two.init(params), params)
    with pytest.raises(ValueError, match="begin another"):
        log.add(one, one.init(params), params)
    with pytest.raises(TypeError, match="`step` must be an integer"):
        log.add(two, two.init(params), params, step=1.5)  # type: ignore[arg-type]
    assert len(log.entries) == 1
    with pytest.raises(TypeError, match=r"those of a metaopt\.Log"):
        mo.Log([{"step": 0, "step_sizes": {}}])

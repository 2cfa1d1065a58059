"""The page of a `Log`: charts of step sizes, losses and votes, and a table of blocks."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from metaopt.svg import COLORS, DASHES, Line, Strip, areas, lines, number, strips

__all__ = ["page"]

Entry = Mapping[str, Any]

#: A line has at most so many points.
POINTS = 300
#: Intervals of steps into which a run is cut to count votes and events.
INTERVALS = 40
#: At most so many blocks have a line, and so many a row of events.
LINES, ROWS = 8, 24

EVENTS = {"restarted": "#d55e00", "pinned": "#0072b2", "collapsed": "#b8860b", "asleep": "#999999"}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --soft: #6b6b70; --rule: #e3e3e6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #17171a; --soft: #a0a0a8; --rule: #38383e } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.1rem; margin: 0 0 .2rem }
p { margin: .3rem 0; color: var(--soft); max-width: 46rem }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 1.8rem; margin: 1.2rem 0 }
section { min-width: 0 } .wide { grid-column: 1 / -1; overflow-x: auto }
svg { width: 100%; height: auto; display: block; max-width: 640px }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
@media (max-width: 500px) { svg text { font-size: 14px } }
.grid { stroke: var(--rule) } .axis { stroke: var(--soft) } .empty { fill: var(--rule) }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .2rem 0;
  font-size: .85rem; overflow-wrap: anywhere }
ul svg { display: inline-block; width: 28px; margin-right: .4rem; vertical-align: middle }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap } th:first-child, td:first-child { text-align: left; padding-left: 0 }
"""


def page(entries: Sequence[Entry], title: str) -> str:
    """Return a log's entries, at least one, as HTML with its pictures in it."""
    sizes, votes = (_losses, _step_sizes, _effective), (_decided, _longer, _distances)
    charts = [part for chart in (*sizes, *votes, _learned, _events) for part in chart(entries)]
    first, last = entries[0]["step"], entries[-1]["step"]
    blocks = len(entries[-1]["step_sizes"])
    summary = f"{len(entries)} entries, steps {first} to {last}; {_many(blocks, 'block')}."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{summary}</p>\n<main>\n"
        + "\n".join([*charts, _table(entries)])
        + "\n</main>\n</body>\n</html>\n"
    )


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _section(title: str, text: str, *content: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return (
        f"<section{kind}>\n<h2>{title}</h2>\n<p>{text}</p>\n" + "\n".join(content) + "\n</section>"
    )


def _legend(names: Sequence[str], *, dashed: bool = True) -> str:
    items = []
    for index, name in enumerate(names):
        dash = DASHES[index % len(DASHES)] if dashed else ""
        stroke = f'stroke="{COLORS[index % len(COLORS)]}" stroke-width="{3 if dashed else 10}"'
        items.append(
            f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><line x1="0" x2="28" y1="5" y2="5" '
            f'{stroke} stroke-dasharray="{dash}"/></svg>{escape(name)}</li>'
        )
    return f"<ul>{''.join(items)}</ul>"


def _thinned(entries: Sequence[Entry], most: int = POINTS) -> Iterator[Sequence[Entry]]:
    """Cut the entries into intervals of equal length, at most so many."""
    each = math.ceil(len(entries) / most)
    return (entries[at : at + each] for at in range(0, len(entries), each))


def _mean(some: Sequence[float | None]) -> float | None:
    found = [value for value in some if value is not None and math.isfinite(value)]
    return math.fsum(found) / len(found) if found else None


def _losses(entries: Sequence[Entry]) -> Iterator[str]:
    """Show the loss, and that at averaged weights."""
    names = {"loss": "at the last weights", "averaged_loss": "at the averaged weights"}
    found, ends = [], []
    for key, name in names.items():
        some = [entry for entry in entries if key in entry]
        if some:
            found.append((name, some, key))
            ends.append(f"{number(some[-1][key])} {name}")
    if not found:
        return
    x: list[float] = []
    y: dict[str, list[float | None]] = {name: [] for name, _, _ in found}
    for interval in _thinned(entries):
        x.append(interval[-1]["step"])
        for name, _, key in found:
            y[name].append(_mean([entry.get(key) for entry in interval]))
    for name in y:  # averages may be evaluated less often: join their points
        y[name] = _bridged(y[name]) if name == names["averaged_loss"] else y[name]
    values = [v for line in y.values() for v in line if v is not None]
    log = bool(values) and min(values) > 0.0 and max(values) > 10.0 * min(values)
    text = f"Last: {', '.join(ends)}."
    chart = lines(x, [Line(name, line) for name, line in y.items()], alt=f"Loss. {text}", log=log)
    yield _section("Loss", text, chart, _legend([*y]) if len(y) > 1 else "")


def _bridged(values: Sequence[float | None]) -> list[float | None]:
    """Return values with straight lines over what is missing between two of them."""
    known = [(at, value) for at, value in enumerate(values) if value is not None]
    found = [*values]
    for (a, left), (b, right) in itertools.pairwise(known):
        for at in range(a + 1, b):
            found[at] = left + (right - left) * (at - a) / (b - a)
    return found


def _moved(entries: Sequence[Entry], block: str) -> float:
    """Return the largest step size that a block has had, over the smallest."""
    sizes = [entry["step_sizes"][block][1] for entry in entries if block in entry["step_sizes"]]
    sizes = [size for size in sizes if size > 0.0 and math.isfinite(size)]
    return max(sizes) / min(sizes) if sizes else 1.0


def _blocks(entries: Sequence[Entry]) -> list[str]:
    """Return the blocks of all entries, in order of appearance."""
    return list(dict.fromkeys(block for entry in entries for block in entry["step_sizes"]))


def _spread_lines(
    entries: Sequence[Entry], key: str, blocks: Sequence[str]
) -> tuple[list[float], list[Line]]:
    """Return the medians of blocks over time, with bands where they hold several numbers."""
    some = [interval[-1] for interval in _thinned(entries)]
    found = []
    for block in blocks:
        spreads = [entry.get(key, {}).get(block) for entry in some]
        low, middle, high = ([s and s[at] for s in spreads] for at in range(3))
        band = (low, high) if low != high else ((), ())
        found.append(Line(block, middle, *band))
    return [entry["step"] for entry in some], found


def _step_sizes(entries: Sequence[Entry]) -> Iterator[str]:
    """Show the step size of each block, of many those that moved the most."""
    blocks = _blocks(entries)
    shown = sorted(blocks, key=lambda block: _moved(entries, block), reverse=True)[:LINES]
    shown = [block for block in blocks if block in shown]
    x, found = _spread_lines(entries, "step_sizes", shown)
    text = "What is learned, before the multiplier <code>lr</code>."
    if len(shown) < len(blocks):
        text += f" The {len(shown)} of {len(blocks)} blocks that moved the most."
    if any(line.low for line in found):
        text += " The median of each block, and a band from its least to its largest."
    log = any(value and value > 0.0 for line in found for value in line.y)
    chart = lines(x, found, alt=f"Step sizes by block. {_ends(found)}", log=log)
    yield _section("Step sizes", text, chart, _legend(shown))


def _effective(entries: Sequence[Entry]) -> Iterator[str]:
    """Show step sizes times the multiplier, where these are others."""
    names = dict.fromkeys(name for entry in entries for name in entry.get("effective_lr", {}))
    shown = [*names][:LINES]
    if all(entry.get("effective_lr", {}) in ({}, entry["step_sizes"]) for entry in entries):
        return
    x, found = _spread_lines(entries, "effective_lr", shown)
    text = "What the next step takes: the step size times <code>lr</code>, schedules and all."
    if len(shown) < len(names):
        text += f" The first {len(shown)} of {len(names)}."
    log = any(value and value > 0.0 for line in found for value in line.y)
    chart = lines(x, found, alt=f"Effective learning rate. {_ends(found)}", log=log)
    yield _section("Effective learning rate", text, chart, _legend(shown))


def _ends(some: Sequence[Line]) -> str:
    return f"{'; '.join(f'{line.name} ends at {_last(line.y)}' for line in some)}."


def _last(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(known[-1]) if known else "nothing"


def _learned(entries: Sequence[Entry]) -> Iterator[str]:
    """Show other numbers that are learned."""
    names = dict.fromkeys(name for entry in entries for name in entry.get("learned", {}))
    for name in names:
        own = [
            {"step": entry["step"], "learned": entry["learned"][name]}
            for entry in entries
            if name in entry.get("learned", {})
        ]
        blocks = [*own[-1]["learned"]][:LINES]
        x, found = _spread_lines(own, "learned", blocks)
        chart = lines(x, found, alt=f"{name} by block. {_ends(found)}")
        yield _section(escape(name), "A number of the base rule, learned.", chart, _legend(blocks))


def _names(entries: Sequence[Entry]) -> list[str]:
    return [f"discount {discount:g}" for discount in entries[-1]["discounts"]]


def _decided(entries: Sequence[Entry]) -> Iterator[str]:
    """Show which discount decided."""
    some = [entry for entry in entries if "decided" in entry]
    if len(some) < 2:
        return
    names = _names(some)
    x: list[float] = []
    shares: list[list[float]] = []
    before = _totals(some[0]["decided"], len(names))
    for interval in _thinned(some[1:], INTERVALS):
        now = _totals(interval[-1]["decided"], len(names))
        new = [max(a - b, 0.0) for a, b in zip(now, before, strict=True)]
        before = now
        if sum(new) > 0.0:
            x.append(interval[-1]["step"])
            shares.append([value / sum(new) for value in new])
    if len(x) < 2:
        return
    total = _totals(some[-1]["decided"], len(names))
    ends = [f"{name}: {n / sum(total):.0%}" for name, n in zip(names, total, strict=True)]
    text = (
        "The share of meta updates that each discount decided, as it asked for the largest step "
        f"size. In all {', '.join(ends)}."
    )
    chart = areas(x, names, [*zip(*shares, strict=True)], f"Who decided. {text}")
    yield _section("Who decided", text, chart, _legend(names, dashed=False))


def _totals(decided: Mapping[str, Sequence[float]], count: int) -> list[float]:
    return [sum(of[at] for of in decided.values()) for at in range(count)]


def _longer(entries: Sequence[Entry]) -> Iterator[str]:
    """Show what each discount voted for."""
    names = _names(entries)
    x: list[float] = []
    votes: list[list[float]] = []
    for interval in _thinned(entries, INTERVALS):
        x.append(interval[-1]["step"])
        votes.append(
            [
                _mean([of[at] for entry in interval for of in entry["longer"].values()]) or 0.0
                for at in range(len(names))
            ]
        )
    found = [Line(name, [row[at] for row in votes]) for at, name in enumerate(names)]
    text = (
        "The share of meta-gradients that asked for a larger step size. At one half, larger and "
        "smaller ones are asked for equally often."
    )
    alt = f"Votes for larger step sizes. {_ends(found)}"
    yield _section("Votes for larger steps", text, lines(x, found, alt=alt), _legend(names))


def _distances(entries: Sequence[Entry]) -> Iterator[str]:
    """Show how far the weights are from their averages."""
    names = _names(entries)
    some = [interval[-1] for interval in _thinned(entries)]
    found = [Line(name, [e["distance"][at] for e in some]) for at, name in enumerate(names)]
    log = any(value and value > 0.0 for line in found for value in line.y)
    text = (
        "The norm of the traces. Without curvature it is the distance of the weights from their "
        "average; with discount 1 and no weight decay, from where the traces started."
    )
    alt = f"Norm of the traces. {_ends(found)}"
    chart = lines([e["step"] for e in some], found, alt=alt, log=log)
    yield _section("Distance from the average", text, chart, _legend(names))


def _condition(interval: Sequence[Entry], block: str) -> str | None:
    """Return the condition that most of a block was in, on average over an interval."""
    for name in ("pinned", "collapsed", "asleep"):
        if (_mean([entry[name].get(block) for entry in interval]) or 0.0) >= 0.5:
            return name
    return None


def _events(entries: Sequence[Entry]) -> Iterator[str]:
    """Show when blocks restarted, were pinned, had collapsed or slept."""
    first = entries[0]  # in the first step there is no trace yet, and every block sleeps
    rows = []
    for block in _blocks(entries):
        kinds: list[str | None] = []
        before = 0
        for interval in _thinned(entries, INTERVALS):
            now = interval[-1]["restarts"].get(block, before)
            condition = _condition([entry for entry in interval if entry is not first], block)
            kinds.append("restarted" if now > before else condition)
            before = now
        if any(kinds):
            rows.append(Strip(block, kinds))
    if not rows:
        text = "No block restarted, was at a bound, had collapsed or slept for long."
        yield _section("Events", text)
        return
    text = (
        "When a block's trace started anew, and when most of the block was at a bound, far below "
        "its peak, or had a meta-gradient of 0."
    )
    if len(rows) > ROWS:
        text += f" The first {ROWS} of {len(rows)} blocks."
    shown = rows[:ROWS]
    told = [f"{row.name}: {', '.join(dict.fromkeys(k for k in row.kinds if k))}" for row in shown]
    steps = [entry["step"] for entry in entries]
    chart = strips(steps, shown, EVENTS, f"Events by block. {'; '.join(told)}.")
    marks = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><rect width="28" height="10" '
        f'fill="{color}"/></svg>{name}</li>'
        for name, color in EVENTS.items()
    )
    yield _section("Events", text, chart, f"<ul>{marks}</ul>")


def _table(entries: Sequence[Entry]) -> str:
    """Return all blocks in numbers."""
    head = ["block", "first", "last", "restarts", "pinned", "collapsed", "asleep"]
    names = _names(entries) if "decided" in entries[-1] else []
    recovers = "recoveries" in entries[-1]
    head += ["recoveries"] * recovers + [f"decided by {name}" for name in names]
    rows = []
    for block in _blocks(entries):
        own = [entry for entry in entries if block in entry["step_sizes"]]
        last = own[-1]
        row = [escape(block), number(own[0]["step_sizes"][block][1])]
        row += [number(last["step_sizes"][block][1]), str(last["restarts"].get(block, 0))]
        for name in ("pinned", "collapsed", "asleep"):
            row.append(f"{_mean([entry[name].get(block) for entry in own]) or 0.0:.0%}")
        row += [str(last.get("recoveries", {}).get(block, 0))] * recovers
        counts = last.get("decided", {}).get(block, [])
        row += [f"{n / sum(counts):.0%}" if sum(counts) else "-" for n in counts]
        rows.append("".join(f"<td>{cell}</td>" for cell in row))
    titles = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    text = "Median step sizes, and the share of entries in which a block was in each condition."
    return _section(
        "Blocks",
        text,
        f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>",
        wide=True,
    )

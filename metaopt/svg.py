"""Charts as SVG text, of the standard library alone, for pages that need nothing else."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["COLORS", "Line", "Strip", "areas", "lines", "number", "strips"]

#: Most are those of Okabe and Ito, which readers who are color-blind can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a2be2", "#777777")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 4", "6 6")

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 38


@dataclass(frozen=True)
class Line:
    """One line of a chart, and the band around it where `low` and `high` are given."""

    name: str
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Strip:
    """One row of marks: for each interval of time a kind, or None."""

    name: str
    kinds: Sequence[str | None]


@dataclass(frozen=True)
class _Scale:
    """Maps values to coordinates of the picture, linearly or by their logarithm."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float | None) -> float | None:
        """Return the coordinate of a value; None where it has none."""
        if value is None or not math.isfinite(value) or (self.log and value <= 0.0):
            return None
        lo, hi, value = (math.log10(v) if self.log else v for v in (self.lo, self.hi, value))
        share = (value - lo) / (hi - lo) if hi > lo else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def number(value: float) -> str:
    """Return a number in short: 0.001, 3.2e-05, 1.8."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def lines(x: Sequence[float], some: Sequence[Line], *, alt: str, log: bool = False) -> str:
    """Return a chart of lines over `x`, its vertical axis logarithmic with `log`."""
    drawn = [value for line in some for part in (line.y, line.low, line.high) for value in part]
    across, up = _scales(x, drawn, log=log)
    parts = [*_axes(across, up)]
    for index, line in enumerate(some):
        color, dash = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
        if line.low:
            parts += _band(x, line.low, line.high, across, up, color)
        for run in _runs(x, line.y, across, up):
            if len(run) == 1:
                parts.append(f'<circle cx="{run[0][0]}" cy="{run[0][1]}" r="2.5" fill="{color}"/>')
                continue
            points = " ".join(f"{a},{b}" for a, b in run)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" '
                f'stroke-dasharray="{dash}"><title>{escape(line.name)}</title></polyline>'
            )
    return _figure(parts, HEIGHT, alt)


def areas(
    x: Sequence[float], names: Sequence[str], shares: Sequence[Sequence[float]], alt: str
) -> str:
    """Return a chart of shares that add up to 1: `shares[i]` are those of `names[i]` over `x`."""
    across, up = _scales(x, [0.0, 1.0], log=False)
    below = [0.0] * len(x)
    parts: list[str] = []
    for index, (name, share) in enumerate(zip(names, shares, strict=True)):
        above = [a + b for a, b in zip(below, share, strict=True)]
        color = COLORS[index % len(COLORS)]
        title = f"<title>{escape(name)}</title>"
        parts += _band(x, below, above, across, up, color, opacity=0.75, title=title)
        below = above
    return _figure([*parts, *_axes(across, up)], HEIGHT, alt)


def strips(x: Sequence[float], some: Sequence[Strip], colors: dict[str, str], alt: str) -> str:
    """Return rows of marks over `x`, one row for each strip, its name above it."""
    row = 30
    height = TOP + row * len(some) + BOTTOM
    across = _Scale(x[0], x[-1], LEFT / 4, WIDTH - RIGHT)
    parts = [*_ticks_below(across, height - BOTTOM)]
    for index, strip in enumerate(some):
        top = TOP + row * index
        wide = (across.end - across.start) / len(strip.kinds)
        parts.append(f'<text x="{across.start}" y="{top + 11}">{escape(_short(strip.name))}</text>')
        parts.append(
            f'<rect x="{across.start}" y="{top + 15}" width="{across.end - across.start:.1f}" '
            'height="9" class="empty"/>'
        )
        for place, kind in enumerate(strip.kinds):
            if kind is not None:
                parts.append(
                    f'<rect x="{across.start + place * wide:.1f}" y="{top + 15}" '
                    f'width="{max(wide, 2.0):.1f}" height="9" fill="{colors[kind]}">'
                    f"<title>{escape(kind)}</title></rect>"
                )
    return _figure(parts, height, alt)


def _short(name: str, most: int = 56) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _figure(parts: Sequence[str], height: int, alt: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _scales(
    x: Sequence[float], values: Sequence[float | None], *, log: bool
) -> tuple[_Scale, _Scale]:
    """Return the scale of time, and that of values with some room around them."""
    found = [v for v in values if v is not None and math.isfinite(v) and (v > 0.0 or not log)]
    lo, hi = (min(found), max(found)) if found else (1.0, 1.0)
    if log:
        room = max((hi / lo) ** 0.05, 1.15)
        lo, hi = lo / room, hi * room
    elif (lo, hi) != (0.0, 1.0):
        room = 0.06 * (hi - lo) or 0.1 * abs(hi) or 1.0
        lo, hi = lo - room, hi + room
    across = _Scale(x[0], x[-1], LEFT, WIDTH - RIGHT)
    return across, _Scale(lo, hi, HEIGHT - BOTTOM, TOP, log)


def _axes(across: _Scale, up: _Scale) -> Iterator[str]:
    for value in _ticks(up.lo, up.hi, log=up.log):
        y = up(value)
        assert y is not None  # ticks lie within the scale
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" class="grid"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    yield from _ticks_below(across, HEIGHT - BOTTOM)


def _ticks_below(across: _Scale, y: float) -> Iterator[str]:
    yield f'<line x1="{across.start}" x2="{across.end}" y1="{y}" y2="{y}" class="axis"/>'
    for value in _ticks(across.lo, across.hi, log=False):
        x = across(value)
        assert x is not None
        yield f'<text x="{x}" y="{y + 16}" text-anchor="middle">{value:g}</text>'
    middle = (across.start + across.end) / 2
    yield f'<text x="{middle}" y="{y + 32}" text-anchor="middle">step</text>'


def _ticks(lo: float, hi: float, *, log: bool) -> list[float]:
    """Return three to eight round numbers between two."""
    if log and hi / lo >= 10.0:
        first, last = math.ceil(math.log10(lo)), math.floor(math.log10(hi))
        every = 1 + (last - first) // 7
        found = [10.0**power for power in range(first, last + 1, every)]
        if len(found) > 1:
            return found
    if hi <= lo:
        return [lo]
    unit = 10.0 ** math.floor(math.log10((hi - lo) / 3))
    step = next(unit * k for k in (5, 2, 1) if (hi - lo) / (unit * k) >= 3 or k == 1)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [float(f"{k * step:.6g}") for k in range(first, last + 1)]


def _runs(
    x: Sequence[float], y: Sequence[float | None], across: _Scale, up: _Scale
) -> Iterator[list[tuple[float, float]]]:
    """Yield the points of a line, a new list after every value that is missing or not finite."""
    run: list[tuple[float, float]] = []
    for value_x, value_y in zip(x, y, strict=True):
        a, b = across(value_x), up(value_y)
        if a is not None and b is not None:
            run.append((a, b))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _band(
    x: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    across: _Scale,
    up: _Scale,
    color: str,
    opacity: float = 0.18,
    title: str = "",
) -> Iterator[str]:
    both = [
        (v, a, b)
        for v, a, b in zip(x, low, high, strict=True)
        if up(a) is not None and up(b) is not None
    ]
    corners = [(across(v), up(b)) for v, _, b in both]
    corners += [(across(v), up(a)) for v, a, _ in reversed(both)]
    points = " ".join(f"{a},{b}" for a, b in corners)
    yield f'<polygon points="{points}" fill="{color}" fill-opacity="{opacity}">{title}</polygon>'

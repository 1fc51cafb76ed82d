"""Losses over pictures seen, as an SVG with a logarithmic axis: needs no library."""

from collections.abc import Mapping, Sequence

import numpy as np

COLOURS = ("#440154", "#3b528b", "#21918c", "#4daf4a", "#d98c00")  # dark to light
LEFT, TOP, WIDE, HIGH = 70, 40, 520, 330
TICKS = (1, 2, 5)  # of each power of ten, where there are few of them


def draw(title: str, legend: str, seen: Sequence[int], losses: Mapping[str, Sequence[float]]) -> str:
    """A line for each name in `losses`. seen: pictures at each point"""
    numbers = np.array(list(losses.values()))  # [lines, points]
    low, up = _bounds(float(numbers.min()), float(numbers.max()))
    most = max(seen)
    right = LEFT + WIDE + 18
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 430">',
        '<rect width="720" height="430" fill="#fff"/><g font-family="sans-serif" font-size="13" fill="#333">',
        f'<text x="{LEFT}" y="24" font-size="15">{title}</text>',
        f'<text x="{LEFT + WIDE / 2}" y="420" text-anchor="middle">training pictures seen</text>',
        f'<text transform="translate(18 {TOP + HIGH / 2}) rotate(-90)" text-anchor="middle">mean squared error</text>',
        f'<text x="{right}" y="{TOP + 5}">{legend}</text>',
    ]
    for tick in _ticks(low, up):
        y = _height(tick, low, up)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDE}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for quarter in range(5):
        x = LEFT + WIDE * quarter / 4
        parts.append(f'<path d="M{x:.1f} {TOP + HIGH}v5" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + HIGH + 20}" text-anchor="middle">{most * quarter / 4:,.0f}</text>')
    for row, (name, colour) in enumerate(zip(losses, COLOURS, strict=False)):
        places = zip(seen, losses[name], strict=True)
        points = " ".join(f"{LEFT + WIDE * at / most:.1f},{_height(loss, low, up):.1f}" for at, loss in places)
        y = TOP + 26 + 20 * row
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{right} {y - 4}h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{right + 30}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def _ticks(low: float, up: float) -> list[float]:
    """Numbers from 10**low to 10**up that are written beside the axis."""
    powers = range(int(np.floor(low)), int(np.ceil(up)) + 1)
    steps = TICKS if len(powers) <= 3 else TICKS[:1]
    found = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in found if low - 1e-9 <= np.log10(tick) <= up + 1e-9]


def _bounds(least: float, most: float) -> tuple[float, float]:
    """The logarithms between which an axis lies that has all losses: whole ones, unless the losses are close."""
    low, up = float(np.floor(np.log10(least))), float(np.ceil(np.log10(most)))
    if up - low > 2:
        return low, up
    marks = np.log10([step * 10.0**power for power in (low - 1, low, low + 1, up, up + 1) for step in TICKS])
    return float(marks[marks <= np.log10(least)].max()), float(marks[marks >= np.log10(most)].min())


def _height(loss: float, low: float, up: float) -> float:
    return TOP + HIGH * (up - float(np.log10(loss))) / (up - low)

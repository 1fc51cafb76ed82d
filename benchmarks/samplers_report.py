"""A table and a plot of what `benchmarks.samplers` has measured.

python -m benchmarks.samplers_report benchmarks/results/DATE-MACHINE-samplers.jsonl docs/pictures/samplers.svg
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
Points: TypeAlias = list[tuple[float, float]]  # (steps, value)
WIDE, HIGH, LEFT, TOP, BETWEEN = 330, 300, 130, 60, 160  # of the panels, in pixels
GAP = 15  # between two labels
STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
HEAD = """| sampler | steps | spacing | clip | readable | rarest digit | imbalance | Fréchet | RMS | pictures |
|---|---|---|---|---|---|---|---|---|---|"""
TRAILING: Json = {"spacing": "trailing", "clip": True}
SERIES: dict[str, tuple[Json, str]] = {  # what is drawn: the fields of a choice, and a colour
    "ddpm": ({"sampler": "ddpm", "spacing": "linspace"}, "#555555"),  # what a request without choices has
    "ddim": (TRAILING | {"sampler": "ddim", "eta": 0.0}, "#b07d00"),
    "dpmpp_sde 2": (TRAILING | {"sampler": "dpmpp_sde", "order": 2}, "#8c564b"),
    "dpmpp 3": (TRAILING | {"sampler": "dpmpp", "order": 3}, "#1769aa"),
    "unipc 3": (TRAILING | {"sampler": "unipc", "order": 3}, "#00805f"),
    "deis 3": (TRAILING | {"sampler": "deis", "order": 3}, "#c2418f"),
    "sde plans": ({"saved": True, "sampler": "dpmpp_sde"}, "#6a3fb5"),
    "tuned plans": ({"saved": True, "sampler": "unipc"}, "#1f1f8f"),
    "ipndm 4": (TRAILING | {"sampler": "ipndm", "order": 4}, "#d1460f"),
}


def name_of(choice: Json) -> str:
    """A sampler with its order, or a plan."""
    if plan := choice.get("plan"):
        return f"`{plan}` (plan)"
    order = f" {choice['order']}" if "order" in choice else ""
    return f"{choice['sampler']}{order}"


def table(lines: list[Json]) -> str:
    """As Markdown: the steps ascending, for each the nearest to real pictures first."""
    rows = [HEAD]
    for line in sorted(lines, key=lambda line: (line["choice"].get("steps", 0), line["frechet"])):
        choice, far = line["choice"], f"{line['frechet']:.3f} ± {line['frechet_error']:.3f}"
        clip = {True: "yes", False: "no", None: ""}[choice.get("clip")]
        cells = [name_of(choice), choice.get("steps", ""), choice.get("spacing", ""), clip]
        cells += [f"{100 * line[part]:.1f} %" for part in ("readable", "rarest", "imbalance")]
        seeds = f", from seed {first}" if (first := line["key"].get("first")) else ""
        cells += [far, f"{line['rms']:.3f}" if "rms" in line else "", f"{line['key']['pictures']}{seeds}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def apart(wanted: list[float], gap: float) -> list[float]:
    """Where to write labels that want these heights, in the same order, none nearer to another than `gap`."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[int]] = []  # of labels that touch, each around the mean of what they want

    def begins(group: list[int]) -> float:
        return sum(wanted[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and begins(groups[-2]) + gap * len(groups[-2]) > begins(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = dict[int, float]()
    for group in groups:
        placed |= {i: begins(group) + gap * number for number, i in enumerate(group)}
    return [placed[i] for i in range(len(wanted))]


@dataclass(frozen=True, slots=True)
class Panel:
    """One measure against the number of steps."""

    title: str
    at: float  # its left edge, in pixels
    ticks: dict[float, str]
    scale: Callable[[float], float]  # what makes values equally spaced

    def x(self, steps: float) -> float:
        return self.at + WIDE * math.log(steps / STEPS[0]) / math.log(STEPS[-1] / STEPS[0])

    def y(self, value: float) -> float:
        low, high = self.scale(min(self.ticks)), self.scale(max(self.ticks))
        share = (self.scale(max(value, min(self.ticks))) - low) / (high - low)
        return TOP + HIGH * (1 - min(share, 1.0))

    def frame(self) -> list[str]:
        """Title, grid and ticks."""
        parts = [f'<text x="{self.at}" y="{TOP - 20}" font-size="15">{self.title}</text>']
        for value, label in self.ticks.items():
            y = self.y(value)
            parts.append(f'<path d="M{self.at} {y:.1f}h{WIDE}" stroke="#ddd"/>')
            parts.append(f'<text x="{self.at + WIDE + 6}" y="{y + 4:.1f}" fill="#666">{label}</text>')
        for steps in STEPS:
            x = self.x(steps)
            parts.append(f'<path d="M{x:.1f} {TOP + HIGH}v5" stroke="#888"/>')
            parts.append(f'<text x="{x:.1f}" y="{TOP + HIGH + 19}" text-anchor="middle" font-size="11">{steps}</text>')
        middle = self.at + WIDE / 2
        return [*parts, f'<text x="{middle}" y="{TOP + HIGH + 40}" text-anchor="middle">steps</text>']

    def lines(self, series: dict[str, tuple[Points, str]]) -> list[str]:
        """A line for each of the series, with its name at the left end. What was measured once is a large dot."""
        parts, first = list[str](), [self.y(found[0][1]) for found, _ in series.values()]
        for (name, (found, colour)), height in zip(series.items(), apart(first, GAP), strict=True):
            spots = [(self.x(steps), self.y(value)) for steps, value in found]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            (x, y), radius = spots[0], 2.5 if len(spots) > 1 else 5
            if len(spots) > 1:
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>' for x, y in spots]
            label = f'x="{self.at - 22}" y="{height + 4:.1f}" text-anchor="end" fill="{colour}"'
            parts.append(f'<path d="M{x - 4:.1f} {y:.1f}L{self.at - 18} {height:.1f}" stroke="{colour}"/>')
            parts.append(f"<text {label}>{name}</text>")
        return parts


def points(lines: list[Json], fields: Json, measure: str) -> Points:
    """What was measured with these fields of a choice from seed 0 on, by steps. One more field says whether it is a
    saved plan."""
    drawn = [line for line in lines if not line["key"].get("first")]
    choices = [(line["choice"] | {"saved": "plan" in line["choice"]}, line[measure]) for line in drawn]
    return sorted((choice["steps"], value) for choice, value in choices if fields.items() <= choice.items())


def draw(lines: list[Json], shown: dict[str, tuple[Json, str]]) -> str:
    """Share readable and Fréchet distance against steps as SVG. shown: by name, the fields of a choice, and a colour"""
    shares = {value / 100: f"{value} %" for value in range(40, 101, 10)}
    distances = {value: f"{value:g}" for value in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)}
    panels = {
        "readable": Panel("Readable pictures", LEFT, shares, float),
        "frechet": Panel("Fréchet distance from real digits", LEFT + WIDE + BETWEEN, distances, math.log),
    }
    wide, high = LEFT + 2 * WIDE + BETWEEN + 60, TOP + HIGH + 55
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}">',
        f'<rect width="{wide}" height="{high}" rx="8" fill="#fff"/>',
        '<g font-family="sans-serif" font-size="13" fill="#333">',
    ]
    for measure, panel in panels.items():
        found = {name: (points(lines, fields, measure), colour) for name, (fields, colour) in shown.items()}
        parts += panel.frame() + panel.lines({name: each for name, each in found.items() if each[0]})
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def read(file: Path) -> list[Json]:
    """The lines behind that of the machine; of those of one choice and first seed, the one of most pictures."""
    best = dict[str, Json]()
    for line in map(json.loads, file.read_text().splitlines()[1:]):
        name = json.dumps([line["choice"], line["key"].get("first", 0)])
        if name not in best or line["key"]["pictures"] >= best[name]["key"]["pictures"]:
            best[name] = line
    return [*best.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    args.svg.write_text(draw(read(args.results), SERIES))
    print(table(read(args.results)), end="")


if __name__ == "__main__":
    main()

"""Draws the pictures of docs/concepts.md from benchmarks/digits with the engine alone, in minutes. Needs extra `bench`.

python docs/pictures.py docs/pictures
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Preview, Request
from model.engine.runner import prepared
from model.sampling.noise import INITIAL, gaussian
from model.sampling.plan import plan, resolve
from model.sampling.schedule import cosine, linear, su_2022

matplotlib.use("Agg")
from matplotlib import pyplot

Picture: TypeAlias = NDArray[np.uint8]  # [H, W]
Choices: TypeAlias = dict[str, Any]
CARD = read_card(Path(__file__).parent.parent / "benchmarks" / "digits")
SEEDS = (199, 202, 207)
BUILT = 42  # the seed that is built up in all steps
INCH = 0.62  # the side of a picture on a sheet

BUILDING = (1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 0)  # shown levels t
STEPS = (5, 10, 20, 50, 100, 250, 1000)
SHEETS: dict[
    str, tuple[dict[str, Choices], dict[str, Choices]]
] = {  # rows and columns, each with its fields of the request
    "steps": (
        {"ddpm": {"sampler": "ddpm"}, "greedy": {"sampler": "greedy"}, "ddim": {"sampler": "ddim"}}
        | {name: {"sampler": name, "order": 3} for name in ("dpmpp", "unipc")}
        | {"dpmpp_sde": {"sampler": "dpmpp_sde"}},
        {str(steps): {"steps": steps} for steps in STEPS},
    ),
    "eta": (
        {"ddim, 20 steps": {"sampler": "ddim", "steps": 20}, "ddim, 100 steps": {"sampler": "ddim", "steps": 100}},
        {f"eta {eta:g}": {"eta": eta} for eta in (0.0, 0.25, 0.5, 0.75, 1.0)},
    ),
    "variance": (
        {name: {"sampler": "ddpm", "variance": name} for name in ("small", "large")},
        {str(steps): {"steps": steps} for steps in STEPS[1:]},
    ),
    "spacing": (
        {name: {"sampler": "ddim", "spacing": name} for name in ("leading", "linspace", "trailing", "quadratic")},
        {str(steps): {"steps": steps} for steps in (3, 5, 7, 10, 20, 50)},
    ),
    "clip": (
        {"clip": {"clip": True}, "no clip": {"clip": False}},
        {
            f"{sampler}, {steps}": {"sampler": sampler, "steps": steps}
            for sampler, steps in (
                ("ddpm", 10),
                ("ddpm", 100),
                ("dpmpp", 10),
                ("ddim", 10),
                ("ddim", 100),
                ("ddim", 250),
            )
        },
    ),
}


def make(requests: Iterable[tuple[int, Choices]], frames: frozenset[int] = frozenset()) -> tuple[list[Picture], Any]:
    """The pictures of these seeds and choices, made in one engine; and (x_t, x0) by (number of the request, step)."""
    model = load_model(CARD, torch.device("cpu"), torch.float32)
    engine, made, shown = Engine(prepared(model, 16)), dict[int, Picture](), {}
    for number, (seed, choices) in enumerate(requests):
        table = plan(CARD.process, resolve(CARD.process, **choices))
        engine.submit(Request(number, seed, table, frames=frames, shows_x0=True))
    while engine.busy:
        for event in engine.step():
            assert isinstance(event.id, int)
            if isinstance(event, Finished):
                made[event.id] = event.picture[:, :, 0]
            elif isinstance(event, Preview):
                shown[event.id, event.step] = (event.x, event.x0)
    return [made[number] for number in sorted(made)], shown


def sheet(file: Path, rows: Mapping[str, Sequence[Picture | None]], columns: Sequence[str]) -> None:
    """Draws pictures in rows, with a label beside each row and above each column."""
    high, wide = np.array(next(p for row in rows.values() for p in row if p is not None).shape) / 32 * INCH
    size = (wide * len(columns) + 1.3, (high + 0.06) * len(rows) + 0.25)
    figure, axes = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    for number, (line, (name, row)) in enumerate(zip(axes, rows.items(), strict=True)):
        for axis, picture in zip(line, row, strict=True):
            axis.axis("off")
            if picture is not None:
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        y = 1 - ((number + 0.5) * (high + 0.06) + 0.25) / size[1]
        figure.text(1.2 / size[0], y, name, ha="right", va="center", fontsize=8)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=8, pad=3)
    figure.subplots_adjust(1.25 / size[0], 0, 1, 1 - 0.25 / size[1], 0.03, 0.06)
    figure.savefig(file, dpi=110, facecolor="white", pil_kwargs={"optimize": True})
    pyplot.close(figure)


def draw_building(file: Path) -> None:
    """Draws a picture built up by 1000 steps of ddpm, the x0 predicted on the way, and the picture taken apart."""
    seed, T = BUILT, CARD.process.schedule.T
    (picture,), shown = make([(seed, {"steps": T})], frozenset(T - t for t in BUILDING))
    built = [shown[0, T - t] for t in BUILDING]
    eps = gaussian(torch.tensor([seed]), torch.tensor([0]), (1, 32, 32), INITIAL)[0, 0].numpy()
    clean, apart = picture / 127.5 - 1, []
    for t in BUILDING:
        x = CARD.process.schedule.alpha_bar[t] * clean + CARD.process.schedule.beta_bar[t] * eps
        apart.append(((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))
    rows: dict[str, Sequence[Picture | None]] = {
        "taken apart, $x_t$": apart,
        "built up, $x_t$": [x[:, :, 0] for x, _ in built],
        r"expected, $\hat{x}_0$": [x0 if x0 is None else x0[:, :, 0] for _, x0 in built],
    }
    sheet(file, rows, [f"$t$ = {t}" for t in BUILDING])


def draw_schedules(file: Path) -> None:
    """Draws the remaining picture, the noise and their ratio at every t of three schedules."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 2.7), layout="constrained")
    named = {"the article's": su_2022(), "Ho et al., linear": linear(), "cosine": cosine()}
    for colour, (name, schedule) in zip(("#b5442e", "#2e6fb5", "#5a8f3c"), named.items(), strict=True):
        t = np.arange(schedule.T + 1)
        left.plot(t, schedule.alpha_bar, color=colour, label=name)
        left.plot(t, schedule.beta_bar, color=colour, linestyle="--")
        right.plot(t[1:], 2 * np.log10(schedule.alpha_bar[1:] / schedule.beta_bar[1:]), color=colour)
    left.set_title(r"$\bar\alpha_t$ (picture) and $\bar\beta_t$ (noise, dashed)", fontsize=9)
    right.set_title(r"signal to noise, $\log_{10}(\bar\alpha_t^2 / \bar\beta_t^2)$", fontsize=9)
    right.set_ylim(-6, 5)
    left.legend(fontsize=7, loc="center right")
    for axis in (left, right):
        axis.set_xlabel("$t$", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110, facecolor="white")
    pyplot.close(figure)


def draw_sheets(folder: Path) -> None:
    """Draws a sheet for each choice: the same seeds in every cell."""
    requests, places = list[tuple[int, Choices]](), list[tuple[str, str, str]]()
    for name, (rows, columns) in SHEETS.items():
        for row, choices in rows.items():
            for column, more in columns.items():
                for seed in SEEDS:
                    requests.append((seed, choices | more))
                    places.append((name, row, column))
    cells: dict[tuple[str, str, str], list[Picture]] = {}
    for place, picture in zip(places, make(requests)[0], strict=True):
        cells.setdefault(place, []).append(picture)
    for name, (rows, columns) in SHEETS.items():
        lines = {row: [np.concatenate(cells[name, row, column], axis=1) for column in columns] for row in rows}
        sheet(folder / f"{name}.png", lines, list(columns))


def main() -> None:
    """Draws all pictures into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    draw_schedules(folder / "schedules.png")
    draw_building(folder / "building.png")
    draw_sheets(folder)


if __name__ == "__main__":
    main()

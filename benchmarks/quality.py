"""How good are the pictures? A judge of real digits looks at a thousand made ones; one JSON line per measure.

    python -m benchmarks.quality benchmarks/digits.npz weights/digits --sheet samples.png --curve curve.svg

The pictures are those of seeds 0, 1, 2, ...; the judge (`benchmarks.classifier`) is first shown the held-out real
digits, so that what it says of the made ones can be read against what it says of real ones. Of a conditional model the
digits 0, 1, ..., 9, 0, ... are asked for, in turns.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.classifier import SHAPE, FloatArray, features, judge, load_digits, load_or_train
from benchmarks.curves import draw
from benchmarks.distance import Gaussian, distance
from benchmarks.measure import Measure, machine
from benchmarks.models import grow_up
from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.load import load_model
from model.checkpoint.presets import PRESETS
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.engine.runner import prepared
from model.sampling.plan import plan, resolve
from model.sampling.samplers import Sampling
from model.sampling.table import Plan
from model.train.data import Uint8Array
from server.worker.cpus import cores
from server.worker.device import DTYPES, choose_dtype

CONFIDENT = 0.9  # a picture is readable if the judge is so sure of one digit


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures made in one go, and how it went."""

    pictures: Uint8Array  # [N, H, W, C]
    wall_s: float


def engine_of(card: ModelCard, dtype: torch.dtype, slots: int) -> Engine:
    """An engine on all cores, as a server has it."""
    torch.set_num_threads(cores())  # the net takes as many; `grow_up` leaves fewer
    model = load_model(card, torch.device("cpu"), dtype)
    grow_up(model, slots)
    return Engine(prepared(model, slots))


def make(engine: Engine, table: Plan, seeds: range, labels: Sequence[tuple[int, ...]] = ()) -> Batch:
    """The pictures of these seeds. Tells its progress on stderr. labels: what the net is told of each, in turns"""
    pictures = dict[int, Uint8Array]()
    for seed in seeds:
        engine.submit(Request(seed, seed, table, labels=labels[seed % len(labels)] if labels else ()))
    started = told = time.monotonic()
    while engine.busy:
        for event in engine.step():
            if not isinstance(event, Finished):
                raise RuntimeError(f"no picture: {event}")
            assert isinstance(event.id, int)
            pictures[event.id] = event.picture
        if pictures and time.monotonic() - told > 10:
            told = time.monotonic()
            left_s = (told - started) * (len(seeds) - len(pictures)) / len(pictures)
            print(f"pictures: {len(pictures)} of {len(seeds)}, {left_s / 60:.1f} min left", file=sys.stderr)
    wall_s = time.monotonic() - started
    return Batch(np.stack([pictures[seed] for seed in seeds]), wall_s)


def of_real(probabilities: FloatArray, labels: Tensor) -> list[Measure]:
    """What the judge makes of digits whose label is known. probabilities: [N, 10], labels: [N]"""
    count, right = len(labels), float((probabilities.argmax(1) == labels.numpy()).mean())
    sure = float((probabilities.max(1) >= CONFIDENT).mean())
    return [
        Measure(f"{count} held-out digits: named rightly", right, "share"),
        Measure(f"{count} held-out digits: confidence at least {CONFIDENT}", sure, "share"),
    ]


def of_made(probabilities: FloatArray, what: str) -> list[Measure]:
    """What the judge makes of made pictures. Each counts for the digit it looks most like. probabilities: [N, 10]"""
    sure = float((probabilities.max(1) >= CONFIDENT).mean())
    shares = np.bincount(probabilities.argmax(1), minlength=10) / len(probabilities)
    return [
        Measure(f"{what}: confidence at least {CONFIDENT}", sure, "share"),
        Measure(f"{what}: rarest digit", float(shares.min()), "share"),
        *(Measure(f"{what}: looks like {digit}", float(share), "share") for digit, share in enumerate(shares)),
    ]


def of_asked(probabilities: FloatArray, labels: list[tuple[int, ...]], what: str) -> Measure:
    """How many of the readable pictures are the digit asked for: the first of the labels, in turns. probabilities:
    [N, 10]"""
    readable = probabilities.max(1) >= CONFIDENT
    asked = np.resize([label for label, *_ in labels], len(probabilities))
    right = probabilities.argmax(1) == asked
    return Measure(f"{what}: of the readable ones, the digit asked for", float(right[readable].mean()), "share")


def sheet(pictures: Uint8Array, across: int = 8, scale: int = 2) -> Image.Image:
    """The first across² pictures, row by row, each pixel `scale` wide. pictures: [N, H, W, 1]"""
    count, height, width, _ = pictures.shape
    grid = np.zeros((across * across, height, width), np.uint8)
    grid[:count] = pictures[: len(grid), :, :, 0]
    whole = grid.reshape(across, across, height, width).swapaxes(1, 2).reshape(across * height, across * width)
    return Image.fromarray(whole.repeat(scale, 0).repeat(scale, 1))


def curve(log: list[dict[str, Any]]) -> str:
    """The held-out loss against pictures seen, a line per level of noise, as SVG. log: lines of training.jsonl"""
    log = [line for line in log if "held_out" in line]
    seen = [line["images"] for line in log]
    lines = {f"{int(level) / 1000:g}": [line["held_out"][level] for line in log] for level in log[0]["held_out"]}
    return draw("Held-out loss of the moving average while training", "t / T", seen, lines)


def told(card: ModelCard, choice: Sampling, guidance: float | None) -> tuple[Sampling, list[tuple[int, ...]]]:
    """The choice with its guidance, and what a conditional net is told of each picture; nothing for another net."""
    if card.labels is None:
        return choice, []
    choice = replace(choice, guidance=card.labels.guidance if guidance is None else guidance)
    null = () if card.labels.null is None or not choice.guided else (card.labels.null,)
    return choice, [(label, *null) for label in card.labels.choices]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "digits", type=Path, help="the labelled .npz that `python -m model.train.packages digits` makes"
    )
    parser.add_argument("directory", type=Path, help="the model directory to measure")
    parser.add_argument("--pictures", type=int, default=1000, help="how many to make (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps for each (%(default)s)")
    parser.add_argument("--sampler", default="ddim", help="(%(default)s)")
    named = parser.add_mutually_exclusive_group()
    named.add_argument("--preset", choices=PRESETS, help="one of the model's presets, in place of sampler and steps")
    named.add_argument("--plan", help="one of the model's plans, in place of sampler and steps")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--guidance", type=float, help="of a conditional model (default: its own)")
    asked.add_argument("--unlabelled", action="store_true", help="ask a conditional model for no digit")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="as in the server (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="pictures denoised at once (%(default)s)")
    parser.add_argument("--classifier", type=Path, help="keep the judge in this file, and take it from there")
    parser.add_argument("--sheet", type=Path, help="a PNG to write: the first 64 pictures")
    parser.add_argument("--curve", type=Path, help="an SVG to write: the held-out loss in the model's training.jsonl")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    card = read_card(args.directory)
    if card.shape != SHAPE:
        raise SystemExit(f"the judge reads {list(SHAPE)}, but {card.name} makes {list(card.shape)}")
    if args.pictures < 1 or args.slots < 1:
        raise SystemExit("--pictures and --slots must be at least 1")
    chosen = card.presets[args.preset] if args.preset else {"sampler": args.sampler, "steps": args.steps}
    chosen = {"plan": args.plan} if args.plan else chosen
    choice, labels = told(card, resolve(card.process, **chosen), 1 if args.unlabelled else args.guidance)
    if args.unlabelled:
        if card.labels is None or card.labels.null is None:
            raise SystemExit("--unlabelled needs a model with a null label")
        labels = [(card.labels.null,)]
    if args.curve:
        log = (args.directory / "training.jsonl").read_text().splitlines()
        args.curve.write_text(curve([json.loads(line) for line in log]))

    print(machine())
    print(json.dumps({"model": {"name": card.name, "digest": card.digest}}), flush=True)
    train, test = load_digits(args.digits)
    net = load_or_train(args.classifier, train)
    for measure in of_real(judge(net, test.pictures), test.labels):
        print(measure.line(), flush=True)

    dtype = choose_dtype(args.dtype, torch.device("cpu"))
    made = make(engine_of(card, dtype, args.slots), plan(card.process, choice), range(args.pictures), labels)
    if args.sheet:
        sheet(made.pictures).save(args.sheet, optimize=True)
    how = f"plan {choice.plan}" if choice.plan else f"{choice.steps} steps of {choice.sampler}"
    what = f"{card.name}, {args.pictures} pictures of {how}"
    what += ", unlabelled" if args.unlabelled else f", guidance {choice.guidance:g}" if labels else ""
    pictures = made.pictures.transpose(0, 3, 1, 2)
    probabilities = judge(net, pictures)
    asked = np.resize([label for label, *_ in labels or [(0,)]], len(pictures))
    far = distance(features(net, pictures), Gaussian.of(features(net, train.pictures)), asked)
    print(Measure(f"{what}: Fréchet distance to those trained on", far.corrected, f"± {far.error:.4f}").line())
    for measure in [
        *of_made(probabilities, what),
        *([of_asked(probabilities, labels, what)] if len(labels) > 1 else []),
    ]:
        print(measure.line())
    how = f"{str(dtype).removeprefix('torch.')}, {args.slots} at once"
    print(Measure(f"{what}: wall time, {how}", made.wall_s, "s").line())


if __name__ == "__main__":
    main()

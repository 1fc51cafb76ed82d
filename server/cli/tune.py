"""Finds a plan of few steps for a model, and writes it to plans/NAME.json in the model's directory with what it gains.
It needs no pictures. After an interruption the same command resumes."""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from model.errors import NoSuchDevice
from model.usage import Parser
from server.errors import SettingsError, StorageFull

if TYPE_CHECKING:
    from model.tune.tuner import Tuner

MOST_SEEDS = 4096
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


def main(arguments: Sequence[str]) -> int:
    """Tunes, and prints what the plan gains. Returns the exit code."""
    from model.checkpoint.plans import NAME

    parser = Parser("ddpm tune", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model directory")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="steps of the plan")
    parser.add_argument("--name", help="of the plan (default: tuned-N)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: plans in MODEL)")
    parser.add_argument("--seeds", type=int, default=64, metavar="N", help="to fit the plan to (%(default)s)")
    parser.add_argument("--updates", type=int, default=12, metavar="N", help="of its numbers, at most (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pictures computed at once (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the numbers inside the net (%(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor (default: all)")
    given = parser.parse_args(arguments)
    name = f"tuned-{given.steps}" if given.name is None else given.name
    if not NAME.fullmatch(name):
        raise SettingsError(f"--name must be 1..64 letters, digits, -, _ and ., the first none of these: {name!r:.80}")
    if not DEVICE.fullmatch(given.device):
        raise NoSuchDevice(f"--device must be auto, cpu, cuda or cuda:N, got {given.device!r:.40}")
    bounds = {"seeds": MOST_SEEDS, "updates": 1000, "batch": 1024}
    for flag, most in {**bounds, **({"threads": 1024} if given.threads is not None else {})}.items():
        if not 1 <= (value := getattr(given, flag)) <= most:
            raise SettingsError(f"--{flag} must lie in 1..{most}, got {value}")
    return _tune(given, name)


def _tune(given: Namespace, name: str) -> int:
    from model.checkpoint.card import read_card
    from model.checkpoint.plans import FOLDER
    from model.tune.teacher import LEVELS
    from model.tune.tuner import Recipe, load_tuner
    from server.worker.cpus import cores
    from server.worker.device import choose_device, choose_dtype

    card = read_card(given.model)
    if card.labels is not None and card.labels.null is None:
        raise SettingsError(f"{card.name} cannot be tuned: plans are tuned without labels, and it has no null_label")
    most = min(LEVELS, card.process.schedule.T)  # that the teacher has
    if not 1 <= given.steps <= most:
        raise SettingsError(f"--steps must lie in 1..{most} for {card.name}, got {given.steps}")
    recipe = Recipe(steps=given.steps, seeds=given.seeds, updates=given.updates, batch=given.batch)
    device, folder = choose_device(given.device), given.out or given.model / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / ".teacher.npz", folder / f".{name}.fit.npz"
        dtype, threads = choose_dtype(given.dtype, device), given.threads or cores()
        document = _run(load_tuner(card, recipe, *files, device, dtype, threads))
        part = folder / f".{name}.part"
        part.write_text(_text(document))
        part.replace(folder / f"{name}.json")
        files[1].unlink(missing_ok=True)
    except OSError as error:
        raise StorageFull(f"{folder} cannot be written: {error.strerror or error}") from None
    print(f"{folder / name}.json: {json.dumps(document['measured'])}")
    return 0


def _run(tuner: "Tuner") -> dict[str, Any]:
    """The document of the plan. Tells the progress on standard error, if that is a terminal."""
    part = ""
    with tqdm(file=sys.stderr, disable=None, leave=False, unit="walk") as bar:
        for progress in tuner.run():
            if part != progress.part:
                part = progress.part
                bar.reset(progress.of)
                bar.set_description(part)
            bar.update(progress.done - bar.n)
    return tuner.document()


def _text(document: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each row."""
    rows = ",\n  ".join(map(json.dumps, document.get("rows", ())))
    lines = [
        f' "{key}": ' + (f"[\n  {rows}\n ]" if key == "rows" else json.dumps(value)) for key, value in document.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"

"""How good are a model's pictures, by sampler and number of steps? A JSON line for each pair, in the order asked for.

    python -m benchmarks.samplers benchmarks/digits.npz benchmarks/digits --steps 5 10 --samplers ddim plan:sde-10
    python -m benchmarks.samplers_report build/samplers.jsonl docs/pictures/samplers.svg     the table and a plot

The pictures are those of seeds 0, 1, 2, ... (or of `--first` and on), made by the engine as a server makes them. They
are kept, and what the file of results says of the same model, plan, numerics class, judge, seeds and number of pictures
is not measured again: a run that was interrupted goes on, and more pictures are made only of the further seeds.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from benchmarks.classifier import SHAPE, Classifier, Digits, features, judge, load_digits, load_or_train
from benchmarks.distance import GROUPS, Gaussian, distance
from benchmarks.measure import ROOT, commit, machine
from benchmarks.quality import CONFIDENT, engine_of, make
from model.checkpoint.card import read_card
from model.digests import file_digest
from model.engine.engine import Engine
from model.errors import PlanError
from model.sampling.plan import SAMPLERS, plan, resolve
from model.sampling.samplers import Sampling
from model.sampling.schedule import FloatArray, Process
from model.sampling.table import Plan, R
from model.train.data import Uint8Array
from server.worker.cpus import cores
from server.worker.device import DTYPES, choose_dtype, describe

Json: TypeAlias = dict[str, Any]
JUDGE = ROOT / "benchmarks" / "judge.safetensors"
CLIP = {"yes": True, "no": False, "model": None}  # None: as the model says
STEPS = (10, 100, 5, 8, 12, 20, 50, 4, 6, 15, 30)
CONVERGED: Json = {"sampler": "dpmpp", "order": 3, "steps": 200, "spacing": "trailing", "clip": False}
HELD_OUT = "real digits, held out"
HIDDEN = {"noise", "timesteps", "plan_digest"}
ALL = [f"{name}:{order}" for name, s in SAMPLERS.items() for order in s.orders or [""]]
SEEDS = 100  # of the converged solution
PIECE = 100  # pictures that are made before they are kept


@dataclass(frozen=True, slots=True)
class Real:
    """What made pictures are compared with: the digits that model and judge were trained on."""

    gaussian: Gaussian
    shares: FloatArray  # [10] of the digits

    @classmethod
    def of(cls, net: Classifier, digits: Digits) -> "Real":
        counts = np.bincount(digits.labels.numpy(), minlength=10)
        return cls(Gaussian.of(features(net, digits.pictures)), counts / counts.sum())


@dataclass(frozen=True, slots=True)
class Made:
    """Pictures of consecutive seeds, and how long one took."""

    pictures: Uint8Array  # [N, H, W, C]
    each_s: float


def digest_of(table: Plan) -> str:
    """Of the rows of a plan."""
    rows = table.rows if table.rows[:, R].any() else table.rows[:, :R]  # runs of before know no guidance
    return hashlib.sha256(rows.astype(np.float32).tobytes()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the pictures of a plan, or takes them from where they were kept."""

    engine: Engine
    folder: Path
    model: str  # digest
    numerics: str
    first: int = 0  # seed

    def key(self, table: Plan) -> Json:
        """All that decides the pictures of a plan, but for their number."""
        seeds = {"first": self.first} if self.first else {}
        return {"model": self.model, "numerics": self.numerics, "rows": digest_of(table), **seeds}

    def make(self, table: Plan, count: int) -> Made:
        """The pictures of `count` seeds."""
        name = hashlib.sha256(json.dumps(self.key(table)).encode()).hexdigest()[:16]
        file, pictures, wall_s = self.folder / f"{name}.npz", np.zeros((0, *SHAPE[1:], 1), np.uint8), 0.0
        if file.is_file():
            with np.load(file) as arrays:
                pictures, wall_s = arrays["pictures"], float(arrays["wall_s"])
        while (have := len(pictures)) < count:
            seeds = range(self.first + have, self.first + min(have + PIECE, count))
            more = make(self.engine, table, seeds)
            pictures, wall_s = np.concatenate([pictures, more.pictures]), wall_s + more.wall_s
            part = file.with_suffix(".part.npz")
            np.savez_compressed(part, pictures=pictures, wall_s=wall_s)
            part.replace(file)
        return Made(pictures[:count], wall_s / len(pictures))


def choices(process: Process, args: argparse.Namespace) -> Iterator[Sampling]:
    """All that is asked for: the model's plans, then each number of steps with everything else."""
    plans = [name for name in args.samplers if name.startswith("plan:")]
    for name in plans:
        yield resolve(process, plan=name.removeprefix("plan:"))
    for steps, spacing, clip in product(args.steps, args.spacing, args.clip):
        for name in args.samplers:
            sampler, _, order = name.partition(":")
            if name not in plans:
                if order and not order.isdecimal():
                    raise PlanError("order", f"it must be an integer, got {order}")
                fields: Json = {"spacing": spacing, "clip": CLIP[clip], "order": int(order) if order else None}
                yield resolve(process, sampler, steps, **fields)


def quality(net: Classifier, pictures: Uint8Array, real: Real) -> Json:
    """How readable, balanced and far from real ones they are. pictures: [N, 1, 32, 32]"""
    probabilities = judge(net, pictures)
    shares = np.bincount(probabilities.argmax(1), minlength=10) / len(probabilities)
    far = distance(features(net, pictures), real.gaussian)
    return {
        "readable": round(float((probabilities.max(1) >= CONFIDENT).mean()), 4),
        "rarest": round(float(shares.min()), 4),
        "imbalance": round(float(np.abs(shares - real.shares).sum() / 2), 4),  # total variation
        "frechet": round(far.corrected, 5),
        "frechet_error": round(far.error, 5),
        "frechet_plain": round(far.plain, 5),
    }


def rms(made: Uint8Array, converged: Uint8Array) -> float:
    """Root of the mean squared difference where both have the seed, of pixels in -1..1."""
    both = min(len(made), len(converged))
    apart = (made[:both].astype(np.float64) - converged[:both]) / 127.5
    return round(float(np.sqrt(np.mean(apart**2))), 4)


def shown(choice: Sampling) -> Json:
    """The fields of a choice that apply, without its levels."""
    return {name: value for name, value in asdict(choice).items() if value is not None and name not in HIDDEN}


@dataclass(frozen=True, slots=True)
class Sweep:
    """Measures one choice after the other, each once."""

    process: Process
    maker: Maker
    net: Classifier
    real: Real
    judge: str  # digest
    out: Path  # the file of results, which begins with the machine

    def done(self) -> list[Json]:
        """The keys of what has been measured."""
        lines = self.out.read_text().splitlines()[1:] if self.out.is_file() else []
        return [json.loads(line)["key"] for line in lines]

    def lines(self, wanted: Iterable[Sampling], count: int) -> Iterator[Json]:
        """A line for each choice that has none in the file yet, where it then is. Several runs may share the work."""
        for choice in wanted:
            table = plan(self.process, choice)
            key = self.maker.key(table) | {"judge": self.judge, "pictures": count}
            if key not in self.done():
                line = {"choice": shown(choice), **self.measured(table, count), "key": key, "commit": commit()}
                with self.out.open("a") as file:
                    print(json.dumps(line), file=file)
                yield line

    def measured(self, table: Plan, count: int) -> Json:
        """What there is to say of a plan's pictures; how far they are from the converged ones, unless it adds noise."""
        made = self.maker.make(table, count)
        found = quality(self.net, made.pictures.transpose(0, 3, 1, 2), self.real)
        if not table.draws:
            converged = plan(self.process, resolve(self.process, **CONVERGED))
            found["rms"] = rms(made.pictures, self.maker.make(converged, min(count, SEEDS)).pictures)
        return found | {"ms_per_picture": round(1000 * made.each_s, 2)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "digits", type=Path, help="the labelled .npz that `python -m model.train.packages digits` makes"
    )
    parser.add_argument("directory", type=Path, help="the model directory to measure")
    parser.add_argument("--samplers", nargs="+", default=ALL, help="NAME, NAME:ORDER or plan:NAME (all samplers)")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument("--spacing", nargs="+", default=[None], help="(the model's)")
    parser.add_argument("--clip", nargs="+", choices=[*CLIP], default=["model"], help="(%(default)s)")
    parser.add_argument("--pictures", type=int, default=1000, help="how many of each (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of these pictures (%(default)s)")
    parser.add_argument("--slots", type=int, default=16, help="pictures denoised at once (%(default)s)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="as in the server (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/samplers.jsonl"), help="(%(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("build/pictures"), help="the pictures' folder (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    card = read_card(args.directory)
    if card.shape != SHAPE:
        raise SystemExit(f"the judge reads {list(SHAPE)}, but {card.name} makes {list(card.shape)}")
    if args.pictures < GROUPS * 2 or args.slots < 1 or args.first < 0:
        raise SystemExit(f"--pictures must be at least {GROUPS * 2}, --slots 1, and --first 0")
    try:
        wanted = [*choices(card.process, args)]
    except PlanError as error:
        raise SystemExit(f"{error.field}: {error}") from error
    torch.set_num_threads(cores())  # as the engine's net
    here = machine()  # before the engine leaves torch one thread
    train, test = load_digits(args.digits)
    net = load_or_train(JUDGE, train)
    real = Real.of(net, train)
    engine = engine_of(card, choose_dtype(args.dtype, torch.device("cpu")), args.slots)
    model = engine.runner.model
    args.keep.mkdir(parents=True, exist_ok=True)
    if not args.out.is_file():  # its first lines are the machine and real pictures
        held_out = {"choice": {"sampler": HELD_OUT}, **quality(net, test.pictures.numpy(), real)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(f"{here}\n{json.dumps(held_out | {'key': {'pictures': len(test.labels)}})}\n")
    maker = Maker(engine, args.keep, model.digest, describe(engine.runner, model, 0.0, 0).numerics, args.first)
    sweep = Sweep(card.process, maker, net, real, file_digest(JUDGE), args.out)
    for line in sweep.lines(wanted, args.pictures):
        print(json.dumps({name: value for name, value in line.items() if name not in ("key", "commit")}), flush=True)


if __name__ == "__main__":
    main()

"""Finds a plan of few steps for a model, without data: a teacher's pictures, then levels and a solver, then numbers.

All that is decided is decided on some seeds; what is told of the result is measured on others.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint.card import ModelCard
from model.checkpoint.load import Model, load_model
from model.digests import short_digest
from model.nets.cpu import CpuNet, grow_up
from model.sampling.plan import levels, plan, resolve
from model.sampling.samplers import Sampling
from model.sampling.schedule import FloatArray, Spacing
from model.tune import state
from model.tune.coefficients import Fit, free, mean_square, update
from model.tune.levels import best_levels
from model.tune.teacher import Teacher
from model.tune.walk import NAMES, TUNED, noise, predictor

FIRST_SEED = 1 << 40  # far from those that people ask for
SOLVERS = (
    ("ddim", None),
    ("dpmpp", 2),
    ("dpmpp", 3),
    ("unipc", 2),
    ("unipc", 3),
    ("deis", 3),
    ("ipndm", 2),
    ("ipndm", 4),
)
SPACINGS: tuple[Spacing, ...] = ("linspace", "trailing")
FORMAT = 2  # of the files of a tuning that goes on
FITS = ("rows", "error", "damping", "updates", "ended")  # what is kept of each fit
STARTS = 4  # sets of levels, for each of which numbers are fitted
BEGUN = 2  # updates of each of them
POWERS = (1.0, 2.0)  # of the local error, each of which gives levels to try


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to tune. Every count is at least 1."""

    steps: int
    seeds: int = 64  # to fit to; half as many again measure the result
    updates: int = 12  # of the best numbers at most
    batch: int = 16
    least_gain: float = 0.002  # of an update, relative to the error, or it is the last

    @property
    def begun(self) -> int:
        """Updates of the numbers at each set of levels, before the best are known."""
        return min(BEGUN, self.updates)

    @property
    def measured(self) -> int:
        """The number of seeds that measure the result."""
        return -(-self.seeds // 2)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a part of the work has come."""

    part: str
    done: int
    of: int


@dataclass(slots=True)
class Tuner:
    """A tuning, which `run` makes or resumes."""

    model: Model
    recipe: Recipe
    teacher_file: Path  # for all plans of this model with as many seeds
    fit_file: Path  # for this plan, until it is done
    device: torch.device
    predict: Any = field(init=False)
    teacher: Teacher = field(init=False)
    x: Tensor = field(init=False)  # [N, C, H, W] the noise of all seeds
    by_hand: Sampling = field(init=False)  # the best that a solver makes at usual levels
    fits: list[Fit] = field(init=False)  # of the best solver at each set of levels
    fit: Fit = field(init=False)  # the best of them
    start: Sampling = field(init=False)  # what it began with

    def __post_init__(self) -> None:
        card, recipe = self.model.card, self.recipe
        self.predict = predictor(self.model)
        self.teacher = Teacher.untaught(card.process, card.shape)
        seeds = range(FIRST_SEED, FIRST_SEED + recipe.seeds + recipe.measured)
        self.x = noise(seeds, card.shape, self.device)

    @property
    def task(self) -> str:
        """What the teacher's file must be for. The numbers in the net change its pictures a little."""
        net, rows = self.model.net, short_digest(self.teacher.rows.tobytes())
        dtype = net.dtype if isinstance(net, CpuNet) else self.model.table.dtype
        return json.dumps([FORMAT, self.model.digest, self.recipe.seeds, len(self.x), rows, str(dtype)])

    @torch.inference_mode()
    def run(self) -> Iterator[Progress]:
        """Tunes, and yields the progress after each walk. Raises ModelRefused, OSError, ValueError."""
        yield from self._teach()
        yield from self._fit()

    def _teach(self) -> Iterator[Progress]:
        """Shows the teacher all seeds. Only those to fit to count for the levels."""
        teacher, known, count = self.teacher, state.load(self.teacher_file, self.task), self.recipe.seeds
        if known:
            teacher.grams, teacher.ends = known["grams"], torch.from_numpy(known["ends"])
        parts = [*self.x[:count].split(self.recipe.batch), *self.x[count:].split(self.recipe.batch)]
        for number, part in enumerate(parts):
            if len(teacher.ends) >= sum(map(len, parts[: number + 1])):
                continue
            grams = teacher.grams
            for done, _ in enumerate(teacher.teach(self.predict, part)):
                yield Progress("teacher", number * len(teacher.grid) + done + 1, len(parts) * len(teacher.grid))
            if len(teacher.ends) > count:
                teacher.grams = grams
            state.save(self.teacher_file, self.task, grams=teacher.grams, ends=teacher.ends.numpy())

    def _fit(self) -> Iterator[Progress]:
        """Chooses levels and a solver, then fits the numbers of its rows."""
        count, recipe = self.recipe.seeds, self.recipe
        choices = self._choices()
        task = f"{self.task} {short_digest(repr(choices).encode())}"
        known = state.load(self.fit_file, task)
        x, ends = self.x[:count], self.teacher.ends[:count].to(self.device)
        errors: list[float] = list(known.get("errors", ()))
        for choice in choices[len(errors) :]:
            errors.append(mean_square(self.predict, self._rows(choice), x, ends, recipe.batch))
            state.save(self.fit_file, task, errors=errors)
            yield Progress("solvers", len(errors), len(choices))
        starts = self._begin(choices, errors)
        if "rows" in known:
            kept = zip(*(known[name] for name in FITS), strict=True)
            self.fits = [Fit(rows, *(each.item() for each in others)) for rows, *others in kept]
        walks = -(-count // recipe.batch) * len(free(recipe.steps))
        most = (recipe.updates + (len(self.fits) - 1) * recipe.begun) * walks
        while (fit := self._next()) is not None:
            made, before = sum(each.updates for each in self.fits) * walks, fit.error
            for done, _ in enumerate(update(self.predict, fit, x, ends, recipe.batch)):
                yield Progress("numbers", made + min(done + 1, walks), most)
            fit.updates, fit.ended = fit.updates + 1, before - fit.error < recipe.least_gain * before
            held = {name: np.array([getattr(each, name) for each in self.fits]) for name in FITS}
            state.save(self.fit_file, task, errors=errors, **held)
        self.fit = min(self.fits, key=lambda fit: fit.error)
        self.start = starts[self.fits.index(self.fit)]

    def _begin(self, choices: list[Sampling], errors: list[float]) -> list[Sampling]:
        """The best solvers, each at levels of its own, whose rows are to be fitted: those that begin nearest to the
        teacher are not always those that end nearest to it."""
        T, best = self.model.card.process.schedule.T, dict[bytes, tuple[Sampling, float]]()
        ranked = sorted(zip(errors, range(len(choices)), strict=True))
        for error, number in ranked:
            best.setdefault(levels(T, choices[number]).tobytes(), (choices[number], error))
        starts = [*best.values()][:STARTS]
        self.fits = [Fit(self._rows(choice), error) for choice, error in starts]
        self.by_hand = next(choices[number] for _, number in ranked if choices[number].spacing is not None)
        return [choice for choice, _ in starts]

    def _next(self) -> Fit | None:
        """What to update: each fit a few times, then the one that has come nearest to the teacher."""
        new = [fit for fit in self.fits if fit.updates < self.recipe.begun and not fit.ended]
        fit = new[0] if new else min(self.fits, key=lambda fit: fit.error)
        return None if fit.ended or fit.updates >= self.recipe.updates else fit

    def _choices(self) -> list[Sampling]:
        """Solvers at levels to begin from, those at the usual levels first. All are tried with and without clamping,
        but for dynamic thresholding, which `model.tune.walk` does not compute."""
        process, steps, teacher = self.model.card.process, self.recipe.steps, self.teacher
        clips = (False,) if process.thresholding else (False, True)
        found = {
            tuple(best_levels(process, teacher.grid, gram, steps, power).tolist())
            for gram, power in product(teacher.grams[: len(clips)], POWERS)
        }
        usual = [{"steps": steps, "spacing": spacing} for spacing in SPACINGS]
        places: list[dict[str, Any]] = [*usual, *({"timesteps": each} for each in sorted(found))]
        return [
            resolve(process, name, order=order, clip=clip, **at)
            for at, (name, order), clip in product(places, SOLVERS, clips)
        ]

    def _rows(self, choice: Sampling) -> FloatArray:
        return plan(self.model.card.process, choice).rows

    @torch.inference_mode()
    def document(self) -> dict[str, Any]:
        """The plan as a file: the best of what was found, by the seeds that nothing was fitted to."""
        process, recipe = self.model.card.process, self.recipe
        x, ends = self.x[recipe.seeds :], self.teacher.ends[recipe.seeds :].to(self.device)
        rows = self.fit.rows.round(8)
        walked = rows, self._rows(self.start), self._rows(self.by_hand)
        errors = [mean_square(self.predict, each, x, ends, recipe.batch) for each in walked]
        fitted, start, by_hand = (round(error**0.5, 5) for error in errors)
        gains = fitted < min(start, by_hand)
        choice, of_its_solver = (self.start, start) if gains or start <= by_hand else (self.by_hand, by_hand)
        t = levels(process.schedule.T, choice)[:-1].tolist()
        values: dict[str, Any] = {"sampler": choice.sampler, "timesteps": t, "clip": choice.clip}
        if choice.order is not None:
            values["order"] = choice.order
        if gains:
            values |= {"columns": NAMES, "rows": rows[:, TUNED].tolist()}
        amplitudes = process.schedule.alpha_bar[t].round(8).tolist()
        told = ("sampler", "order", "spacing", "clip")
        hand = {name: value for name in told if (value := getattr(self.by_hand, name)) is not None}
        return values | {
            "process": {"T": process.schedule.T, "prediction": process.prediction, "alpha_bar": amplitudes},
            "source": f"ddpm tune, {recipe.steps} steps, {recipe.seeds} seeds, model {self.model.digest}",
            "measured": {
                "rms": fitted if gains else of_its_solver,
                "rms_of_its_solver": of_its_solver,
                "rms_by_hand": by_hand,
                "by_hand": hand,
                "to": f"dpmpp of order 2 in {len(self.teacher.grid)} steps",
                "seeds": recipe.measured,
            },
        }


def load_tuner(
    card: ModelCard,
    recipe: Recipe,
    teacher_file: Path,
    fit_file: Path,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
) -> Tuner:
    """Loads a model, computed in `dtype` by so many threads of a CPU, and begins or resumes. Raises ModelRefused."""
    torch.set_num_threads(threads)
    model = load_model(card, device, dtype)
    if isinstance(model.net, CpuNet):
        grow_up(model.net, recipe.batch)
    return Tuner(model, recipe, teacher_file, fit_file, device)

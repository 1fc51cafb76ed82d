"""Finds a plan of few steps for a model, without data: a teacher's pictures, then levels and a solver, then numbers.

All that is decided is decided on some seeds; what is told of the result is measured on others.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.card import ModelCard
from model.checkpoint.load import Model, load_model
from model.digests import short_digest
from model.nets.cpu import CpuNet, grow_up
from model.sampling.plan import levels, plan, resolve
from model.sampling.samplers import Sampling
from model.sampling.schedule import FloatArray
from model.tune import state
from model.tune.coefficients import Fit, free, mean_square, update
from model.tune.levels import best_levels
from model.tune.teacher import Teacher, unclamped
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
SPACINGS = ("linspace", "trailing")
POWERS = (1.0, 2.0)  # of the local error, each of which gives levels to try


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to tune. Every count is at least 1."""

    steps: int
    seeds: int = 64  # to fit to; half as many again measure the result
    updates: int = 12  # of the numbers at most
    batch: int = 16
    least_gain: float = 0.002  # of an update, relative to the error, or it is the last

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
    start: Sampling = field(init=False)  # the best that a solver makes
    by_hand: Sampling = field(init=False)  # the best that a solver makes at usual levels
    fit: Fit = field(init=False)

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
        return json.dumps([self.model.digest, self.recipe.seeds, len(self.x), rows, str(dtype)])

    @torch.inference_mode()
    def run(self) -> Iterator[Progress]:
        """Tunes, and yields the progress after each walk. Raises ModelRefused, OSError, ValueError."""
        yield from self._teach()
        yield from self._fit()

    def _teach(self) -> Iterator[Progress]:
        """Shows the teacher all seeds. Only those to fit to count for the levels."""
        teacher, known, count = self.teacher, state.load(self.teacher_file, self.task), self.recipe.seeds
        if known:
            teacher.gram, teacher.ends = known["gram"], torch.from_numpy(known["ends"])
        parts = [*self.x[:count].split(self.recipe.batch), *self.x[count:].split(self.recipe.batch)]
        for number, part in enumerate(parts):
            if len(teacher.ends) >= sum(map(len, parts[: number + 1])):
                continue
            gram = teacher.gram
            for done, _ in enumerate(teacher.teach(self.predict, part)):
                yield Progress("teacher", number * len(teacher.grid) + done + 1, len(parts) * len(teacher.grid))
            if len(teacher.ends) > count:
                teacher.gram = gram
            state.save(self.teacher_file, self.task, gram=teacher.gram, ends=teacher.ends.numpy())

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
        ranked = sorted(zip(errors, range(len(choices)), strict=True))
        self.start = choices[ranked[0][1]]
        self.by_hand = next(choices[number] for _, number in ranked if choices[number].spacing is not None)
        if "rows" in known:
            self.fit = Fit(known["rows"], float(known["error"]), float(known["damping"]))
        else:
            self.fit = Fit(self._rows(self.start), ranked[0][0])
        made, ended = int(known.get("updates", 0)), bool(known.get("ended", False))
        walks = -(-count // recipe.batch) * len(free(recipe.steps))
        while made < recipe.updates and not ended:
            before = self.fit.error
            for done, _ in enumerate(update(self.predict, self.fit, x, ends, recipe.batch)):
                yield Progress("numbers", made * walks + min(done + 1, walks), recipe.updates * walks)
            made, ended = made + 1, before - self.fit.error < recipe.least_gain * before
            held = {"rows": self.fit.rows, "error": self.fit.error, "damping": self.fit.damping}
            state.save(self.fit_file, task, errors=errors, updates=made, ended=ended, **held)

    def _choices(self) -> list[Sampling]:
        """Solvers at levels to begin from, those at the usual levels first."""
        process, steps, teacher = self.model.card.process, self.recipe.steps, self.teacher
        found = {tuple(best_levels(process, teacher.grid, teacher.gram, steps, power).tolist()) for power in POWERS}
        usual = [{"steps": steps, "spacing": spacing} for spacing in SPACINGS]
        places: list[dict[str, Any]] = [*usual, *({"timesteps": each} for each in sorted(found))]
        clip = unclamped(process)
        return [resolve(process, name, order=order, clip=clip, **at) for at, (name, order) in product(places, SOLVERS)]

    def _rows(self, choice: Sampling) -> FloatArray:
        return plan(self.model.card.process, choice).rows

    @torch.inference_mode()
    def document(self) -> dict[str, Any]:
        """The plan as a file: the best of what was found, by the seeds that nothing was fitted to."""
        process, recipe = self.model.card.process, self.recipe
        x, ends = self.x[recipe.seeds :], self.teacher.ends[recipe.seeds :].to(self.device)
        fitted = self.fit.rows.round(8)
        by_hand, start = self._rows(self.by_hand), self._rows(self.start)
        found = [mean_square(self.predict, rows, x, ends, recipe.batch) ** 0.5 for rows in (fitted, start, by_hand)]
        choice = self.by_hand if found[2] < min(found[:2]) else self.start
        t = levels(process.schedule.T, choice)[:-1].tolist()
        values: dict[str, Any] = {"sampler": choice.sampler, "timesteps": t, "clip": choice.clip}
        if choice.order is not None:
            values["order"] = choice.order
        if found[0] <= min(found):
            values |= {"columns": NAMES, "rows": fitted[:, TUNED].tolist()}
        amplitudes = process.schedule.alpha_bar[t].round(8).tolist()
        hand = {"sampler": self.by_hand.sampler, "order": self.by_hand.order, "spacing": self.by_hand.spacing}
        return values | {
            "process": {"T": process.schedule.T, "prediction": process.prediction, "alpha_bar": amplitudes},
            "source": f"ddpm tune, {recipe.steps} steps, {recipe.seeds} seeds, model {self.model.digest}",
            "measured": {
                "rms": round(min(found), 5),
                "rms_of_its_solver": round(found[1], 5),
                "rms_by_hand": round(found[2], 5),
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

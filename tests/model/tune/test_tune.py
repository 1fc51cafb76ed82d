"""Tuning: levels, then numbers, then a plan that a model directory can have."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import model.tune.tuner
from model.errors import ModelRefused
from model.sampling.plan import levels, plan, resolve
from model.sampling.reference import sample_alone
from model.sampling.schedule import FloatArray, Thresholding
from model.sampling.table import C, H, K, M, N
from model.tune.coefficients import Fit, free, mean_square, update
from model.tune.levels import best_levels, local_errors
from model.tune.teacher import Teacher
from model.tune.tuner import SOLVERS, SPACINGS, STARTS, Progress, Recipe, Tuner
from model.tune.walk import begin, end, noise, predictor, steps
from tests.model.tiny import CPU, PROCESS, a_plan, card, function_model, halve

GRID = np.array([30, 24, 17, 11, 6, 2])
SHAPE = card().shape
DEVIATION = 0.2  # of the data of a Gaussian world, in which all is known exactly


def seen() -> tuple[FloatArray, FloatArray]:
    """(what a teacher has seen, [2G + 1, 50], its Gram matrix)"""
    vectors = np.random.default_rng(0).normal(size=(2 * len(GRID) + 1, 50))
    return vectors, vectors @ vectors.T


def error(vectors: FloatArray, h: int | None, i: int, j: int) -> float:
    """The relative error of a step, by the row that DPM-Solver++ has for it."""
    t = [int(level) for level in (*([] if h is None else [GRID[h]]), GRID[i], *GRID[j : j + 1])]
    row = plan(PROCESS, resolve(PROCESS, "dpmpp", order=2, timesteps=t)).rows[0 if h is None else 1]
    x, x0, target = vectors[i], vectors[len(GRID) + 1 + i], vectors[j]
    before = 0.0 if h is None else row[H] * vectors[len(GRID) + 1 + h]
    return float(np.linalg.norm(row[N] * x + row[M] * x0 + before - target) / np.linalg.norm(target))


def test_local_errors_are_those_of_the_solvers_rows() -> None:
    vectors, gram = seen()
    errors, size = local_errors(PROCESS, GRID, gram), len(GRID)

    for i, j in combinations(range(size + 1), 2):
        assert errors[i, i, j] == pytest.approx(error(vectors, None, i, j))
        for h in range(i):
            assert errors[h, i, j] == pytest.approx(error(vectors, h, i, j))
    assert np.isfinite(errors).sum() == sum((i + 1) * (size - i) for i in range(size))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_no_other_levels_have_a_smaller_sum_of_errors(steps: int, power: float) -> None:
    vectors, gram = seen()

    def total(inner: tuple[int, ...]) -> float:
        at = [0, *inner, len(GRID)]
        return math.fsum(
            error(vectors, at[s - 1] if s else None, at[s], at[s + 1]) ** power for s in range(len(at) - 1)
        )

    best = min(combinations(range(1, len(GRID)), steps - 1), key=total)
    assert best_levels(PROCESS, GRID, gram, steps, power).tolist() == GRID[[0, *best]].tolist()


def gaussian_net(x: Tensor, k: int) -> Tensor:
    """The best net there can be where every pixel is Gaussian around 0."""
    alpha_bar, beta_bar = PROCESS.schedule.alpha_bar[k + 1], PROCESS.schedule.beta_bar[k + 1]
    return x * float(beta_bar / ((alpha_bar * DEVIATION) ** 2 + beta_bar**2))


def test_the_numbers_of_a_linear_world_become_exact() -> None:
    x = noise(range(6), SHAPE, CPU)
    spread = np.hypot(PROCESS.schedule.alpha_bar[-1] * DEVIATION, PROCESS.schedule.beta_bar[-1])
    ends = x * float(DEVIATION / spread)  # where the probability flow leads
    rows = a_plan(3, "dpmpp", clip=False).rows
    fit = Fit(rows, mean_square(gaussian_net, rows, x, ends, 4))
    by_hand = fit.error
    for _ in range(4):
        assert len(list(update(gaussian_net, fit, x, ends, 4))) > 2 * len(free(3))

    assert by_hand > 1e-4
    assert fit.error < 1e-8
    assert fit.error == pytest.approx(mean_square(gaussian_net, fit.rows, x, ends, 6), abs=1e-10)


def test_pictures_that_are_clamped_everywhere_leave_the_numbers_as_they_are() -> None:
    rows, x = a_plan(2, "dpmpp", clip=False).rows, noise(range(2), SHAPE, CPU)
    fit = Fit(rows, 1.0)
    list(update(lambda x, k: torch.full_like(x, -1e6), fit, x, torch.zeros_like(x), 2))

    assert (fit.rows is rows, fit.error) == (True, 1.0)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "unipc", "ipndm"])
def test_a_batch_is_walked_as_the_reference_walks_each_picture(sampler: str) -> None:
    table = a_plan(6, sampler)
    made = end(lambda x, k: halve(x, torch.tensor([float(k)])), table.rows, begin(noise([3, 8], SHAPE, CPU)))

    for picture, seed in zip(made, [3, 8], strict=True):
        *_, (x, _) = sample_alone(halve, table, seed, SHAPE)
        torch.testing.assert_close(picture, x[0].clamp(-1, 1))


def bend(x: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(x * (0.5 + 0.01 * k[:, None, None, None])) + 0.2 * torch.sin(3 * x)


def tuner(folder: Path, **recipe: int) -> Tuner:
    choice = {"steps": 3, "seeds": 4, "updates": 2, "batch": 2} | recipe
    return Tuner(function_model(bend), Recipe(**choice), folder / "teacher.npz", folder / "fit.npz", CPU)


def test_an_interrupted_tuning_ends_as_another_does(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = tuner(tmp_path / "whole")
    told = list(whole.run())

    runs = list[list[Progress]]()
    while not runs or len(runs[-1]) == 40:  # as many as an interrupted run yields
        resumed = tuner(tmp_path)
        runs.append(list(islice(resumed.run(), 40)))
    assert len(runs) > 4 and {run[0].part for run in runs if run} == {"teacher", "solvers", "numbers"}
    assert sum(map(len, runs)) < 2 * len(told)
    assert resumed.document() == whole.document()
    assert list(tuner(tmp_path).run()) == []


def test_a_teacher_holds_two_pictures_of_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, x, usual, held = Teacher.untaught(PROCESS, SHAPE), noise(range(2), SHAPE, CPU), torch.stack, list[int]()

    def stack(tensors: list[Tensor]) -> Tensor:
        held.append(sum(each.untyped_storage().nbytes() for each in tensors))
        return usual(tensors)

    monkeypatch.setattr(torch, "stack", stack)
    list(teacher.teach(gaussian_net, x))

    assert held[-1] == (2 * len(teacher.grid) + 1) * x.nbytes


def test_a_plan_is_measured_on_seeds_that_it_was_not_fitted_to(tmp_path: Path) -> None:
    tuned = tuner(tmp_path)
    assert [each.part for each in tuned.run()][-1] == "numbers"
    measured, x = tuned.document()["measured"], tuned.x[4:]

    def rms(rows: FloatArray) -> float:
        return math.sqrt(mean_square(tuned.predict, rows, x, tuned.teacher.ends[4:], 2))

    by_hand = plan(PROCESS, tuned.by_hand).rows
    assert measured["rms"] == pytest.approx(rms(tuned.fit.rows), abs=1e-5)
    assert measured["rms_by_hand"] == pytest.approx(rms(by_hand), abs=1e-5)
    assert measured["rms"] < 0.8 * measured["rms_by_hand"]


def test_a_plan_of_a_model_with_dynamic_thresholding_does_without_it_as_its_tuning_did(tmp_path: Path) -> None:
    tuned = tuner(tmp_path, updates=1)
    card = tuned.model.card
    process = replace(card.process, thresholding=Thresholding(0.9, 2.0))
    tuned = Tuner(
        replace(tuned.model, card=replace(card, process=process)),
        tuned.recipe,
        tmp_path / "teacher.npz",
        tmp_path / "fit.npz",
        CPU,
    )
    list(tuned.run())

    assert np.isinf(tuned.teacher.rows[:, C]).all() and np.isinf(tuned.fit.rows[:, C]).all()
    assert tuned.document()["clip"] is False


def test_what_is_known_of_other_seeds_is_not_used(tmp_path: Path) -> None:
    list(tuner(tmp_path, updates=1).run())

    parts = {each.part for each in tuner(tmp_path, steps=2, updates=1).run()}
    assert parts == {"solvers", "numbers"}
    parts = {each.part for each in tuner(tmp_path, seeds=6, updates=1).run()}
    assert parts == {"teacher", "solvers", "numbers"}


def test_what_another_version_knew_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(tuner(tmp_path, updates=1).run())

    monkeypatch.setattr(model.tune.tuner, "SOLVERS", SOLVERS[1:])
    assert {each.part for each in tuner(tmp_path, updates=1).run()} == {"solvers", "numbers"}
    monkeypatch.setattr(model.tune.tuner, "FORMAT", 3)
    assert {each.part for each in tuner(tmp_path, updates=1).run()} == {"teacher", "solvers", "numbers"}
    another = tuner(tmp_path, updates=1)
    another.teacher.rows = another.teacher.rows * 1.01
    assert {each.part for each in another.run()} == {"teacher", "solvers", "numbers"}


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.npz").write_bytes(b"PK not quite")

    with pytest.raises(ModelRefused, match=r"/teacher\.npz is damaged; delete it, and tuning begins anew"):
        list(tuner(tmp_path).run())

    (tmp_path / "teacher.npz").unlink()
    (tmp_path / "teacher.npz").mkdir()
    with pytest.raises(IsADirectoryError):
        list(tuner(tmp_path).run())


def test_an_empty_history_has_no_numbers_to_fit() -> None:
    every = [0, 1, 2, 3, 4]  # x0, y1, y2, y3, x
    by_row = [[0, 4], [0, 1, 4], [0, 1, 2, 4], every, every]

    assert free(5) == [(row, term) for row, terms in enumerate(by_row) for term in terms]


def test_levels_are_chosen_by_the_seeds_that_are_fitted_to(tmp_path: Path) -> None:
    tuned = tuner(tmp_path, updates=1)
    list(tuned.run())

    fitted_to = float(tuned.x[:4].double().square().sum())
    assert tuned.teacher.grams[0, 0, 0] == pytest.approx(fitted_to, rel=1e-5)
    assert len(tuned.teacher.ends) == len(tuned.x) == 6


def test_the_best_solver_at_each_set_of_levels_is_fitted_before_one_goes_on(tmp_path: Path) -> None:
    tuned = tuner(tmp_path, updates=5)
    list(tuned.run())

    visited = {tuple(t) for t in (levels(PROCESS.schedule.T, choice) for choice in tuned._choices())}
    assert len(tuned.fits) == min(len(visited), STARTS) > 2
    assert all(fit.updates == tuned.recipe.begun or fit.ended for fit in tuned.fits if fit is not tuned.fit)
    assert tuned.fit.updates > tuned.recipe.begun or tuned.fit.ended
    assert tuned.fit.error == min(fit.error for fit in tuned.fits)
    begun = mean_square(tuned.predict, plan(PROCESS, tuned.start).rows, tuned.x[:4], tuned.teacher.ends[:4], 2)
    assert tuned.fit.error < begun


@pytest.mark.parametrize("clip_range", [1.0, 0.4])
def test_a_teacher_keeps_products_of_x0_as_it_is_and_clamped(clip_range: float) -> None:
    teacher, x = Teacher.untaught(replace(PROCESS, clip_range=clip_range), SHAPE), noise(range(2), SHAPE, CPU)
    predict = predictor(function_model(bend))
    walked = [(step.after, step.terms[0].clone()) for step in steps(predict, teacher.rows, begin(x))]
    xs, x0s = torch.stack([x, *(after for after, _ in walked)]), torch.stack([x0 for _, x0 in walked])
    list(teacher.teach(predict, x))

    assert x0s.abs().max() > clip_range
    for gram, kept in zip(teacher.grams, (x0s, x0s.clamp(-clip_range, clip_range)), strict=True):
        seen = torch.cat([xs, kept]).flatten(1).double()
        np.testing.assert_allclose(gram, seen @ seen.T, rtol=1e-5, atol=1e-3)


def improving(chosen: int, factor: float = 1.0) -> Callable[..., Iterator[None]]:
    """An update that says of the fit of this number, and no other, that it comes nearer, and multiplies its m."""
    fits = list[Fit]()

    def update(predict: object, fit: Fit, *rest: object) -> Iterator[None]:
        if not any(fit is each for each in fits):
            fits.append(fit)
        if len(fits) > chosen and fit is fits[chosen]:
            fit.error *= 0.1
            fit.rows = fit.rows.copy()
            fit.rows[:, M] *= factor
        yield

    return update


def test_the_plan_is_of_the_solver_whose_numbers_were_fitted_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tune.tuner, "update", improving(2))
    tuned = tuner(tmp_path)
    told = list(tuned.run())

    assert tuned.fit is tuned.fits[2]
    np.testing.assert_array_equal(tuned.fit.rows, plan(PROCESS, tuned.start).rows)
    assert told[-1].done <= told[-1].of


def test_numbers_that_gain_nothing_on_other_seeds_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tune.tuner, "update", improving(2, 3.0))
    tuned = tuner(tmp_path)
    list(tuned.run())
    made = tuned.document()
    measured, hand = made["measured"], made["measured"]["by_hand"]

    assert not {"rows", "columns"} & made.keys()
    assert measured["rms"] == measured["rms_of_its_solver"] <= measured["rms_by_hand"]
    by_hand = resolve(PROCESS, steps=3, **hand)
    assert plan(PROCESS, by_hand).rows.tolist() == plan(PROCESS, tuned.by_hand).rows.tolist()
    best = tuned.by_hand if measured["rms"] == measured["rms_by_hand"] else tuned.start
    fields: dict[str, Any] = {name: made.get(name) for name in ("sampler", "order", "timesteps", "clip")}
    assert plan(PROCESS, resolve(PROCESS, **fields)).rows.tolist() == plan(PROCESS, best).rows.tolist()


def test_levels_come_from_what_the_teacher_saw_with_and_without_clamping(tmp_path: Path) -> None:
    tuned, draw = tuner(tmp_path), np.random.default_rng(0)
    grid = tuned.teacher.grid
    vectors = draw.normal(size=(2, 2 * len(grid) + 1, 80))
    tuned.teacher.grams = vectors @ vectors.transpose(0, 2, 1)
    wanted = {tuple(best_levels(PROCESS, grid, gram, 3, 1.0)) for gram in tuned.teacher.grams}

    assert len(wanted) == 2
    assert wanted <= {choice.timesteps for choice in tuned._choices()}


def test_the_best_solver_at_usual_levels_is_told_whether_or_not_it_clamps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = [
        plan(PROCESS, resolve(PROCESS, steps=3, spacing=each, **solver)).rows[:, K].tolist()
        for each in SPACINGS
        for solver in ({"sampler": "ddim"}, {"sampler": "unipc", "order": 2})
    ]

    def error(predict: object, rows: FloatArray, *rest: object) -> float:
        return (0.25 if np.isfinite(rows[:, C]).all() else 1.0) * (1.0 if rows[:, K].tolist() in usual else 0.25)

    monkeypatch.setattr(model.tune.tuner, "mean_square", error)
    monkeypatch.setattr(model.tune.tuner, "update", improving(9))
    tuned = tuner(tmp_path)
    list(tuned.run())
    made = tuned.document()

    assert (made["clip"], made["measured"]["by_hand"]["clip"]) == (True, True)
    assert made["measured"]["by_hand"]["spacing"] in SPACINGS
    assert (made["measured"]["rms"], made["measured"]["rms_by_hand"]) == (0.25, 0.5)

"""Plans: every one that can be asked for is usable, and on Gaussian data each sampler does what theory says."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from model.errors import PlanError
from model.sampling.levels import SPACINGS, solver_timesteps, timesteps
from model.sampling.plan import SAMPLERS, levels, resolve
from model.sampling.schedule import (
    FloatArray,
    IntArray,
    NoiseSchedule,
    Prediction,
    Process,
    Spacing,
    Variance,
    cosine,
    linear,
    su_2022,
)
from model.sampling.table import COLUMNS, A, B, C, D, E, G, H, K, M, N, P, Q, S, U, W
from tests.model.worlds import PREDICTIONS, THEIR_SPACINGS, planned

ONE_STEP: list[dict[str, Any]] = [
    {"sampler": "ddpm", "variance": "small"},
    {"sampler": "ddpm", "variance": "large"},
    {"sampler": "ddpm", "variance": "learned"},
    {"sampler": "greedy"},
    {"sampler": "ddim", "eta": 0.0},
    {"sampler": "ddim", "eta": 1.0},
]
MULTISTEP = [{"sampler": name, "order": order} for name, sampler in SAMPLERS.items() for order in sampler.orders]
EVERY_SAMPLER = ONE_STEP + MULTISTEP


@pytest.mark.parametrize("visited", [timesteps, solver_timesteps])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_n_steps_visit_n_levels_in_descending_order(visited: Callable[..., IntArray], spacing: Spacing) -> None:
    for T in (1, 2, 3, 10, 1000):
        for steps in range(1, T + 1):
            t = visited(T, steps, spacing)
            assert len(t) == steps and t[0] <= T and t[-1] >= 1 and (np.diff(t) < 0).all(), (T, steps)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, about numpy 2
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("spacing", THEIR_SPACINGS)
def test_the_levels_of_a_solver_are_those_of_diffusers(spacing: Spacing, scheduler: Any) -> None:
    """But for trailing in 62 step counts, in which they ask for a step more, and for all steps, which they repeat."""
    theirs, longer = scheduler(timestep_spacing=spacing), 0
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy() + 1
        longer += len(expected) > steps
        np.testing.assert_array_equal(solver_timesteps(1000, steps, spacing), expected[:steps], err_msg=f"{steps}")
    assert longer == (62 if spacing == "trailing" else 0)
    assert levels(1000, resolve(Process(linear()), "unipc", 5)).tolist() == [831, 665, 499, 333, 167, 0]


def test_quadratic_levels_are_those_of_ddim_until_they_would_repeat() -> None:
    for steps in range(2, 28):
        squares = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]  # ddim's runners/diffusion.py
        assert timesteps(1000, steps, "quadratic").tolist() == [1 + s for s in reversed(squares)]
    assert timesteps(1000, 1, "quadratic").tolist() == [801]
    assert timesteps(1000, 100, "quadratic")[-15:].tolist() == [16, *range(14, 0, -1)]


@pytest.mark.parametrize("spacing", THEIR_SPACINGS)
def test_the_levels_are_those_of_diffusers(spacing: Spacing) -> None:
    """But for linspace in one step, where diffusers asks the net what it sees in pure noise at the clean level."""
    theirs = DDPMScheduler(timestep_spacing=spacing)
    for steps in range(2 if spacing == "linspace" else 1, 1001):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps[:steps].numpy() + 1
        np.testing.assert_array_equal(timesteps(1000, steps, spacing), expected, err_msg=f"{steps} steps")


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2))])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [linear(), cosine()], ids=["linear", "cosine"])
def test_every_plan_that_can_be_asked_for_is_finite(schedule: NoiseSchedule, spacing: Spacing, part: int) -> None:
    processes = [Process(schedule, prediction, learned_variance=True, clip=True) for prediction in PREDICTIONS]
    for steps in (*range(1, 20), *range(20 + part, 1001, 3)):
        for process in processes[:1] if steps % 10 else processes:
            few_or_all = steps < 20 or steps % 250 in (0, 249)  # else one multistep sampler of all, in turn
            for choices in EVERY_SAMPLER if few_or_all else [*ONE_STEP, MULTISTEP[steps % len(MULTISTEP)]]:
                rows = planned(process, steps=steps, spacing=spacing, clip=True, **choices).rows
                assert np.isfinite(rows.astype(np.float32)).all(), (steps, process.prediction, choices)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("choices", EVERY_SAMPLER, ids=lambda choices: "-".join(map(str, choices.values())))
def test_the_last_step_adds_no_noise_and_the_first_has_no_predecessor(
    choices: dict[str, Any], spacing: Spacing
) -> None:
    process = Process(linear(), learned_variance=True)
    for noise in ("philox", "torch") if choices.get("variance") != "learned" else ("philox",):
        for steps in (1, 2, 10, 1000):
            rows = planned(process, steps=steps, spacing=spacing, noise=noise, **choices).rows
            assert not rows[-1, [S, U]].any() and not rows[0, [H, G, D]].any() and not rows[1:2, [G, D]].any()
            assert choices["sampler"] == "ipndm" or not rows[-1, [H, G, D]].any()  # all others end with first order


def test_noise_from_outside_takes_the_place_of_our_own() -> None:
    ours, given = (planned(Process(linear()), steps=50, noise=noise).rows for noise in ("philox", "torch"))
    np.testing.assert_array_equal(given[:, U], ours[:, S])
    assert not ours[:, U].any() and not given[:, S].any()


def test_clipping_is_the_range_the_model_was_sampled_with_or_none() -> None:
    process = Process(linear(), clip_range=2.0)
    assert set(planned(process, steps=9).rows[:, C]) == {2.0}
    assert set(planned(process, steps=9, clip=False).rows[:, C]) == {np.inf}


def test_the_whole_chain_uses_the_authors_variance_and_a_shorter_one_the_small() -> None:
    process = Process(linear(), variance="large")
    assert [resolve(process, steps=steps).variance for steps in (999, 1000)] == ["small", "large"]


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("sampler", {"sampler": "euler"}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": 1001}),
        ("variance", {"sampler": "ddim", "variance": "small"}),
        ("variance", {"variance": "learned"}),
        ("eta", {"eta": 0.5}),
        ("eta", {"sampler": "ddim", "eta": 1.5}),
        ("eta", {"sampler": "ddim", "eta": math.nan}),
        ("spacing", {"spacing": "karras"}),
        ("noise", {"noise": "numpy"}),
    ],
)
def test_a_plan_that_cannot_exist_is_refused_by_the_field_that_is_wrong(field: str, choices: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as refusal:
        resolve(Process(linear()), **choices)
    assert refusal.value.field == field


def test_a_learned_variance_has_no_noise_of_torch_to_go_with() -> None:
    learned = Process(linear(), learned_variance=True)
    asked: list[Variance | None] = [None, "learned"]
    for variance in asked:
        with pytest.raises(PlanError, match="variance must be small or large with noise torch"):
            resolve(learned, noise="torch", variance=variance)
    assert resolve(learned, noise="torch", variance="small").variance == "small"


def test_ddpm_without_clipping_is_the_random_sample_of_the_article() -> None:
    """x_{t-1} = (x_t - beta_t^2 / beta_bar_t eps) / alpha_t + sigma z (eq. 17), for any way to say what eps is."""
    schedule = su_2022()
    a, b = schedule.alpha_bar, schedule.beta_bar
    alpha = a[1:] / a[:-1]
    rows = planned(Process(schedule), steps=1000, variance="large").rows[::-1]
    weight_of_x = rows[:, M] * rows[:, P] + rows[:, N]
    weight_of_eps = rows[:, M] * rows[:, Q] + rows[:, E]
    np.testing.assert_allclose(weight_of_x, 1 / alpha, rtol=1e-9)
    np.testing.assert_allclose(weight_of_eps, -(1 - alpha**2) / (alpha * b[1:]), rtol=1e-9)
    np.testing.assert_allclose(rows[1:, S], np.sqrt(1 - alpha[1:] ** 2), rtol=1e-9)


# Data that is Gaussian with variance s^2 has a known best net, eps = beta_bar x / (alpha_bar^2 s^2 + beta_bar^2), with
# which every sampler is linear. So the variance of what it makes is a product, and no picture is needed to know it.


def optimal(schedule: NoiseSchedule, t: int, s2: float) -> float:
    """What the best net answers to x = 1."""
    a, b = schedule.alpha_bar[t], schedule.beta_bar[t]
    return float(b / (a**2 * s2 + b**2))


def variance_of(rows: FloatArray, schedule: NoiseSchedule, s2: float) -> float:
    """The variance of what these rows make of white noise. Both x and the last x0 are multiples of x_T, plus noise."""
    x, x0, noise = 1.0, 0.0, 0.0  # the multiples, and the variance of what was added
    for row in rows:
        out = optimal(schedule, int(row[K]) + 1, s2)
        seen = row[P] + row[Q] * out  # x0 as a multiple of x
        gain = row[M] * seen + row[N] + row[E] * out
        x, x0 = gain * x + row[H] * x0, seen * x
        noise = gain**2 * noise + row[S] ** 2
    return float(x**2 + noise)


def variance_in_theory(schedule: NoiseSchedule, steps: int, s2: float, name: str) -> float:
    """The same from the formulas of the papers, leading steps, in squared notation: a = alpha_bar^2."""
    total, stride = 1.0, schedule.T // steps
    squared = schedule.alpha_bar**2
    for i in reversed(range(steps)):
        a = squared[1 + i * stride]
        a_next = squared[1 + (i - 1) * stride] if i else 1.0
        alpha, beta = a / a_next, 1 - a / a_next
        eps = math.sqrt(1 - a) / (a * s2 + 1 - a)
        x0 = (1 - math.sqrt(1 - a) * eps) / math.sqrt(a)
        mean = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(alpha) * (1 - a_next) / (1 - a)
        gain, added = {
            "large": (mean, beta if i else 0.0),
            "small": (mean, (1 - a_next) / (1 - a) * beta),
            "ddim": (math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps, 0.0),
            "greedy": ((1 - beta / math.sqrt(1 - a) * eps) / math.sqrt(alpha), 0.0),
        }[name]
        total = gain**2 * total + added
    return total


CHOICES: dict[str, dict[str, Any]] = {
    "large": {"sampler": "ddpm", "variance": "large"},
    "small": {"sampler": "ddpm", "variance": "small"},
    "ddim": {"sampler": "ddim"},
    "greedy": {"sampler": "greedy"},
}
TABLE = [  # s^2, steps, and the variance made: the article's schedule, leading, no clipping
    (1.0, 1000, {"large": 0.99998, "small": 0.99116, "ddim": 0.99633, "greedy": 4e-5}),
    (1.0, 100, {"large": 0.99998, "small": 0.92168, "ddim": 0.96411, "greedy": 5e-5}),
    (1.0, 50, {"large": 0.99998, "small": 0.85749, "ddim": 0.92951, "greedy": 6e-5}),
    (1.0, 10, {"large": 0.99998, "small": 0.54849, "ddim": 0.69165, "greedy": 2.8e-4}),
    (0.25, 1000, {"large": 0.25083, "small": 0.24623, "ddim": 0.24858, "greedy": 0.0}),
    (0.25, 50, {"large": 0.26762, "small": 0.19742, "ddim": 0.22332, "greedy": 0.0}),
    (0.25, 10, {"large": 0.34657, "small": 0.11178, "ddim": 0.13997, "greedy": 2e-5}),
]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("s2", "steps", "published"), TABLE)
def test_a_sampler_makes_gaussian_data_of_the_variance_in_the_table(
    name: str, s2: float, steps: int, published: dict[str, float]
) -> None:
    schedule = su_2022()
    variance = variance_of(planned(Process(schedule), steps=steps, **CHOICES[name]).rows, schedule, s2)
    assert abs(variance - published[name]) <= 5.001e-6  # half of the last digit that is printed


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("schedule", [linear(), cosine(), su_2022()], ids=["linear", "cosine", "article"])
def test_a_sampler_makes_gaussian_data_of_the_variance_in_theory(
    schedule: NoiseSchedule, name: str, prediction: Prediction
) -> None:
    for s2, steps in ((1.0, 1000), (0.25, 300), (4.0, 7), (0.5, 1)):
        rows = planned(Process(schedule, prediction), steps=steps, **CHOICES[name]).rows
        said = as_epsilon(rows, schedule, prediction)
        assert math.isclose(
            variance_of(said, schedule, s2), variance_in_theory(schedule, steps, s2, name), rel_tol=1e-6, abs_tol=1e-12
        )


def as_epsilon(rows: FloatArray, schedule: NoiseSchedule, prediction: Prediction) -> FloatArray:
    """Rows for a net that predicts v or x0, fed by one that predicts eps: its answer is out = f x + g eps."""
    t = rows[:, K].astype(int) + 1
    a, b = schedule.alpha_bar[t], schedule.beta_bar[t]
    f, g = {"epsilon": (0 * a, 1 + 0 * a), "v_prediction": (-b / a, 1 / a), "sample": (1 / a, -b / a)}[prediction]
    said = rows.copy()
    said[:, P], said[:, Q] = rows[:, P] + rows[:, Q] * f, rows[:, Q] * g
    said[:, N], said[:, E] = rows[:, N] + rows[:, E] * f, rows[:, E] * g
    return said


def test_with_as_many_steps_dpm_solver_comes_closer_to_the_exact_solution_than_ddim() -> None:
    """The probability-flow ODE scales Gaussian noise to data exactly: by s / sqrt(alpha_bar_T^2 s^2 + beta_bar_T^2)."""
    schedule, s2 = cosine(), 0.25
    for steps in (10, 20, 50, 100):
        first, second = (
            variance_of(planned(Process(schedule), steps=steps, sampler=name, spacing="trailing").rows, schedule, s2)
            for name in ("ddim", "dpmpp_2m")
        )
        a, b = schedule.alpha_bar[-1], schedule.beta_bar[-1]
        exact = s2 / (a**2 * s2 + b**2)
        assert abs(second - exact) < 0.5 * abs(first - exact)


def error_of(sampler: str, order: int, steps: int) -> float:
    """Relative error of a solver on Gaussian data, where x is a multiple of `exact`.

    From the fifth step on, with an exact history, to the fourth from the end, so that all are of full order.
    """
    lam = np.linspace(4, -3, 20_000)
    squared = np.append(1, 1 / (1 + np.exp(-2 * lam)))
    schedule, at = NoiseSchedule(len(lam), np.sqrt(squared), np.sqrt(1 - squared)), np.linspace(0, 1, steps)
    t = np.round(len(lam) - (len(lam) - 1) * (1.3 * at - 0.3 * at**2)).astype(int)
    rows = planned(Process(schedule, "sample"), sampler, order=order, timesteps=t.tolist()).rows
    alpha_bar, exact = schedule.alpha_bar[t], np.sqrt(1 - 0.75 * schedule.alpha_bar[t] ** 2)  # data of variance 1/4
    x0s = 0.25 * alpha_bar / exact
    x, past = exact[4], [rows[i, A] * x0s[i] + rows[i, B] * exact[i] for i in (3, 2, 1)]
    for i in range(4, steps - 4):
        row, x0 = rows[i], 0.25 * alpha_bar[i] / exact[i] ** 2 * x
        of_past, past = row[[H, G, D]] @ past, [row[A] * x0 + row[B] * x, *past[:2]]
        x = row[M] * x0 + of_past + row[N] * x
    return float(abs(x / exact[steps - 4] - 1))


@pytest.mark.parametrize(
    ("sampler", "orders"),
    [
        ("dpmpp", [1, 2, 2]),  # of order 3 only by name: as published, its last term is half of what Taylor's would be
        ("deis", [1, 2, 3]),
        ("unipc", [2, 3, 4]),  # its corrector adds one
    ],
)
def test_half_the_step_leaves_as_much_of_the_error_as_the_order_says(sampler: str, orders: list[int]) -> None:
    found = [math.log2(error_of(sampler, order, 80) / error_of(sampler, order, 160)) for order in (1, 2, 3)]
    assert np.abs(np.subtract(found, orders)).max() < 0.35


def test_ddim_with_all_its_noise_is_ddpm_with_the_small_variance() -> None:
    process = Process(linear(), clip=False)
    ddim, ddpm = planned(process, "ddim", 50, eta=1.0).rows, planned(process, "ddpm", 50).rows
    for own, of_x0 in ((N, P), (E, Q)):  # what multiplies x, and what the net's answer, with x0 put in
        first, second = (rows[:, own] + rows[:, M] * rows[:, of_x0] for rows in (ddim, ddpm))
        np.testing.assert_allclose(first, second, rtol=1e-9)
    np.testing.assert_allclose(ddim[:, S], ddpm[:, S], rtol=1e-9)


def test_a_learned_variance_lies_between_the_small_and_the_large() -> None:
    process = Process(linear(), learned_variance=True)
    small, large, learned = (planned(process, steps=100, variance=v).rows[:-1] for v in ("small", "large", "learned"))
    np.testing.assert_allclose(learned[:, S] * np.exp(-learned[:, W]), small[:, S], rtol=1e-9)
    np.testing.assert_allclose(learned[:, S] * np.exp(learned[:, W]), large[:, S], rtol=1e-9)


def test_a_plan_cannot_be_written_to_and_has_a_row_a_step() -> None:
    table = planned(Process(linear()), "ddim", 4, spacing="trailing")
    assert table.rows.shape == (table.steps, len(COLUMNS)) == (4, 16)
    assert table.t.tolist() == [1000, 750, 500, 250, 0]
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 1

"""Noise schedules: the numbers of the papers, and those of diffusers to its float32."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from model.sampling.schedule import BY_NAME, NoiseSchedule, cosine, linear, su_2022


@pytest.mark.parametrize("name", BY_NAME)
def test_a_schedule_by_name_is_the_one_diffusers_has_by_that_name(name: str) -> None:
    theirs = DDPMScheduler(400, beta_start=2e-4, beta_end=0.03, beta_schedule=name)
    ours = BY_NAME[name](400, 2e-4, 0.03)
    np.testing.assert_allclose(ours.alpha_bar[1:] ** 2, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(ours.beta_bar[1:] ** 2, 1 - theirs.alphas_cumprod.numpy(), rtol=2e-3)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_step_has_the_variance_diffusers_gives_it(name: str) -> None:
    theirs = DDPMScheduler(400, beta_start=2e-4, beta_end=0.03, beta_schedule=name)
    alpha_bar = BY_NAME[name](400, 2e-4, 0.03).alpha_bar
    np.testing.assert_allclose(1 - (alpha_bar[1:] / alpha_bar[:-1]) ** 2, theirs.betas.numpy(), rtol=1e-4)


def test_the_schedule_of_the_article_is_its_equation_18() -> None:
    schedule, t = su_2022(), np.arange(1, 1001)
    alpha = schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    np.testing.assert_allclose(alpha, np.sqrt(1 - 0.02 * t / 1000), rtol=1e-12)
    assert math.isclose(math.log(schedule.alpha_bar[1000]), -5.0387, abs_tol=5e-5)


def test_ho_leaves_the_paper_s_trace_of_the_picture_at_the_end() -> None:
    assert math.isclose(linear().alpha_bar[1000], 0.006353, abs_tol=5e-7)


def test_the_cosine_schedule_is_half_way_down_in_the_middle() -> None:
    schedule = cosine()
    assert math.isclose(schedule.alpha_bar[500] ** 2, 0.4938, abs_tol=5e-5)
    assert math.isclose(1 - schedule.alpha_bar[1] ** 2, 4.13e-5, abs_tol=5e-8)
    assert math.isclose(schedule.alpha_bar[1000] ** 2, 2.4e-9, abs_tol=5e-11)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_clean_picture_has_no_noise_and_every_step_adds_some(name: str) -> None:
    schedule = BY_NAME[name](1000, 1e-4, 0.02)
    assert (schedule.T, schedule.alpha_bar[0], schedule.beta_bar[0]) == (1000, 1.0, 0.0)
    assert (np.diff(schedule.alpha_bar) < 0).all() and (np.diff(schedule.beta_bar) > 0).all()
    np.testing.assert_allclose(schedule.alpha_bar**2 + schedule.beta_bar**2, 1, rtol=1e-15)


def test_a_schedule_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        linear().alpha_bar[3] = 0.5


@pytest.mark.parametrize("variances", [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [float("nan")], [[0.1]]])
def test_variances_that_make_no_schedule_are_refused(variances: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoiseSchedule.of(variances)


def test_the_float32_tables_of_diffusers_are_the_less_exact_ones() -> None:
    """The reason for float64: 1 - alphas_cumprod[0] should be 1e-4, the first variance."""
    theirs = float(1 - DDPMScheduler().alphas_cumprod[0])
    assert abs(linear().beta_bar[1] ** 2 - 1e-4) < 1e-15 < abs(theirs - 1e-4)
    assert torch.get_default_dtype() == torch.float32

"""Multistep solvers, step by step: against their papers in float64, and against diffusers as it is.

The papers' integrals of polynomials through the history are computed by quadrature here. `test_steps` has the worlds.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from model.sampling.schedule import FloatArray
from model.sampling.table import A, D, E, G, H, M, N, P, Plan, Q
from tests.grid import grid
from tests.model.sampling.test_steps import Step, World, alphas_squared, far, half_log_snr, walk
from tests.model.worlds import PREDICTIONS, THEIR_SPACINGS, planned

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, about numpy 2

WORLDS = [World("linear", prediction, "leading", clip=True) for prediction in PREDICTIONS]
WORLDS += [World("linear", "epsilon", spacing, clip=False) for spacing in THEIR_SPACINGS]
WORLDS += [World("squaredcos_cap_v2", prediction, "trailing", clip=False) for prediction in PREDICTIONS]
STEP_COUNTS = (1, 2, 3, 7, 17)  # in fewer than 15, DPM-Solver's and DEIS's last steps are of lower order
AT, WEIGHT = np.polynomial.legendre.leggauss(40)


def every_world(*orders: int) -> pytest.MarkDecorator:
    """Worlds x orders."""
    return pytest.mark.parametrize(("world", "order"), grid(WORLDS, orders, one_in=2), ids=str)


class Past:
    """What a formula needs of a walk: all in float64, at step i and before."""

    def __init__(self, world: World, steps: list[Step], end: int = -1) -> None:
        ks = [step.k for step in steps] + [end]
        a = torch.stack([world.alpha_squared(k) for k in ks])
        self.alpha, self.sigma = a.sqrt().numpy(), (1 - a).sqrt().numpy()  # [steps + 1]
        self.lam = half_log_snr(a).numpy()  # [steps + 1], infinite at x0
        self.x = [step.x.double() for step in steps]
        self.x0 = [world.read(step.k, step.x.double(), step.out.double())[0] for step in steps]
        self.eps = [(x - a * x0) / s for x, x0, a, s in zip(self.x, self.x0, self.alpha, self.sigma, strict=False)]

    def weights(self, i: int, nodes: list[int], speed: float) -> FloatArray:
        """Of y at these steps, in the integral of exp(speed (lam_next - lam)) y(lam), the polynomial through them."""
        h, at = self.lam[i + 1] - self.lam[i], self.lam[nodes]
        lam = self.lam[i] + h * (AT + 1) / 2
        basis = [np.prod([(lam - o) / (me - o) for o in at if o != me], axis=0) for me in at]
        return np.array([(h / 2 * WEIGHT * np.exp(speed * (self.lam[i + 1] - lam)) * b).sum() for b in basis])


def order_at(i: int, steps: int, order: int, always: bool = False) -> int:
    """diffusers' `lower_order_nums`, `lower_order_final` and `lower_order_second`."""
    return min(order, i + 1, steps - i if always or steps < 15 else order)


def mixed(weights: FloatArray, values: list[Tensor]) -> Tensor:
    """The weighted sum."""
    return torch.stack([float(w) * value for w, value in zip(weights, values, strict=True)]).sum(0)


def dpmpp_steps(world: World, steps: list[Step], order: int, sde: bool) -> Iterator[Tensor]:
    """DPMSolverMultistepScheduler; order 3 of the SDE as in k-diffusion's sample_dpmpp_3m_sde with eta 1."""
    past = Past(world, steps)
    for i, step in enumerate(steps[:-1]):
        a, s, h = past.alpha[i + 1], past.sigma[i + 1], past.lam[i + 1] - past.lam[i]
        H, p, x0 = 2 * h if sde else h, order_at(i, len(steps), order), past.x0
        x = s / past.sigma[i] * np.exp(h - H) * past.x[i] + a * (1 - np.exp(-H)) * x0[i]
        if p > 1:
            r0 = (past.lam[i] - past.lam[i - 1]) / h
            d0 = (x0[i] - x0[i - 1]) / r0
        if p == 2:
            x = x + 0.5 * a * (1 - np.exp(-H)) * d0
        if p == 3:
            r1 = (past.lam[i - 1] - past.lam[i - 2]) / h
            d1 = (x0[i - 1] - x0[i - 2]) / r1
            slope, bend = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
            phi_2 = (np.exp(-H) - 1) / H + 1
            x = x + a * phi_2 * slope - a * (phi_2 / H - 0.5) * bend
        yield x + (s * np.sqrt(1 - np.exp(-2 * h)) * step.z.double() if sde else 0)
    yield past.x0[-1]


def unipc_steps(world: World, steps: list[Step], order: int) -> Iterator[Tensor]:
    """UniPCMultistepScheduler with bh2: correct the state with the new x0, then predict from the corrected state."""
    past, corrected = Past(world, steps), list[Tensor]()

    def solved(i: int, nodes: list[int]) -> Tensor:
        """From the corrected state of step i to the next level, with the polynomial through x0 at these steps."""
        integral = mixed(past.weights(i, nodes, -1), [past.x0[n] for n in nodes])
        return float(past.sigma[i + 1] / past.sigma[i]) * corrected[i] + float(past.alpha[i + 1]) * integral

    def averaged(i: int, change: Tensor) -> Tensor:
        """The same with x0 halfway to where its change leads, as they do where one difference is known."""
        weight = float(past.alpha[i + 1] * (1 - np.exp(past.lam[i] - past.lam[i + 1])))
        return float(past.sigma[i + 1] / past.sigma[i]) * corrected[i] + weight * (past.x0[i] + 0.5 * change)

    for i in range(len(steps)):
        if i == 0:
            corrected.append(past.x[0])
        elif (p := order_at(i - 1, len(steps), order, always=True)) == 1:
            corrected.append(averaged(i - 1, past.x0[i] - past.x0[i - 1]))
        else:
            corrected.append(solved(i - 1, [i - back for back in range(p + 1)]))
        p = order_at(i, len(steps), order, always=True)
        if i == len(steps) - 1:
            yield past.x0[-1]
        elif p == 2:
            r = (past.lam[i] - past.lam[i - 1]) / (past.lam[i + 1] - past.lam[i])
            yield averaged(i, (past.x0[i] - past.x0[i - 1]) / r)
        else:
            yield solved(i, [i - back for back in range(p)])


def deis_steps(world: World, steps: list[Step], order: int, end: int) -> Iterator[Tensor]:
    """DEISMultistepScheduler, which ends at timestep 0; with end -1, by its first order, at x0."""
    past = Past(world, steps, end)
    for i in range(len(steps)):
        if i == len(steps) - 1 and end < 0:
            yield past.x0[-1]
            continue
        nodes = [i - back for back in range(order_at(i, len(steps), order))]
        integral = mixed(past.weights(i, nodes, 1), [past.eps[n] for n in nodes])
        yield past.alpha[i + 1] / past.alpha[i] * past.x[i] - past.sigma[i + 1] * integral


ADAMS_BASHFORTH = {
    1: [1.0],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def ipndm_steps(world: World, steps: list[Step], order: int) -> Iterator[Tensor]:
    """IPNDMScheduler on the levels of this walk."""
    past = Past(world, steps)
    for i in range(len(steps)):
        weights = ADAMS_BASHFORTH[min(order, i + 1)]
        eps = mixed(np.array(weights), [past.eps[i - back] for back in range(len(weights))])
        x0 = (past.x[i] - past.sigma[i] * eps) / past.alpha[i]
        yield past.alpha[i + 1] * x0 + past.sigma[i + 1] * eps


def check(plan: Plan, world: World, formula: Callable[[list[Step]], Iterator[Tensor]], theirs: Any = None) -> None:
    """Each step of the walk is the formula's, and that of their scheduler at the same levels, if there is one."""
    steps = walk(world.process(), plan)
    for step, expected in zip(steps, formula(steps), strict=True):
        assert far(step.x_next, expected) < 1e-5
    if theirs is None:
        return
    theirs.set_timesteps(plan.steps)
    ks, a = plan.t[:-1] - 1, alphas_squared(world.schedule).numpy()
    sigmas = np.sqrt((1 - a) / a)
    # They compute in float32, also 1 - exp(h) and what is divided by 1e-4, unless they are given float64.
    end = sigmas[0] if isinstance(theirs, DEISMultistepScheduler) else 0.0
    theirs.timesteps, theirs.sigmas = torch.from_numpy(ks), torch.from_numpy(np.append(sigmas[ks], end))
    for step in steps:
        noise = {"variance_noise": step.z} if "sde" in getattr(theirs.config, "algorithm_type", "") else {}
        assert far(step.x_next, theirs.step(step.out.double(), step.k, step.x.double(), **noise).prev_sample) < 2e-4


def options(world: World, order: int) -> dict[str, Any]:
    """Of a solver of theirs, which clips only under the name of thresholding: with a largest value of 1 it is that."""
    return world.options() | {"solver_order": order, "thresholding": world.clip, "sample_max_value": 1.0}


@every_world(1, 2, 3)
def test_a_step_of_dpm_solver_is_that_of_the_paper_and_of_diffusers(world: World, order: int) -> None:
    for steps in STEP_COUNTS:
        plan = planned(world.process(), "dpmpp", steps, order=order, clip=world.clip)
        theirs = DPMSolverMultistepScheduler(**options(world, order))
        check(plan, world, lambda walked: dpmpp_steps(world, walked, order, sde=False), theirs)


@every_world(1, 2, 3)
def test_a_step_of_the_sde_dpm_solver_is_that_of_its_authors_and_of_diffusers(world: World, order: int) -> None:
    """But for order 3, where diffusers subtracts the half that it should add."""
    for steps in STEP_COUNTS:
        plan = planned(world.process(), "dpmpp_sde", steps, order=order, clip=world.clip)
        theirs = DPMSolverMultistepScheduler(**options(world, order), algorithm_type="sde-dpmsolver++")
        formula = lambda walked: dpmpp_steps(world, walked, order, sde=True)  # noqa: E731
        check(plan, world, formula, theirs if order < 3 or steps < 4 else None)


@every_world(1, 2, 3)
def test_a_step_of_unipc_is_that_of_the_paper_and_of_diffusers(world: World, order: int) -> None:
    for steps in STEP_COUNTS:
        plan = planned(world.process(), "unipc", steps, order=order, clip=world.clip)
        theirs = UniPCMultistepScheduler(**options(world, order))
        check(plan, world, lambda walked: unipc_steps(world, walked, order), theirs)


@every_world(1, 2, 3)
def test_a_step_of_deis_is_that_of_the_paper_and_with_their_noise_that_of_diffusers(world: World, order: int) -> None:
    for steps in STEP_COUNTS:
        plan = planned(world.process(), "deis", steps, order=order, clip=world.clip)
        check(plan, world, lambda walked: deis_steps(world, walked, order, end=-1))
        plan = planned(world.process(), "deis", steps, order=order, noise="torch", clip=world.clip)
        theirs = DEISMultistepScheduler(**options(world, order))
        check(plan, world, lambda walked: deis_steps(world, walked, order, end=0), theirs)


@every_world(1, 2, 3, 4)
def test_a_step_of_ipndm_is_that_of_the_paper(world: World, order: int) -> None:
    for steps in STEP_COUNTS:
        plan = planned(world.process(), "ipndm", steps, order=order, clip=world.clip)
        check(plan, world, lambda walked: ipndm_steps(world, walked, order))


@pytest.mark.parametrize("spacing", THEIR_SPACINGS)
def test_a_step_of_ipndm_is_that_of_diffusers_on_our_schedule(spacing: Any) -> None:
    """Theirs has a schedule of its own, sines and cosines, and reads a net that predicts v; both can be replaced."""
    world = World("squaredcos_cap_v2", "v_prediction", spacing, clip=False)
    for steps in STEP_COUNTS:
        plan = planned(world.process(), "ipndm", steps, order=4)
        walked = walk(world.process(), plan)
        past, theirs = Past(world, walked), IPNDMScheduler()
        theirs.set_timesteps(steps)
        theirs.alphas, theirs.betas = torch.from_numpy(past.alpha), torch.from_numpy(past.sigma)
        for step, t in zip(walked, theirs.timesteps, strict=True):
            assert far(step.x_next, theirs.step(step.out.double(), t, step.x.double()).prev_sample) < 2e-4


def test_a_step_of_ipndm_is_that_of_diffusers_pndm_once_it_has_started() -> None:
    world = World("linear", "epsilon", "leading", clip=False)
    for steps in STEP_COUNTS[1:]:
        walked = walk(world.process(), planned(world.process(), "ipndm", steps, order=4))
        theirs: Any = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, **world.options())
        theirs.set_timesteps(steps)
        theirs.ets, theirs.counter = [walked[0].out], 2  # it starts with two looks at the same level
        for step in walked[1:]:
            assert far(step.x_next, theirs.step_plms(step.out, step.k, step.x).prev_sample) < 2e-4


def test_first_order_is_ddim_and_with_noise_it_is_ddpm_with_the_small_variance() -> None:
    process = World("linear", "v_prediction", "leading", clip=False).process()
    levels: dict[str, Any] = {"timesteps": [1000, 700, 300, 20]}
    ddim = in_x_and_out(planned(process, "ddim", **levels))
    for sampler in ("dpmpp", "deis", "ipndm"):
        np.testing.assert_allclose(in_x_and_out(planned(process, sampler, order=1, **levels)), ddim, rtol=0, atol=1e-9)
    noisy, ddpm = planned(process, "dpmpp_sde", order=1, **levels), planned(process, "ddpm", variance="small", **levels)
    np.testing.assert_array_equal(noisy.rows[:, :A], ddpm.rows[:, :A])


def in_x_and_out(plan: Plan) -> FloatArray:
    """What each step multiplies x and the net's answer by, x0 put in. The history must not count. [2, steps]"""
    rows = plan.rows
    assert not rows[:, [H, G, D]].any()
    of_x, of_out = rows[:, N] + rows[:, M] * rows[:, P], rows[:, E] + rows[:, M] * rows[:, Q]
    return np.array([of_x, of_out], np.float64)

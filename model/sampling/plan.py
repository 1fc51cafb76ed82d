"""From a request's choices to its plan: which sampler, with which of its fields, at which levels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import get_args

import numpy as np

from model.errors import PlanError
from model.sampling.levels import SPACINGS, solver_timesteps, timesteps
from model.sampling.multistep import deis, dpmpp, dpmpp_sde, ipndm, unipc
from model.sampling.samplers import Sampling, Walk, ddim, ddpm, greedy
from model.sampling.schedule import FloatArray, IntArray, Process, Spacing, Variance
from model.sampling.table import COLUMNS, NOISES, C, K, Noise, P, Plan, Q, R, S, U

VARIANCES: tuple[Variance, ...] = get_args(Variance)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler's function, those of the optional fields that it uses, its orders, and what diffusers does with it."""

    fill: Callable[[Walk, FloatArray, Sampling], None]
    fields: frozenset[str] = frozenset()
    orders: range = range(0)  # that may be asked for; if there are any, it does not clamp unless it is told to
    order: int | None = None  # unless asked for
    solver: bool = False  # whether that scheduler has levels of its own
    end: int = 0  # the level at which that scheduler ends


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, frozenset({"variance"})),
    "greedy": Sampler(greedy),
    "ddim": Sampler(ddim, frozenset({"eta"})),
    "dpmpp": Sampler(dpmpp, orders=range(1, 4), order=2, solver=True),
    "unipc": Sampler(unipc, orders=range(1, 4), order=2, solver=True),
    "deis": Sampler(deis, orders=range(1, 4), order=2, solver=True, end=1),
    "ipndm": Sampler(ipndm, orders=range(1, 5), order=3),
    "dpmpp_sde": Sampler(dpmpp_sde, orders=range(1, 4), order=2, solver=True),
    "dpmpp_2m": Sampler(dpmpp, orders=range(2, 3), order=2, solver=True),  # dpmpp of order 2 in earlier versions
}


def resolve(
    process: Process,
    sampler: str | None = None,
    steps: int | None = None,
    *,
    plan: str | None = None,
    variance: Variance | None = None,
    eta: float | None = None,
    order: int | None = None,
    spacing: Spacing | None = None,
    timesteps: Sequence[int] | None = None,
    clip: bool | None = None,
    noise: Noise = "philox",
) -> Sampling:
    """Completes a request's choices with the checkpoint's defaults. Raises PlanError naming the field.

    plan: the name of one of the process's, which makes all other choices but the noise's
    """
    if noise not in NOISES:
        raise PlanError("noise", f"noise must be one of {', '.join(NOISES)}")
    if plan is not None:
        others: dict[str, object] = {"sampler": sampler, "steps": steps, "order": order, "spacing": spacing}
        others |= {"timesteps": timesteps, "variance": variance, "eta": eta, "clip": clip}
        return _resolve_saved(process, plan, noise, others)
    sampler = "ddpm" if sampler is None else sampler
    if sampler not in SAMPLERS:
        raise PlanError("sampler", f"sampler must be one of {', '.join(SAMPLERS)}")
    steps, spacing, chosen = _resolve_levels(process, steps, spacing, timesteps)
    variance, eta = _resolve_fields(process, sampler, steps, noise, variance, eta)
    return Sampling(
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        clip=_clips(process, sampler) if clip is None else clip,
        noise=noise,
        variance=variance,
        eta=eta,
        order=_resolve_order(sampler, order),
        timesteps=chosen,
    )


def _clips(process: Process, sampler: str) -> bool:
    """Whether x0 is clamped unless asked otherwise: as the checkpoint says, but a multistep solver does so only by
    dynamic thresholding, as in diffusers."""
    return process.clip and (process.thresholding is not None or not SAMPLERS[sampler].orders)


def _resolve_saved(process: Process, name: str, noise: Noise, others: Mapping[str, object]) -> Sampling:
    """What a plan of the process chooses. others: the fields that must not be given beside it. Raises PlanError."""
    for field, given in others.items():
        if given is not None:
            raise PlanError(field, f"{field} must be left out beside plan, which chooses it")
    if name in process.refused_plans:
        raise PlanError("plan", f"plan {name} is refused: {process.refused_plans[name]}")
    if (saved := process.plans.get(name)) is None:
        names = f"one of {', '.join(process.plans)}" if process.plans else "left out, for this model has none"
        raise PlanError("plan", f"plan must be {names}")
    choice = resolve(
        process,
        saved.sampler,
        order=saved.order,
        timesteps=saved.timesteps,
        variance=saved.variance,
        eta=saved.eta,
        clip=saved.clip,
    )
    if noise == "torch" and (choice.variance == "learned" or "w" in saved.columns):
        raise PlanError("noise", f"noise must be philox with plan {name}, which adds as much as the net has learned")
    return replace(choice, noise=noise, plan=name, plan_digest=saved.digest)


def _resolve_levels(
    process: Process, steps: int | None, spacing: Spacing | None, timesteps: Sequence[int] | None
) -> tuple[int, Spacing | None, tuple[int, ...] | None]:
    """(steps, spacing, timesteps), the spacing or the timesteps None. Raises PlanError."""
    T = process.schedule.T
    if timesteps is not None:
        chosen = _resolve_timesteps(timesteps, T, steps, spacing)
        return len(chosen), None, chosen
    steps = process.default_steps if steps is None else steps
    if not 1 <= steps <= T:
        raise PlanError("steps", f"steps must lie in 1..{T}, got {steps}")
    if spacing is not None and spacing not in SPACINGS:
        raise PlanError("spacing", f"spacing must be one of {', '.join(SPACINGS)}")
    return steps, spacing or process.spacing, None


def _resolve_fields(
    process: Process, sampler: str, steps: int, noise: Noise, variance: Variance | None, eta: float | None
) -> tuple[Variance | None, float | None]:
    """(variance, eta), each None unless the sampler uses it. Raises PlanError."""
    fields = SAMPLERS[sampler].fields
    for name, given in (("variance", variance), ("eta", eta)):
        if given is not None and name not in fields:
            owners = ", ".join(owner for owner, s in SAMPLERS.items() if name in s.fields)
            raise PlanError(name, f"{name} applies to {owners} only, not to {sampler}")
    if "variance" in fields:
        variance = _resolve_variance(process, steps, variance, noise)
    if "eta" in fields and not 0 <= (eta := 0.0 if eta is None else float(eta)) <= 1:
        raise PlanError("eta", f"eta must lie in 0..1, got {eta}")
    return variance, eta


def _resolve_timesteps(given: Sequence[int], T: int, steps: int | None, spacing: Spacing | None) -> tuple[int, ...]:
    """The given noise levels. Raises PlanError unless they are 1..T of 1..T, descending, with no other choice of levels
    beside them."""
    for name, other in (("steps", steps), ("spacing", spacing)):
        if other is not None:
            raise PlanError(name, f"{name} must be left out beside timesteps, which choose the levels")
    if not 1 <= len(given) <= T:
        raise PlanError("timesteps", f"timesteps must be 1..{T} levels, got {len(given)}")
    if wrong := [t for t in given if not 1 <= t <= T]:
        raise PlanError("timesteps", f"timesteps must lie in 1..{T}, got {wrong[0]}")
    for t, t_next in pairwise(given):
        if t <= t_next:
            raise PlanError("timesteps", f"timesteps must descend without repeats, got {t_next} behind {t}")
    return tuple(given)


def _resolve_order(sampler: str, order: int | None) -> int | None:
    """The given order, or the sampler's own. Raises PlanError."""
    orders = SAMPLERS[sampler].orders
    if order is None or order in orders:
        return SAMPLERS[sampler].order if order is None else order
    if not orders:
        owners = ", ".join(owner for owner, s in SAMPLERS.items() if s.orders)
        raise PlanError("order", f"order applies to {owners} only, not to {sampler}")
    allowed = f"lie in {orders[0]}..{orders[-1]}" if len(orders) > 1 else f"be {orders[0]}"
    raise PlanError("order", f"order must {allowed} for {sampler}, got {order}")


def _resolve_variance(process: Process, steps: int, variance: Variance | None, noise: Noise) -> Variance:
    """The given variance, or the process's, whose large one is only for the whole chain: few steps with it ruin a
    picture. Raises PlanError."""
    if variance is None:
        usual = process.variance if steps == process.schedule.T else "small"
        variance = "learned" if process.learned_variance else usual
    if variance not in VARIANCES:
        raise PlanError("variance", f"variance must be one of {', '.join(VARIANCES)}")
    if variance == "learned" and not process.learned_variance:
        raise PlanError("variance", "variance must be small or large: this net has not learned one")
    if variance == "learned" and noise == "torch":
        raise PlanError("variance", "variance must be small or large with noise torch")
    return variance


def levels(T: int, choice: Sampling) -> IntArray:
    """The noise level before each step, and at the end. -> [steps + 1]"""
    sampler = SAMPLERS[choice.sampler]
    if choice.timesteps is not None:
        t = np.array(choice.timesteps, np.int64)
    else:
        assert choice.spacing is not None
        t = (solver_timesteps if sampler.solver else timesteps)(T, choice.steps, choice.spacing)
    return np.append(t, sampler.end if choice.noise == "torch" and choice.plan is None else 0)


def stands(process: Process, choice: Sampling) -> bool:
    """Whether the plan of the process that these choices name, if they name one, is still what they were made of."""
    saved = None if choice.plan is None else process.plans.get(choice.plan)
    return choice.plan_digest == (None if saved is None else saved.digest)


def plan(process: Process, choice: Sampling) -> Plan:
    """The table for these choices, which come from `resolve`, so that such a plan exists. Raises PlanError if the plan
    that they name has changed since."""
    if not stands(process, choice):
        raise PlanError("plan", f"plan {choice.plan} is not what it was when it was chosen")
    visited = levels(process.schedule.T, choice)
    walk, rows = Walk(process, visited), np.zeros((choice.steps, len(COLUMNS)))
    rows[:, K] = visited[:-1] - 1
    rows[:, P], rows[:, Q] = walk.p, walk.q
    rows[:, C] = process.clip_range if choice.clip else np.inf
    SAMPLERS[choice.sampler].fill(walk, rows, choice)
    if choice.plan is not None and (saved := process.plans[choice.plan]).rows:
        rows[:, [COLUMNS.index(column) for column in saved.columns]] = saved.rows
    if choice.guidance is not None and choice.guided:
        high, low = choice.guidance_interval or (process.schedule.T, 1)
        rows[:, R] = np.where((visited[:-1] <= high) & (visited[:-1] >= low), choice.guidance - 1, 0)
    if choice.noise == "torch":
        rows[:, U], rows[:, S] = rows[:, S].copy(), 0.0
    rows.flags.writeable = False
    return Plan(rows, visited, choice.noise)

"""Requests, and their pictures by the slow sampler, with which those of the engine are compared."""

import numpy as np

from model.engine.events import Picture, Request
from model.engine.readout import as_bytes
from model.sampling.reference import sample_alone
from model.sampling.table import P, Plan
from tests.model.tiny import (
    ARCHITECTURE,
    T,
    a_plan,
    a_request,
    halve,
)


def alone(request: Request) -> list[tuple[Picture, Picture]]:
    """(x, x0) before the first step and after each, as pictures, by the reference sampler."""
    states = sample_alone(halve, request.plan, request.seed, ARCHITECTURE.shape)
    return [(as_bytes(x)[0].numpy(), as_bytes(x0)[0].numpy()) for x, x0 in states]


def alone_picture(request: Request) -> bytes:
    """The picture by the reference sampler."""
    return alone(request)[-1][0].tobytes()


def poisoned(steps: int = 4) -> Plan:
    """A plan in whose second step 0 times infinity occurs."""
    healthy = a_plan(steps)
    rows = healthy.rows.copy()
    rows[1, P] = np.nan
    return Plan(rows, healthy.t)


MIXED = [
    a_request("whole chain", T, seed=1),
    a_request("ddim", plan=a_plan(7, "ddim"), seed=2),
    a_request("eta", plan=a_plan(5, "ddim", eta=0.5), seed=3),
    a_request("greedy", plan=a_plan(4, "greedy"), seed=4),
    a_request("solver", plan=a_plan(6, "dpmpp_2m", clip=False), seed=5),
    a_request("large", plan=a_plan(9, variance="large"), seed=6),
    a_request("from torch", plan=a_plan(8, noise="torch"), seed=7),
    a_request("from torch, ddim", plan=a_plan(3, "ddim", eta=1.0, noise="torch"), seed=8),
    a_request("one step", plan=a_plan(1, "ddim"), seed=9),
    a_request("largest seed", 4, seed=2**63 - 1),
]

"""Samplers as tables. Everything in which two requests differ is in one row of numbers per step:

    (k, p, q, c, m, h, n, e, s, w, u, g, d, a, b, r)

and one denoising step, for every sampler, step count, prediction and clipping choice, is

    out, f = net(x, k)                                    f: the extra channels of a learned-variance net, else 0
    out = out + r (out - out without the label)           of a conditional net: classifier-free guidance
    x0  = clamp(p x + q out, -c, c)
    x'  = m x0 + h y1 + g y2 + d y3 + n x + e out + s exp(w f) z + u given
    y1, y2, y3 = a x0 + b x, y1, y2

A model with dynamic thresholding (`model.sampling.schedule.Thresholding`) divides p x + q out by a quantile of the
picture before the clamp, unless c is infinite.

The history y1, y2, y3 is what the last three steps have left for multistep solvers: each its x0, or its eps. A sampler
is a pure function of a `Walk` that fills columns (`model.sampling.samplers`, `model.sampling.multistep`); rows are
computed once, on the host, in float64.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from model.sampling.schedule import FloatArray, IntArray

Noise = Literal["philox", "torch"]
NOISES: tuple[Noise, ...] = get_args(Noise)

COLUMNS = "kpqcmhneswugdabr"
K, P, Q, C, M, H, N, E, S, W, U, G, D, A, B, R = range(16)
HISTORY = 3  # pictures in the history of a sample: y1, y2, y3


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The table that a sample walks down, one row per step."""

    rows: FloatArray  # [steps, 16]
    t: IntArray  # [steps + 1] the noise level before each step, and at the end
    noise: Noise = "philox"  # where x_T and the noise of the steps come from
    steps: int = field(init=False)
    draws: bool = field(init=False)  # whether any step adds noise that `model.sampling.noise.gaussian` draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", len(self.rows))
        object.__setattr__(self, "draws", bool(self.rows[:, S].any()))

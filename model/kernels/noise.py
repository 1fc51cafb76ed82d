"""The noise of `model.sampling.noise` in Triton's language, for the kernels that draw it. Importing this module imports
Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _box_muller(first, second):
    """Two words of 32 bits -> two independent normal numbers, each rounded to float32 from float64."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * 2.3283064365386963e-10))  # 2^-32
    angle = 6.283185307179586 * ((second.to(tl.float64) + 0.5) * 2.3283064365386963e-10)  # 2 pi u
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def gaussian(seed, step, quad, DOMAIN: tl.constexpr):
    """`model.sampling.noise.gaussian` for four adjacent elements each. quad: [Q] int32, element / 4 -> [4 Q] float32"""
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(seed, quad, zero + step.to(tl.int32), zero + DOMAIN, zero)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))

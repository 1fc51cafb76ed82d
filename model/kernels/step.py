"""The Triton kernels before and behind the net on a GPU: its arguments, the sampler's update, the cursor's step.

`model.engine.step` has in plain torch what they compute, and `model.sampling.noise` the noise. Each program computes
for one sample, and no number depends on another. Importing this module imports Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import dependent, ready
from model.kernels.noise import gaussian
from model.sampling.noise import STEP
from model.sampling.table import COLUMNS

BLOCK = 1024  # numbers in a program


@triton.jit
def _enter(
    x, rows, cursor, table, label, out, embedding, now, rows_stride, pixels, channels, width, timesteps,
    LABELLED: tl.constexpr, READ: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, inside = at % READ, at < pixels * READ  # of the picture, channels-last
    ready(DEPENDENT)
    where = x + (sample * channels + channel) * pixels + at // READ
    value = tl.load(where, mask=inside & (channel < channels), other=0.0)
    tl.store(out + sample * pixels * READ + at, value.to(out.dtype.element_ty), mask=inside)
    step = tl.load(cursor + sample)
    if tl.program_id(0) == 0:
        tl.store(now + sample, step)
    k = tl.load(rows + sample * rows_stride + step * COLUMNS).to(tl.int64)
    inside = at < width  # of a row of the table
    row = tl.load(table + k * width + at, mask=inside)
    if LABELLED:
        named = tl.load(table + (timesteps + tl.load(label + sample)) * width + at, mask=inside)
        row = (row.to(tl.float32) + named.to(tl.float32)).to(row.dtype)
    tl.store(embedding + sample * width + at, row, mask=inside)


def enter(
    x: Tensor, rows: Tensor, cursor: Tensor, table: Tensor, read: int, label: Tensor | None = None, labels: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The net's arguments and the current step: the pictures in the net's dtype, channels-last, with zeros in the
    channels that it reads beyond theirs; their rows of the table, with that of its label added to each if the net knows
    `labels`; and a copy of the cursor.

    x: [b, C, H, W], rows: [B, S + 1, 16], cursor, label: [B], table: [T + labels, W] -> [b, read, H, W], [b, W], [b]
    """
    (b, C, H, W), P = x.shape, table.shape[1]
    out = torch.empty((b, read, H, W), dtype=table.dtype, device=x.device, memory_format=torch.channels_last)
    embedding, now = torch.empty(b, P, dtype=table.dtype, device=x.device), torch.empty_like(cursor)
    grid = (triton.cdiv(max(read * H * W, P), BLOCK), b)
    _enter[grid](
        x, rows, cursor, table, cursor if label is None else label, out, embedding, now, rows.stride(0), H * W, C, P,
        len(table) - labels, LABELLED=labels > 0, READ=read, COLUMNS=len(COLUMNS), BLOCK=BLOCK,
        enable_fp_fusion=False, **dependent(x.device),
    )  # fmt: skip
    return out, embedding, now


@triton.jit
def _update(
    net_out, x, x0, given, history, scale, rows, now, cursor, last, seed, labelled, unlabelled, rows_stride, elements,
    pixels, channels, LABELLED: tl.constexpr, LEARNED: tl.constexpr, DOMAIN: tl.constexpr, COLUMNS: tl.constexpr,
    QUADS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    ready(DEPENDENT)
    step = tl.load(now + sample)
    row = rows + sample * rows_stride + step * COLUMNS  # k, p, q, c, m, h, n, e, s, w, u, g, d, a, b, r
    z = gaussian(tl.load(seed + sample), step, tl.program_id(0) * QUADS + tl.arange(0, QUADS), DOMAIN)
    at = tl.program_id(0) * (4 * QUADS) + tl.arange(0, 4 * QUADS)  # in [C, H, W]
    inside = at < elements
    outs: tl.constexpr = 2 if LEARNED else 1
    places = (at % pixels) * (channels * outs) + at // pixels  # of [H, W, C or 2 C]
    source = sample
    if LABELLED:
        source += tl.load(labelled + sample)
    net_out_of = net_out + source * elements * outs + places
    out = tl.load(net_out_of, mask=inside).to(tl.float32)
    if LEARNED:
        f = tl.load(net_out_of + channels, mask=inside).to(tl.float32)
        z *= tl.exp(tl.load(row + 9) * f)
    if LABELLED:
        source = sample + tl.load(unlabelled + sample)
        other = tl.load(net_out + source * elements * outs + places, mask=inside).to(tl.float32)
        out += tl.load(row + 15) * (out - other)
    at += sample * elements
    old = tl.load(x + at, mask=inside)
    y1 = history + 2 * sample * elements + at  # of [B, 3, C, H, W]
    y2, y3 = y1 + elements, y1 + 2 * elements
    before, earlier, earliest = tl.load(y1, mask=inside), tl.load(y2, mask=inside), tl.load(y3, mask=inside)
    limit = tl.load(row + 3)
    clean = tl.load(row + 1) * old + tl.load(row + 2) * out
    if scale is not None:
        clean = tl.div_rn(clean, tl.load(scale + sample))
    clean = tl.where(clean > limit, limit, tl.where(clean < -limit, -limit, clean))  # NaN stays NaN
    past = tl.load(row + 5) * before + tl.load(row + 11) * earlier + tl.load(row + 12) * earliest
    new = tl.load(row + 4) * clean + past + tl.load(row + 6) * old + tl.load(row + 7) * out
    new += tl.load(row + 8) * z + tl.load(row + 10) * tl.load(given + at, mask=inside)
    tl.store(x + at, new, mask=inside)
    tl.store(x0 + at, clean, mask=inside)
    tl.store(y1, tl.load(row + 13) * clean + tl.load(row + 14) * old, mask=inside)
    tl.store(y2, before, mask=inside)
    tl.store(y3, earlier, mask=inside)
    if tl.program_id(0) == 0:  # no program reads the cursor here: all read `now`
        tl.store(cursor + sample, tl.minimum(step + 1, tl.load(last + sample)))


def update(
    out: Tensor,
    x: Tensor,
    x0: Tensor,
    given: Tensor,
    history: Tensor,
    scale: Tensor | None = None,
    *,
    rows: Tensor,
    now: Tensor,
    cursor: Tensor,
    last: Tensor,
    seed: Tensor,
    labelled: Tensor | None = None,
    unlabelled: Tensor | None = None,
) -> None:
    """The sampler's step with its noise, written to x, x0 and history. Each cursor moves on by one row, or stays on the
    last. See `model.engine.step.algebra`.

    out: [b, C or 2C, H, W] the net's result, x, x0, given: [b, C, H, W], history: [B, 3, C, H, W],
    scale: [b, 1, 1, 1] of dynamic thresholding, rows: [B, S + 1, 16], now: [b] from `enter`, cursor, last, seed: [B]
    labelled, unlabelled: [B], for a conditional net: see `model.engine.slots.Slots`
    """
    b, C, H, W = x.shape
    out = out.contiguous(memory_format=torch.channels_last)
    _update[(triton.cdiv(C * H * W, BLOCK), b)](
        out, x, x0, given, history, scale, rows, now, cursor, last, seed, cursor if labelled is None else labelled,
        cursor if unlabelled is None else unlabelled, rows.stride(0), C * H * W, H * W, C,
        LABELLED=labelled is not None, LEARNED=out.shape[1] == 2 * C, DOMAIN=STEP, COLUMNS=len(COLUMNS),
        QUADS=BLOCK // 4, enable_fp_fusion=False, **dependent(x.device),
    )  # fmt: skip

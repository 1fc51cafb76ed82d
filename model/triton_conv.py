"""A convolution on a GPU as one matrix product, in which a picture's bits do not depend on the batch.

The result is a matrix with a row for every pixel of every picture and a column for every channel. A program computes a
tile of it: it walks along the product's third dimension, tap by tap and, in each tap, through the channels, always in
the same order. How large the tiles are, and in how many ranges that walk is split, follows from the layer alone
(`tiling`), where a library chooses by the whole problem. The ranges of a split walk are added up by a second kernel, in
order; there are no atomics.
Importing this module imports Triton. `model.kernels` says in plain torch what it computes.
"""

# `None` for a tensor and every UPPERCASE argument are constants of the compilation. What grows with the batch must not
# be specialised on: a batch of one would be compiled differently.

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

KNEE = 8  # pictures in the batch that layers are cut up for. Any would be right, as long as it is always the same
# Shapes of a tile, pixels by channels, and the programs that each must leave for such a batch. A large tile uses more
# often what it has read, which a full GPU needs; small ones share a small batch among more programs.
SHAPES = ((128, 128, 32), (128, 64, 32), (64, 64, 0))
FEW_PIXELS = 64  # up to which the walk is split, since there are never tiles enough,
PROGRAMS = 128  # until there are so many programs,
DEEP = 8  # but no range becomes shorter than this: a kernel that adds ranges up costs as much as several steps
MOST_SPLITS = 8
BLOCK = 1024  # numbers to a program of that kernel


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one layer is cut up."""

    pixels: int  # to a tile
    channels: int  # of the result, to a tile
    depth: int  # channels of the source that are multiplied in one step
    splits: int  # ranges of steps, each a program of its own
    warps: int
    stages: int  # steps whose numbers are under way at once


@cache
def tiling(channels: int, outs: int, pixels: int, size: int, number_bytes: int) -> Tiling:
    """How a layer is cut up: from `channels` to `outs`, for a result of so many pixels, by a kernel of size x size."""
    half = number_bytes == 2
    depth = max(16, min(64 if half else 16, triton.next_power_of_2(channels)))
    shapes = SHAPES if half else SHAPES[-1:]  # float32 is computed without matrix units, so registers are scarce
    for rows, columns, enough in shapes:
        columns = min(columns, max(16, triton.next_power_of_2(outs)))
        programs = triton.cdiv(KNEE * pixels, rows) * triton.cdiv(outs, columns)
        if programs >= enough:
            break
    steps, splits = size * size * triton.cdiv(channels, depth), 1
    while pixels <= FEW_PIXELS and programs * splits < PROGRAMS and steps >= 2 * splits * DEEP and splits < MOST_SPLITS:
        splits *= 2
    large = rows * columns == 128 * 128  # with more stages, two programs would not find room on one multiprocessor
    return Tiling(rows, columns, depth, splits, warps=8 if large else 4, stages=3 if large else 4)


@triton.jit(do_not_specialize=["rows"])
def _convolve(
    x, weight, bias, add, out, rows, height, width, pixels, out_width, outs,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TIMES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of the result; of a split walk, what one range contributes. weight: [outs, SIZE, SIZE, CHANNELS]"""
    tiles, split = tl.cdiv(outs, COLUMNS), tl.program_id(1)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS  # pixel of the batch; tiles side by side read the same ones
    row, column = tl.arange(0, ROWS), tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists, known = row < rows - first, column < outs
    sample = first // pixels  # of the first pixel; others may belong to samples that follow
    pixel = (first - sample * pixels).to(tl.int32) + row
    picture = x + (sample + pixel // pixels) * (height * width * CHANNELS)  # [ROWS] where each pixel's sample begins
    top = pixel % pixels // out_width * STRIDE - PADDING
    left = pixel % pixels % out_width * STRIDE - PADDING

    CHUNKS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    STEPS: tl.constexpr = SIZE * SIZE * CHUNKS
    LENGTH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    weights = weight + column[None, :] * (SIZE * SIZE * CHANNELS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(split * LENGTH, tl.minimum(split * LENGTH + LENGTH, STEPS)):
        tap = step // CHUNKS
        channel = step % CHUNKS * DEPTH + tl.arange(0, DEPTH)
        y, z = top + tap // SIZE, left + tap % SIZE
        within = (
            exists & (y.to(tl.uint32) < height * TIMES) & (z.to(tl.uint32) < width * TIMES)
        )  # below 0 is very large
        at = picture + (y // TIMES * width + z // TIMES) * CHANNELS
        inside, there = within[:, None], known[None, :]
        if CHANNELS % DEPTH != 0:
            inside, there = inside & (channel < CHANNELS)[None, :], there & (channel < CHANNELS)[:, None]
        source = tl.load(at[:, None] + channel[None, :], mask=inside, other=0.0)  # [ROWS, DEPTH]
        factor = tl.load(weights + (tap * CHANNELS + channel)[:, None], mask=there, other=0.0)  # [DEPTH, COLUMNS]
        total = tl.dot(source, factor, total, input_precision="ieee")

    start = (split.to(tl.int64) * rows + first) * outs
    offset, inside = row[:, None] * outs + column[None, :], exists[:, None] & known[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    if add is not None:
        total += tl.load(add + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + offset, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _add_up(parts, bias, add, out, size, outs, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The ranges of a split walk, from the first to the last, and what joins them. parts: [SPLITS, size]"""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < size - start
    total = tl.load(parts + start + offset, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + size.to(tl.int64) * split + start + offset, mask=inside, other=0.0)
    if bias is not None:
        channel = ((start % outs).to(tl.int32) + offset) % outs
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        total += tl.load(add + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + offset, total.to(out.dtype.element_ty), mask=inside)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    *,
    stride: int,
    padding: int,
    below: int = 0,
    times: int = 1,
) -> Tensor:
    """The convolution of x, plus bias, plus `add`. All channels-last, square kernels.

    x: [B, C, H, W], read as if each pixel stood there `times` x `times` times, with `padding` zeros around, and `below`
    more below and to the right; weight: [out, C, h, h], bias: [out], add: [B, out, H', W'] -> [B, out, H', W']
    """
    (B, C, H, W), (outs, _, size, _) = x.shape, weight.shape
    height, width = ((times * side + 2 * padding + below - size) // stride + 1 for side in (H, W))
    out = torch.empty(B, outs, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    matrix = weight.permute(0, 2, 3, 1).contiguous()  # which copies nothing from channels-last
    cut, rows = tiling(C, outs, height * width, size, x.element_size()), B * height * width
    grid = (triton.cdiv(rows, cut.pixels) * triton.cdiv(outs, cut.channels), cut.splits)
    shapes = (rows, H, W, height * width, width, outs)
    kind = {"CHANNELS": C, "SIZE": size, "STRIDE": stride, "PADDING": padding, "TIMES": times}
    kind |= {"ROWS": cut.pixels, "COLUMNS": cut.channels, "DEPTH": cut.depth, "SPLITS": cut.splits}
    kind |= {"num_warps": cut.warps, "num_stages": cut.stages}
    if cut.splits == 1:
        _convolve[grid](x, matrix, bias, add, out, *shapes, **kind)
        return out
    parts = torch.empty(cut.splits, rows, outs, dtype=torch.float32, device=x.device)
    _convolve[grid](x, matrix, None, None, parts, *shapes, **kind)
    _add_up[(triton.cdiv(out.numel(), BLOCK),)](
        parts, bias, add, out, out.numel(), outs, SPLITS=cut.splits, BLOCK=BLOCK
    )
    return out

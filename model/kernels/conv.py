"""A convolution on a GPU as one matrix product, in which a picture's bits do not depend on the batch.

The result is a matrix with a row for each pixel of each picture and a column for each channel. A program computes a
tile of it: it goes along the product's third dimension, tap by tap and, in each tap, through the channels, always in
the same order. Into how many ranges this reduction is split, and how deep a step is, follow from the layer alone
(`reduction`), where a library chooses by the whole problem; the bits depend on nothing else. The size of the tiles
follows from the batch as well (`tile`): small ones share a few pictures among more programs, large ones reuse more of
what they read. A trial at the start shows, layer by layer, whether tiles of two sizes give the same bits
(`model.nets.exact`); if not, one size serves every batch. The ranges of a split reduction are added up in order by a
second kernel, or by the norm behind it (`model.kernels.norm`). There are no atomics. `model.nets.convolution` has in
plain torch what it computes. Importing this module imports Triton.
"""

# A tensor that is None and all UPPERCASE arguments are constants of the compilation. Numbers that grow with the batch
# must not be specialised: a batch of one would be compiled differently.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import dependent, ready, shared_bytes

KNEE = 8  # pictures in the batch for which reductions are split and pinned tiles are chosen
PROGRAMS = 128  # about the number of a large GPU's multiprocessors: with fewer, some of them are idle
FEW_PIXELS = 64  # up to which the reduction is split, since there would be too few tiles
DEEP = 8  # the least steps in a range: adding ranges up costs as much as several steps
MOST_SPLITS = 8
MOST_BY_PIECES = 32 << 10  # the most bytes of a step that are not fetched 16 at a time
BLOCK = 1024  # numbers in a program of the kernel that adds ranges up


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of the result that one program computes, and its means. stages: steps that are fetched at a time"""

    pixels: int
    channels: int
    warps: int
    stages: int


# The largest first: a tile's reads grow with its sides and its products with its area, so that only the largest do not
# wait for memory. Two programs of 128 x 128 share a multiprocessor.
HALF = (
    Tile(128, 256, 8, 4),
    Tile(256, 128, 8, 4),
    Tile(128, 128, 8, 3),
    Tile(128, 64, 4, 4),
    Tile(64, 64, 4, 4),
    Tile(64, 32, 4, 6),
)
FULL = (Tile(64, 64, 4, 4), Tile(64, 32, 4, 4))  # without matrix units, registers are scarce


@dataclass(frozen=True, slots=True)
class Reduction:
    """The order in which a layer's products are added up. depth: channels in one step; splits: ranges of steps

    lines: whether each pixel's channels can be fetched 16 bytes at a time; if not, large tiles lack registers
    """

    depth: int
    splits: int
    lines: bool = True


@cache
def reduction(sources: tuple[int, ...], outs: int, pixels: int, size: int, number_bytes: int) -> Reduction:
    """The reduction of a layer with a result of so many pixels: by a kernel of size x size through the channels of the
    first source, and through those of the others at the pixel itself."""
    half = number_bytes == 2
    depth = max(16, min(64 if half else 16, triton.next_power_of_2(sources[0])))
    steps = (size * size - 1) * triton.cdiv(sources[0], depth) + sum(triton.cdiv(each, depth) for each in sources)
    programs, splits = triton.cdiv(KNEE * pixels, 64) * triton.cdiv(outs, 64), 1
    while pixels <= FEW_PIXELS and programs * splits < PROGRAMS and steps >= 2 * splits * DEEP and splits < MOST_SPLITS:
        splits *= 2
    return Reduction(depth, splits, lines=all(each * number_bytes % 16 == 0 for each in sources))


@cache
def tile(rows: int, outs: int, order: Reduction, number_bytes: int, room: int) -> Tile:
    """The largest tile with which a result of so many rows has enough programs, or the smallest. None is wider than the
    result, or takes more than `room` bytes of shared memory."""
    wide = max(16, triton.next_power_of_2(outs))
    shapes = HALF if number_bytes == 2 else FULL
    smallest = replace(shapes[-1], channels=min(shapes[-1].channels, wide))
    for shape in shapes:
        step = (shape.pixels + shape.channels) * order.depth * number_bytes
        programs = triton.cdiv(rows, shape.pixels) * triton.cdiv(outs, shape.channels) * order.splits
        fits = shape.channels <= wide and step * shape.stages <= room and (order.lines or step <= MOST_BY_PIECES)
        if fits and programs >= PROGRAMS:
            return shape
    return smallest


@triton.jit
def _through(
    total, source, weights, row, exists, known, first, stop,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The part of a reduction that goes through a source's channels at the pixel itself. source: [rows, CHANNELS]"""
    for step in range(first, stop):
        channel = step * DEPTH + tl.arange(0, DEPTH)
        inside, there = exists[:, None], known[None, :]
        if CHANNELS % DEPTH != 0:
            inside, there = inside & (channel < CHANNELS)[None, :], there & (channel < CHANNELS)[:, None]
        read = tl.load(source + row[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)  # [ROWS, DEPTH]
        factor = tl.load(weights + channel[:, None], mask=there, other=0.0)  # [DEPTH, COLUMNS]
        total = tl.dot(read, factor, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])
def _convolve(
    x, weight, bias, add, second, third, projection, out, rows, height, width, pixels, out_width, outs,
    CHANNELS: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TIMES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of the result, or, of a split reduction, one range's terms of it. weight: [outs, SIZE, SIZE, CHANNELS]

    second, third: [rows, SECOND] and [rows, THIRD], or None; projection: [outs, SECOND + THIRD]
    """
    tiles, split = tl.cdiv(outs, COLUMNS), tl.program_id(1)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS  # pixel of the batch; adjacent tiles read the same ones
    row, column = tl.arange(0, ROWS), tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists, known = row < rows - first, column < outs
    sample = first // pixels  # of the first pixel; the others may belong to the next samples
    pixel = (first - sample * pixels).to(tl.int32) + row
    picture = x + (sample + pixel // pixels) * (height * width * CHANNELS)  # [ROWS] the begin of each pixel's sample
    top = pixel % pixels // out_width * STRIDE - PADDING
    left = pixel % pixels % out_width * STRIDE - PADDING

    CHUNKS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    TAPS: tl.constexpr = SIZE * SIZE * CHUNKS
    BEFORE: tl.constexpr = TAPS + (SECOND + DEPTH - 1) // DEPTH
    STEPS: tl.constexpr = BEFORE + (THIRD + DEPTH - 1) // DEPTH
    LENGTH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    start, stop = split * LENGTH, tl.minimum(split * LENGTH + LENGTH, STEPS)
    weights = weight + column[None, :] * (SIZE * SIZE * CHANNELS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    ready(DEPENDENT)
    for step in range(start, tl.minimum(stop, TAPS)):
        tap = step // CHUNKS
        channel = step % CHUNKS * DEPTH + tl.arange(0, DEPTH)
        y, z = top + tap // SIZE, left + tap % SIZE
        # numbers below 0 become very large
        within = exists & (y.to(tl.uint32) < height * TIMES) & (z.to(tl.uint32) < width * TIMES)
        at = picture + (y // TIMES * width + z // TIMES) * CHANNELS
        inside, there = within[:, None], known[None, :]
        if CHANNELS % DEPTH != 0:
            inside, there = inside & (channel < CHANNELS)[None, :], there & (channel < CHANNELS)[:, None]
        source = tl.load(at[:, None] + channel[None, :], mask=inside, other=0.0)  # [ROWS, DEPTH]
        factor = tl.load(weights + (tap * CHANNELS + channel)[:, None], mask=there, other=0.0)  # [DEPTH, COLUMNS]
        total = tl.dot(source, factor, total, input_precision="ieee")
    projected = projection
    if SECOND > 0:
        projected = projection + column[None, :] * (SECOND + THIRD)
        total = _through(
            total, second + first * SECOND, projected, row, exists, known,
            tl.maximum(start, TAPS) - TAPS, tl.minimum(stop, BEFORE) - TAPS, SECOND, DEPTH,
        )  # fmt: skip
    if THIRD > 0:
        total = _through(
            total, third + first * THIRD, projected + SECOND, row, exists, known,
            tl.maximum(start, BEFORE) - BEFORE, stop - BEFORE, THIRD, DEPTH,
        )  # fmt: skip

    begin = (split.to(tl.int64) * rows + first) * outs
    offset, inside = row[:, None] * outs + column[None, :], exists[:, None] & known[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    if add is not None:
        total += tl.load(add + begin + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + begin + offset, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add_up(
    parts, bias, add, out, rows, outs, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """Adds up the ranges of a split reduction in order, the bias and `add`. parts: [SPLITS, rows, outs]"""
    start, size = tl.program_id(0).to(tl.int64) * BLOCK, rows.to(tl.int64) * outs
    offset = tl.arange(0, BLOCK)
    inside = offset < size - start
    ready(DEPENDENT)
    total = tl.load(parts + start + offset, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + size * split + start + offset, mask=inside, other=0.0)
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
    projection: Tensor | None = None,
    sources: Sequence[Tensor] = (),
    whole: bool = True,
    pinned: bool = False,
) -> Tensor:
    """The convolution of x, plus bias, `add` and a projection of some sources. All are channels-last, kernels square.

    x: [B, C, H, W], read with each pixel repeated `times` x `times` times, with `padding` zeros around and `below` more
    below and to the right; weight: [out, C, h, h], bias: [out], add: [B, out, H', W'];
    projection: [out, sum of channels, 1, 1] of one or two sources, [B, channels, H', W'] each -> [B, out, H', W']

    pinned: with tiles of one size for any batch
    whole: if false and the reduction is split, the ranges' terms in float32, without bias -> [S, B, out, H', W']
    """
    (B, C, H, W), (outs, _, size, _) = x.shape, weight.shape
    height, width = ((times * side + 2 * padding + below - size) // stride + 1 for side in (H, W))
    channels, rows = [source.shape[1] for source in sources] + [0, 0], B * height * width
    order = reduction((C, *channels[: len(sources)]), outs, height * width, size, x.element_size())
    cut = tile(KNEE * height * width if pinned else rows, outs, order, x.element_size(), shared_bytes(x.device))
    shape = (B, outs, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    matrix = weight.permute(0, 2, 3, 1).contiguous()  # which copies nothing if it is channels-last
    pictures = (*sources, None, None)[:2]
    grid = (triton.cdiv(rows, cut.pixels) * triton.cdiv(outs, cut.channels), order.splits)
    shapes = (rows, H, W, height * width, width, outs)
    kind = {"CHANNELS": C, "SECOND": channels[0], "THIRD": channels[1], "SIZE": size, "STRIDE": stride}
    kind |= {"PADDING": padding, "TIMES": times, "ROWS": cut.pixels, "COLUMNS": cut.channels, "DEPTH": order.depth}
    kind |= {"SPLITS": order.splits, "num_warps": cut.warps, "num_stages": cut.stages} | dependent(x.device)
    if order.splits == 1:
        _convolve[grid](x, matrix, bias, add, *pictures, projection, out, *shapes, **kind)
        return out
    parts = torch.empty(order.splits, rows, outs, dtype=torch.float32, device=x.device)
    _convolve[grid](x, matrix, None, None, *pictures, projection, parts, *shapes, **kind)
    if not whole:
        return parts.view(order.splits, B, height, width, outs).permute(0, 1, 4, 2, 3)
    kind = {"SPLITS": order.splits, "BLOCK": BLOCK} | dependent(x.device)
    _add_up[(triton.cdiv(out.numel(), BLOCK),)](parts, bias, add, out, rows, outs, **kind)
    return out

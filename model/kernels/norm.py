"""The Triton kernels of a net's norms and additions on a GPU. `model.nets.layers` has each in plain torch.

No program reads two samples and there are no atomics; how a reduction is split, and the order in which its parts are
added up, depend on H, W and C alone. So a sample's bits depend neither on the size of the batch nor on its slot.
Activations are channels-last: [B, H, W, C] in memory. Arithmetic is float32, whatever the storage.
Importing this module imports Triton, so it is separate from `model.nets.layers`.
"""

# A tensor that is None and all UPPERCASE arguments are constants of the compilation: an `if` about them costs nothing.
# Multiplications and additions are not fused, so that they round as in torch with any version of Triton.

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import dependent, ready

IN_REGISTERS = 16_384  # numbers of a group that one program holds: 512 threads with 32 each, in half their registers
TILE = 8192  # numbers that a program holds at a time as it walks over a larger picture
SPLITS = 64  # ranges of pixels of a larger picture's reduction; with 4 ranges of channels each they fill a GPU
SECTOR = 32  # bytes of the smallest fetch: narrower groups are read side by side, so that little of it is wasted
LINE = 32  # the least channels that a program walks over side by side: 64 bytes, so that no fetch is wasted
BLOCK = 1024  # numbers in a program where no number depends on another


@triton.jit
def _channels(first_group, groups, WIDTH: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """The channels of some groups of WIDTH channels each, and whether they exist. -> [1, GROUPS, WIDE] twice"""
    group = first_group + tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, WIDE)[None, None, :]
    return group * WIDTH + member, (group < groups) & (member < WIDTH)


@triton.jit
def _read(
    x, beside, before, time, pixel, channel, known, inside, channels, own, part,
    PARTS: tl.constexpr, MODULATES: tl.constexpr,
):  # fmt: skip
    """A tile of a picture, with the terms that are added before the norm. -> [PIXELS, GROUPS, WIDE] float32, 0 outside

    Its first `own` channels are in x, all others in `beside`. x may be PARTS pictures to add up, each `part` numbers
    behind the one before it.
    """
    if beside is None:
        value = tl.load(x + pixel * channels + channel, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(1, PARTS):
            value += tl.load(x + i * part.to(tl.int64) + pixel * channels + channel, mask=inside, other=0.0)
    else:
        value = tl.load(x + pixel * own + channel, mask=inside & (channel < own), other=0.0).to(tl.float32)
        there = pixel * (channels - own) + channel - own
        value += tl.load(beside + there, mask=inside & (channel >= own), other=0.0).to(tl.float32)
    if before is not None:
        value += tl.load(before + channel, mask=known, other=0.0).to(tl.float32)
    if time is not None:
        if not MODULATES:
            value += tl.load(time + channel, mask=known, other=0.0).to(tl.float32)
    return tl.where(inside, value, 0.0)


@triton.jit
def _write(
    out, value, weight, bias, time, pixel, channel, known, inside, channels, MODULATES: tl.constexpr, SILU: tl.constexpr
):
    """The operations behind the norm, from a tile with mean 0 and variance 1."""
    value *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    if MODULATES:
        value *= 1.0 + tl.load(time + channel, mask=known, other=0.0).to(tl.float32)
        value += tl.load(time + channels + channel, mask=known, other=0.0).to(tl.float32)
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + pixel * channels + channel, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["part"])
def _norm_in_registers(
    x, beside, out, weight, bias, before, time, time_stride, pixels, channels, own, groups, part, eps,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, MODULATES: tl.constexpr, SILU: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Norms some groups of one sample, which it reads once and writes once."""
    sample = tl.program_id(1).to(tl.int64)
    x += sample * pixels * own
    if beside is not None:
        beside += sample * pixels * (channels - own)
    out += sample * pixels * channels
    if time is not None:
        time += sample * time_stride
    channel, known = _channels(tl.program_id(0) * GROUPS, groups, WIDTH, GROUPS, WIDE)
    pixel = tl.arange(0, PIXELS)[:, None, None]
    inside = known & (pixel < pixels)  # [PIXELS, GROUPS, WIDE]
    ready(DEPENDENT)
    value = _read(x, beside, before, time, pixel, channel, known, inside, channels, own, part, PARTS, MODULATES)
    count = pixels * WIDTH
    mean = tl.sum(tl.sum(value, 2), 0) / count  # [GROUPS]
    value = tl.where(inside, value - mean[None, :, None], 0.0)
    variance = tl.sum(tl.sum(value * value, 2), 0) / count
    value *= tl.rsqrt(variance + eps)[None, :, None]
    _write(out, value, weight, bias, time, pixel, channel, known, inside, channels, MODULATES, SILU)


@triton.jit
def _moments(
    x, beside, moments, before, time, time_stride, pixels, channels, own, groups,
    WIDTH: tl.constexpr, MODULATES: tl.constexpr, SPLITS: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares around it of one range of pixels in some groups, tile by tile (Chan et al. 1979)."""
    split, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x += sample * pixels * own
    if beside is not None:
        beside += sample * pixels * (channels - own)
    if time is not None:
        time += sample * time_stride
    channel, known = _channels(tl.program_id(0) * GROUPS, groups, WIDTH, GROUPS, WIDE)
    length = tl.cdiv(pixels, SPLITS)
    first = split * length
    stop = tl.minimum(first + length, pixels)
    mean = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    ready(DEPENDENT)
    for start in range(first, stop, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[:, None, None]
        inside = known & (pixel < stop)  # [PIXELS, GROUPS, WIDE]
        value = _read(x, beside, before, time, pixel, channel, known, inside, channels, own, 0, 1, MODULATES)
        seen, here = (start - first) * WIDTH, tl.minimum(stop - start, PIXELS) * WIDTH
        mean_here = tl.sum(tl.sum(value, 2), 0) / here  # [GROUPS]
        value = tl.where(inside, value - mean_here[None, :, None], 0.0)
        delta, share = mean_here - mean, here / (seen + here)
        mean += delta * share
        squares += tl.sum(tl.sum(value * value, 2), 0) + delta * delta * (seen * share)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    at = moments + ((sample * SPLITS + split) * groups + group) * 2
    tl.store(at, mean, mask=group < groups)
    tl.store(at + 1, squares, mask=group < groups)


@triton.jit
def _norm_by_moments(
    x, beside, out, weight, bias, moments, before, time, time_stride, pixels, channels, own, groups, eps,
    WIDTH: tl.constexpr, MODULATES: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Combines the moments of all ranges, in the same order in each program, and norms one range of pixels."""
    split, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x += sample * pixels * own
    if beside is not None:
        beside += sample * pixels * (channels - own)
    out += sample * pixels * channels
    if time is not None:
        time += sample * time_stride
    length = tl.cdiv(pixels, SPLITS)
    ready(DEPENDENT)
    ranges, group = tl.arange(0, SPLITS)[:, None], tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[None, :]
    at = moments + ((sample * SPLITS + ranges) * groups + group) * 2
    means = tl.load(at, mask=group < groups, other=0.0)  # [SPLITS, GROUPS]
    squares = tl.load(at + 1, mask=group < groups, other=0.0)
    count, counts = pixels * WIDTH, tl.maximum(tl.minimum(pixels - ranges * length, length), 0) * WIDTH
    mean = tl.sum(means * counts, 0) / count  # [GROUPS]
    apart = means - mean[None, :]
    scale = tl.rsqrt(tl.sum(squares + apart * apart * counts, 0) / count + eps)

    channel, known = _channels(tl.program_id(0) * GROUPS, groups, WIDTH, GROUPS, WIDE)
    first = split * length
    stop = tl.minimum(first + length, pixels)
    for start in range(first, stop, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[:, None, None]
        inside = known & (pixel < stop)
        value = _read(x, beside, before, time, pixel, channel, known, inside, channels, own, 0, 1, MODULATES)
        value = (value - mean[None, :, None]) * scale[None, :, None]
        _write(out, value, weight, bias, time, pixel, channel, known, inside, channels, MODULATES, SILU)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    beside: Tensor | None,
    before: Tensor | None,
    time: Tensor | None,
    silu: bool,
) -> Tensor:
    """The forward pass of `model.nets.layers.GroupNorm`.

    x: [B, C, H, W] or [S, B, C, H, W], beside: [B, D, H, W], before: [C + D], time: [B, C + D] or [B, 2 (C + D)]
    -> [B, C + D, H, W]
    """
    (B, own, H, W), pixels, C = x.shape[-4:], x.shape[-1] * x.shape[-2], len(weight)
    out = torch.empty((B, C, H, W), dtype=weight.dtype, device=x.device, memory_format=torch.channels_last)
    width, wide = C // groups, triton.next_power_of_2(C // groups)
    stride, modulates = (0, False) if time is None else (time.stride(0), time.shape[1] == 2 * C)
    sizes = (before, time, stride, pixels, C, own, groups)
    kind = {"WIDTH": width, "WIDE": wide, "MODULATES": modulates, "enable_fp_fusion": False} | dependent(x.device)
    tile = triton.next_power_of_2(pixels) * wide
    if tile <= IN_REGISTERS:  # one kernel reads the picture once, and there are enough groups to fill a GPU
        side = triton.next_power_of_2(min(groups, triton.cdiv(SECTOR, width * weight.element_size())))
        while tile * side > IN_REGISTERS:
            side //= 2
        kind |= {"PIXELS": tile // wide, "GROUPS": side, "num_warps": _warps(tile * side)}
        kind |= {"PARTS": 1 if x.ndim == 4 else len(x), "SILU": silu}
        part = B * pixels * C
        _norm_in_registers[(triton.cdiv(groups, side), B)](x, beside, out, weight, bias, *sizes, part, eps, **kind)
        return out
    x = x if x.ndim == 4 else x.sum(0).to(weight.dtype).contiguous(memory_format=torch.channels_last)
    together = triton.next_power_of_2(min(groups, triton.cdiv(LINE, width)))
    at_once = max(1, min(TILE // (together * wide), triton.next_power_of_2(triton.cdiv(pixels, SPLITS))))
    kind |= {"PIXELS": at_once, "GROUPS": together, "SPLITS": SPLITS, "num_warps": _warps(at_once * together * wide)}
    moments = torch.empty(B, SPLITS, groups, 2, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(groups, together), SPLITS, B)
    _moments[grid](x, beside, moments, *sizes, **kind)
    _norm_by_moments[grid](x, beside, out, weight, bias, moments, *sizes, eps, SILU=silu, **kind)
    return out


def _warps(tile: int) -> int:
    """The number of warps for a tile of so many numbers, a power of two: at most 32 numbers per thread."""
    return max(1, min(16, tile // 512))


@triton.jit(do_not_specialize=["rows"])
def _add_bias(x, bias, other, rows, channels, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    start, size = tl.program_id(0).to(tl.int64) * BLOCK, rows.to(tl.int64) * channels
    offset = tl.arange(0, BLOCK)
    inside = offset < size - start
    ready(DEPENDENT)
    value = tl.load(x + start + offset, mask=inside).to(tl.float32)
    if bias is not None:
        channel = ((start % channels).to(tl.int32) + offset) % channels
        value += tl.load(bias + channel, mask=inside).to(tl.float32)
    if other is not None:
        value += tl.load(other + start + offset, mask=inside).to(tl.float32)
    tl.store(x + start + offset, value.to(x.dtype.element_ty), mask=inside)


def add_bias(x: Tensor, bias: Tensor | None, other: Tensor | None) -> Tensor:
    """x + bias + other, written into x. x, other: [B, C, H, W], bias: [C]"""
    size, channels = x.numel(), x.shape[1]
    grid, kind = (triton.cdiv(size, BLOCK),), {"BLOCK": BLOCK, "enable_fp_fusion": False} | dependent(x.device)
    _add_bias[grid](x, bias, other, size // channels, channels, **kind)
    return x

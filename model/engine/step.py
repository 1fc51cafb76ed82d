"""One denoising step of a batch as a function of its slots, which a GPU captures as a CUDA graph.

`model.sampling.table` explains the letters. Nothing here reads the host, branches on a request or allocates per sample.
"""

import math

import numpy as np
import torch
from torch import Tensor

from model.engine.slots import Slots
from model.nets.build import Net
from model.nets.cpu import CpuNet
from model.nets.layers import uses_triton
from model.sampling.schedule import Thresholding
from model.sampling.table import C, P, Q, R


def denoise(
    net: Net | CpuNet, table: Tensor, slots: Slots, batch: int, thresholding: Thresholding | None = None
) -> None:
    """One denoising step of the first `batch` slots, in place: by Triton kernels where they run, else by `algebra`.

    thresholding: the model's own
    """
    if not isinstance(net, CpuNet) and uses_triton(slots.x):
        return denoise_by_kernels(net, table, slots, batch, thresholding)
    with np.errstate(all="ignore"):  # the engine looks for pictures that are not finite later
        algebra(net, table, slots, batch, thresholding)


def denoise_by_kernels(
    net: Net, table: Tensor, slots: Slots, batch: int, thresholding: Thresholding | None = None
) -> None:
    """`algebra` and its noise, as one kernel before the net and one behind it."""
    from model.kernels import step as kernels

    x, cursor = slots.x[:batch], slots.cursor[:batch]  # [b, C, H, W], [b]
    picture, embedding, now = kernels.enter(x, slots.rows, cursor, table, net.reads, slots.label, net.labels)
    out, scale = net(picture, embedding), None
    if thresholding is not None:
        row = slots.rows[slots.order[:batch], now]  # [b, 16]
        p, q, c, r = row[:, [P, Q, C, R]].T[..., None, None, None]  # [b, 1, 1, 1] each
        eps = out[:, : x.shape[1]].float()
        if net.labels:
            eps, other = (eps[slots.order[:batch] + each[:batch]] for each in (slots.labelled, slots.unlabelled))
            eps = eps + r * (eps - other)
        scale = scales(p * x + q * eps, c, thresholding)
    state = {"rows": slots.rows, "cursor": cursor, "last": slots.last, "seed": slots.seed}
    if net.labels:
        state |= {"labelled": slots.labelled, "unlabelled": slots.unlabelled}
    kernels.update(out, x, slots.x0, slots.given, slots.history, scale, now=now, **state)


def scales(x0: Tensor, c: Tensor, thresholding: Thresholding) -> Tensor:
    """The number by which dynamic thresholding divides each picture's x0; 1 where c is infinite.

    x0: [b, C, H, W] not yet clamped, c: [b, 1, 1, 1] -> [b, 1, 1, 1]. Two numbers are chosen, and nothing is added up,
    so that the bits do not depend on the batch. `torch.lerp` may round by the place in a vector.
    """
    size = x0.abs().flatten(1)  # [b, N]
    rank, weight = divmod(thresholding.ratio * (size.shape[1] - 1), 1)
    largest = size.topk(size.shape[1] - int(rank)).values  # [b, N - rank] descending
    low, high = largest[:, -1], largest[:, -2:][:, 0]
    s = (low + weight * (high - low)).clamp(1, thresholding.max)
    return s.view_as(c).masked_fill(c == math.inf, 1)


def algebra(
    net: Net | CpuNet, table: Tensor, slots: Slots, batch: int, thresholding: Thresholding | None = None
) -> None:
    """One denoising step: in numpy on a CPU, in torch elsewhere."""
    at, library = slots.arrays, slots.library
    x, history, cursor = at.x[:batch], at.history[:batch], at.cursor[:batch]  # [b, C, H, W], [b, 3, C, H, W], [b]
    row = at.rows[at.order[:batch], cursor]  # [b, 16]
    k, p, q, c, m, h, n, e, s, w, u, g, d, a, b, r = row.T[..., None, None, None]  # [b, 1, 1, 1] each
    y1, y2, y3 = history[:, 0], history[:, 1], history[:, 2]  # [b, C, H, W] each
    picture = slots.x[:batch]
    if not isinstance(net, CpuNet):
        picture = picture.to(table.dtype, memory_format=torch.channels_last)
    embedding = table[slots.index(k)]  # [b, W]
    if net.labels:
        embedding = embedding + table[slots.label[:batch] - net.labels]  # the last rows of the table are the labels'
    out = slots.array(net(picture, embedding).float())  # [b, C, H, W], or [b, 2C, H, W]
    if net.labels:
        out, other = out[at.order[:batch] + at.labelled[:batch]], out[at.order[:batch] + at.unlabelled[:batch]]
    z = slots.noise(batch)
    if out.shape[1] > x.shape[1]:  # a learned variance
        out, f = out[:, : x.shape[1]], out[:, x.shape[1] :]
        z = library.exp(w * f) * z
    if net.labels:
        out = out + r * (out - other[:, : x.shape[1]])
    x0 = p * x + q * out
    if thresholding is not None:
        x0 = x0 / slots.array(scales(slots.tensor(x0), slots.tensor(c), thresholding))
    x0 = library.clip(x0, -c, c)
    y = a * x0 + b * x
    x[...] = m * x0 + (h * y1 + g * y2 + d * y3) + n * x + e * out + s * z + u * at.given[:batch]
    at.x0[:batch] = x0
    y3[...] = y2  # one after the other: torch cannot copy a tensor to memory that it overlaps
    y2[...] = y1
    y1[...] = y
    cursor[...] = library.minimum(cursor + 1, at.last[:batch])

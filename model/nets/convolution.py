"""Convolutions that add another tensor to their result, in plain torch, and the choice of what computes them.

A convolution computes in plain torch until `use` is called, once, when the net is prepared for inference on a GPU. Then
cuDNN computes it and a Triton kernel adds to it; or, where cuDNN's bits depend on the batch (`model.nets.exact`), a
Triton kernel computes all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.layers import How, channels_last, upsample, uses_triton

READ = 16  # channels that a net's first convolution reads on a GPU: fewer are not computed as a matrix product


class Conv(nn.Conv2d):
    """A convolution that can add a tensor to its result. [B, C, H, W] -> [B, out, H', W']"""

    doubled = False  # whether it reads the picture at twice its size
    below = False  # whether it reads one more row and column of zeros, below and to the right

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias, device=device)
        self.how: How = "torch"
        self._compute: Compute = _by_torch

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> "Conv":
        """A convolution without stride or padding. weight: [out, C, h, w], bias: [out]"""
        out, channels, *kernel = weight.shape
        conv = cls(channels, out, (kernel[0], kernel[1]), device="meta")
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        return conv

    def use(self, how: How) -> None:
        """Chooses what computes this layer from now on, on the device where it is. Without Triton it is torch."""
        self.how = how
        self._compute = WAYS[how] if uses_triton(self.weight) else _by_torch

    @property
    def invariant(self) -> bool:
        """Whether the chosen kernel's bits do not depend on the batch."""
        return self.how in ("invariant", "pinned")

    @property
    def joins(self) -> bool:
        """Whether it computes a projection of one or two pictures along with its own result."""
        return self.invariant and self._compute is not _by_torch

    def extra_repr(self) -> str:
        shape: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shape}, doubled={self.doubled}, below={self.below}"

    def read(self, x: Tensor) -> Tensor:
        """The whole picture that is convolved. [B, C, H, W] -> [B, C, H, W], [B, C, 2H, 2W] or [B, C, H + 1, W + 1]"""
        x = upsample(x) if self.doubled else x
        return F.pad(x, (0, 1, 0, 1)) if self.below else x

    def forward(self, x: Tensor, add: "Tensor | Projection | None" = None, *, whole: bool = True) -> Tensor:
        """add: [B, out, H', W'], or a projection with this result. If not `whole`, a convolution without a bias may
        return terms of a sum, [S, B, out, H', W'], for the norm behind it to add up"""
        if x.shape[1] < self.in_channels:  # it was widened, and the caller has the colours alone
            x = channels_last(F.pad(x, (0, 0, 0, 0, 0, self.in_channels - x.shape[1])))
        return self._compute(self, x, add, whole)

    def widen(self, channels: int) -> None:
        """Makes it read so many channels, with zero weights beyond its own. A GPU reads 32 bytes as fast as six."""
        self.weight = nn.Parameter(F.pad(self.weight, (0, 0, 0, 0, 0, channels - self.in_channels)), False)
        self.in_channels = channels

    def take_bias(self, other: "Conv") -> None:
        """Takes over the bias of another convolution, whose result is added to this one's."""
        assert self.bias is not None and other.bias is not None
        self.bias, other.bias = nn.Parameter(self.bias + other.bias, requires_grad=False), None


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A convolution of 1 x 1 whose result is to be added: the convolution that adds it may compute it as well.

    sources: one or two pictures, the channels of the second after those of the first
    """

    conv: Conv
    sources: tuple[Tensor, ...]

    @property
    def plain(self) -> bool:
        """Whether it is a matrix product and nothing else."""
        return self.conv.kernel_size == (1, 1) and self.conv.bias is None

    def compute(self) -> Tensor:
        """Its result. -> [B, out, H, W]"""
        out: Tensor = self.conv(self.sources[0] if len(self.sources) == 1 else torch.cat(self.sources, dim=1))
        return out


Compute: TypeAlias = Callable[[Conv, Tensor, Tensor | Projection | None, bool], Tensor]


def _by_torch(conv: Conv, x: Tensor, add: Tensor | Projection | None, whole: bool) -> Tensor:
    add = add.compute() if isinstance(add, Projection) else add
    out = F.conv2d(conv.read(x), conv.weight, conv.bias, conv.stride, conv.padding)
    return out if add is None else out + add


def _by_library(conv: Conv, x: Tensor, add: Tensor | Projection | None, whole: bool) -> Tensor:
    """torch would add the bias in a kernel of its own; this one kernel adds `add` as well."""
    from model.kernels import norm as kernels

    add = add.compute() if isinstance(add, Projection) else add
    out = channels_last(F.conv2d(conv.read(x), conv.weight, None, conv.stride, conv.padding))
    if conv.bias is None and add is None:
        return out
    return kernels.add_bias(out, conv.bias, None if add is None else channels_last(add))


def _by_triton(conv: Conv, x: Tensor, add: Tensor | Projection | None, whole: bool, *, pinned: bool) -> Tensor:
    from model.kernels import conv as kernels

    if isinstance(add, Projection) and not add.plain:
        add = add.compute()
    return kernels.convolve(
        channels_last(x),
        conv.weight,
        conv.bias,
        channels_last(add) if isinstance(add, Tensor) else None,
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
        below=int(conv.below),
        times=2 if conv.doubled else 1,
        projection=add.conv.weight if isinstance(add, Projection) else None,
        sources=[channels_last(source) for source in add.sources] if isinstance(add, Projection) else (),
        whole=whole or conv.bias is not None,
        pinned=pinned,
    )


WAYS: dict[How, Compute] = {
    "torch": _by_torch,
    "library": _by_library,
    "invariant": partial(_by_triton, pinned=False),
    "pinned": partial(_by_triton, pinned=True),
}

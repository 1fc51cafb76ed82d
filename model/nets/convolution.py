"""Convolutions, and what may be added to them, beside their meaning in plain torch.

On a GPU, in inference, those that were marked `invariant`, because cuDNN's bits depend on the batch
(`model.nets.exact`), are computed by Triton kernels. Where these cannot run, torch computes the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.layers import add_bias, upsample, uses_triton

READ = 16  # channels that a net's first convolution reads on a GPU: of fewer, a matrix product is not made


class Conv(nn.Conv2d):
    """A convolution that can add a tensor to its result. [B, C, H, W] -> [B, out, H', W']"""

    doubled = False  # whether it reads the picture twice as large
    below = False  # whether it reads one more pixel of zeros, below and to the right
    invariant = False  # whether, on a GPU, the kernel is used whose bits do not depend on the batch,
    pinned = False  # and whether that computes tiles of one size in every batch

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> "Conv":
        """A convolution without stride or padding. weight: [out, C, h, w], bias: [out]"""
        out, channels, *kernel = weight.shape
        conv = cls(channels, out, (kernel[0], kernel[1]), device="meta")
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        return conv

    def extra_repr(self) -> str:
        shape: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shape}, doubled={self.doubled}, below={self.below}"

    def read(self, x: Tensor) -> Tensor:
        """What is convolved, in full. [B, C, H, W] -> [B, C, H, W], [B, C, 2H, 2W] or [B, C, H + 1, W + 1]"""
        x = upsample(x) if self.doubled else x
        return F.pad(x, (0, 1, 0, 1)) if self.below else x

    def forward(self, x: Tensor, add: "Tensor | Projection | None" = None, *, whole: bool = True) -> Tensor:
        """whole: else it may give terms for the norm behind to add up, if it has no bias -> [S, B, out, H', W']"""
        if x.shape[1] < self.in_channels:  # it was widened, and who calls brings the colours alone
            x = F.pad(x, (0, 0, 0, 0, 0, self.in_channels - x.shape[1])).contiguous(memory_format=torch.channels_last)
        if self.invariant and uses_triton(x, self.weight, self.bias, *terms(add)):
            return self._by_triton(x, add, whole or self.bias is not None)
        add = add.compute() if isinstance(add, Projection) else add
        x = self.read(x)
        out: Tensor
        if uses_triton(x, self.bias):  # torch would add the bias in a kernel of its own as well
            out = F.conv2d(x, self.weight, None, self.stride, self.padding)
            return add_bias(out.contiguous(memory_format=torch.channels_last), self.bias, add)
        out = super().forward(x)
        return out if add is None else out + add

    def _by_triton(self, x: Tensor, add: "Tensor | Projection | None", whole: bool) -> Tensor:
        from model.kernels import conv as kernels

        if isinstance(add, Projection) and not add.plain:
            add = add.compute()
        return kernels.convolve(
            x,
            self.weight,
            self.bias,
            add if isinstance(add, Tensor) else None,
            stride=self.stride[0],
            padding=int(self.padding[0]),
            below=int(self.below),
            times=1 + self.doubled,
            projection=add.conv.weight if isinstance(add, Projection) else None,
            sources=add.sources if isinstance(add, Projection) else (),
            whole=whole,
            pinned=self.pinned,
        )

    def widen(self, channels: int) -> None:
        """From now on it reads so many channels, zeros beyond its own. A GPU reads 32 bytes as fast as six."""
        self.weight = nn.Parameter(F.pad(self.weight, (0, 0, 0, 0, 0, channels - self.in_channels)), False)
        self.in_channels = channels

    def take_bias(self, other: "Conv") -> None:
        """From now on this convolution adds the bias of the other, whose result is added to its own."""
        assert self.bias is not None and other.bias is not None
        self.bias, other.bias = nn.Parameter(self.bias + other.bias, requires_grad=False), None


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A convolution of 1 x 1 that is to be added: whoever adds it may compute it along with its own.

    sources: one or two pictures, whose channels stand one behind the other
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


def terms(add: Tensor | Projection | None) -> tuple[Tensor | None, ...]:
    """The tensors that somebody reads who adds this."""
    return (*add.sources, add.conv.weight) if isinstance(add, Projection) else (add,)

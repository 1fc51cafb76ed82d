"""The layers of the nets besides convolutions, each in plain torch, and the choice of what computes them.

A layer computes in plain torch until `use` is called, once, when the net is prepared for inference on a GPU. Then
Triton kernels compute the group norms, with the operations before and behind them in the same kernel, where Triton
runs on the device.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.errors import attempt
from model.kernels.gpu import raise_if_fatal

# torch: as on a CPU. library: cuDNN and torch's attention, with Triton around them. invariant: a kernel that computes
# each picture alike in every batch. pinned: the same with tiles of one size.
How: TypeAlias = Literal["torch", "library", "invariant", "pinned"]
TRITON_ON = frozenset({"cuda"})  # the types of device on which Triton is tried; if empty, torch computes everything
TRITON_STORES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device, found out once by running the smallest."""

    def smallest() -> None:
        from model.kernels import norm as kernels

        kernels.add_bias(torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, device=device), None)

    if (error := attempt(smallest)) is not None:  # a package, a compiler, a cache or a driver may be missing
        raise_if_fatal(error, device)
        reason = f"{type(error).__name__}: {error}"
        logger.warning("no Triton on %s, so steps are slower there (it needs gcc and Python.h): %s", device, reason)
        return False
    return True


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton computes with tensors of this device and dtype."""
    device = tensor.device
    if device.type not in TRITON_ON or tensor.dtype not in TRITON_STORES:
        return False
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton would launch on the other
        return False
    return _triton_works(device)


def channels_last(x: Tensor) -> Tensor:
    """The same picture as the kernels read it, which is most often itself. x: [B, C, H, W]"""
    return x.contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, with an addition before it and a modulation and SiLU behind it."""

    before: nn.Parameter | None  # [C] is added to x: the bias of the convolution before, if it was taken over

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__(groups, channels, eps)
        self.register_parameter("before", None)
        self._compute = _norm_by_torch

    def use(self, how: How) -> None:
        """Chooses what computes this layer from now on, on the device where it is."""
        self._compute = _norm_by_torch if how == "torch" or not uses_triton(self.weight) else _norm_by_triton

    def take_bias(self, conv: nn.Conv2d) -> None:
        """Takes over the bias of the convolution before: from now on this norm adds it."""
        assert isinstance(conv.bias, nn.Parameter)
        self.before, conv.bias = conv.bias, None

    def forward(
        self, x: Tensor, time: Tensor | None = None, silu: bool = False, *, beside: Tensor | None = None
    ) -> Tensor:
        """x: [B, C, H, W], or terms of a sum, [S, B, C, H, W]; beside: [B, D, H, W], whose channels follow those of x;
        time: [B, C], which is added to x, or [B, 2C], which scales and shifts the normed picture -> [B, C + D, H, W]"""
        return self._compute(self, x, time, silu, beside)


def _norm_by_triton(norm: GroupNorm, x: Tensor, time: Tensor | None, silu: bool, beside: Tensor | None) -> Tensor:
    from model.kernels import norm as kernels

    x, beside = x if x.ndim == 5 else channels_last(x), None if beside is None else channels_last(beside)
    affine = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    return kernels.group_norm(x, *affine, beside=beside, before=norm.before, time=time, silu=silu)


def _norm_by_torch(norm: GroupNorm, x: Tensor, time: Tensor | None, silu: bool, beside: Tensor | None) -> Tensor:
    x = x if x.ndim == 4 else x.sum(0).to(norm.weight.dtype)
    x = x if beside is None else torch.cat([x, beside], dim=1)
    x = x if norm.before is None else x + norm.before[:, None, None]
    scale = shift = None
    if time is not None:
        time = time[:, :, None, None]
        if time.shape[1] == x.shape[1]:
            x = x + time
        else:
            scale, shift = time.chunk(2, dim=1)
    out = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    out = out if scale is None or shift is None else out * (1 + scale) + shift
    return F.silu(out) if silu else out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v. q, k, v: [B, heads, L, d] -> [B, heads, L, d]"""
    if q.requires_grad:  # the fused kernel's backward pass is slow on a CPU
        return torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def invariant_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by kernels that give each block of queries to one program in any batch. The others may divide a query's
    keys among several programs when the batch is too small to fill the GPU."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return attention(q, k, v)


class SelfAttention(nn.Module):
    """Attention of each pixel to all pixels of its picture. [B, 3C, H, W] queries, keys, values -> [B, C, H, W]

    memory: [2, heads, M, d], keys and values that are the same for every picture and come before its own
    """

    def __init__(self, heads: int, memory: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.invariant = heads, False
        self.memory = None if memory is None else nn.Parameter(memory)
        self._attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention

    def use(self, how: How) -> None:
        """Chooses what computes this layer from now on."""
        self.invariant = how in ("invariant", "pinned")
        self._attend = invariant_attention if self.invariant else attention

    def extra_repr(self) -> str:
        return f"heads={self.heads}, memories={0 if self.memory is None else self.memory.shape[2]}"

    def forward(self, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        parts = h.permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, C // (3 * self.heads))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, heads, H W, d] each
        if self.memory is not None:
            before = self.memory[:, None].expand(2, B, -1, -1, -1)  # [2, B, heads, M, d]
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        return self._attend(q, k, v).transpose(1, 2).reshape(B, H, W, C // 3).permute(0, 3, 1, 2)


class Timed(Protocol):
    """A block that reads its own columns of the table of timestep embeddings."""

    share: slice


def assign_columns(blocks: Sequence[Timed], widths: Sequence[int]) -> int:
    """Gives each block as many columns of the table as it needs, and returns the number of all columns."""
    start = 0
    for block, width in zip(blocks, widths, strict=True):
        block.share = slice(start, start + width)
        start += width
    return start


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times. [B, C, H, W] -> [B, C, 2H, 2W]"""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")

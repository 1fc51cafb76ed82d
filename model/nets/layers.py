"""The operations the U-Net is made of besides convolutions, each beside its meaning in plain torch; and where Triton
computes.

On a GPU, in inference, Triton kernels compute the norms with what stands around them and what is added to a
convolution. Where they cannot run, torch computes the same.
"""

import logging
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.nets.gpu import raise_if_fatal

TRITON_ON = frozenset({"cuda"})  # the types of device that Triton's kernels are tried on; if empty, torch does it all
TRITON_STORES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: found out once, by running the smallest."""
    try:
        from model.kernels import norm as kernels

        kernels.add_bias(torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, device=device), None)
    except Exception as error:  # a package, a compiler, a cache or a driver: each lacks in its own way, none is needed
        raise_if_fatal(error, device)
        reason = f"{type(error).__name__}: {error}"
        logger.warning("no Triton on %s, so steps are slower there (it needs gcc and Python.h): %s", device, reason)
        return False
    return True


def uses_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton computes with these tensors: in inference, on the current GPU, channels-last, all of one dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    device, pictures = given[0].device, [tensor for tensor in given if tensor.ndim == 4]
    if device.type not in TRITON_ON or torch.is_grad_enabled():
        return False
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton would launch on the other
        return False
    return (
        given[0].dtype in TRITON_STORES
        and all(tensor.dtype == given[0].dtype for tensor in given)
        and all(picture.is_contiguous(memory_format=torch.channels_last) for picture in pictures)
        and all(picture[0].numel() < 2**31 for picture in pictures)  # offsets within one are int32
        and _triton_works(device)
    )


def add_bias(x: Tensor, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
    """x + bias + other, in one pass; x may be overwritten. x, other: [B, C, H, W], bias: [C]"""
    if bias is None and other is None:
        return x
    if uses_triton(x, bias, other):
        from model.kernels import norm as kernels

        return kernels.add_bias(x, bias, other)
    x = x if bias is None else x + bias[:, None, None]
    return x if other is None else x + other


class GroupNorm(nn.GroupNorm):
    """Group normalisation, with what may stand around it: an addition before, a modulation and SiLU behind."""

    before: nn.Parameter | None  # [C] joins x: the bias of the convolution that x comes from, once it has been taken

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__(groups, channels, eps)
        self.register_parameter("before", None)

    def take_bias(self, conv: nn.Conv2d) -> None:
        """From now on this norm adds the bias of the convolution it follows."""
        assert isinstance(conv.bias, nn.Parameter)
        self.before, conv.bias = conv.bias, None

    def forward(
        self, x: Tensor, time: Tensor | None = None, silu: bool = False, *, beside: Tensor | None = None
    ) -> Tensor:
        """x: [B, C, H, W], or [S, B, C, H, W] to be added up first; beside: [B, D, H, W], whose channels stand behind
        those of x; time: [B, C], which joins x, or [B, 2C], which scales and shifts what is normed"""
        if uses_triton(self.weight, time, beside, x if x.ndim == 4 else None):
            from model.kernels import norm as kernels

            affine = (self.num_groups, self.weight, self.bias, self.eps)
            return kernels.group_norm(x, *affine, beside=beside, before=self.before, time=time, silu=silu)
        x = x if x.ndim == 4 else x.sum(0).to(self.weight.dtype)
        x = x if beside is None else torch.cat([x, beside], dim=1)
        x = x if self.before is None else x + self.before[:, None, None]
        if time is None:
            return self._norm(x, silu)
        time = time[:, :, None, None]
        if time.shape[1] == x.shape[1]:
            return self._norm(x + time, silu)
        scale, shift = time.chunk(2, dim=1)
        out = self._norm(x, silu=False) * (1 + scale) + shift
        return F.silu(out) if silu else out

    def _norm(self, x: Tensor, silu: bool) -> Tensor:
        out = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(out) if silu else out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v. q, k, v: [B, heads, L, d] -> [B, heads, L, d]"""
    if q.requires_grad:  # the fused kernel's backward pass is slow on a CPU
        return torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Each pixel's query to all pixels of its picture. [B, 3C, H, W], queries, keys, values -> [B, C, H, W]

    memory: [2, heads, M, d], keys and values that are the same for every picture and stand before its own
    """

    # Whether, on a GPU, torch may use no kernel but one that gives each block of queries to one program, for any batch.
    # The others may share a query's keys among several when the batch is too small to fill the GPU.
    invariant = False

    def __init__(self, heads: int, memory: Tensor | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.memory = None if memory is None else nn.Parameter(memory)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, memories={0 if self.memory is None else self.memory.shape[2]}"

    def forward(self, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        parts = h.permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, C // (3 * self.heads))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, heads, H W, d] each
        if self.memory is not None:
            before = self.memory[:, None].expand(2, B, -1, -1, -1)  # [2, B, heads, M, d]
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        if self.invariant:
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                out = attention(q, k, v)
        else:
            out = attention(q, k, v)
        return out.transpose(1, 2).reshape(B, H, W, C // 3).permute(0, 3, 1, 2)


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times. [B, C, H, W] -> [B, C, 2H, 2W]"""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")

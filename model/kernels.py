"""The operations the U-Net is made of, each with its meaning in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Conv2d):
    """A convolution that can add a tensor to its result. [B, C, H, W] -> [B, out, H', W']"""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if add is None else out + add


class GroupNorm(nn.GroupNorm):
    """Group normalisation, perhaps followed by SiLU. [B, C, H, W] -> [B, C, H, W]"""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        out = super().forward(x)
        return F.silu(out) if silu else out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v. q, k, v: [B, heads, L, d] -> [B, heads, L, d]"""
    if q.requires_grad:  # the fused kernel's backward pass is slow on a CPU
        return torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times. [B, C, H, W] -> [B, C, 2H, 2W]"""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")

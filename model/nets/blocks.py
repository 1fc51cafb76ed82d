"""The blocks of Ho's U-Net: residual blocks, attention, changes of size, and the levels that are made of them.

Names of attributes are those of diffusers' `UNet2DModel`, so that its state dicts fit.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.config import ATTENTION, DOWN_BLOCKS, RESNET, UP_BLOCKS, Architecture
from model.nets.convolution import Conv, Projection
from model.nets.layers import GroupNorm, SelfAttention, upsample


class Resnet(nn.Module):
    """Residual block: norm, SiLU, convolution, twice, with the timestep in the second norm.

    [B, C, H, W] -> [B, out, H', W']
    """

    def __init__(
        self, arch: Architecture, channels: int, out: int, *, down: bool = False, up: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        embedding = arch.embedding_dim
        shares = 2 if arch.resnet_time_scale_shift == "scale_shift" else 1
        self.down, self.up, self.scale = down, up, scale
        self.norm1 = GroupNorm(arch.norm_num_groups, channels, arch.norm_eps)
        self.conv1 = Conv(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out * shares)
        self.norm2 = GroupNorm(arch.norm_num_groups, out, arch.norm_eps)
        self.conv2 = Conv(out, out, 3, padding=1)
        self.conv_shortcut = Conv(channels, out, 1) if channels != out else None
        self.share = slice(0)  # this block's columns of the embedding table

    def forward(self, x: Tensor, embedding: Tensor, beside: Tensor | None = None) -> Tensor:
        """beside: [B, C', H, W], whose channels follow those of x"""
        if beside is not None and not self._reads_both:
            x, beside = torch.cat([x, beside], dim=1), None
        h = self.norm1(x, silu=True, beside=beside)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.up:
            h, x = upsample(h), upsample(x)
        h = self.norm2(self.conv1(h, whole=False), embedding[:, self.share], silu=True)
        sources = (x,) if beside is None else (x, beside)
        out: Tensor = self.conv2(h, add=x if self.conv_shortcut is None else Projection(self.conv_shortcut, sources))
        return out if self.scale == 1 else out / self.scale

    @property
    def _reads_both(self) -> bool:
        """Whether two pictures need not be concatenated: all their readers are kernels that take two."""
        return self.conv_shortcut is not None and self.conv2.joins and not (self.down or self.up)

    def fuse(self) -> None:
        """For inference on a GPU, where a bias costs a kernel: the next layer adds the bias of a convolution."""
        self.norm2.take_bias(self.conv1)
        if self.conv_shortcut is not None:
            self.conv2.take_bias(self.conv_shortcut)


class Attention(nn.Module):
    """Self-attention over the pixels of each picture, with a residual connection. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, arch: Architecture, channels: int, groups: int | None, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.group_norm = GroupNorm(groups, channels, arch.norm_eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.attend = SelfAttention(arch.heads(channels))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.to_qkv: Conv | None = None  # the dense layers as 1 x 1 convolutions, after `fuse`
        self.back: Conv | None = None

    def _dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the three dense layers before the attention, and of the one behind it.

        -> [3C, C, 1, 1], [3C], [C, C, 1, 1], [C]
        """
        qkv, out = (self.to_q, self.to_k, self.to_v), self.to_out[0]
        assert isinstance(out, nn.Linear)
        weight, bias = torch.cat([to.weight for to in qkv]), torch.cat([to.bias for to in qkv])
        return weight[:, :, None, None], bias, out.weight[:, :, None, None], out.bias

    def fuse(self) -> None:
        """For inference: the dense layers become two convolutions."""
        weight, bias, back_weight, back_bias = self._dense()
        self.to_qkv, self.back = Conv.of(weight, bias), Conv.of(back_weight, back_bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.group_norm is None else self.group_norm(x)
        if self.to_qkv is None:
            weight, bias, back_weight, back_bias = self._dense()
        h = F.conv2d(h, weight, bias) if self.to_qkv is None else self.to_qkv(h)  # [B, 3C, H, W]
        h = self.attend(h)
        out: Tensor = F.conv2d(h, back_weight, back_bias) + x if self.back is None else self.back(h, add=x)
        return out if self.scale == 1 else out / self.scale


class Downsample(nn.Module):
    """Half the size by a strided convolution. Padding 0 means Ho's: one row and column, below and to the right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding)
        self.conv.below = padding == 0

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Twice the size by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)
        self.conv.doubled = True

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Resize(nn.Module):
    """Half or twice the size without weights: the mean of four pixels, or each pixel four times."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return upsample(x) if self.up else F.avg_pool2d(x, 2)


class Block(nn.Module):
    """The residual blocks of one level, each perhaps followed by attention."""

    def __init__(self, resnets: list[Resnet], attentions: list[Attention]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.attends = bool(attentions)

    def layer(self, i: int, x: Tensor, embedding: Tensor, beside: Tensor | None = None) -> Tensor:
        """Residual block i and its attention."""
        x = self.resnets[i](x, embedding, beside)
        return self.attentions[i](x) if self.attends and i < len(self.attentions) else x


class DownBlock(Block):
    """One level on the way down. It keeps each layer's output for the way up."""

    def __init__(self, arch: Architecture, level: int) -> None:
        kind = DOWN_BLOCKS[arch.down_block_types[level]]
        before, out = arch.block_out_channels[max(level - 1, 0)], arch.block_out_channels[level]
        count = arch.layers_per_block
        super().__init__(
            [Resnet(arch, before if i == 0 else out, out) for i in range(count)],
            [Attention(arch, out, arch.norm_num_groups) for _ in range(count)] if kind == ATTENTION else [],
        )
        self.downsamplers = nn.ModuleList()
        if level < len(arch.block_out_channels) - 1:
            by_resnet = kind == RESNET or (kind == ATTENTION and arch.downsample_type == "resnet")
            sampler: nn.Module = Downsample(out, arch.downsample_padding)
            if by_resnet:
                sampler = Resnet(arch, out, out, down=True)
            elif arch.downsample_type == "pool":
                sampler = Resize(up=False)
            self.downsamplers.append(sampler)

    def forward(self, x: Tensor, embedding: Tensor, kept: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, embedding)
            kept.append(x)
        for sampler in self.downsamplers:
            x = sampler(x, embedding)
            kept.append(x)
        return x


class UpBlock(Block):
    """One level on the way up. Each layer reads its input beside an output that the way down has kept."""

    def __init__(self, arch: Architecture, level: int) -> None:
        kind = UP_BLOCKS[arch.up_block_types[level]]
        widths, count = arch.block_out_channels[::-1], arch.layers_per_block + 1
        before, out, kept_last = widths[max(level - 1, 0)], widths[level], widths[min(level + 1, len(widths) - 1)]
        super().__init__(
            [
                Resnet(arch, (before if i == 0 else out) + (kept_last if i == count - 1 else out), out)
                for i in range(count)
            ],
            [Attention(arch, out, arch.norm_num_groups) for _ in range(count)] if kind == ATTENTION else [],
        )
        self.upsamplers = nn.ModuleList()
        if level < len(widths) - 1:
            by_resnet = kind == RESNET or (kind == ATTENTION and arch.upsample_type == "resnet")
            sampler: nn.Module = Upsample(out)
            if by_resnet:
                sampler = Resnet(arch, out, out, up=True)
            elif arch.upsample_type == "repeat":
                sampler = Resize(up=True)
            self.upsamplers.append(sampler)

    def forward(self, x: Tensor, embedding: Tensor, kept: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, embedding, beside=kept.pop())
        for sampler in self.upsamplers:
            x = sampler(x, embedding)
        return x


class MidBlock(Block):
    """The bottom: residual block, attention, residual block."""

    def __init__(self, arch: Architecture) -> None:
        width, scale = arch.block_out_channels[-1], arch.mid_block_scale_factor
        groups = arch.attn_norm_num_groups
        if groups is None and arch.resnet_time_scale_shift == "default":
            groups = arch.norm_num_groups
        super().__init__(
            [Resnet(arch, width, width, scale=scale) for _ in range(2)],
            [Attention(arch, width, groups, scale)] if arch.add_attention else [],
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.layer(1, self.layer(0, x, embedding), embedding)

"""The U-Net of Ho et al. (2020), state-dict compatible with diffusers' `UNet2DModel`.

Everything that depends on the timestep alone (its sinusoid, the two dense layers, one projection per residual block)
is computed beforehand, for every timestep, by `UNet.embed`; the forward pass is handed one row of that table per
sample. It is therefore one straight line of convolutions, norms and additions, whatever timesteps share the batch.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.card import ATTENTION, DOWN_BLOCKS, RESNET, UP_BLOCKS, Architecture
from model.kernels import Conv, GroupNorm, attention, linear, upsample


def sinusoid(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding (Ho et al. 2020, appendix B, as diffusers orders it). timesteps: [N] -> [N, dim] float32"""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -math.log(10_000) / (half - freq_shift))
    angles = timesteps.float()[:, None] * frequencies.to(timesteps.device)  # [N, dim / 2]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Sinusoid to embedding: two dense layers. [N, dim] -> [N, out]"""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Resnet(nn.Module):
    """Residual block: norm, SiLU, convolution, twice; the timestep enters between. [B, C, H, W] -> [B, out, H', W']"""

    def __init__(
        self, arch: Architecture, channels: int, out: int, *, down: bool = False, up: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        embedding = arch.time_embedding_dim or 4 * arch.block_out_channels[0]
        self.scale_shift = arch.resnet_time_scale_shift == "scale_shift"
        self.down, self.up, self.scale = down, up, scale
        self.norm1 = GroupNorm(arch.norm_num_groups, channels, arch.norm_eps)
        self.conv1 = Conv(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(arch.norm_num_groups, out, arch.norm_eps)
        self.conv2 = Conv(out, out, 3, padding=1)
        self.conv_shortcut = Conv(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time: [B, width of time_emb_proj], this block's share of the embedding table's rows."""
        h = self.norm1(x, silu=True)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.up:
            h, x = upsample(h), upsample(x)
        time = time[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = F.silu(self.norm2(self.conv1(h)) * (1 + scale) + shift)
        else:
            h = self.norm2(self.conv1(h) + time, silu=True)
        out = self.conv2(h, add=x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out if self.scale == 1 else out / self.scale


class Attention(nn.Module):
    """Self-attention over the pixels of each picture, with a residual connection. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, arch: Architecture, channels: int, groups: int | None, scale: float = 1.0) -> None:
        super().__init__()
        self.heads = channels // (arch.attention_head_dim or channels)
        self.scale = scale
        self.group_norm = GroupNorm(groups, channels, arch.norm_eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = (linear(to, h) for to in (self.to_q, self.to_k, self.to_v))
        q, k, v = (projected.view(B, H * W, self.heads, -1).transpose(1, 2) for projected in qkv)
        h = attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)  # [B, HW, C]
        h = linear(self.to_out[0], h).view(B, H, W, C).permute(0, 3, 1, 2)
        out = x + h
        return out if self.scale == 1 else out / self.scale


class Downsample(nn.Module):
    """Half the size by a strided convolution. Padding 0 means Ho's: one pixel, below and to the right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample(x))


class Block(nn.Module):
    """The residual blocks of one level, each perhaps followed by attention, then perhaps a change of size."""

    def __init__(self, resnets: list[Resnet], attentions: list[Attention]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.attends = bool(attentions)

    def layer(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        """Residual block i and its attention."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x) if self.attends else x


class DownBlock(Block):
    """One level on the way down: every layer's output is kept for the way up."""

    def __init__(self, arch: Architecture, level: int) -> None:
        kind = DOWN_BLOCKS[arch.down_block_types[level]]
        before, out = arch.block_out_channels[max(level - 1, 0)], arch.block_out_channels[level]
        count = arch.layers_per_block
        super().__init__(
            [Resnet(arch, before if i == 0 else out, out) for i in range(count)],
            [Attention(arch, out, arch.norm_num_groups) for _ in range(count)] if kind == ATTENTION else [],
        )
        if level < len(arch.block_out_channels) - 1:
            by_resnet = kind == RESNET or (kind == ATTENTION and arch.downsample_type == "resnet")
            sampler = Resnet(arch, out, out, down=True) if by_resnet else Downsample(out, arch.downsample_padding)
            self.downsamplers = nn.ModuleList([sampler])


class UpBlock(Block):
    """One level on the way up: every layer reads its own input beside what the way down kept."""

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
        if level < len(widths) - 1:
            by_resnet = kind == RESNET or (kind == ATTENTION and arch.upsample_type == "resnet")
            self.upsamplers = nn.ModuleList([Resnet(arch, out, out, up=True) if by_resnet else Upsample(out)])


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


class UNet(nn.Module):
    """The whole net: x_t and a row of the embedding table in, what the net was trained to predict out."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        widths, levels = arch.block_out_channels, range(len(arch.block_out_channels))
        self.conv_in = Conv(arch.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], arch.time_embedding_dim or 4 * widths[0])
        self.down_blocks = nn.ModuleList([DownBlock(arch, level) for level in levels])
        self.mid_block = MidBlock(arch) if arch.mid_block_type else None
        self.up_blocks = nn.ModuleList([UpBlock(arch, level) for level in levels])
        self.conv_norm_out = GroupNorm(arch.norm_num_groups, widths[0], arch.norm_eps)
        self.conv_out = Conv(widths[0], arch.out_channels, 3, padding=1)
        self.timed = [m for m in self.modules() if isinstance(m, Resnet)]
        self.shares = [m.time_emb_proj.out_features for m in self.timed]

    def embed(self, timesteps: Tensor) -> Tensor:
        """All that the net needs to know of a timestep. timesteps: [N], as it was trained -> [N, sum of shares]"""
        dim = self.arch.block_out_channels[0]
        embedding = sinusoid(timesteps, dim, self.arch.flip_sin_to_cos, self.arch.freq_shift)
        embedding = F.silu(self.time_embedding(embedding.to(self.time_embedding.linear_1.weight.dtype)))
        return torch.cat([resnet.time_emb_proj(embedding) for resnet in self.timed], dim=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, C, H, W], embedding: [B, sum of shares], rows of `embed` -> [B, out_channels, H, W]"""
        time = dict(zip(self.timed, embedding.split(self.shares, dim=1), strict=True))
        x = self.conv_in(x)
        kept = [x]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = block.layer(i, x, time[resnet])
                kept.append(x)
            for sampler in getattr(block, "downsamplers", ()):
                x = sampler(x, time[sampler]) if isinstance(sampler, Resnet) else sampler(x)
                kept.append(x)
        if self.mid_block is not None:
            x = self.mid_block.layer(0, x, time[self.mid_block.resnets[0]])
            x = self.mid_block.resnets[1](x, time[self.mid_block.resnets[1]])
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = block.layer(i, torch.cat([x, kept.pop()], dim=1), time[resnet])
            for sampler in getattr(block, "upsamplers", ()):
                x = sampler(x, time[sampler]) if isinstance(sampler, Resnet) else sampler(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))

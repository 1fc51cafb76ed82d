"""OpenAI's `UNetModel` in small: their names for every weight, their forward pass, their options.

Written from the two papers and the layout of their checkpoints, so that what is converted has something to be compared
with. As in the originals, timesteps are rescaled by the diffusion process, not by the net.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Kind:
    """The options that `UNetModel` is built with."""

    channels: int = 32
    multipliers: Sequence[int] = (1, 2)
    layers: int = 1
    attended: Sequence[int] = (2,)  # by how much a picture is smaller where it is attended to
    learn_sigma: bool = False
    scale_shift: bool = True
    by_resnets: bool = False
    conv_resample: bool = True
    heads: int = 4
    head_channels: int = -1
    new_order: bool = False
    classes: int | None = None


def embedded(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines, then sines. timesteps: [N], perhaps between two numbers -> [N, dim]"""
    rates = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = timesteps[:, None].float() * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Down(nn.Module):
    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Up(nn.Module):
    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class ResBlock(nn.Module):
    def __init__(self, kind: Kind, channels: int, out: int, resize: str = "") -> None:
        super().__init__()
        self.resize, self.scale_shift = resize, kind.scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * kind.channels, out * (1 + kind.scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resize == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h, x = conv(self.resized(act(norm(x)))), self.resized(x)
        told = self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        for layer in rest:
            h = layer(h)
        out: Tensor = self.skip_connection(x) + h
        return out


class AttentionBlock(nn.Module):
    def __init__(self, kind: Kind, channels: int) -> None:
        super().__init__()
        self.heads = kind.heads if kind.head_channels == -1 else channels // kind.head_channels
        self.new_order = kind.new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        B, C, H, W = x.shape
        flat, d = x.reshape(B, C, H * W), C // self.heads
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = (part.reshape(B * self.heads, d, H * W) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(B * self.heads, 3 * d, H * W).split(d, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(d), dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(B, C, H * W)
        out: Tensor = flat + self.proj_out(h)
        return out.reshape(B, C, H, W)


def layers(block: nn.Module) -> list[nn.Module]:
    """Of one block."""
    assert isinstance(block, nn.ModuleList)
    return list(block)


class UNetModel(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, wide = kind, 4 * kind.channels
        self.time_embed = nn.Sequential(nn.Linear(kind.channels, wide), nn.SiLU(), nn.Linear(wide, wide))
        if kind.classes is not None:
            self.label_emb = nn.Embedding(kind.classes, wide)
        now, size = kind.multipliers[0] * kind.channels, 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, now, 3, padding=1)])])
        kept, last = [now], len(kind.multipliers) - 1
        for level, multiplier in enumerate(kind.multipliers):
            for _ in range(kind.layers):
                self.input_blocks.append(self.layer(now, multiplier * kind.channels, size))
                kept.append(now := multiplier * kind.channels)
            if level < last:
                down = ResBlock(kind, now, now, "down") if kind.by_resnets else Down(now, kind.conv_resample)
                self.input_blocks.append(nn.ModuleList([down]))
                kept.append(now)
                size *= 2
        self.middle_block = nn.ModuleList(
            [ResBlock(kind, now, now), AttentionBlock(kind, now), ResBlock(kind, now, now)]
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(kind.multipliers))):
            for i in range(kind.layers + 1):
                block = self.layer(now + kept.pop(), multiplier * kind.channels, size)
                now = multiplier * kind.channels
                if level and i == kind.layers:
                    block.append(ResBlock(kind, now, now, "up") if kind.by_resnets else Up(now, kind.conv_resample))
                    size //= 2
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 6 if kind.learn_sigma else 3, 3, padding=1)
        )

    def layer(self, channels: int, out: int, size: int) -> nn.ModuleList:
        attention = [AttentionBlock(self.kind, out)] if size in self.kind.attended else []
        return nn.ModuleList([ResBlock(self.kind, channels, out), *attention])

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(embedded(timesteps, self.kind.channels))
        emb = emb if y is None else emb + self.label_emb(y)
        (first,), *others = map(layers, self.input_blocks)
        kept = [h := first(x)]
        for block in others:
            for layer in block:
                h = layer(h, emb)
            kept.append(h)
        for layer in self.middle_block:
            h = layer(h, emb)
        for block in map(layers, self.output_blocks):
            h = torch.cat([h, kept.pop()], dim=1)
            for layer in block:
                h = layer(h, emb)
        out: Tensor = self.out(h)
        return out


def shaken(kind: Kind, seed: int = 0) -> UNetModel:
    """Such a net with random weights; none is left at the 0 or 1 where the original starts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNetModel(kind).eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
    return net

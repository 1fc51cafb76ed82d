"""Ho's U-Net as pytorch-ddpm lays it out, from its names and the paper's appendix B: what `model.convert` reads."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.group_norm(x)
        q, k, v = (to(normed).flatten(2).transpose(1, 2) for to in (self.proj_q, self.proj_k, self.proj_v))
        weight = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=2)  # [b, hw, hw]
        out: Tensor = x + self.proj((weight @ v).transpose(1, 2).reshape(x.shape))
        return out


class Resnet(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int, attends: bool) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.block2 = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Identity(), last)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.attn = Attention(out) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.block1(x) + self.temb_proj(embedding)[:, :, None, None]
        out: Tensor = self.attn(self.block2(h) + self.shortcut(x))
        return out


class Resample(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.main(x if self.main.stride == (2, 2) else F.interpolate(x, scale_factor=2.0))
        return out


class FlatUNet(nn.Module):
    """The whole net: its first dense layer reads a sine and a cosine by turns, from a table."""

    def __init__(self, T: int = 50, mult: tuple[int, ...] = (1, 2, 2), attends: int = 1, blocks: int = 1) -> None:
        super().__init__()
        width, last = 32, len(mult) - 1
        angles = torch.arange(T)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
        table = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # [T, width]
        dense = nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        self.time_embedding = nn.ModuleDict(
            {"timembedding": nn.Sequential(nn.Embedding.from_pretrained(table), *dense)}
        )
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        before, kept = width, [width]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.downblocks.append(Resnet(before, m * width, 4 * width, level == attends))
                before = m * width
                kept.append(before)
            if level < last:
                self.downblocks.append(Resample(before, 2))
                kept.append(before)
        self.middleblocks = nn.ModuleList([Resnet(before, before, 4 * width, i == 0) for i in range(2)])
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.upblocks.append(Resnet(before + kept.pop(), m * width, 4 * width, level == attends))
                before = m * width
            if level:
                self.upblocks.append(Resample(before, 1))
        self.tail = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time_embedding["timembedding"](t)
        h = self.head(x)
        kept = [h]
        for layer in self.downblocks:
            h = layer(h, embedding)
            kept.append(h)
        for layer in self.middleblocks:
            h = layer(h, embedding)
        for layer in self.upblocks:
            h = layer(torch.cat([h, kept.pop()], dim=1) if isinstance(layer, Resnet) else h, embedding)
        out: Tensor = self.tail(h)
        return out

"""Ho's U-Net as the ports of 2020 spell it, from the paper's appendix B and their names: what `model.convert` reads."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Resnet(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, out)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x))) + self.temb_proj(swish(embedding))[:, :, None, None]
        h = self.conv2(swish(self.norm2(h)))
        out: Tensor = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (to(normed).reshape(b, c, h * w) for to in (self.q, self.k, self.v))
        weight = (q.transpose(1, 2) @ k * c**-0.5).softmax(dim=2)  # [b, hw, hw]
        out: Tensor = x + self.proj_out((v @ weight.transpose(1, 2)).reshape(b, c, h, w))
        return out


class Part(nn.Module):
    """A place in the net for layers by name."""

    block: nn.ModuleList
    attn: nn.ModuleList


class Resample(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=stride % 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.conv.stride == (2, 2) else F.interpolate(x, scale_factor=2.0)
        out: Tensor = self.conv(x)
        return out


class PortedUNet(nn.Module):
    """The whole net, for pictures of `size` pixels: it attends where they are `attended` of a side."""

    def __init__(
        self, size: int = 32, mult: tuple[int, ...] = (1, 2), blocks: int = 1, channels: int = 3, attended: int = 16
    ) -> None:
        super().__init__()
        width, levels = 32, len(mult)
        self.width, embedding, widths = width, 4 * width, [width * m for m in mult]
        attends = [size >> level == attended for level in range(levels)]
        self.temb = Part()
        self.temb.dense = nn.ModuleList([nn.Linear(width, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), Part(), nn.ModuleList()
        before, kept = width, [width]
        for level, out in enumerate(widths):
            part = Part()
            part.block = nn.ModuleList([Resnet(out if i else before, out, embedding) for i in range(blocks)])
            part.attn = nn.ModuleList([Attention(out) for _ in range(blocks if attends[level] else 0)])
            kept += [out] * blocks
            if level < levels - 1:
                part.downsample = Resample(out, 2)
                kept.append(out)
            self.down.append(part)
            before = out
        self.mid.block_1, self.mid.block_2 = (Resnet(before, before, embedding) for _ in range(2))
        self.mid.attn_1 = Attention(before)
        for level in reversed(range(levels)):
            part, out = Part(), widths[level]
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                part.block.append(Resnet(before + kept.pop(), out, embedding))
                if attends[level]:
                    part.attn.append(Attention(out))
                before = out
            if level:
                part.upsample = Resample(out, 1)
            self.up.insert(0, part)
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1))
        first, second = self.temb.dense  # type: ignore[misc]
        embedding = second(swish(first(torch.cat([angles.sin(), angles.cos()], dim=1))))
        h = self.conv_in(x)
        kept = [h]
        for part in self.down:
            for i, block in enumerate(part.block):  # type: ignore[arg-type]
                h = block(h, embedding)
                h = part.attn[i](h) if len(part.attn) else h  # type: ignore[arg-type, index, operator]
                kept.append(h)
            if hasattr(part, "downsample"):
                h = part.downsample(h)  # type: ignore[operator]
                kept.append(h)
        h = self.mid.block_1(h, embedding)  # type: ignore[operator]
        h = self.mid.block_2(self.mid.attn_1(h), embedding)  # type: ignore[operator]
        for part in reversed(self.up):
            for i, block in enumerate(part.block):  # type: ignore[arg-type]
                h = block(torch.cat([h, kept.pop()], dim=1), embedding)
                h = part.attn[i](h) if len(part.attn) else h  # type: ignore[arg-type, index, operator]
            if hasattr(part, "upsample"):
                h = part.upsample(h)  # type: ignore[operator]
        out: Tensor = self.conv_out(swish(self.norm_out(h)))
        return out

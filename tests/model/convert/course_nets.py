"""Ho's U-Net as tqch's `ddpm-torch` and rosinality's `denoising-diffusion-pytorch` lay it out, from their names and the
papers: what `model.convert` reads."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoid(t: Tensor, dim: int, shift: int) -> Tensor:
    """Sines, then cosines. t: [B] -> [B, dim]"""
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2 - shift))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention among all pixels. [B, heads, d, H W] each"""
    weight = (torch.einsum("bhdi,bhdj->bhij", q, k) * scale).softmax(dim=-1)
    return torch.einsum("bhij,bhdj->bhdi", weight, v)


class TqchAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.project_in, self.project_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = (part.flatten(2)[:, None] for part in self.project_in(self.norm(x)).chunk(3, dim=1))
        out: Tensor = x + self.project_out(attend(q, k, v, x.shape[1] ** -0.5).reshape(x.shape))
        return out


class TqchBlock(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, channels, eps=1e-6), nn.Conv2d(channels, out, 3, padding=1)
        self.fc = nn.Linear(embedding, out)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.fc(F.silu(t))[:, :, None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(h))) + self.skip(x)
        return out


class Steps(nn.ModuleList):
    """Modules one behind another, all of which are told the timestep."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for module in self:
            x = module(x, t)
        return x


class TqchResize(nn.Sequential):
    """The second of two layers has the weights."""

    def __init__(self, channels: int, up: bool) -> None:
        first = nn.Upsample(scale_factor=2) if up else nn.ZeroPad2d((0, 1, 0, 1))
        super().__init__(
            first, nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, 2)
        )


class TqchUNet(nn.Module):
    def __init__(self, mult: Sequence[int] = (1, 2, 2), attended: Sequence[int] = (1,), blocks: int = 1) -> None:
        super().__init__()
        width, embedding, last = 32, 128, len(mult) - 1

        def block(level: int, channels: int) -> nn.Module:
            out = mult[level] * width
            resnet = TqchBlock(channels, out, embedding)
            return Steps([resnet, TqchAttention(out)]) if level in attended else resnet

        self.embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.in_conv = nn.Conv2d(3, width, 3, padding=1)
        self.downsamples, self.upsamples = nn.ModuleDict(), nn.ModuleDict()
        kept, before = [width], width
        for level, m in enumerate(mult):
            layers = nn.ModuleList()
            for _ in range(blocks):
                layers.append(block(level, before))
                before = m * width
                kept.append(before)
            if level < last:
                layers.append(TqchResize(before, up=False))
                kept.append(before)
            self.downsamples[f"level_{level}"] = layers
        middle = [TqchBlock(before, before, embedding) for _ in range(2)]
        self.middle = Steps([middle[0], TqchAttention(before), middle[1]])
        for level, m in reversed(list(enumerate(mult))):
            layers = nn.ModuleList()
            for _ in range(blocks + 1):
                layers.append(block(level, before + kept.pop()))
                before = m * width
            if level:
                layers.append(TqchResize(before, up=True))
            self.upsamples[f"level_{level}"] = layers
        self.out_conv = nn.Sequential(nn.GroupNorm(32, before, eps=1e-6), nn.SiLU(), nn.Conv2d(before, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding, levels = self.embed(sinusoid(t, 32, 1)), len(self.downsamples)
        h = self.in_conv(x)
        kept = [h]
        for level in range(levels):
            for layer in layers_of(self.downsamples[f"level_{level}"]):
                h = layer(h) if isinstance(layer, TqchResize) else layer(h, embedding)
                kept.append(h)
        h = self.middle(h, embedding)
        for level in reversed(range(levels)):
            for layer in layers_of(self.upsamples[f"level_{level}"]):
                resizes = isinstance(layer, TqchResize)
                h = layer(h) if resizes else layer(torch.cat([h, kept.pop()], dim=1), embedding)
        out: Tensor = self.out_conv(h)
        return out


def layers_of(modules: nn.Module) -> Iterable[nn.Module]:
    assert isinstance(modules, nn.ModuleList)
    return modules


class RosinalityAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(32, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (self.heads, -1)).chunk(3, dim=2)
        out: Tensor = x + self.out(attend(q, k, v, x.shape[1] ** -0.5).reshape(x.shape))
        return out


class RosinalityResnet(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int, affine: bool) -> None:
        super().__init__()
        self.affine = affine
        self.norm1, self.conv1 = nn.GroupNorm(32, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if affine else out))
        self.norm2, self.conv2 = nn.GroupNorm(32, out, affine=not affine), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, time = self.conv1(F.silu(self.norm1(x))), self.time(t)[:, :, None, None]
        if self.affine:
            scale, shift = time.chunk(2, dim=1)
            h = (1 + scale) * self.norm2(h) + shift
        else:
            h = self.norm2(h + time)
        out: Tensor = self.conv2(F.silu(h)) + (x if self.skip is None else self.skip(x))
        return out


class RosinalityBlock(nn.Module):
    def __init__(self, channels: int, out: int, attends: bool, heads: int, affine: bool) -> None:
        super().__init__()
        self.resblocks = RosinalityResnet(channels, out, 128, affine)
        self.attention = RosinalityAttention(out, heads) if attends else None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h: Tensor = self.resblocks(x, t)
        return h if self.attention is None else self.attention(h)


class RosinalityUNet(nn.Module):
    def __init__(
        self, mult: Sequence[int] = (1, 2, 2), attended: Sequence[int] = (1,), heads: int = 1, affine: bool = False
    ) -> None:
        super().__init__()
        width, last = 32, len(mult) - 1
        self.time = nn.Sequential(nn.Identity(), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 128))
        self.time[0].register_buffer("inv_freq", torch.ones(width // 2))
        down: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        up: list[nn.Module] = []
        kept, before = [width], width
        for level, m in enumerate(mult):
            down.append(RosinalityBlock(before, m * width, level in attended, heads, affine))
            before = m * width
            kept.append(before)
            if level < last:
                down.append(nn.Sequential(nn.Conv2d(before, before, 3, stride=2, padding=1)))
                kept.append(before)
        self.down = nn.ModuleList(down)
        self.mid = nn.ModuleList([RosinalityBlock(before, before, attends, heads, affine) for attends in (True, False)])
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(2):
                up.append(RosinalityBlock(before + kept.pop(), m * width, level in attended, heads, affine))
                before = m * width
            if level:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(before, before, 3, padding=1)))
        self.up = nn.ModuleList(up)
        self.out = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding, kept = self.time(sinusoid(t, 32, 0)), list[Tensor]()
        for layer in self.down:
            x = layer(x, embedding) if isinstance(layer, RosinalityBlock) else layer(x)
            kept.append(x)
        for layer in self.mid:
            x = layer(x, embedding)
        for layer in self.up:
            x = layer(torch.cat([x, kept.pop()], dim=1), embedding) if isinstance(layer, RosinalityBlock) else layer(x)
        out: Tensor = self.out(x)
        return out

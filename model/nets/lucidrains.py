"""The U-Net of lucidrains' `denoising_diffusion_pytorch` 2: RMS norms, linear attention, memories beside the picture.

It computes the same as the original, under the original's names, from one row of the timestep table per sample as in
`model.nets.unet`. Two layers are written as equivalents: four pixels stacked before a convolution of one pixel are a
convolution of 2 x 2 with stride 2, and a convolution behind an upsampling reads each pixel several times.

The original's net for classifier-free guidance concatenates the embedding of a label to that of the timestep before
each block projects them. The projection of the two is the sum of their projections, so both tables have whole rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.convolution import READ, Conv
from model.nets.layers import How, SelfAttention, assign_columns
from model.nets.lucidrains_config import LucidrainsArchitecture

TOGETHER = 8  # pictures in a product where the library's choice of a kernel must not depend on the batch


def sinusoid(timesteps: Tensor, dim: int, theta: float) -> Tensor:
    """Sines, then cosines, rounded in the order the original rounds in. timesteps: [N] -> [N, dim] float32"""
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(theta) / (half - 1)))
    angles = timesteps.float()[:, None] * rates.to(timesteps.device)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class RMSNorm(nn.Module):
    """Each pixel's channels divided by their root mean square and scaled, perhaps with a modulation and SiLU behind."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor, time: Tensor | None = None, silu: bool = False) -> Tensor:
        """x: [B, C, H, W], time: [B, 2C], which scales and shifts the normed picture -> [B, C, H, W]"""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)  # [B, 1, H, W]
        weight = self.g.float() * x.shape[1] ** 0.5  # [1, C, 1, 1]
        out = x / length.clamp_min(1e-12)  # float32, whatever the storage
        if time is None:
            out = out * weight
        else:
            scale, shift = time.float()[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
            out = torch.addcmul(shift, out, weight * (1 + scale))
        return (F.silu(out) if silu else out).to(x.dtype)


class Block(nn.Module):
    """A convolution, a norm, SiLU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj, self.norm = Conv(channels, out, 3, padding=1), RMSNorm(out)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(self.proj(x), time, silu=True)
        return out


class ResnetBlock(nn.Module):
    """Two blocks and a residual connection; the timestep modulates the first. [B, C, H, W] -> [B, out, H, W]"""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.block1, self.block2 = Block(channels, out), Block(out, out)
        self.res_conv = Conv(channels, out, 1) if channels != out else None
        self.share = slice(0)  # this block's columns of the embedding table

    def project(self, embedding: Tensor, start: int = 0) -> Tensor:
        """Its columns for an embedding that `mlp` reads from column `start` on; the first has the bias.
        [N, D] -> [N, 2 out]"""
        dense = self.mlp[1]
        assert isinstance(dense, nn.Linear)
        weight = dense.weight[:, start : start + embedding.shape[1]]
        return F.linear(F.silu(embedding), weight, None if start else dense.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.block2(self.block1(x, embedding[:, self.share]))
        out: Tensor = h + x if self.res_conv is None else self.res_conv(x, add=h)
        return out


class Attention(nn.Module):
    """Attention over the pixels of each picture and some memories, with a residual connection."""

    def __init__(self, channels: int, heads: int, head_dim: int, memories: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.to_qkv = Conv(channels, 3 * heads * head_dim, 1, bias=False)
        self.attend = SelfAttention(heads, torch.zeros(2, heads, memories, head_dim) if memories else None)
        self.to_out = Conv(heads * head_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out(self.attend(self.to_qkv(self.norm(x))), add=x)
        return out


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (kᵀ v), picture by picture and head by head. q, k, v: [B, heads, L, d] -> [B, heads, L, d]"""
    context = k.transpose(-1, -2) @ v  # [B, heads, d, d]
    return q @ context


def products_in_groups(*factors: Tensor) -> Tensor:
    """The same with always TOGETHER pictures at a time, the last of them beside zeros. On a GPU a library chooses its
    kernel by the whole shape, which is the same in any batch then."""
    results = []
    for group in zip(*(factor.split(TOGETHER) for factor in factors), strict=True):
        count = len(group[0])
        missing = (0, 0, 0, 0, 0, 0, 0, TOGETHER - count)
        results.append(products(*(F.pad(factor, missing) if count < TOGETHER else factor for factor in group))[:count])
    return torch.cat(results)


class LinearAttention(nn.Module):
    """Attention with a cost linear in the pixels (Shen et al. 2018), with a residual connection."""

    def __init__(self, channels: int, heads: int, head_dim: int, memories: int) -> None:
        super().__init__()
        self.heads, self.norm, self.invariant = heads, RMSNorm(channels), False
        self.mem_kv = nn.Parameter(torch.zeros(2, heads, head_dim, memories)) if memories else None
        self.to_qkv = Conv(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Sequential(Conv(heads * head_dim, channels, 1), RMSNorm(channels))
        self._multiply: Callable[[Tensor, Tensor, Tensor], Tensor] = products

    def use(self, how: How) -> None:
        """Chooses how the products are computed from now on; see `products_in_groups`."""
        self.invariant = how in ("invariant", "pinned")
        self._multiply = products_in_groups if self.invariant else products

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        qkv: Tensor = self.to_qkv(self.norm(x))  # [B, 3 heads d, H, W]
        d = qkv.shape[1] // (3 * self.heads)
        q, k, v = qkv.permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, d).permute(2, 0, 3, 1, 4)
        if self.mem_kv is not None:
            before = self.mem_kv.transpose(-1, -2)[:, None].expand(2, B, -1, -1, -1)  # [2, B, heads, M, d]
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))  # [B, heads, M + H W, d]
        h = self._multiply(q.softmax(dim=3) * d**-0.5, k.softmax(dim=2), v)  # [B, heads, H W, d]
        h = h.transpose(1, 2).reshape(B, H, W, self.heads * d).permute(0, 3, 1, 2)
        out: Tensor = self.to_out(h) + x
        return out


def _attention(arch: LucidrainsArchitecture, channels: int, level: int, full: bool) -> nn.Module:
    kind = Attention if full else LinearAttention
    return kind(channels, arch.attn_heads[level], arch.attn_dim_head[level], arch.num_mem_kv)


def _level(arch: LucidrainsArchitecture, channels: int, joined: int, level: int, resize: Conv) -> nn.ModuleList:
    """Two residual blocks, attention, and the convolution that leads to the next level. joined: channels beside x"""
    blocks = [ResnetBlock(channels + joined, channels, arch.embedding_dim) for _ in range(2)]
    return nn.ModuleList([*blocks, _attention(arch, channels, level, arch.full_attn[level]), resize])


def _dense(dim: int) -> tuple[nn.Module, ...]:
    """The two dense layers that make an embedding. [N, dim] -> [N, 4 dim]"""
    return nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim)


def _layers(level: nn.Module) -> list[nn.Module]:
    """The four layers of a level."""
    assert isinstance(level, nn.ModuleList)
    return list(level)


class LucidrainsUNet(nn.Module):
    """The whole net, from x_t and a row of the embedding table to what the net was trained to predict."""

    def __init__(self, arch: LucidrainsArchitecture) -> None:
        super().__init__()
        self.arch, self.labels = arch, arch.labels
        widths, embedding, levels = arch.widths, arch.embedding_dim, range(len(arch.dim_mults))
        self.init_conv = Conv(arch.in_channels, arch.init_dim, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), *_dense(arch.dim))
        if arch.num_classes is not None:
            self.classes_emb = nn.Embedding(arch.num_classes, arch.dim)
            self.null_classes_emb = nn.Parameter(torch.zeros(arch.dim))
            self.classes_mlp = nn.Sequential(*_dense(arch.dim))
        self.downs, self.ups, side = nn.ModuleList(), nn.ModuleList(), arch.downsample_kernel
        for level in levels:
            above, below = widths[level], widths[level + 1]
            last = level == levels[-1]
            down = Conv(above, below, 3, padding=1) if last else Conv(above, below, side, 2, padding=side // 2 - 1)
            self.downs.append(_level(arch, above, 0, level, down))
        bottom = widths[-1]
        self.mid_block1, self.mid_block2 = (ResnetBlock(bottom, bottom, embedding) for _ in range(2))
        self.mid_attn = _attention(arch, bottom, levels[-1], full=True)
        for level in reversed(levels):
            above, below = widths[level], widths[level + 1]
            up = Conv(below, above, 3, padding=1)
            up.doubled = level > 0
            self.ups.append(_level(arch, below, above, level, up))
        self.final_res_block = ResnetBlock(2 * arch.init_dim, arch.init_dim, embedding)
        self.final_conv = Conv(arch.init_dim, arch.out_channels, 1)
        self.timed = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        columns = [2 * block.block1.proj.out_channels for block in self.timed]
        self.embedding_width = assign_columns(self.timed, columns)  # P

    def embed(self, timesteps: Tensor) -> Tensor:
        """All that the net needs to know of a timestep. timesteps: [N], as in its training -> [N, P]"""
        embedding = sinusoid(timesteps, self.arch.dim, self.arch.sinusoidal_pos_emb_theta)
        embedding = self.time_mlp(embedding.to(self.init_conv.weight.dtype))
        return torch.cat([block.project(embedding) for block in self.timed], dim=1)

    def embed_labels(self) -> Tensor:
        """What is added to a row of `embed` for each label, the null label last. -> [L, P]"""
        embedding = self.classes_mlp(torch.cat([self.classes_emb.weight, self.null_classes_emb[None]]))
        return torch.cat([block.project(embedding, start=4 * self.arch.dim) for block in self.timed], dim=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, C, H, W], embedding: [B, P], rows of `embed`, of a conditional net each with a row of `embed_labels`
        added -> [B, out_channels, H, W]"""
        first = x = self.init_conv(x)
        kept = []
        for level in self.downs:
            block1, block2, attention, resize = _layers(level)
            kept.append(x := block1(x, embedding))
            kept.append(x := attention(block2(x, embedding)))
            x = resize(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, embedding)), embedding)
        for level in self.ups:
            block1, block2, attention, resize = _layers(level)
            x = block1(torch.cat([x, kept.pop()], dim=1), embedding)
            x = block2(torch.cat([x, kept.pop()], dim=1), embedding)
            x = resize(attention(x))
        out: Tensor = self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), embedding))
        return out

    @property
    def reads(self) -> int:
        """The channels that the first convolution reads: those of a picture, and zeros."""
        return self.init_conv.in_channels

    def fuse(self) -> None:
        """Prepares the weights for inference: on a GPU the first convolution reads more channels, which is faster."""
        if self.init_conv.weight.device.type != "cpu":
            self.init_conv.widen(READ)

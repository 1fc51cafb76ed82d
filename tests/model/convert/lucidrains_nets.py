"""lucidrains' `Unet` in small: its names for every weight, its forward pass, its diffusion process's tables.

Written from the layout of the package's checkpoints (version 2.x), so that what is converted has something to be
compared with.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sinusoid(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        rates = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        angles = t[:, None] * rates[None]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.g = dim**0.5, nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.normalize(x, dim=1) * self.g * self.scale
        return out


class Block(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(dim, out, 3, padding=1), RMSNorm(out)

    def forward(self, x: Tensor, modulation: Sequence[Tensor] = ()) -> Tensor:
        x = self.norm(self.proj(x))
        if modulation:
            scale, shift = modulation
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResnetBlock(nn.Module):
    def __init__(self, dim: int, out: int, time: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * out))
        self.block1, self.block2 = Block(dim, out), Block(out, out)
        self.res_conv = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.block1(x, self.mlp(t)[:, :, None, None].chunk(2, dim=1))
        out: Tensor = self.block2(h) + self.res_conv(x)
        return out


def heads_of(qkv: Tensor, heads: int) -> list[Tensor]:
    """[B, 3 heads d, H, W] -> three of [B, heads, d, H W]"""
    return [part.unflatten(1, (heads, -1)).flatten(3) for part in qkv.chunk(3, dim=1)]


class LinearAttention(nn.Module):
    def __init__(self, dim: int, heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.d, self.norm = heads, d, RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, d, 4))
        self.to_qkv = nn.Conv2d(dim, 3 * heads * d, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * d, dim, 1), RMSNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.to_qkv(self.norm(x)), self.heads)
        more_k, more_v = (each.expand(len(x), -1, -1, -1) for each in self.mem_kv)
        k, v = torch.cat((more_k, k), dim=-1).softmax(dim=-1), torch.cat((more_v, v), dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        h = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * self.d**-0.5)
        out: Tensor = self.to_out(h.flatten(1, 2).unflatten(-1, x.shape[2:]))
        return out


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.d, self.norm = heads, d, RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, 4, d))
        self.to_qkv = nn.Conv2d(dim, 3 * heads * d, 1, bias=False)
        self.to_out = nn.Conv2d(heads * d, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-1, -2) for part in heads_of(self.to_qkv(self.norm(x)), self.heads))
        more_k, more_v = (each.expand(len(x), -1, -1, -1) for each in self.mem_kv)
        k, v = torch.cat((more_k, k), dim=-2), torch.cat((more_v, v), dim=-2)
        weight = (torch.einsum("bhid,bhjd->bhij", q, k) * self.d**-0.5).softmax(dim=-1)
        h = torch.einsum("bhij,bhjd->bhid", weight, v).transpose(-1, -2)
        out: Tensor = self.to_out(h.flatten(1, 2).unflatten(-1, x.shape[2:]))
        return out


class Unstack(nn.Module):
    """Four pixels beside one another become four channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


def layers(level: nn.Module) -> list[nn.Module]:
    """Of one level."""
    assert isinstance(level, nn.ModuleList)
    return list(level)


class Unet(nn.Module):
    def __init__(
        self,
        dim: int = 16,
        init_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2),
        channels: int = 3,
        learned_variance: bool = False,
        full_attn: Sequence[bool] = (False, True),
        heads: Sequence[int] = (2, 2),
        d: Sequence[int] = (8, 8),
    ) -> None:
        super().__init__()
        first, time = init_dim or dim, 4 * dim
        self.init_conv = nn.Conv2d(channels, first, 7, padding=3)
        self.time_mlp = nn.Sequential(Sinusoid(dim), nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time))
        widths = [first, *(dim * multiplier for multiplier in dim_mults)]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (here, below) in enumerate(pairs):
            kind = Attention if full_attn[level] else LinearAttention
            smaller: nn.Module = nn.Sequential(Unstack(), nn.Conv2d(4 * here, below, 1))
            if level == len(pairs) - 1:
                smaller = nn.Conv2d(here, below, 3, padding=1)
            blocks = [ResnetBlock(here, here, time) for _ in range(2)]
            self.downs.append(nn.ModuleList([*blocks, kind(here, heads[level], d[level]), smaller]))
        last = widths[-1]
        self.mid_block1, self.mid_attn = ResnetBlock(last, last, time), Attention(last, heads[-1], d[-1])
        self.mid_block2 = ResnetBlock(last, last, time)
        for level, (above, here) in reversed(list(enumerate(pairs))):
            kind = Attention if full_attn[level] else LinearAttention
            larger: nn.Module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(here, above, 3, padding=1))
            if level == 0:
                larger = nn.Conv2d(here, above, 3, padding=1)
            blocks = [ResnetBlock(here + above, here, time) for _ in range(2)]
            self.ups.append(nn.ModuleList([*blocks, kind(here, heads[level], d[level]), larger]))
        self.final_res_block = ResnetBlock(2 * first, first, time)
        self.final_conv = nn.Conv2d(first, channels * (1 + learned_variance), 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.init_conv(x)
        t, first, kept = self.time_mlp(time), x.clone(), []
        for block1, block2, attention, smaller in map(layers, self.downs):
            x = block1(x, t)
            kept.append(x)
            x = block2(x, t)
            x = attention(x) + x
            kept.append(x)
            x = smaller(x)
        x = self.mid_block1(x, t)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, t)
        for block1, block2, attention, larger in map(layers, self.ups):
            x = block1(torch.cat((x, kept.pop()), dim=1), t)
            x = block2(torch.cat((x, kept.pop()), dim=1), t)
            x = larger(attention(x) + x)
        out: Tensor = self.final_conv(self.final_res_block(torch.cat((x, first), dim=1), t))
        return out


def betas(name: str, T: int) -> Tensor:
    """The package's schedules: step variances. [T] float64"""
    if name == "linear":
        return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
    t = torch.linspace(0, T, T + 1, dtype=torch.float64) / T
    if name == "cosine":
        left = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    else:
        start, end = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
        left = (end - (t * 6 - 3).sigmoid()) / (end - start)
    left = left / left[0]
    return (1 - left[1:] / left[:-1]).clamp(0, 0.999)


def tables(name: str, T: int, objective: str, gamma: float = math.inf) -> dict[str, Tensor]:
    """What of `GaussianDiffusion`'s tables a checkpoint holds: float32, some of many. gamma: of min-SNR weighting"""
    variances = betas(name, T)
    left = (1 - variances).cumprod(0)
    snr = left / (1 - left)
    clamped = snr.clamp(max=gamma)
    weight = {"pred_noise": clamped / snr, "pred_x0": clamped, "pred_v": clamped / (snr + 1)}[objective]
    made = {"betas": variances, "alphas_cumprod": left, "sqrt_alphas_cumprod": left.sqrt(), "loss_weight": weight}
    return {name: table.float() for name, table in made.items()}


def shaken(seed: int = 0, **options: object) -> Unet:
    """Such a net with random weights; none is left at the 0 or 1 where the original starts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Unet(**options).eval().requires_grad_(False)  # type: ignore[arg-type]
        for name, parameter in net.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if name.endswith((".g", ".bias")) else 0)
    return net


def diffusion(
    net: Unet, schedule: str = "sigmoid", T: int = 40, objective: str = "pred_v", **more: float
) -> dict[str, Tensor]:
    """The state dict of a `GaussianDiffusion` around this net."""
    return tables(schedule, T, objective, **more) | {f"model.{k}": v for k, v in net.state_dict().items()}

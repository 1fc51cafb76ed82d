"""lucidrains' `Unet` for classifier-free guidance in small: its names for every weight, and its forward pass.

Written from the layout of the package's checkpoints (version 2.x), so that what is converted has something to be
compared with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.model.convert.lucidrains_nets import Block, RMSNorm, Sinusoid, heads_of, layers

HEADS, D = 4, 32


class ResnetBlock(nn.Module):
    def __init__(self, dim: int, out: int, time: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(2 * time, 2 * out))  # of the timestep's and the label's embedding
        self.block1, self.block2 = Block(dim, out), Block(out, out)
        self.res_conv = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        h = self.block1(x, self.mlp(torch.cat((t, c), dim=-1))[:, :, None, None].chunk(2, dim=1))
        out: Tensor = self.block2(h) + self.res_conv(x)
        return out


class LinearAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(dim, 3 * HEADS * D, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(HEADS * D, dim, 1), RMSNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.to_qkv(x), HEADS)
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        h = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * D**-0.5)
        out: Tensor = self.to_out(h.flatten(1, 2).unflatten(-1, x.shape[2:]))
        return out


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Conv2d(dim, 3 * heads * D, 1, bias=False), nn.Conv2d(heads * D, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.to_qkv(x), self.heads)
        weight = torch.einsum("bhdi,bhdj->bhij", q * D**-0.5, k).softmax(dim=-1)
        h = torch.einsum("bhij,bhdj->bhdi", weight, v)
        out: Tensor = self.to_out(h.flatten(1, 2).unflatten(-1, x.shape[2:]))
        return out


class Within(nn.Module):
    """A layer by the name `fn` in another, behind a norm or beside a residual connection."""

    def __init__(self, fn: nn.Module, dim: int | None = None) -> None:
        super().__init__()
        self.fn = fn
        if dim is not None:
            self.norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x)) if hasattr(self, "norm") else self.fn(x) + x
        return out


class Unet(nn.Module):
    def __init__(
        self,
        dim: int = 16,
        num_classes: int = 5,
        init_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2),
        channels: int = 3,
        attn_heads: int = HEADS,
    ) -> None:
        super().__init__()
        first, time = init_dim or dim, 4 * dim
        self.init_conv = nn.Conv2d(channels, first, 7, padding=3)
        self.time_mlp = nn.Sequential(Sinusoid(dim), nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time))
        self.classes_emb, self.null_classes_emb = nn.Embedding(num_classes, dim), nn.Parameter(torch.randn(dim))
        self.classes_mlp = nn.Sequential(nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time))
        widths = [first, *(dim * multiplier for multiplier in dim_mults)]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (here, below) in enumerate(pairs):
            last = level == len(pairs) - 1
            smaller = nn.Conv2d(here, below, 3, padding=1) if last else nn.Conv2d(here, below, 4, 2, 1)
            attention = Within(Within(LinearAttention(here), here))
            self.downs.append(nn.ModuleList([*(ResnetBlock(here, here, time) for _ in range(2)), attention, smaller]))
        bottom = widths[-1]
        self.mid_block1, self.mid_block2 = (ResnetBlock(bottom, bottom, time) for _ in range(2))
        self.mid_attn = Within(Within(Attention(bottom, attn_heads), bottom))
        for level, (above, here) in reversed(list(enumerate(pairs))):
            larger: nn.Module = nn.Conv2d(here, above, 3, padding=1)
            larger = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), larger) if level else larger
            attention, blocks = Within(Within(LinearAttention(here), here)), range(2)
            self.ups.append(
                nn.ModuleList([*(ResnetBlock(here + above, here, time) for _ in blocks), attention, larger])
            )
        self.final_res_block = ResnetBlock(2 * first, first, time)
        self.final_conv = nn.Conv2d(first, channels, 1)

    def forward(self, x: Tensor, time: Tensor, classes: Tensor | None) -> Tensor:
        """classes: None for the null label, which the original takes with cond_drop_prob = 1"""
        null = self.null_classes_emb.expand(len(x), -1)
        t, c = self.time_mlp(time), self.classes_mlp(null if classes is None else self.classes_emb(classes))
        x = self.init_conv(x)
        first, kept = x.clone(), []
        for block1, block2, attention, smaller in map(layers, self.downs):
            kept.append(x := block1(x, t, c))
            kept.append(x := attention(block2(x, t, c)))
            x = smaller(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, t, c)), t, c)
        for block1, block2, attention, larger in map(layers, self.ups):
            x = block1(torch.cat((x, kept.pop()), dim=1), t, c)
            x = larger(attention(block2(torch.cat((x, kept.pop()), dim=1), t, c)))
        out: Tensor = self.final_conv(self.final_res_block(torch.cat((x, first), dim=1), t, c))
        return out


def shaken(seed: int = 0, **options: object) -> Unet:
    """Such a net with random weights; none is left at the 0 or 1 where the original starts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Unet(**options).eval().requires_grad_(False)  # type: ignore[arg-type]
        for name, parameter in net.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if name.endswith((".g", ".bias")) else 0)
    return net

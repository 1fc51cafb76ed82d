"""The U-Net of Ho et al. (2020), state-dict compatible with diffusers' `UNet2DModel`.

Everything that depends on the timestep alone (its sinusoid, the two dense layers, one projection per residual block) is
computed for every timestep beforehand, by `UNet.embed`; the forward pass is given one row of that table per sample. It
is therefore one straight line of convolutions, norms and additions, whatever timesteps share the batch.

A conditional net adds the embedding of a label to that of the timestep before it projects them. Its tables end there:
`embed` and `embed_labels` give the terms of the sum, and the projection is the first layer of the forward pass.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.blocks import Attention, DownBlock, MidBlock, Resnet, UpBlock
from model.nets.config import Architecture
from model.nets.convolution import READ, Conv
from model.nets.layers import GroupNorm, assign_columns


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
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class UNet(nn.Module):
    """The whole net, from x_t and a row of the embedding table to what the net was trained to predict."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        widths, levels = arch.block_out_channels, range(len(arch.block_out_channels))
        self.conv_in = Conv(arch.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(arch.sinusoid_dim or widths[0], arch.embedding_dim)
        if arch.labels and arch.class_embed_type == "timestep":
            self.class_embedding: nn.Module = TimestepEmbedding(arch.sinusoid_dim or widths[0], arch.embedding_dim)
        elif arch.labels:
            self.class_embedding = nn.Embedding(arch.labels, arch.embedding_dim)
        self.down_blocks = nn.ModuleList([DownBlock(arch, level) for level in levels])
        self.mid_block = MidBlock(arch) if arch.mid_block_type else None
        self.up_blocks = nn.ModuleList([UpBlock(arch, level) for level in levels])
        self.conv_norm_out = GroupNorm(arch.norm_num_groups, widths[0], arch.norm_eps)
        self.conv_out = Conv(widths[0], arch.out_channels, 3, padding=1)
        self.timed = [module for module in self.modules() if isinstance(module, Resnet)]
        self.labels = arch.labels
        projected = assign_columns(self.timed, [each.time_emb_proj.out_features for each in self.timed])  # P
        self.embedding_width = arch.embedding_dim if arch.labels else projected  # W
        self.project: Conv | None = None  # all projections of a conditional net as one layer, after `fuse`

    def embed(self, timesteps: Tensor) -> Tensor:
        """All that the net needs to know of a timestep. timesteps: [N], as in its training -> [N, W]"""
        embedding: Tensor = self.time_embedding(self._sinusoid(timesteps.float() * self.arch.timestep_scale))
        return embedding if self.labels else self._project(embedding)

    def embed_labels(self) -> Tensor:
        """What is added to a row of `embed` for each label. -> [L, W]"""
        if self.arch.class_embed_type == "timestep":
            numbers = torch.arange(self.labels, device=self.conv_in.weight.device)
            embedding: Tensor = self.class_embedding(self._sinusoid(numbers))
            return embedding
        weight = self.class_embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    def _sinusoid(self, numbers: Tensor) -> Tensor:
        """[N] -> [N, dim], in the dtype of the weights"""
        arch, first = self.arch, self.time_embedding.linear_1
        return sinusoid(numbers, first.in_features, arch.flip_sin_to_cos, arch.freq_shift).to(first.weight.dtype)

    def _project(self, embedding: Tensor) -> Tensor:
        """What each residual block adds or modulates by. [N, D] -> [N, P]"""
        embedding = F.silu(embedding)
        if self.project is not None:
            projected: Tensor = self.project(embedding[:, :, None, None])  # [N, P, 1, 1]
            return projected.reshape(projected.shape[0], projected.shape[1])
        return torch.cat([resnet.time_emb_proj(embedding) for resnet in self.timed], dim=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, C, H, W], or [B, reads, H, W], embedding: [B, W], rows of `embed`, to which those of a conditional net
        have rows of `embed_labels` added -> [B, out_channels, H, W]"""
        if self.labels:
            embedding = self._project(embedding)
        x = self.conv_in(x)
        kept = [x]
        for block in self.down_blocks:
            x = block(x, embedding, kept)
        if self.mid_block is not None:
            x = self.mid_block(x, embedding)
        for block in self.up_blocks:
            x = block(x, embedding, kept)
        out: Tensor = self.conv_out(self.conv_norm_out(x, silu=True))
        return out

    @property
    def reads(self) -> int:
        """The channels that the first convolution reads: those of a picture, and zeros."""
        return self.conv_in.in_channels

    def fuse(self) -> None:
        """Prepares the weights for inference: computes once what the forward pass would compute at each call."""
        on_cpu = self.conv_in.weight.device.type == "cpu"  # where the bias of a convolution costs nothing
        for module in list(self.modules()):
            if isinstance(module, Attention) or (isinstance(module, Resnet) and not on_cpu):
                module.fuse()
        if not on_cpu:
            self.conv_in.widen(READ)
        if self.labels:
            self.fuse_labels()

    def fuse_labels(self) -> None:
        """Makes one layer of the projections of a conditional net."""
        layers = [resnet.time_emb_proj for resnet in self.timed]
        weight = torch.cat([layer.weight for layer in layers])[:, :, None, None]  # [P, D, 1, 1]
        self.project = Conv.of(weight, torch.cat([layer.bias for layer in layers]))

"""What a model takes of a device's memory: bounded before it is loaded, with no tensor allocated for it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.architecture import ATTENTION, DOWN_BLOCKS, UP_BLOCKS, Architecture
from model.card import ModelCard
from model.checkpoint import Model
from model.cpu_net import CpuNet, sizes_up_to
from model.lucid_architecture import LucidArchitecture
from model.nets import build
from model.slots import Slots

AT_WORK = 6  # tensors of a layer that are alive at a time: what it reads, normed, padded, convolved, added to
WORKSPACE = 1.5  # of what is alive in a step: what libraries take for themselves, and what fragments
SAMPLER = 8  # float32 numbers that its arithmetic holds for each of a picture, beside the net


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of a model: its number of weights, and the bytes that it takes at most."""

    parameters: int
    size_bytes: int


def footprint(card: ModelCard, slots: int, device: torch.device, dtype: torch.dtype) -> Footprint:
    """What the model will take, loaded: while it is read, its weights are there in float32 as well as in `dtype`."""
    with torch.device("meta"):
        net = build(card.architecture)
    count, T = sum(p.numel() for p in net.parameters()), card.process.schedule.T
    batch = batch_bytes(Slots(1, card.architecture.shape, T, device))
    if device.type == "cpu":
        table = 4 * net.embedding_width * T
        return Footprint(count, 4 * count + table + slots * batch + cpu_bytes(card.architecture, count, slots, dtype))
    weights = (count + net.embedding_width * T) * (4 + dtype.itemsize)
    return Footprint(count, weights + slots * (batch + picture_bytes(card.architecture, dtype)))


def resident_bytes(model: Model, slots: Slots) -> int:
    """What a loaded model holds of a device that does not tell, once its net has grown to a full batch."""
    table = model.table.numel() * model.table.element_size()
    dtype = model.net.dtype if isinstance(model.net, CpuNet) else model.table.dtype
    return table + batch_bytes(slots) + cpu_bytes(model.card.architecture, model.parameters, slots.capacity, dtype)


def cpu_bytes(arch: Architecture | LucidArchitecture, parameters: int, slots: int, dtype: torch.dtype) -> int:
    """A net on a CPU: each size of batch has weights and working memory of its own."""
    sizes = sizes_up_to(slots, parameters * dtype.itemsize)
    return len(sizes) * parameters * int(dtype.itemsize) + sum(sizes) * picture_bytes(arch, dtype)


def batch_bytes(slots: Slots) -> int:
    """A batch, and as much again: pictures that were unseated keep their state, and plans their rows on a GPU."""
    return 2 * sum(
        tensor.numel() * tensor.element_size() for tensor in vars(slots).values() if isinstance(tensor, Tensor)
    )


def picture_bytes(arch: Architecture | LucidArchitecture, dtype: torch.dtype) -> int:
    """What a step takes for itself while it is made, for each picture in it, at most."""
    pixels, itemsize = arch.height * arch.width, int(dtype.itemsize)
    return math.ceil(WORKSPACE * (itemsize * alive(arch) + SAMPLER * 4 * arch.in_channels * pixels))


def alive(arch: Architecture | LucidArchitecture) -> int:
    """The most numbers that are alive at a time while the net computes one picture: what the way down keeps for the way
    up, and the largest layer at work."""
    return _alive_in_lucid(arch) if isinstance(arch, LucidArchitecture) else _alive(arch)


def _alive_in_lucid(arch: LucidArchitecture) -> int:
    kept, largest, scores = arch.init_dim * arch.height * arch.width, 0, 0
    for level, (above, below) in enumerate(zip(arch.widths, arch.widths[1:], strict=False)):
        pixels = -(-arch.height // (1 << level)) * -(-arch.width // (1 << level))
        kept += 2 * above * pixels
        largest = max(largest, (above + below) * pixels)
        inner = arch.attn_heads[level] * arch.attn_dim_head[level]
        seen = arch.attn_heads[level] * (pixels + arch.num_mem_kv) if arch.full_attn[level] else 4 * inner
        scores = max(scores, (4 * inner + seen) * pixels)
    return kept + max(AT_WORK * largest, scores + 2 * largest)


def _alive(arch: Architecture) -> int:
    widths, layers, last = arch.block_out_channels, arch.layers_per_block, len(arch.block_out_channels) - 1
    pixels = [-(-arch.height // (1 << level)) * -(-arch.width // (1 << level)) for level in range(last + 1)]
    kept, largest, scores = widths[0] * pixels[0], 0, 0
    for level, channels in enumerate(widths):
        kept += layers * channels * pixels[level]
        if level < last:
            kept += channels * pixels[level + 1]
        above = widths[min(level + 1, last)]
        largest = max(largest, (above + channels) * pixels[level])  # joined on the way up
        kinds = (DOWN_BLOCKS[arch.down_block_types[level]], UP_BLOCKS[arch.up_block_types[last - level]])
        if ATTENTION in kinds or (level == last and arch.add_attention):
            scores = max(scores, arch.heads(channels) * pixels[level] * pixels[level] + 4 * channels * pixels[level])
    return kept + max(AT_WORK * largest, scores + 2 * largest)

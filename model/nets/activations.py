"""How many numbers of a net are alive at a time while it computes, and so how much memory a batch takes."""

import torch

from model.nets.config import ATTENTION, DOWN_BLOCKS, UP_BLOCKS, Architecture
from model.nets.lucidrains_config import AnyArchitecture, LucidrainsArchitecture

AT_WORK = 6  # tensors of a layer that are alive at a time: its input, normed, padded, convolved, added
SIZES = (1, 2, 4, 8, 16)  # batch sizes for which a net is compiled on a CPU
SIZES_BYTES = 3 << 30  # of memory that they may take together, unless the first alone takes more


def sizes_up_to(slots: int, arch: AnyArchitecture, parameters: int, dtype: torch.dtype) -> list[int]:
    """The batch sizes of a net on a CPU after it has grown to `slots` pictures."""
    sizes, taken = [1], size_bytes(1, arch, parameters, dtype)
    for size in SIZES[1:]:
        taken += size_bytes(size, arch, parameters, dtype)
        if size <= slots and taken <= SIZES_BYTES:
            sizes.append(size)
    return sizes


def size_bytes(size: int, arch: AnyArchitecture, parameters: int, dtype: torch.dtype) -> int:
    """Memory of one batch size: its own copy of the weights, and the activations of each picture."""
    return int(dtype.itemsize) * (parameters + size * alive(arch))


def alive(arch: AnyArchitecture) -> int:
    """The most numbers that are alive at a time while the net computes one picture: those that the way down keeps for
    the way up, and those of the largest layer at work."""
    return _alive_in_lucidrains(arch) if isinstance(arch, LucidrainsArchitecture) else _alive(arch)


def _pixels(arch: AnyArchitecture, level: int) -> int:
    """The pixels of a picture at a level, from 0 down."""
    return -(-arch.height // (1 << level)) * -(-arch.width // (1 << level))


def _most(kept: int, largest: int, scores: int) -> int:
    """kept: for the way up; largest: input and output of a layer; scores: of an attention, with its other tensors"""
    return kept + max(AT_WORK * largest, scores + 2 * largest)


def _alive_in_lucidrains(arch: LucidrainsArchitecture) -> int:
    kept, largest, scores = arch.init_dim * arch.height * arch.width, 0, 0
    for level, (above, below) in enumerate(zip(arch.widths, arch.widths[1:], strict=False)):
        pixels = _pixels(arch, level)
        kept += 2 * above * pixels
        largest = max(largest, (above + below) * pixels)
        inner = arch.attn_heads[level] * arch.attn_dim_head[level]
        seen = arch.attn_heads[level] * (pixels + arch.num_mem_kv) if arch.full_attn[level] else 4 * inner
        scores = max(scores, (4 * inner + seen) * pixels)
    return _most(kept, largest, scores)


def _alive(arch: Architecture) -> int:
    widths, layers, last = arch.block_out_channels, arch.layers_per_block, len(arch.block_out_channels) - 1
    kept, largest, scores = widths[0] * _pixels(arch, 0), 0, 0
    for level, channels in enumerate(widths):
        pixels = _pixels(arch, level)
        kept += layers * channels * pixels
        if level < last:
            kept += channels * _pixels(arch, level + 1)
        above = widths[min(level + 1, last)]
        largest = max(largest, (above + channels) * pixels)  # concatenated on the way up
        kinds = (DOWN_BLOCKS[arch.down_block_types[level]], UP_BLOCKS[arch.up_block_types[last - level]])
        if ATTENTION in kinds or (level == last and arch.add_attention):
            scores = max(scores, arch.heads(channels) * pixels * pixels + 4 * channels * pixels)
    return _most(kept, largest, scores)

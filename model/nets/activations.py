"""How much of a net is alive at a time while it computes a picture."""

from model.nets.config import ATTENTION, DOWN_BLOCKS, UP_BLOCKS, Architecture
from model.nets.lucidrains_config import LucidArchitecture

AT_WORK = 6  # tensors of a layer that are alive at a time: what it reads, normed, padded, convolved, added to


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

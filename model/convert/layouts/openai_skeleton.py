"""The levels of an OpenAI checkpoint, read from the names of its numbered blocks, and where each block belongs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from model.errors import ModelRefused

MOST_LEVELS, MOST_LAYERS = 8, 16
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The levels that the numbered blocks of a checkpoint make up."""

    widths: list[int]  # channels of each level
    attends: list[bool]
    layers: int  # residual blocks of a level on the way down; one more on the way up
    resampling: str  # conv, resnet or none: how the picture's size changes


def _numbers(state: Mapping[str, Tensor], where: str, what: str) -> list[int]:
    """The numbers n of all tensors named `where`.n.`what`."""
    numbered = (key.removeprefix(f"{where}.").partition(".") for key in state if key.startswith(f"{where}."))
    return sorted({int(n) for n, _, rest in numbered if rest == what and n.isdecimal()})


def read_skeleton(state: Mapping[str, Tensor]) -> Skeleton:
    """The levels, each of which ends where the picture's size changes. Raises ModelRefused."""
    blocks = _numbers(state, "input_blocks", "0.in_layers.2.weight")
    strided = _numbers(state, "input_blocks", "0.op.weight")
    raised = [n for i in (1, 2) for n in _numbers(state, "output_blocks", f"{i}.in_layers.2.weight")]
    if raised:
        resampling, per_level = "resnet", min(raised) + 1
    elif strided:
        resampling, per_level = "conv", strided[0]
    else:  # by pooling, whose blocks have no weights, so that their numbers are missing
        per_level = next(n for n in range(1, max(blocks, default=0) + 2) if n not in blocks)
        resampling = "none" if per_level < max(blocks, default=0) else "conv"
    firsts = [n for n in blocks if n % per_level == 1 % per_level]
    if not (2 <= per_level <= MOST_LAYERS + 1 and 1 <= len(firsts) <= MOST_LEVELS):
        raise ModelRefused(f"a net must have at most {MOST_LEVELS} levels of 1 to {MOST_LAYERS} residual blocks")
    attends = [f"input_blocks.{n}.1.qkv.weight" in state for n in firsts]
    widths = [state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts]
    return Skeleton(widths, attends, per_level - 1, resampling)


def places(skeleton: Skeleton) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(path in the checkpoint, path in UNet2DModel, names of its layers) of each block."""
    levels, per_level, by = len(skeleton.widths), skeleton.layers + 1, skeleton.resampling
    for i in range(2):
        yield f"middle_block.{2 * i}", f"mid_block.resnets.{i}", RESNET
    yield "middle_block.1", "mid_block.attentions.0", ATTENTION
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        for i in range(skeleton.layers):
            n = 1 + level * per_level + i
            yield f"input_blocks.{n}.0", f"{down}.resnets.{i}", RESNET
            yield f"input_blocks.{n}.1", f"{down}.attentions.{i}", ATTENTION
        for i in range(per_level):
            n = (levels - 1 - level) * per_level + i
            yield f"output_blocks.{n}.0", f"{up}.resnets.{i}", RESNET
            yield f"output_blocks.{n}.1", f"{up}.attentions.{i}", ATTENTION if skeleton.attends[level] else {}
        below, above = (level + 1) * per_level, (levels - level) * per_level - 1
        behind = f"output_blocks.{above}.{1 + skeleton.attends[level]}"
        if by == "resnet" and level < levels - 1:
            yield f"input_blocks.{below}.0", f"{down}.downsamplers.0", RESNET
        if by == "resnet" and level > 0:
            yield behind, f"{up}.upsamplers.0", RESNET
        if by == "conv":
            yield f"input_blocks.{below}.0", f"{down}.downsamplers.0", {"op": "conv"}
            yield behind, f"{up}.upsamplers.0", {"conv": "conv"}


def attended(skeleton: Skeleton, width: int) -> bool:
    """Whether an attention reads so many channels. The middle block always has one."""
    pairs = zip(skeleton.widths, skeleton.attends, strict=True)
    return width == skeleton.widths[-1] or any(attends for each, attends in pairs if each == width)

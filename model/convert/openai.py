"""The U-Nets of OpenAI's improved-diffusion (Nichol & Dhariwal 2021) and guided-diffusion (Dhariwal & Nichol 2021).

A checkpoint is the state dict of their `UNetModel`. Its skeleton can be read from it; the picture's size, the heads of
attention, the order of their weights, T and the schedule cannot. Where diffusers' `UNet2DModel` has words for the net,
it becomes one, else an `OpenAIUNet` (`model.nets.config`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from model.convert.frame import Converted, Options, required, scheduler_config
from model.errors import ModelRefused
from model.nets.config import CHANNELS, OPENAI

READS = frozenset(field.name for field in fields(Options))  # all there are
GROUPS = 32
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
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """How the numbered blocks of a checkpoint make up levels."""

    widths: list[int]  # channels of each level
    attends: list[bool]
    layers: int  # residual blocks of a level on the way down; one more on the way up
    resampling: str  # conv, resnet or none: how the picture's size changes


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether these tensors have the names of OpenAI's `UNetModel`."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"} <= state.keys()


def _numbers(state: Mapping[str, Tensor], where: str, what: str) -> list[int]:
    """The numbers n of all tensors named `where`.n.`what`."""
    numbered = (key.removeprefix(f"{where}.").partition(".") for key in state if key.startswith(f"{where}."))
    return sorted({int(n) for n, _, rest in numbered if rest == what and n.isdecimal()})


def _skeleton(state: Mapping[str, Tensor]) -> Skeleton:
    """The levels: they end where the picture's size changes."""
    blocks = _numbers(state, "input_blocks", "0.in_layers.2.weight")
    strided = _numbers(state, "input_blocks", "0.op.weight")
    raised = [n for i in (1, 2) for n in _numbers(state, "output_blocks", f"{i}.in_layers.2.weight")]
    if raised:
        resampling, per_level = "resnet", min(raised) + 1
    elif strided:
        resampling, per_level = "conv", strided[0]
    else:  # by pooling, which has no weights, so that numbers are left out
        per_level = next(n for n in range(1, max(blocks, default=0) + 2) if n not in blocks)
        resampling = "none" if per_level < max(blocks, default=0) else "conv"
    firsts = [n for n in blocks if n % per_level == 1 % per_level]
    if not (2 <= per_level <= MOST_LAYERS + 1 and 1 <= len(firsts) <= MOST_LEVELS):
        raise ModelRefused(f"a net must have at most {MOST_LEVELS} levels of 1 to {MOST_LAYERS} residual blocks")
    attends = [f"input_blocks.{n}.1.qkv.weight" in state for n in firsts]
    widths = [state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts]
    return Skeleton(widths, attends, per_level - 1, resampling)


def _places(skeleton: Skeleton) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Where every block is, there and here, and what its layers are called."""
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


def _separated(weight: Tensor, heads: int | None) -> tuple[Tensor, ...]:
    """Weight or bias of queries, keys and values, from all three: by kind first, or, given the heads, by head first."""
    if heads is None:
        return weight.chunk(3)
    parts = weight.unflatten(0, (heads, 3, -1))  # [heads, 3, C / heads, ...]
    return tuple(part.flatten(0, 1) for part in parts.unbind(1))


def _tensors(state: Mapping[str, Tensor], skeleton: Skeleton, options: Options) -> dict[str, Tensor]:
    """The weights by their names in `UNet2DModel`."""
    names = dict(ENDS)
    for there, here, layers in _places(skeleton):
        names |= {f"{there}.{theirs}": f"{here}.{ours}" for theirs, ours in layers.items()}
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if layer not in names:
            raise ModelRefused(f"{ascii(key)} is not a tensor of OpenAI's U-Net: a variant that cannot be converted")
        name = names[layer]
        tensor = tensor.flatten(1) if ".attentions." in name and tensor.ndim > 1 else tensor  # a dense layer here
        if not name.endswith(".to_qkv"):
            tensors[f"{name}.{kind}"] = tensor
            continue
        channels = tensor.shape[0] // 3
        heads = None if options.new_attention_order else _heads(channels, options)
        for part, separate in zip("qkv", _separated(tensor, heads), strict=True):
            tensors[f"{name.removesuffix('qkv')}{part}.{kind}"] = separate.contiguous()
    return tensors


def _heads(channels: int, options: Options) -> int:
    """Into how many heads an attention divides these channels."""
    if options.heads is None and options.head_channels is None:
        raise ModelRefused(
            "--heads or --head-channels must be given: the file does not tell (num_heads was 4 unless set)"
        )
    if options.head_channels is not None:  # goes before num_heads there, too
        heads, rest = divmod(channels, max(options.head_channels, 1))
    else:
        heads = max(options.heads or 0, 0)
        rest = channels % max(heads, 1)
    if rest or heads < 1:
        raise ModelRefused(f"--heads and --head-channels must divide the {channels} channels that are attended to")
    return heads


def _config(state: Mapping[str, Tensor], skeleton: Skeleton, options: Options, scale: float) -> dict[str, Any]:
    widths, by = skeleton.widths, skeleton.resampling
    plain, resampled = ("ResnetDownsampleBlock2D", "resnet") if by == "resnet" else ("DownBlock2D", "conv")
    down = ["AttnDownBlock2D" if attends else plain for attends in skeleton.attends]
    sizes = {width // _heads(width, options) for width in [*widths, widths[-1]] if _attended(skeleton, width)}
    embedding, sinusoid = state["time_embed.0.weight"].shape
    shifts = state["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1]
    ours = {
        "attention_heads": options.heads if len(sizes) > 1 else None,
        "sinusoid_dim": sinusoid if sinusoid != widths[0] else None,
        "timestep_scale": scale if scale != 1 else None,
        "downsample_type": "pool" if by == "none" else None,
        "upsample_type": "repeat" if by == "none" else None,
    }
    ours = {option: value for option, value in ours.items() if value is not None}
    config = {
        "_class_name": OPENAI if ours else "UNet2DModel",
        "sample_size": required(options.image_size, "--image-size", "the file does not tell the size of a picture"),
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": skeleton.layers,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "downsample_type": resampled,
        "upsample_type": resampled,
        "downsample_padding": 1,
        "attention_head_dim": max(sizes) if len(sizes) == 1 else None,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if shifts else "default",
        "act_fn": "silu",
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "time_embedding_type": "positional",
        "time_embedding_dim": embedding,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    return config | ours


def _attended(skeleton: Skeleton, width: int) -> bool:
    """Whether some attention reads so many channels; the middle always attends."""
    pairs = zip(skeleton.widths, skeleton.attends, strict=True)
    return width == skeleton.widths[-1] or any(attends for each, attends in pairs if each == width)


def _refuse_conditional(state: Mapping[str, Tensor]) -> None:
    """Nets that want to be told more than x_t and t, and nets that predict something else."""
    if "label_emb.weight" in state:
        raise ModelRefused(
            "a class-conditional net (label_emb) cannot be converted: only unconditional ones are served"
        )
    if "output_blocks.0.0.in_layers.2.weight" not in state or "out.2.weight" not in state:
        raise ModelRefused("a net without output_blocks is a classifier, not a U-Net")
    channels = state["input_blocks.0.0.weight"].shape[1]
    if channels not in CHANNELS:
        raise ModelRefused(f"a net that reads {channels} channels cannot be converted: an upsampler, or one of latents")


def convert(state: Mapping[str, Tensor], options: Options) -> Converted:
    """The same net as a `UNet2DModel` or an `OpenAIUNet`; what is not told is as in OpenAI's scripts."""
    _refuse_conditional(state)
    skeleton = _skeleton(state)
    T, scale = options.timesteps or 1000, 1.0
    if T != 1000:
        why = "improved-diffusion rescales timesteps unless told not to, guided-diffusion does not, and T is not 1000"
        scale = 1000 / T if required(options.rescale_timesteps, "--rescale-timesteps", why) else 1.0
    config = _config(state, skeleton, options, scale)
    tensors = _tensors(state, skeleton, options)
    learned = config["out_channels"] == 2 * config["in_channels"]
    # their linear schedule adds the same noise for any T
    scaled = replace(options, beta_start=options.beta_start or 0.1 / T, beta_end=options.beta_end or 20 / T)
    scheduler = scheduler_config(scaled, "learned_range" if learned else "fixed_large")
    told = (
        f"{'new' if options.new_attention_order else 'legacy'} attention order",
        f"heads of {options.head_channels} channels" if options.head_channels else f"{options.heads} heads",
        scheduler["prediction_type"],
        f"{scheduler['beta_schedule']} schedule",
        f"timesteps {'rescaled' if options.rescale_timesteps else 'not rescaled'}",
    )
    origin = f"OpenAI's U-Net ({', '.join(told)}), {config['sample_size']} x {config['sample_size']}, T = {T}"
    return Converted(config, scheduler | {"timestep_spacing": "linspace"}, tensors, origin)

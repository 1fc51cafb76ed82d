"""The U-Nets of OpenAI's improved-diffusion (Nichol & Dhariwal 2021) and guided-diffusion (Dhariwal & Nichol 2021).

A checkpoint is the state dict of their `UNetModel`. Its levels and the number of its labels can be read from it; the
picture's size, the heads of attention, the order of their weights, T and the schedule cannot. If diffusers'
`UNet2DModel` can describe the net, it becomes one, otherwise an `OpenAIUNet` (`model.nets.config`).
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from model.convert.layouts.openai_skeleton import ENDS, Skeleton, attended, places, read_skeleton
from model.convert.nets import Net
from model.convert.protocol import Converted, Options, required, scheduler_config, with_scaled_betas
from model.errors import ModelRefused
from model.nets.config import OPENAI
from model.options import CHANNELS

READS = frozenset(field.name for field in fields(Options)) - {"config", "scheduler"}
NAMES = frozenset({"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"})
GROUPS = 32


def _separated(weight: Tensor, heads: int | None) -> tuple[Tensor, ...]:
    """Weight or bias of queries, keys and values from those of all three, which are ordered by kind, or, given the
    number of heads, by head and then by kind."""
    if heads is None:
        return weight.chunk(3)
    parts = weight.unflatten(0, (heads, 3, -1))  # [heads, 3, C / heads, ...]
    return tuple(part.flatten(0, 1) for part in parts.unbind(1))


def _tensors(state: Mapping[str, Tensor], skeleton: Skeleton, options: Options) -> dict[str, Tensor]:
    """The weights by their names in `UNet2DModel`."""
    names = dict(ENDS)
    for there, here, layers in places(skeleton):
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
    """The number of heads of an attention with so many channels. Raises ModelRefused."""
    if options.heads is None and options.head_channels is None:
        raise ModelRefused(
            "--heads or --head-channels must be given: the file does not tell (num_heads was 4 unless set)"
        )
    if options.head_channels is not None:  # it takes precedence over num_heads in their code, too
        heads, rest = divmod(channels, max(options.head_channels, 1))
    else:
        heads = max(options.heads or 0, 0)
        rest = channels % max(heads, 1)
    if rest or heads < 1:
        raise ModelRefused(f"--heads and --head-channels must divide the {channels} channels that are attended to")
    return heads


def _extensions(skeleton: Skeleton, options: Options, sinusoid: int, mixed: bool, scale: float) -> dict[str, Any]:
    """The options that only an `OpenAIUNet` has. mixed: whether heads differ in their channels"""
    pools = skeleton.resampling == "none"
    extensions = {
        "attention_heads": options.heads if mixed else None,
        "sinusoid_dim": sinusoid if sinusoid != skeleton.widths[0] else None,
        "timestep_scale": scale if scale != 1 else None,
        "downsample_type": "pool" if pools else None,
        "upsample_type": "repeat" if pools else None,
    }
    return {option: value for option, value in extensions.items() if value is not None}


def _config(state: Mapping[str, Tensor], skeleton: Skeleton, options: Options, scale: float) -> dict[str, Any]:
    widths = skeleton.widths
    plain, resampled = "DownBlock2D", "conv"
    if skeleton.resampling == "resnet":
        plain, resampled = "ResnetDownsampleBlock2D", "resnet"
    down = ["AttnDownBlock2D" if attends else plain for attends in skeleton.attends]
    sizes = {width // _heads(width, options) for width in [*widths, widths[-1]] if attended(skeleton, width)}
    embedding, sinusoid = state["time_embed.0.weight"].shape
    shifts = state["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1]
    extensions = _extensions(skeleton, options, sinusoid, len(sizes) > 1, scale)
    config = {
        "_class_name": OPENAI if extensions else "UNet2DModel",
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
    if "label_emb.weight" in state:
        config["num_class_embeds"] = state["label_emb.weight"].shape[0]
    return config | extensions


def _refuse_other_kinds(state: Mapping[str, Tensor]) -> None:
    """Refuses nets that read more than x_t, t and a label, and nets that predict something else. Raises ModelRefused"""
    if "output_blocks.0.0.in_layers.2.weight" not in state or "out.2.weight" not in state:
        raise ModelRefused("a net without output_blocks is a classifier, not a U-Net")
    channels = state["input_blocks.0.0.weight"].shape[1]
    if channels not in CHANNELS:
        raise ModelRefused(f"a net that reads {channels} channels cannot be converted: an upsampler, or one of latents")


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net as a `UNet2DModel` or an `OpenAIUNet`. The defaults are those of OpenAI's scripts."""
    state = net.tensors
    _refuse_other_kinds(state)
    skeleton = read_skeleton(state)
    T, scale = options.timesteps or 1000, 1.0
    if T != 1000:
        why = "improved-diffusion rescales timesteps unless told not to, guided-diffusion does not, and T is not 1000"
        scale = 1000 / T if required(options.rescale_timesteps, "--rescale-timesteps", why) else 1.0
    config = _config(state, skeleton, options, scale)
    tensors = _tensors(state, skeleton, options)
    learned = config["out_channels"] == 2 * config["in_channels"]
    scheduler = scheduler_config(with_scaled_betas(options, T), "learned_range" if learned else "fixed_large")
    labels = (f"{config['num_class_embeds']} labels",) if "num_class_embeds" in config else ()
    assumptions = (
        *labels,
        f"{'new' if options.new_attention_order else 'legacy'} attention order",
        f"heads of {options.head_channels} channels" if options.head_channels else f"{options.heads} heads",
        scheduler["prediction_type"],
        f"{scheduler['beta_schedule']} schedule",
        f"timesteps {'rescaled' if options.rescale_timesteps else 'not rescaled'}",
    )
    origin = f"OpenAI's U-Net ({', '.join(assumptions)}), {config['sample_size']} x {config['sample_size']}, T = {T}"
    return Converted(config, scheduler | {"timestep_spacing": "linspace"}, tensors, origin)

"""The shape of a U-Net, read from the `config.json` that diffusers writes, with bounds for every number.

OpenAI's improved- and guided-diffusion build nets that `UNet2DModel` cannot describe. Their `config.json` names the
class `OpenAIUNet`: the same options and a few more (docs/models.md), all of which must be known here.
"""

from dataclasses import dataclass, fields
from typing import Any

from model.errors import ModelRefused
from model.options import Json, Options, image_size, picture_channels, whole

MAX_LABELS = 1 << 16  # that a net may know
MAX_PARAMETERS = 4_000_000_000
PLAIN, ATTENTION, RESNET = "plain", "attention", "resnet"
DIFFUSERS = ("UNet2DModel", "UNetUnconditionalModel", "UNetModel")  # of today and of 2022
OPENAI = "OpenAIUNet"
DOWN_BLOCKS = {"DownBlock2D": PLAIN, "AttnDownBlock2D": ATTENTION, "ResnetDownsampleBlock2D": RESNET}
UP_BLOCKS = {"UpBlock2D": PLAIN, "AttnUpBlock2D": ATTENTION, "ResnetUpsampleBlock2D": RESNET}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a U-Net, by the options of diffusers' `UNet2DModel` (0.42); the last three are `OpenAIUNet`'s."""

    height: int
    width: int
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_embedding_dim: int | None = None
    class_embed_type: str | None = None
    num_class_embeds: int | None = None  # labels, the null label among them; None: the net knows no labels
    attention_heads: int | None = None  # in every attention; attention_head_dim is ignored then
    sinusoid_dim: int | None = None  # None: the first level's channels
    timestep_scale: float = 1.0  # by which the timesteps of the training were multiplied

    @property
    def learned_variance(self) -> bool:
        """Whether a second set of output channels says how much noise to add."""
        return self.out_channels == 2 * self.in_channels

    @property
    def levels(self) -> int:
        """The number of sizes at which the net works, each half of the one above."""
        return len(self.block_out_channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.in_channels, self.height, self.width

    @property
    def labels(self) -> int:
        """How many labels the net knows, the null label among them; 0 if it is unconditional."""
        return self.num_class_embeds or 0

    @property
    def null_label(self) -> int | None:
        """The label that stands for none, if the net itself tells."""
        return None

    @property
    def embedding_dim(self) -> int:
        """Width of the timestep's embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def heads(self, channels: int) -> int:
        """The number of heads of an attention with so many channels."""
        return self.attention_heads or channels // (self.attention_head_dim or channels)

    @property
    def least_parameters(self) -> int:
        """A lower bound of its parameters: one convolution of each residual block, from and to its level's channels."""
        return (2 * self.layers_per_block + 1) * sum(9 * width * width for width in self.block_out_channels)


# The names of options before diffusers 0.1, and now.
RENAMED = {
    "image_size": "sample_size",
    "block_channels": "block_out_channels",
    "num_res_blocks": "layers_per_block",
    "down_blocks": "down_block_types",
    "up_blocks": "up_block_types",
    "downscale_freq_shift": "freq_shift",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "resnet_eps": "norm_eps",
    "num_head_channels": "attention_head_dim",
}

# The values with which this U-Net computes the same function as diffusers'. Others are refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None, "timestep", "identity"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "attention_heads": (None,),
    "sinusoid_dim": (None,),
    "timestep_scale": (1, 1.0),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True, False),
    "conv_resample": (True, None),
    "flip_sin_to_cos": (True, False),
}
_OPENAI = {"downsample_type": ("conv", "resnet", "pool"), "upsample_type": ("conv", "resnet", "repeat")}
_NUMBERS = {"attention_heads", "sinusoid_dim", "timestep_scale"}  # of `OpenAIUNet` alone
_KEPT = {field.name for field in fields(Architecture)} & (_FIXED.keys() - _NUMBERS)


def with_todays_names(config: Json) -> Json:
    """The same options under diffusers' names of today; of an option under both names the new one counts."""
    named = {RENAMED.get(option, option): value for option, value in config.items() if option in RENAMED}
    named |= {option: value for option, value in config.items() if option not in RENAMED}
    for option in ("down_block_types", "up_block_types"):
        if isinstance(types := named.get(option), list):
            named[option] = [t.removeprefix("UNetRes") if isinstance(t, str) else t for t in types]
    return named


def _block_types(options: Options, option: str, known: Json, default: tuple[str, ...]) -> tuple[str, ...]:
    types = options.items(option, default, 8)
    if not all(isinstance(block_type, str) and block_type in known for block_type in types):
        raise options.refuse(option, "a list of " + ", ".join(known))
    return tuple(types)


def _levels(options: Options, default: Architecture) -> tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]:
    """(block_out_channels, down_block_types, up_block_types), all of one length. Raises ModelRefused."""
    given = [whole(item) for item in options.items("block_out_channels", default.block_out_channels, 8)]
    widths = tuple(width for width in given if width is not None and 1 <= width <= 8192)
    if len(widths) != len(given):
        raise options.refuse("block_out_channels", "integers in 1..8192")
    down = _block_types(options, "down_block_types", DOWN_BLOCKS, default.down_block_types)
    up = _block_types(options, "up_block_types", UP_BLOCKS, default.up_block_types)
    if not len(down) == len(up) == len(widths):
        raise options.refuse("down_block_types", f"as long as block_out_channels and up_block_types ({len(widths)})")
    return widths, down, up


def architecture(config: Json) -> Architecture:
    """The net that a `config.json` describes. Raises ModelRefused naming the option that is out of bounds."""
    if "ch_mult" in config:
        raise ModelRefused("config.json: a net in the layout before diffusers' first; `ddpm convert` makes it today's")
    config = with_todays_names(config)
    options = Options("config.json", config)
    _check_words(options)
    widths, down, up = _levels(options, Architecture(height=32, width=32))
    height, width = image_size(options, len(widths))
    channels, out = picture_channels(options, 3)
    arch = Architecture(
        height=height,
        width=width,
        in_channels=channels,
        out_channels=out,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=options.integer("layers_per_block", 1, 16, 2),
        mid_block_scale_factor=options.number("mid_block_scale_factor", 1e-3, 1e3, 1.0),
        downsample_padding=options.integer("downsample_padding", 0, 1, 1),
        attention_head_dim=options.optional("attention_head_dim", 1, 8192, 8),
        norm_num_groups=options.integer("norm_num_groups", 1, 8192, 32),
        attn_norm_num_groups=options.optional("attn_norm_num_groups", 1, 8192),
        norm_eps=options.number("norm_eps", 1e-12, 1.0, 1e-5),
        freq_shift=options.number("freq_shift", -4.0, 4.0, 0.0),
        time_embedding_dim=options.optional("time_embedding_dim", 1, 32768),
        num_class_embeds=options.optional("num_class_embeds", 1, MAX_LABELS),
        attention_heads=options.optional("attention_heads", 1, 8192),
        sinusoid_dim=options.optional("sinusoid_dim", 4, 8192),
        timestep_scale=options.number("timestep_scale", 1e-6, 1e6, 1.0),
        **{name: config[name] for name in _KEPT & config.keys()},
    )
    _check_consistency(options, arch)
    return arch


def _check_words(options: Options) -> None:
    """Checks every option that is one of a few words, and for `OpenAIUNet` that all options are known."""
    ours = options.values.get("_class_name") == OPENAI
    if ours:
        known = {field.name for field in fields(Architecture)} | _FIXED.keys() | {"sample_size"}
        for option in options.values:
            if option not in known and not option.startswith("_"):
                raise options.refuse(option, f"absent: {OPENAI} has no such option")
    for option, allowed in (_FIXED | (_OPENAI if ours else {})).items():
        if option in options.values and not (ours and option in _NUMBERS):
            options.word(option, allowed, None)


def _check_consistency(options: Options, arch: Architecture) -> None:
    """Checks options that are each fine, but may not be so together."""
    if (least := arch.least_parameters) > MAX_PARAMETERS:
        raise ModelRefused(f"config.json: at most {MAX_PARAMETERS} parameters are allowed, it calls for over {least}")
    if arch.class_embed_type is not None and arch.num_class_embeds is None:
        why = f"class_embed_type {arch.class_embed_type} does not tell how many labels the net knows"
        raise options.refuse("num_class_embeds", f"an integer in 1..{MAX_LABELS}", why)
    channels, groups = arch.block_out_channels, arch.norm_num_groups
    sinusoid = arch.sinusoid_dim or channels[0]
    if sinusoid < 4 or sinusoid // 2 <= arch.freq_shift:
        raise options.refuse("block_out_channels", "at least 4 channels in the first level")
    norms = {*channels, *(a + b for a, b in zip(channels, channels[1:], strict=False)), *(2 * c for c in channels)}
    if any(width % groups for width in norms):
        raise options.refuse("norm_num_groups", "a divisor of every channel count")
    if arch.attn_norm_num_groups is not None and channels[-1] % arch.attn_norm_num_groups:
        raise options.refuse("attn_norm_num_groups", f"a divisor of {channels[-1]}")
    _check_attention(options, arch)


def _check_attention(options: Options, arch: Architecture) -> None:
    """Checks that the channels of every attention can be divided into its heads."""
    channels = arch.block_out_channels
    attended = [c for c, t in zip(channels, arch.down_block_types, strict=True) if DOWN_BLOCKS[t] == ATTENTION]
    attended += [c for c, t in zip(channels[::-1], arch.up_block_types, strict=True) if UP_BLOCKS[t] == ATTENTION]
    if arch.mid_block_type and arch.add_attention:
        attended.append(channels[-1])
    if arch.attention_heads is not None:
        if any(c % arch.attention_heads for c in attended):
            raise options.refuse("attention_heads", "null or a divisor of the channels it attends to")
    elif arch.attention_head_dim is not None and any(c % arch.attention_head_dim for c in attended):
        raise options.refuse("attention_head_dim", "null or a divisor of the channels it attends to")

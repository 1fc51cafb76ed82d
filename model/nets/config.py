"""The shape of a U-Net, read from the `config.json` that diffusers writes, every number bounded.

OpenAI's improved- and guided-diffusion build nets that `UNet2DModel` has no words for. Their `config.json` names the
class `OpenAIUNet`: the same vocabulary with a few words more (docs/models.md), and no word that is not known here.
"""

from dataclasses import dataclass, fields
from typing import Any

from model.errors import ModelRefused
from model.options import Json, Options, whole

CHANNELS = (1, 3)  # of a picture: grey, or red, green and blue
MAX_SIDE = 2048  # pixels
MAX_PARAMETERS = 4_000_000_000
PLAIN, ATTENTION, RESNET = "plain", "attention", "resnet"
OPENAI = "OpenAIUNet"
DOWN_BLOCKS = {"DownBlock2D": PLAIN, "AttnDownBlock2D": ATTENTION, "ResnetDownsampleBlock2D": RESNET}
UP_BLOCKS = {"UpBlock2D": PLAIN, "AttnUpBlock2D": ATTENTION, "ResnetUpsampleBlock2D": RESNET}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a U-Net, in the vocabulary of diffusers' `UNet2DModel` (0.42); the last three are `OpenAIUNet`'s."""

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
    attention_heads: int | None = None  # in every attention; then attention_head_dim does not count
    sinusoid_dim: int | None = None  # if it is not the first level's channels
    timestep_scale: float = 1.0  # the net was trained with timesteps times this

    @property
    def learned_variance(self) -> bool:
        """Whether the net has a second set of channels that says how much noise to add."""
        return self.out_channels == 2 * self.in_channels

    @property
    def levels(self) -> int:
        """Sizes of picture that the net works at, each half of the one above."""
        return len(self.block_out_channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.in_channels, self.height, self.width

    @property
    def embedding_dim(self) -> int:
        """Width of the timestep's embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def heads(self, channels: int) -> int:
        """Into how many heads an attention divides these channels."""
        return self.attention_heads or channels // (self.attention_head_dim or channels)

    @property
    def least_parameters(self) -> int:
        """Fewer than it has: of each resnet the convolution that keeps its level's channels."""
        return (2 * self.layers_per_block + 1) * sum(9 * width * width for width in self.block_out_channels)


# What options were called before diffusers 0.1, and are called now.
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

# What an option must be for this U-Net to compute the same function. Anything else is refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
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
_OPENAI: dict[str, tuple[Any, ...]] = {
    "downsample_type": ("conv", "resnet", "pool"),
    "upsample_type": ("conv", "resnet", "repeat"),
}


def with_todays_names(config: Json) -> Json:
    """The same options as diffusers names them today; what has both names keeps what the new one says."""
    named = {RENAMED.get(option, option): value for option, value in config.items() if option in RENAMED}
    named |= {option: value for option, value in config.items() if option not in RENAMED}
    for option in ("down_block_types", "up_block_types"):
        if isinstance(types := named.get(option), list):
            named[option] = [t.removeprefix("UNetRes") if isinstance(t, str) else t for t in types]
    return named


def _block_types(options: Options, option: str, known: Json, default: tuple[str, ...]) -> tuple[str, ...]:
    types = options.items(option, default, 8)
    for block_type in types:
        if not isinstance(block_type, str) or block_type not in known:
            raise options.refuse(option, "a list of " + ", ".join(known))
    return tuple(types)


def image_size(options: Options, levels: int) -> tuple[int, int]:
    """(height, width) of a picture that can be halved between so many levels. Raises ModelRefused."""
    size = options.values.get("sample_size")
    given = size if isinstance(size, list | tuple) else [size, size]
    step = 2 ** (levels - 1)
    sides = [s for s in map(whole, given[:3]) if s is not None and step <= s <= MAX_SIDE and s % step == 0]
    if not len(given) == len(sides) == 2:
        raise options.refuse("sample_size", f"a multiple of {step} in {step}..{MAX_SIDE}, or [height, width] of such")
    return sides[0], sides[1]


def architecture(config: Json) -> Architecture:
    """The net that a `config.json` describes. Raises ModelRefused naming the option that is out of bounds."""
    if "ch_mult" in config:
        raise ModelRefused("config.json: a net in the layout before diffusers' first; `ddpm convert` makes it today's")
    config = with_todays_names(config)
    options = Options("config.json", config)
    _check_words(options)
    default = Architecture(32, 32)
    channels = []
    for value in map(whole, options.items("block_out_channels", default.block_out_channels, 8)):
        if value is None or not 1 <= value <= 8192:
            raise options.refuse("block_out_channels", "integers in 1..8192")
        channels.append(value)
    down = _block_types(options, "down_block_types", DOWN_BLOCKS, default.down_block_types)
    up = _block_types(options, "up_block_types", UP_BLOCKS, default.up_block_types)
    if not len(down) == len(up) == len(channels):
        raise options.refuse("down_block_types", f"as long as block_out_channels and up_block_types ({len(channels)})")
    height, width = image_size(options, len(channels))
    in_channels = options.integer("in_channels", min(CHANNELS), max(CHANNELS), 3)
    if in_channels not in CHANNELS:
        raise options.refuse("in_channels", " or ".join(map(str, CHANNELS)))
    arch = Architecture(
        height,
        width,
        in_channels,
        options.integer("out_channels", 1, 2 * max(CHANNELS), 3),
        tuple(channels),
        down,
        up,
        config.get("mid_block_type", "UNetMidBlock2D"),
        options.integer("layers_per_block", 1, 16, 2),
        options.number("mid_block_scale_factor", 1e-3, 1e3, 1.0),
        options.integer("downsample_padding", 0, 1, 1),
        config.get("downsample_type", "conv"),
        config.get("upsample_type", "conv"),
        options.optional("attention_head_dim", 1, 8192, 8),
        options.integer("norm_num_groups", 1, 8192, 32),
        options.optional("attn_norm_num_groups", 1, 8192),
        options.number("norm_eps", 1e-12, 1.0, 1e-5),
        config.get("resnet_time_scale_shift", "default"),
        config.get("add_attention", True),
        config.get("flip_sin_to_cos", True),
        options.number("freq_shift", -4.0, 4.0, 0.0),
        options.optional("time_embedding_dim", 1, 32768),
        options.optional("attention_heads", 1, 8192),
        options.optional("sinusoid_dim", 4, 8192),
        options.number("timestep_scale", 1e-6, 1e6, 1.0),
    )
    _check_consistency(options, arch)
    return arch


def _check_words(options: Options) -> None:
    """Every option that is one of a few words, and for `OpenAIUNet` that there is none beside those that are known."""
    ours = options.values.get("_class_name") == OPENAI
    if ours:
        known = {field.name for field in fields(Architecture)} | _FIXED.keys() | {"sample_size"}
        for option in options.values:
            if option not in known and not option.startswith("_"):
                raise options.refuse(option, f"absent: {OPENAI} has no such option")
    numbers = {"attention_heads", "sinusoid_dim", "timestep_scale"} if ours else set()
    for option, allowed in (_FIXED | (_OPENAI if ours else {})).items():
        if option in options.values and option not in numbers:
            options.word(option, allowed, None)


def _check_consistency(options: Options, arch: Architecture) -> None:
    """Options that are each fine, but not together."""
    if (least := arch.least_parameters) > MAX_PARAMETERS:
        raise ModelRefused(f"config.json: at most {MAX_PARAMETERS} parameters are allowed, it calls for over {least}")
    channels, groups = arch.block_out_channels, arch.norm_num_groups
    if arch.out_channels not in (arch.in_channels, 2 * arch.in_channels):
        raise options.refuse("out_channels", f"in_channels or twice that ({arch.in_channels})")
    sinusoid = arch.sinusoid_dim or channels[0]
    if sinusoid < 4 or sinusoid // 2 <= arch.freq_shift:
        raise options.refuse("block_out_channels", "at least 4 channels in the first level")
    norms = {*channels, *(a + b for a, b in zip(channels, channels[1:], strict=False)), *(2 * c for c in channels)}
    if any(width % groups for width in norms):
        raise options.refuse("norm_num_groups", "a divisor of every channel count")
    if arch.attn_norm_num_groups is not None and channels[-1] % arch.attn_norm_num_groups:
        raise options.refuse("attn_norm_num_groups", f"a divisor of {channels[-1]}")
    attended = [c for c, t in zip(channels, arch.down_block_types, strict=True) if DOWN_BLOCKS[t] == ATTENTION]
    attended += [c for c, t in zip(channels[::-1], arch.up_block_types, strict=True) if UP_BLOCKS[t] == ATTENTION]
    if arch.mid_block_type and arch.add_attention:
        attended.append(channels[-1])
    if arch.attention_heads is not None:
        if any(c % arch.attention_heads for c in attended):
            raise options.refuse("attention_heads", "null or a divisor of the channels it attends to")
    elif arch.attention_head_dim is not None and any(c % arch.attention_head_dim for c in attended):
        raise options.refuse("attention_head_dim", "null or a divisor of the channels it attends to")

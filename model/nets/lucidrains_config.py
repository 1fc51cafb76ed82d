"""The shape of lucidrains' U-Net (`denoising_diffusion_pytorch` 2), for which diffusers has no class.

The `config.json` of its model directories names the class `LucidUNet`. The options are those of the original's
constructors, of the unconditional net and of that for classifier-free guidance, and `downsample_kernel`, in which the
two differ. All of them must be known here. See docs/models.md.
"""

from dataclasses import dataclass, fields
from typing import TypeAlias

from model.nets.config import MAX_LABELS, Architecture
from model.options import Json, Options, image_size, picture_channels, whole

LUCIDRAINS = "LucidUNet"  # the class in `config.json`: directories with this name exist


@dataclass(frozen=True, slots=True, kw_only=True)
class LucidrainsArchitecture:
    """The arguments of lucidrains' `Unet`; a tuple has an item for each level, from the picture down."""

    height: int
    width: int
    in_channels: int
    out_channels: int
    dim: int
    init_dim: int
    dim_mults: tuple[int, ...]
    full_attn: tuple[bool, ...]  # whether a level has full attention; it is linear otherwise
    attn_heads: tuple[int, ...]
    attn_dim_head: tuple[int, ...]
    num_mem_kv: int = 4  # keys and values that every attention has besides those of the picture
    sinusoidal_pos_emb_theta: float = 10_000.0
    downsample_kernel: int = 2  # side of the convolutions that halve the picture
    num_classes: int | None = None  # labels besides the null label; None: the net knows no labels

    @property
    def learned_variance(self) -> bool:
        """Whether a second set of output channels says how much noise to add."""
        return self.out_channels == 2 * self.in_channels

    @property
    def labels(self) -> int:
        """How many labels the net knows, the last of which is the null label; 0 if it is unconditional."""
        return 0 if self.num_classes is None else self.num_classes + 1

    @property
    def null_label(self) -> int | None:
        """The label that stands for none."""
        return self.num_classes

    @property
    def embedding_dim(self) -> int:
        """Width of what each block projects: the timestep's embedding, and perhaps that of a label behind it."""
        return 4 * self.dim * (1 if self.num_classes is None else 2)

    @property
    def levels(self) -> int:
        """The number of sizes at which the net works, each half of the one above."""
        return len(self.dim_mults)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.in_channels, self.height, self.width

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels before the first level, and behind each."""
        return self.init_dim, *(self.dim * multiplier for multiplier in self.dim_mults)


AnyArchitecture: TypeAlias = Architecture | LucidrainsArchitecture


def _whole_numbers(options: Options, option: str, low: int, high: int) -> tuple[int, ...]:
    numbers = [whole(item) for item in options.items(option, None, 8)]
    if any(number is None or not low <= number <= high for number in numbers):
        raise options.refuse(option, f"integers in {low}..{high}")
    return tuple(number for number in numbers if number is not None)


def lucidrains_architecture(config: Json) -> LucidrainsArchitecture:
    """The net that such a `config.json` describes. Raises ModelRefused naming the option that is out of bounds."""
    options = Options("config.json", config)
    known = {field.name for field in fields(LucidrainsArchitecture)} - {"height", "width"} | {"sample_size"}
    for option in config:
        if option not in known and not option.startswith("_"):
            raise options.refuse(option, f"absent: {LUCIDRAINS} has no such option")
    multipliers = _whole_numbers(options, "dim_mults", 1, 64)
    height, width = image_size(options, len(multipliers))
    channels, out = picture_channels(options)
    full = options.items("full_attn", None, 8)
    if not all(isinstance(item, bool) for item in full):
        raise options.refuse("full_attn", "a list of true and false")
    heads, head_dims = (_whole_numbers(options, name, 1, 1024) for name in ("attn_heads", "attn_dim_head"))
    for option, items in (("full_attn", full), ("attn_heads", heads), ("attn_dim_head", head_dims)):
        if len(items) != len(multipliers):
            raise options.refuse(option, f"as long as dim_mults ({len(multipliers)})")
    dim = options.integer("dim", 4, 2048, None)
    return LucidrainsArchitecture(
        height=height,
        width=width,
        in_channels=channels,
        out_channels=out,
        dim=dim,
        init_dim=options.integer("init_dim", 1, 8192, dim),
        dim_mults=multipliers,
        full_attn=tuple(full),
        attn_heads=heads,
        attn_dim_head=head_dims,
        num_mem_kv=options.integer("num_mem_kv", 0, 1024, 4),
        sinusoidal_pos_emb_theta=options.number("sinusoidal_pos_emb_theta", 1.0, 1e9, 10_000.0),
        downsample_kernel=options.word("downsample_kernel", (2, 4), 2),
        num_classes=options.optional("num_classes", 1, MAX_LABELS - 1),
    )

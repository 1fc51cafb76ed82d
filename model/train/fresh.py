"""The configurations of a new model directory, which fit the pictures that it is trained on."""

from collections.abc import Sequence
from typing import Any

from model.checkpoint.labels import MAX_NAME
from model.sampling.labels import RANDOM
from model.train.source import Outline

MADE_FOR = "0.42.1"  # the version of diffusers whose names the files use
SIDE = 32  # pixels of a picture, unless they are all of one size up to LARGEST
SMALLEST, LARGEST, MOST_SIDE = 8, 64, 512
LOWEST = 4  # pixels of the lowest level, or more, but less than twice as many
GROUPS = 8  # of every norm, and channels of an attention's head
FACTORS = (1, 2, 3, 3, 4, 4, 4, 4)  # of the width, by level
WIDTHS = range(GROUPS, 513, GROUPS)
GUIDANCE, DEFAULT_STEPS = 2.0, 50


def levels(side: int) -> int:
    """The number of a net's levels, each of half the side of the one above, the lowest of 4 to 7 pixels."""
    return max(2, (side // LOWEST).bit_length())


def fits(height: int, width: int) -> bool:
    """Whether both sides can be halved from level to level, down to two pixels or more."""
    step = 1 << (levels(max(height, width)) - 1)
    return all(side % step == 0 and side // step >= LOWEST // 2 for side in (height, width))


def sides_for(pictures: Outline, size: int | None) -> tuple[int, int]:
    """(height, width) of a new net's pictures. size: of a square, if it is given. Raises ValueError"""
    if size is not None:
        if not SMALLEST <= size <= MOST_SIDE or not fits(size, size):
            step = 1 << (levels(min(max(size, SMALLEST), MOST_SIDE)) - 1)
            raise ValueError(f"--size must be a multiple of {step} in {SMALLEST}..{MOST_SIDE}, got {size}")
        return size, size
    if pictures.sides is None:
        return SIDE, SIDE
    height, width = pictures.sides
    if fits(height, width) and (max(height, width) <= LARGEST or pictures.fixed):
        return height, width
    if not pictures.fixed:
        return SIDE, SIDE
    square = max(height, width, SMALLEST)
    square = next(each for each in range(square, 2 * square + 1) if fits(each, each))
    return square, square


def net_config(channels: int, sides: tuple[int, int], width: int | None, labels: int) -> dict[str, Any]:
    """The `config.json` of a net for such pictures. width: channels of its first level; labels: 0 for none

    Raises ValueError."""
    width = (32 if max(sides) <= LARGEST else 64) if width is None else width
    if width not in WIDTHS:
        raise ValueError(f"--width must be a multiple of {GROUPS} in {WIDTHS[0]}..{WIDTHS[-1]}, got {width}")
    count = levels(max(sides))
    down = ["DownBlock2D"] * (count - 2) + ["AttnDownBlock2D"] * 2
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": MADE_FOR,
        "act_fn": "silu",
        "attention_head_dim": GROUPS,
        "block_out_channels": [factor * width for factor in FACTORS[:count]],
        "center_input_sample": False,
        "class_embed_type": None,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": channels,
        "layers_per_block": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": GROUPS,
        "num_class_embeds": labels + 1 if labels else None,  # the last is the null label
        "out_channels": channels,
        "sample_size": sides[0] if sides[0] == sides[1] else list(sides),
        "time_embedding_type": "positional",
        "up_block_types": [block.replace("Down", "Up") for block in reversed(down)],
    }


def scheduler_config() -> dict[str, Any]:
    """The `scheduler_config.json`: the cosine schedule of Nichol & Dhariwal (2021), which suits small pictures.

    The net predicts v (Salimans & Ho 2022), so that colours come out right from the first minutes on: to get x_0 from
    eps one divides by alpha_bar_t, which is next to nothing at the first steps.
    """
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": MADE_FOR,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "variance_type": "fixed_small",
    }


def _is_sayable(name: str) -> bool:
    """Whether a request can ask for a label by this name; others are asked for by their number."""
    return 1 <= len(name) <= MAX_NAME and name.isprintable() and name != RANDOM


def labels_index(names: Sequence[str], guided: bool = True) -> dict[str, Any]:
    """What a `model_index.json` says of labels: their names, the null label, and guidance; nothing without labels.

    guided: whether the null label is learned, which guidance needs"""
    sayable = {str(label): name for label, name in enumerate(names) if _is_sayable(name)}
    said = {"id2label": sayable, "null_label": len(names)} | ({"guidance": GUIDANCE} if guided else {})
    return said if names else {}


def index(names: Sequence[str], guided: bool = True) -> dict[str, Any]:
    """The `model_index.json` of a new net, which knows these labels."""
    return {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": MADE_FOR,
        "default_steps": DEFAULT_STEPS,
        **labels_index(names, guided),
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }

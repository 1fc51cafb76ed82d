"""The flags of `ddpm convert`, which give what a checkpoint does not tell."""

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from model.sampling.schedule import BY_NAME, Prediction
from model.usage import Parser

# The layouts that can be converted, and the module of each in model.convert.layouts.
LAYOUTS = {
    "ports": "ports",
    "flat-ports": "flat_ports",
    "openai": "openai",
    "lucidrains": "lucidrains",
    "lucidrains-cfg": "lucidrains_cfg",
    "tqch": "tqch",
    "rosinality": "rosinality",
    "diffusers": "diffusers",
}
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
SUMMARY = """SRC is a file (.pt, .pth, .ckpt, .bin, .safetensors) or a directory that diffusers or accelerate saved. DIR
is written beside its final place, opened as the server would open it, and only then moved there."""


def _parser() -> Parser:
    made = Parser("ddpm convert", description=SUMMARY)
    made.add_argument("source", metavar="SRC", type=Path, help="a checkpoint, or a directory of diffusers")
    made.add_argument("target", metavar="DIR", type=Path, help="the model directory to make; must not exist yet")
    made.add_argument("--format", choices=LAYOUTS, help="its layout (default: recognised by its tensors)")
    made.add_argument(
        "--part",
        help="which of several nets in a file or directory (default: an average over training, else the largest)",
    )
    made.add_argument(
        "--config", type=Path, metavar="JSON", help="a net's config.json of diffusers, for its weights alone"
    )
    made.add_argument(
        "--scheduler", type=Path, metavar="JSON", help="a scheduler_config.json (default: the one nearby)"
    )
    usual = "(default: the layout's)"
    made.add_argument("--image-size", type=int, metavar="PIXELS", help=f"of one side {usual}")
    made.add_argument("--timesteps", type=int, metavar="T", help=f"that the net was trained with {usual}")
    made.add_argument("--schedule", choices=BY_NAME, help=f"of the noise {usual}")
    made.add_argument("--beta-start", type=float, metavar="BETA", help=f"of the schedule {usual}")
    made.add_argument("--beta-end", type=float, metavar="BETA", help=f"of the schedule {usual}")
    made.add_argument("--prediction", choices=get_args(Prediction), help=f"what the net gives {usual}")
    made.add_argument("--variance", choices=VARIANCES, help=f"of the noise that a step adds {usual}")
    yes_or_no = BooleanOptionalAction
    made.add_argument("--clip", action=yes_or_no, help=f"whether predictions are clamped to [-1, 1] {usual}")
    made.add_argument("--heads", type=int, help=f"of attention {usual}")
    made.add_argument("--head-channels", type=int, help=f"of each head of attention {usual}")
    made.add_argument("--new-attention-order", action=yes_or_no, help="OpenAI's attention after 2021 (default: no)")
    made.add_argument("--rescale-timesteps", action=yes_or_no, help=f"whether T counts as 1000 {usual}")
    return made


def parsed(arguments: Sequence[str] | None) -> Namespace:
    """The given flags. Exits with 2, in one line, if they are wrong."""
    made = _parser()
    given = made.parse_args(arguments)
    if not given.source.exists():
        made.error(f"SRC does not exist: {given.source}")
    if given.target.exists():
        made.error(f"DIR exists already: {given.target}")
    return given

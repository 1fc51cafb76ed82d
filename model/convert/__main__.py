"""`ddpm convert SRC DIR` converts a checkpoint into a model directory.

SRC is a file (.pt, .pth, .ckpt, .bin, .safetensors) or a directory that diffusers saved with pickled weights. DIR is
written beside its final place, opened as the server would open it, and only then moved there.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file

from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.load import load_model
from model.convert import directories, formats
from model.convert.protocol import Converted, Options
from model.convert.sources import read_state
from model.digests import file_digest
from model.errors import ModelRefused
from model.sampling.schedule import BY_NAME, Prediction

EXIT_FAILED, EXIT_MODEL_REFUSED = 1, 3
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    made = argparse.ArgumentParser("ddpm convert", description=(__doc__ or "").strip().split("\n\n")[1])
    made.add_argument("source", metavar="SRC", type=Path, help="a checkpoint, or a directory of diffusers")
    made.add_argument("target", metavar="DIR", type=Path, help="the model directory to make; must not exist yet")
    made.add_argument("--format", choices=formats.FORMATS, help="its layout (default: recognised by its tensors)")
    made.add_argument(
        "--part", help="which of a file's state dicts (default: an average over training, else the largest)"
    )
    usual = "(default: the layout's)"
    made.add_argument("--image-size", type=int, metavar="PIXELS", help=f"of one side {usual}")
    made.add_argument("--timesteps", type=int, metavar="T", help=f"that the net was trained with {usual}")
    made.add_argument("--schedule", choices=BY_NAME, help=f"of the noise {usual}")
    made.add_argument("--beta-start", type=float, metavar="BETA", help=f"of the schedule {usual}")
    made.add_argument("--beta-end", type=float, metavar="BETA", help=f"of the schedule {usual}")
    made.add_argument("--prediction", choices=get_args(Prediction), help=f"what the net gives {usual}")
    made.add_argument("--variance", choices=VARIANCES, help=f"of the noise that a step adds {usual}")
    yes_or_no = argparse.BooleanOptionalAction
    made.add_argument("--clip", action=yes_or_no, help=f"whether predictions are clamped to [-1, 1] {usual}")
    made.add_argument("--heads", type=int, help=f"of attention {usual}")
    made.add_argument("--head-channels", type=int, help=f"of each head of attention {usual}")
    made.add_argument("--new-attention-order", action=yes_or_no, help="OpenAI's attention after 2021 (default: no)")
    made.add_argument("--rescale-timesteps", action=yes_or_no, help=f"whether T counts as 1000 {usual}")
    return made


def _card(name: str, converted: Converted, source: Path, digest: str, part: str) -> str:
    """README.md of the model directory."""
    taken = f", part `{part}`" if part else ""
    return f"# {name}\n\n{converted.origin}.\n\nConverted from `{source.name}`{taken}, sha256 `{digest}`.\n"


def write(converted: Converted, target: Path, readme: str) -> None:
    """Writes a model directory, and moves it to its place if it can be opened. Raises ModelRefused, OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        index = {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", converted.config.get("_class_name", "UNet2DModel")],
        }
        written = {
            "config.json": converted.config,
            "scheduler_config.json": converted.scheduler,
            "model_index.json": index,
        }
        for name, values in written.items():
            (directory / name).write_text(json.dumps(values, indent=2) + "\n")
        (directory / "README.md").write_text(readme)
        save_file({k: t.contiguous() for k, t in converted.tensors.items()}, directory / WEIGHTS, {"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)  # the server may be run by another user
        load_model(read_card(directory), torch.device("cpu"), torch.float32)
        directory.rename(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts. Returns the exit code: 0 done, 1 failed, 3 model refused; a usage error exits with 2."""
    made = parser()
    given = made.parse_args(arguments)
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    source, target = given.source, given.target
    if not source.exists():
        made.error("SRC does not exist")
    if target.exists():
        made.error("DIR exists already")
    try:
        if source.is_dir():
            if given.format or given.part:
                raise ModelRefused("--format and --part must not be given: SRC is a directory of diffusers")
            converted, file = directories.convert(source, options)
            part = ""
        else:
            state, part, parts = read_state(source, given.part)
            converted, file = formats.convert(state, options, given.format), source
            if len(parts) > 1:
                print(f"{source.name} holds {', '.join(map(repr, parts))}; took {part!r}")
        write(converted, target, _card(target.name, converted, file, file_digest(file), part))
    except ModelRefused as refused:
        print(f"ddpm: {refused}", file=sys.stderr)
        return EXIT_MODEL_REFUSED
    except OSError as error:
        print(f"ddpm: {error.strerror or type(error).__name__}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{target.name}: {converted.origin}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

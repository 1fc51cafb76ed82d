"""Which of several weights in a directory are taken, by their names: for serving, fetching and converting alike.

An average over training is taken before the net itself, all digits before half of them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import ModelRefused
from model.options import read_json

AVERAGED = re.compile(r"ema|shadow|averaged?|avg|swa")
NOT_AVERAGED = re.compile(r"(non?|not|without|pre)[._-]?(ema|averaged?|avg|swa)")
SHADOW = "custom_checkpoint"  # accelerate's name for what else it was told to save: an EMAModel, mostly
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = re.compile(r"\.index(\.\w+)?\.json")  # of several files; with a variant, such as .index.fp16.json
VARIANT = re.compile(r"diffusion_pytorch_model(?:\.([\w-]+))?\.safetensors(?:\.index(?:\.([\w-]+))?\.json)?", re.ASCII)
HALVES = ("fp16", "bf16")
# What a training saves beside its nets: of the optimizer, of the learning rate, of random numbers.
NO_WEIGHTS = (
    "optimizer",
    "scheduler",
    "random_states",
    "scaler",
    "sampler",
    "dl_",
    "rng_",
    "training_args",
    "trainer_",
)
OF_NETS = ("UNet2DModel", "UNetUnconditionalModel", "UNetModel", "OpenAIUNet")


def standing(name: str) -> int:
    """0 if something of this name is an average over training, 2 if the name says that it is not one, else 1."""
    name = name.lower()
    return 0 if AVERAGED.search(NOT_AVERAGED.sub("", name)) else 2 if NOT_AVERAGED.search(name) else 1


def averaged(name: str) -> bool:
    """Whether something of this name is an average over training."""
    return standing(name) == 0


def rank(name: str, loose: bool = False) -> tuple[object, ...]:
    """Of several weights the least is taken. name: relative to the directory. loose: without a configuration beside"""
    folder, _, file = name.rpartition("/")
    best = 0 if SHADOW in file else standing(name)
    half = next((i for i, half in enumerate(HALVES, 1) if half in file), 0)
    kinds = [not INDEX.sub("", file).endswith(suffix) for suffix in SUFFIXES]
    return best, loose, folder != "unet", half, kinds, len(name), name


def served_names(names: Iterable[str]) -> list[str]:
    """Those of the names that weights of a model directory may have, relative to it, the best first."""
    return sorted(filter(_is_served, names), key=rank)


def _is_served(name: str) -> bool:
    known = VARIANT.fullmatch(name.rpartition("/")[2])
    variants = [] if known is None else [variant for variant in known.groups() if variant is not None]
    return known is not None and all(variant in HALVES or averaged(variant) for variant in variants)


@dataclass(frozen=True, slots=True)
class Candidate:
    """The weights of a net in a directory."""

    name: str  # relative to the directory
    path: Path  # of the weights, or of the index of several files
    config: Path | None  # beside it

    @property
    def rank(self) -> tuple[object, ...]:
        """The least is taken."""
        return rank(self.name, self.config is None)

    @property
    def averaged(self) -> bool:
        """Whether it is an average over training, as far as its name tells."""
        return self.rank[0] == 0


def candidates(directory: Path) -> list[Candidate]:
    """All weights in a directory and in its folders that hold nets, the best first. Raises OSError."""
    return sorted(_candidates(directory), key=lambda candidate: candidate.rank)


def _candidates(directory: Path) -> Iterator[Candidate]:
    for folder in [directory, *(each for each in sorted(directory.iterdir()) if each.is_dir())]:
        config = folder / "config.json"
        if folder != directory and not (folder.name.startswith("unet") or _is_net(config)):
            continue
        for path in folder.iterdir():
            stem, weights = path.name.lower(), path.suffix in SUFFIXES or INDEX.search(path.name)
            if not weights or not path.is_file() or stem.startswith(NO_WEIGHTS) or "-of-" in stem:
                continue
            name = path.relative_to(directory).as_posix()
            yield Candidate(name, path, config if config.is_file() else None)


def _is_net(config: Path) -> bool:
    try:
        return config.is_file() and read_json(config).get("_class_name") in OF_NETS
    except ModelRefused:
        return False


def told(taken: str, left: Iterable[str]) -> str:
    """A line that says which weights were taken, and which others were left."""
    how = " (an average over training)" if rank(taken)[0] == 0 else ""
    others = ", ".join(map(ascii, left))
    return f"weights: took {ascii(taken)}{how}{f'; left {others}' if others else ''}"

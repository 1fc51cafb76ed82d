"""Which of several weights in a directory are taken, by their names: for serving, fetching and converting alike.

An average over training is taken before the net itself, all digits before half of them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

from model.errors import ModelRefused
from model.nets.config import DIFFUSERS, OPENAI
from model.options import read_json

# Words, of which `ema` may be joined to a few others: a schema is no average.
AVERAGED = re.compile(
    r"(?<![a-z])(ema|swa)(?![a-z])|(model|net|weights|params)ema|ema(model|net|weights|params)|shadow|averaged?|avg"
)
NOT_AVERAGED = re.compile(r"(non?|not|without|pre)[._-]?(ema|averaged?|avg|swa)")
SHADOW = "custom_checkpoint"  # accelerate's name for what else it was told to save: an EMAModel, mostly
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SUFFIXES = (".safetensors", *PICKLES)
INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")  # of several files; with a variant, such as .index.fp16.json
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
MOST_FOLDERS, PEEKED_BYTES = 100, 1 << 16  # that are looked into, and of a configuration
OF_NETS = (*DIFFUSERS, OPENAI)


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
    half = next((i for i, half in enumerate(HALVES, 1) if half in name), 0)
    kind = SUFFIXES.index(PurePath(INDEX.sub("", file)).suffix)
    return best, loose, folder != "unet", half, kind, len(name), name


def served_names(names: Iterable[str]) -> list[str]:
    """Those of the names that weights of a model directory may have, relative to it, the best first."""
    return sorted(filter(is_served, names), key=rank)


def is_served(name: str) -> bool:
    """Whether weights of a model directory may have this name."""
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
    nets = [name for name, kind in classes(directory).items() if kind in OF_NETS]
    unets = [name for name in _folders(directory) if name.startswith("unet")]
    folders = ["", *sorted({*nets, *unets})]
    found = [candidate for folder in folders for candidate in _candidates(directory / folder, folder)]
    return sorted(found, key=lambda candidate: candidate.rank)


def _candidates(folder: Path, name: str) -> Iterator[Candidate]:
    config = folder / "config.json"
    beside = config if _is_meant(config) else None
    for path in folder.iterdir():
        stem, weights = path.name.lower(), PurePath(INDEX.sub("", path.name)).suffix in SUFFIXES
        if weights and not stem.startswith(NO_WEIGHTS) and "-of-" not in stem and _is_meant(path):
            yield Candidate(f"{name}/{path.name}".lstrip("/"), path, beside)


def _is_meant(path: Path) -> bool:
    """Whether there is a file, or a link to one that is missing: then nothing else is taken instead of it."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def classes(directory: Path) -> dict[str, str]:
    """{name of a folder: class that its config.json names}, of the first folders that have one. Raises OSError."""
    configs = (directory / name / "config.json" for name in _folders(directory))
    found = islice(filter(_is_there, configs), MOST_FOLDERS)
    return {config.parent.name: _class_of(config) for config in found if config.stat().st_size <= PEEKED_BYTES}


def _folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def _is_there(config: Path) -> bool:
    try:
        return config.is_file()
    except PermissionError:  # in a folder that is not for this user
        return False


def _class_of(config: Path) -> str:
    try:
        return str(read_json(config).get("_class_name"))
    except ModelRefused:
        return ""


def told(taken: str, left: Iterable[str]) -> str:
    """A line that says which weights were taken, and which others were left."""
    how = " (an average over training)" if rank(taken)[0] == 0 else ""
    others = ", ".join(map(ascii, left))
    return f"weights: took {ascii(taken)}{how}{f'; left {others}' if others else ''}"

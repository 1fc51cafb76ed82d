"""The pipeline around a net: the `model_index.json` beside it, or one folder up from it.

A net of latents, or one that needs a text, may look like a net of pictures by its own files: only its pipeline tells.
"""

import re
from collections.abc import Collection
from pathlib import Path

from model.checkpoint.foreign import CLASSES as NETS
from model.checkpoint.foreign import KINDS as OTHER_NETS
from model.checkpoint.scheduler import CLASSES as SCHEDULERS
from model.checkpoint.weighing import classes
from model.errors import ModelRefused
from model.options import Json, read_json

INDEX = "model_index.json"
# The pipelines whose net makes pictures alone, by Ho's process; in July 2022 they were called DDPM and so on.
SERVED = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "RePaintPipeline")
WHY = {
    "ScoreSdeVePipeline": "its process is another, a variance-exploding SDE",
    "KarrasVePipeline": "its process is another, a variance-exploding SDE",
    "ConsistencyModelPipeline": "its net is a consistency model",
}
# Folders of what makes pictures of a net's output, or conditions for it.
PARTS = frozenset({"vqvae", "vae", "movq", "text_encoder", "text_encoder_2", "image_encoder", "bert", "prior"})
# The parts that a served pipeline has, and their classes.
KNOWN = {"unet": NETS, "scheduler": {f"{flax}{kind}Scheduler" for kind in SCHEDULERS for flax in ("", "Flax")}}
PART = re.compile(r"unet.*|checkpoint-.*")  # a folder that is a part of what lies one folder up


def is_part(directory: Path) -> bool:
    """Whether a directory is a part of the pipeline one folder up: `unet/`, or `checkpoint-500/` of a training."""
    home = directory.resolve()  # a link may have any name
    if (home / INDEX).exists():
        return False
    if PART.fullmatch(home.name):
        return True
    try:
        return home.name in read_json(home.parent / INDEX)
    except ModelRefused:
        return False  # most often there is none


def read_index(directory: Path) -> Json:
    """The `model_index.json` of the pipeline that a directory is, or is a part of; empty if there is none.

    Raises ModelRefused unless the net makes pictures alone, as far as the index and the folders beside it tell.
    """
    home, part = directory.resolve(), is_part(directory)
    folder = home.parent if part else directory
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    own = not part or home.name == "unet"  # beside `unet_faces/` may lie other models
    require_served(index, [] if index else other_parts(folder, own))
    return index


def require_served(index: Json, folders: Collection[str] = ()) -> None:
    """Raises ModelRefused unless this pipeline's net makes pictures alone.

    folders: other parts beside `unet/`, which count where there is no index
    """
    given = index.get("_class_name")
    if isinstance(given, list):
        name = _word(str(given[-1]) if given else "")
        raise ModelRefused(f"{INDEX}: {name} is not served, for it is code of the model's authors")
    kind, others = str(given), list[str]()
    for name, entry in index.items():
        if (part := _part(entry)) is None or name[:1] == "_":
            continue
        if name not in KNOWN:
            others.append(f"{_word(name)} ({_word(part[1])})")
        elif part[0] != "diffusers" or part[1] not in KNOWN[name]:
            words = f"{_word(name)} is {_word(part[1])} of {_word(part[0])}, which is not one that is served"
            raise ModelRefused(f"{INDEX}: {words}")
    others += [] if index else sorted(folders)
    owner = "the pipeline" if given is None else _word(kind)
    if others:
        has = f"{owner} has {', '.join(others[:6])} besides unet and scheduler"
        raise ModelRefused(f"{INDEX if index else 'unet'}: {has}, so its net alone makes no pictures; it is not served")
    if given is not None and f"{kind.removesuffix('Pipeline')}Pipeline" not in SERVED:
        why = WHY.get(kind, "it is not known to make pictures with its net alone")
        raise ModelRefused(f"{INDEX}: {owner} is not served, for {why}; served are {', '.join(SERVED)}")


def _part(entry: object) -> tuple[str, str] | None:
    """(library, class) of a part of a pipeline; None for anything else in its index."""
    match entry:
        case [str(library), str(kind), *_]:
            return library, kind
        case {"_class_name": str(kind)}:
            return "diffusers", kind
    return None


def other_parts(directory: Path, by_class: bool = True) -> list[str]:
    """The folders that hold what makes pictures of a net's output, or a condition for it. Raises OSError.

    by_class: whether folders of any name are looked into
    """
    kinds = classes(directory) if by_class else {}
    named = [part for part in PARTS if (directory / part).is_dir()]
    return sorted({*named, *(name for name, kind in kinds.items() if kind in OTHER_NETS)})


def _word(text: str) -> str:
    return text if re.fullmatch(r"\w{1,60}", text, re.ASCII) else ascii(text)[:60]

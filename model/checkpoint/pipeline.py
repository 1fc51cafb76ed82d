"""The pipeline around a net: the `model_index.json` beside it, or one folder up from it.

A net of latents, or one that needs a text, may look like a net of pictures by its own files: only its pipeline tells.
"""

import re
from collections.abc import Collection
from pathlib import Path

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
    folder = directory.resolve().parent if is_part(directory) else directory
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    require_served(index, [part for part in PARTS if (folder / part).is_dir()])
    return index


def require_served(index: Json, folders: Collection[str] = ()) -> None:
    """Raises ModelRefused unless this pipeline's net makes pictures alone.

    folders: those beside `unet/`, which tell of parts where there is no index
    """
    given = index.get("_class_name")
    kind = str(given[-1] if isinstance(given, list) and given else given)  # a list: code of the model's authors
    entries = {name: entry for name, entry in index.items() if name[:1] != "_" and name not in ("unet", "scheduler")}
    pairs = [(name, each[1]) for name, each in entries.items() if isinstance(each, list) and len(each) == 2]
    others = [f"{_word(name)} ({_word(part)})" for name, part in pairs if isinstance(part, str)]
    others += [] if index else sorted(PARTS.intersection(folders))
    owner = "the pipeline" if given is None else _word(kind)
    if others:
        has = f"{owner} has {', '.join(others[:6])} besides unet and scheduler"
        raise ModelRefused(f"{INDEX if index else 'unet'}: {has}, so its net alone makes no pictures; it is not served")
    if given is not None and f"{kind.removesuffix('Pipeline')}Pipeline" not in SERVED:
        why = WHY.get(kind, "it is not known to make pictures with its net alone")
        raise ModelRefused(f"{INDEX}: {owner} is not served, for {why}; served are {', '.join(SERVED)}")


def _word(text: str) -> str:
    return text if re.fullmatch(r"\w{1,60}", text, re.ASCII) else ascii(text)[:60]

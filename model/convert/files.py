"""What a file is that is to be converted. This module needs no torch: refusing costs little."""

import zipfile
from pathlib import Path

from model.checkpoint.beginnings import HEAD_BYTES, PICKLE, ZIP, recognised
from model.errors import ModelRefused
from model.options import require_file

SAFETENSORS, TORCH = "safetensors", "torch"
TENSORFLOW_INDEX = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the end of a `.index` beside TensorFlow's `.data-…`


def kind(path: Path) -> str:
    """SAFETENSORS, or TORCH for what `torch.save` writes. Raises ModelRefused, saying what the file is instead."""
    require_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - len(TENSORFLOW_INDEX)))
        tail = file.read(len(TENSORFLOW_INDEX))
    if int.from_bytes(head[:8], "little") < size and head[8:9] == b"{":
        return SAFETENSORS
    if PICKLE.match(head):
        return TORCH
    if head.startswith(ZIP):
        foreign = _archive(path)
    elif tail == TENSORFLOW_INDEX:
        foreign = "a part of a TensorFlow checkpoint"
    else:
        foreign = recognised(head) or "of no known kind, or damaged"
    if foreign:
        raise ModelRefused(f"{path.name} is {foreign}; a checkpoint is a file of torch.save, or safetensors")
    return TORCH


def _archive(path: Path) -> str:
    """What a zip archive is that torch.save has not written; "" if it has."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged or truncated zip archive"
    inside = {name.partition("/")[2] or name for name in names}
    if any(name.startswith("code/") for name in inside):
        return "a TorchScript program: save the net's state_dict() instead"
    if "data.pkl" in inside:
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return "a model of Keras" if "model.weights.h5" in inside else "a zip archive that torch.save has not written"

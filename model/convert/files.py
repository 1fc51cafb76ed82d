"""What a file is, told by its first bytes whatever its name is. This module needs no torch: refusing costs little."""

import re
import zipfile
from pathlib import Path

from model.errors import ModelRefused
from model.options import require_file

SAFETENSORS, TORCH = "safetensors", "torch"
HEAD_BYTES = 512
BEGINNINGS = {
    b"\x89PNG\r\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a WebP picture, or sound or video",
    b"GGUF": "a GGUF file, of quantised language models",
    b"ggml": "a GGML file, of quantised language models",
    b"\x89HDF\r\n": "an HDF5 file, as Keras and TensorFlow save weights",
    b"\x93NUMPY": "a NumPy array",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x7fELF": "a program",
    b"\x08\x01\x12": "a SavedModel of TensorFlow",
}
TENSORFLOW_INDEX = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the end of a `.index` beside TensorFlow's `.data-…`
ONNX = re.compile(rb"\x08[\x02-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")  # the version of the format, then another field
MSGPACK = re.compile(rb"[\x81-\x8f\xde\xdf].{0,4}?[\xa1-\xbf\xd9]", re.DOTALL)  # a map whose first key is a string
PICKLE = re.compile(rb"\x80[\x02-\x05]")


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
    foreign = _archive(path) if head.startswith(b"PK\x03\x04") else _foreign(head, tail)
    if foreign:
        raise ModelRefused(f"{path.name} is {foreign}; a checkpoint is a file of torch.save, or safetensors")
    return TORCH


def _foreign(head: bytes, tail: bytes) -> str:
    """What a file is that torch.save has not written."""
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            return what
    text = head.lstrip().lower()
    if not text:
        return "empty" if not head else "blank"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, such as a login or an error in place of the file"
    if tail == TENSORFLOW_INDEX or not any(head):
        return "a part of a TensorFlow checkpoint" if any(head) else "nothing but zeros: an unfinished download"
    if ONNX.match(head):
        return "an ONNX model"
    if MSGPACK.match(head):
        return "a msgpack file, as Flax saves weights"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return "a text file" if text.isascii() and b"\0" not in text else "of no known kind, or damaged"


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

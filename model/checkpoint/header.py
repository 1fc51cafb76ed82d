"""The header of a safetensors file: which tensors it holds, in which order, and whether they are those of a net.

Read without torch, and checked before memory is taken for any tensor.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.checkpoint.beginnings import HEAD_BYTES, PICKLE, ZIP, recognised
from model.checkpoint.shapes import Shapes
from model.errors import ModelRefused, reason
from model.options import unique_keys

MAX_HEADER_BYTES = 1 << 20
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names, and bytes
# The names of the net's parts before diffusers 0.1, and of attention's layers before 0.17.
OLD_PLACES = {"downsample_blocks": "down_blocks", "upsample_blocks": "up_blocks", "mid": "mid_block"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file. offset: of its first byte behind the header"""

    key: str  # its name there
    dtype: str
    shape: tuple[int, ...]
    offset: int


def modern(key: str) -> str:
    """A tensor's name in today's diffusers, given its name in any version."""
    first, *rest = key.split(".")
    if "attentions" in rest[:-2] and rest[-2] in OLD_ATTENTION:
        rest[-2] = OLD_ATTENTION[rest[-2]]
    return ".".join([OLD_PLACES.get(first, first), *rest])


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of a safetensors file, by its header alone. Raises ModelRefused if it is malformed."""
    return {entry.key: (entry.dtype, entry.shape) for entry in entries_of(path)}


def entries_of(path: Path) -> list[Entry]:
    """The tensors of a safetensors file in the order of their bytes. Raises ModelRefused if it is malformed."""
    try:
        with path.open("rb") as file:
            return parse(file, path.name)[0]
    except OSError as error:
        raise ModelRefused(f"{path.name} could not be read: {reason(error)}") from error


def parse(file: BinaryIO, name: str) -> tuple[list[Entry], bytes]:
    """(the tensors in the order of their bytes, all bytes before the first). Raises ModelRefused, OSError.

    The tensors must lie back to back and fill the file to its last byte. Afterwards the file stands at the first.
    """
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        claims = f"its header claims {length} of {size} bytes"
        raise ModelRefused(f"{name} is not a safetensors file: {_kind(prefix + file.read(HEAD_BYTES - 8)) or claims}")
    text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{name} has a malformed header: {reason(error)}") from error
    if not isinstance(header, dict):
        raise ModelRefused(f"{name} has a malformed header: not an object")
    header.pop("__metadata__", None)
    entries = sorted((_entry(name, key, entry) for key, entry in header.items()), key=_span)
    _check_spans(name, map(_span, entries), size - 8 - length)
    return entries, prefix + text


def _kind(head: bytes) -> str:
    """What a file is instead, in words; "" if that is unknown."""
    if PICKLE.match(head) or head.startswith(ZIP):
        return "it is a pickle, as torch.save writes, which is never read; `ddpm convert` makes safetensors of it"
    return f"it is {what}" if (what := recognised(head)) else ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _entry(name: str, key: str, entry: object) -> Entry:
    """One tensor of a header. Raises ModelRefused."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelRefused(f"{name} has a malformed entry in its header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOATS:
        given = f"{ascii(key)[:60]} as {ascii(dtype)[:20]}"
        raise ModelRefused(f"{name} holds {given}, which is not one of {', '.join(FLOATS)}")
    sound = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not sound or len(shape) > 8 or not all(map(_is_count, [*shape, *offsets])):
        raise ModelRefused(f"{name} has a malformed shape or offset in its header")
    if offsets[1] - offsets[0] != math.prod(shape) * FLOATS[dtype]:
        raise ModelRefused(f"{name} has a tensor whose bytes do not match its shape")
    return Entry(key, dtype, tuple(shape), offsets[0])


def _span(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.offset + math.prod(entry.shape) * FLOATS[entry.dtype]


def _check_spans(name: str, spans: Iterable[tuple[int, int]], end: int) -> None:
    """Checks that the tensors cover the data exactly, without overlap or hole. Raises ModelRefused."""
    position = 0
    for start, stop in spans:
        if start != position:
            raise ModelRefused(f"{name} has tensors that overlap or leave holes")
        position = stop
    if position != end:
        raise ModelRefused(f"{name} is truncated or has data behind its tensors: {end} bytes, {position} expected")


def require_tensors(files: Iterable[tuple[str, Iterable[Entry]]], expected: Shapes, name: str) -> None:
    """Raises ModelRefused unless the files, given by name, hold exactly the tensors of a net, in any version's names.

    name: of the file or index that the refusal is about
    """
    given, total = Shapes(), 0
    for file, entries in files:
        for entry in entries:
            given[modern(entry.key)] = entry.shape
            total += 1
        if len(given) != total:
            raise ModelRefused(f"{file} holds weights twice, or under both their old and their new names")
    for key, shape in expected.items():
        if key not in given:
            prefix = next((other.removesuffix(key) for other in given if other.endswith(key)), "")
            hint = f" (its names begin with {ascii(prefix)[:60]}, which `ddpm convert` strips)" if prefix else ""
            raise ModelRefused(f"{name} lacks {key}{hint}")
        if given[key] != shape:
            raise ModelRefused(f"{name}: {key} must have shape {list(shape)}, got {list(given[key])}")
    if extra := sorted(given.keys() - expected.keys()):
        some = ascii(extra[0])[:60]
        second = any(other.endswith(f".{key}") for other in extra for key in list(expected)[:1])
        hint = " (a second net: `ddpm convert` takes one of them, the average if there is one)" if second else ""
        raise ModelRefused(
            f"{name} holds {len(extra)} tensors that config.json does not call for, such as {some}{hint}"
        )

"""Reads a checkpoint file of any kind as a state dict."""

import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.convert.files import SAFETENSORS, kind
from model.convert.pickles import unpickle
from model.errors import ModelRefused, reason

MAX_TENSORS, MAX_NAME = 20_000, 1_000  # characters of a name


def read_state(source: Path, part: str | None = None) -> tuple[dict[str, Tensor], str, list[str]]:
    """(tensors by name, the part of the file they were taken from, all its parts). Raises ModelRefused."""
    if kind(source) == SAFETENSORS:
        state = _load(source)
        if part is not None and not any(key.startswith(f"{part}.") for key in state):
            raise ModelRefused(f"--part must not be given: {source.name} holds one state dict")
        return state, "", [""]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "part.safetensors"
        taken, found = unpickle(source, target, part)
        return _load(target), taken, found


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ModelRefused(f"{path.name} could not be read: {reason(error)}") from error
    if len(state) > MAX_TENSORS or any(len(name) > MAX_NAME for name in state):
        raise ModelRefused(f"at most {MAX_TENSORS} tensors with names of at most {MAX_NAME} characters are read")
    return state

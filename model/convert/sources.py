"""Reads a checkpoint file of any kind as a state dict."""

import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.convert.pickles import unpickle
from model.errors import ModelRefused
from model.options import require_file

WRAPPED = "module."  # DataParallel's prefix of every name


def read_state(source: Path, part: str | None = None) -> tuple[dict[str, Tensor], str, list[str]]:
    """(tensors by name, the part of the file they were taken from, all its parts). Raises ModelRefused."""
    require_file(source)
    if source.suffix == ".safetensors":
        if part is not None:
            raise ModelRefused(f"--part must not be given: {source.name} holds one state dict")
        return _stripped(_load(source)), "", [""]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "part.safetensors"
        taken, found = unpickle(source, target, part)
        return _stripped(_load(target)), taken, found


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ModelRefused(f"{path.name} could not be read: {type(error).__name__}") from error


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefix of a training on several devices."""
    wrapped = all(key.startswith(WRAPPED) for key in state)
    return {key.removeprefix(WRAPPED): tensor for key, tensor in state.items()} if wrapped else state

"""Converts a checkpoint into a model directory: `ddpm convert` is `python -m model.convert`."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from server.errors import SettingsError

CONVERTER = "model.convert.__main__"


def main(arguments: Sequence[str]) -> int:
    """Runs the converter. Returns the exit code."""
    if find_spec("model.convert") is None or find_spec(CONVERTER) is None:
        raise SettingsError("this installation cannot convert checkpoints")
    code: int = import_module(CONVERTER).main(list(arguments))
    return code

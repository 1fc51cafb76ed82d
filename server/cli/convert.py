"""Turns a foreign checkpoint into a model directory."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from server.errors import SettingsError

ROOM = "model.convert.__main__"


def main(arguments: Sequence[str]) -> int:
    """What `python -m model.convert` does. Returns the exit code."""
    if find_spec("model.convert") is None or find_spec(ROOM) is None:
        raise SettingsError("this installation cannot convert checkpoints")
    code: int = import_module(ROOM).main(list(arguments))
    return code

"""How the fields of a request are read from flags, and from the text chunks of a PNG."""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any, get_type_hints

from ddpm_client import Request


def numbers(text: str) -> list[int]:
    """The integers of a list, with brackets or without. Raises ArgumentTypeError."""
    try:
        return [int(number) for number in text.strip("[]").split(",")]
    except ValueError:
        raise ArgumentTypeError("must be integers with commas, such as 900,500,100") from None


def number(text: str) -> float:
    """Raises ArgumentTypeError for NaN and infinity, which JSON lacks."""
    try:
        if isfinite(found := float(text)):
            return found
    except ValueError:
        pass
    raise ArgumentTypeError(f"must be a number, got {text}")


def label(text: str) -> str:
    """A label by its name or number: the server knows which it is."""
    return text


def labels(text: str) -> list[int | str]:
    """The labels of a list: words with commas, in brackets or without, or a list of JSON. Raises ArgumentTypeError."""
    found: list[Any] = [word.strip() for word in text.strip("[]").split(",")]
    with suppress(ValueError):
        found = json.loads(text) if text.startswith("[") else found
    if not found or not all(type(each) is int or (isinstance(each, str) and each) for each in found):
        raise ArgumentTypeError('must be labels with commas, or a JSON list such as ["salt, sea", "3"]')
    return found


METAVARS: dict[Callable[[str], Any], str] = {
    int: "N",
    number: "X",
    str: "WORD",
    numbers: "N,N,...",
    label: "LABEL",
    labels: "LABEL,...",
}
READERS: dict[Any, Callable[[str], Any]] = {int: int, float: number, str: str, int | str: label}
READERS |= {Sequence[int]: numbers, Sequence[int | str]: labels}
# How each field is read from a flag, and from a PNG, where labels are numbers whatever their names
FIELDS = {name: READERS[kind] for name, kind in get_type_hints(Request).items() if kind in READERS}
WRITTEN = FIELDS | {"label": int, "labels": numbers}

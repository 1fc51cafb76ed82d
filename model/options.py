"""Configuration files: read as a whole if small and well-formed, then option by option, each within its bounds."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from model.errors import ModelRefused, reason

Json: TypeAlias = Mapping[str, Any]
MAX_CONFIG_BYTES = 1 << 20
CHANNELS = (1, 3)  # of a picture: grey, or red, green and blue
MAX_SIDE = 2048  # pixels


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key occurs twice; an `object_pairs_hook`. Raises ValueError."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def require_file(path: Path, hint: str = "") -> None:
    """Raises ModelRefused unless this is a regular file, or a link to one, as in the hub's cache.

    Opening a pipe would block for ever, and reading a device would never end.
    """
    if not path.is_file():
        there = path.exists() or path.is_symlink()
        raise ModelRefused(f"{path.name} is not a regular file" if there else f"{path.name} is missing{hint}")


def lies_in(path: Path, directory: Path) -> bool:
    """Whether a file of a model directory lies in it, wherever its links lead; or in the hub's cache, where
    snapshots/<revision>/ consists of links to blobs/ beside it."""
    home, above = directory.resolve(), directory.resolve().parent
    blobs = [above.parent / "blobs"] if above.name == "snapshots" else []
    return any(path.resolve().is_relative_to(place) for place in (home, *blobs))


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file as a dict. Raises ModelRefused if it is missing, too large, or not a JSON object."""
    return read_config(path)[0]


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """(a configuration file as a dict, sha256 of the bytes it was read from). Raises ModelRefused as `read_json`."""
    require_file(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise ModelRefused(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(text, object_pairs_hook=unique_keys)
    except OSError as error:
        raise ModelRefused(f"{path.name} could not be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{path.name} is not valid JSON: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ModelRefused(f"{path.name} must be a JSON object")
    defaults = values.get("_use_default_values")  # options that diffusers passes over, whatever the file says of them
    if isinstance(defaults, list):
        values = {option: value for option, value in values.items() if option not in defaults}
    return values, hashlib.sha256(text).hexdigest()


def whole(value: object) -> int | None:
    """The value as an integer, which some configurations write as 32.0; None if it is not one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class Options:
    """One configuration file, read option by option. Each refusal names the file and the option."""

    def __init__(self, name: str, values: Json) -> None:
        self.name, self.values = name, values

    def refuse(self, option: str, allowed: str, why: str = "") -> ModelRefused:
        """The error to raise for an option, with the values that are allowed, the given one, and perhaps why."""
        try:
            given = json.dumps(self.values.get(option))[:60]
        except RecursionError:
            given = "a deeply nested value"
        option = option if re.fullmatch(r"\w{1,60}", option, re.ASCII) else ascii(option)[:60]  # a file may have any
        return ModelRefused(f"{self.name}: {option} must be {allowed}, got {given}{f': {why}' if why else ''}")

    def integer(self, option: str, low: int, high: int, default: int | None) -> int:
        """An integer in low..high. Raises ModelRefused, also if it is missing and has no default."""
        value = whole(self.values.get(option, default))
        if value is None or not low <= value <= high:
            raise self.refuse(option, f"an integer in {low}..{high}")
        return value

    def optional(self, option: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer in low..high, or None. Raises ModelRefused."""
        return None if self.values.get(option, default) is None else self.integer(option, low, high, default)

    def number(self, option: str, low: float, high: float, default: float | None = None) -> float:
        """A number in low..high. Raises ModelRefused."""
        value = self.values.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refuse(option, f"a number in {low}..{high}")
        return float(value)

    def boolean(self, option: str, default: bool | None = None) -> bool:
        """True or false. Raises ModelRefused."""
        value = self.values.get(option, default)
        if not isinstance(value, bool):
            raise self.refuse(option, "true or false")
        return value

    def word(self, option: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """One of the allowed values. Raises ModelRefused."""
        value = self.values.get(option, default)
        if isinstance(value, list | dict) or not any(value == a and type(value) is type(a) for a in allowed):
            raise self.refuse(option, "one of " + ", ".join(map(json.dumps, allowed)))
        return value

    def items(self, option: str, default: tuple[Any, ...] | None, most: int) -> list[Any]:
        """A list of 1..most items. Raises ModelRefused."""
        value = self.values.get(option, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
            raise self.refuse(option, f"a list of 1..{most} items")
        return list(value)


def image_size(options: Options, levels: int) -> tuple[int, int]:
    """(height, width) of a picture, which can be halved between so many levels. Raises ModelRefused."""
    size = options.values.get("sample_size")
    given = size if isinstance(size, list | tuple) else [size, size]
    step = 2 ** (levels - 1)
    sides = [s for s in map(whole, given[:3]) if s is not None and step <= s <= MAX_SIDE and s % step == 0]
    if not len(given) == len(sides) == 2:
        raise options.refuse("sample_size", f"a multiple of {step} in {step}..{MAX_SIDE}, or [height, width] of such")
    return sides[0], sides[1]


def picture_channels(options: Options, out: int | None = None) -> tuple[int, int]:
    """(channels of a picture, channels of the net's output), by default as many or `out`. Raises ModelRefused."""
    channels = options.integer("in_channels", min(CHANNELS), max(CHANNELS), 3)
    if channels not in CHANNELS:
        raise options.refuse("in_channels", " or ".join(map(str, CHANNELS)))
    out = options.integer("out_channels", 1, 2 * max(CHANNELS), channels if out is None else out)
    if out not in (channels, 2 * channels):
        raise options.refuse("out_channels", f"in_channels or twice that ({channels})")
    return channels, out

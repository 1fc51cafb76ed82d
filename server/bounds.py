"""What a field allows, in words: for whoever is refused, for `ddpm serve --help` and for docs/settings.md.

A number that was given is repeated, since there is no harm in one; nothing else is.
"""

import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.errors import Invalid

NUMBER = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?")
LONGEST = 25  # characters of a number that is repeated
WORDS = {True: "true", False: "false"}
KINDS = {str: "a string", list: "a list", dict: "an object", NoneType: "null"}


def kind_of(field: FieldInfo) -> Any:
    """What a field is if it is not null: a type, or a Literal."""
    if get_origin(field.annotation) in (Union, UnionType):
        return next(one for one in get_args(field.annotation) if one is not NoneType)
    return field.annotation


def _bounds(field: FieldInfo, *names: str) -> list[Any]:
    """The bounds of a field that go by one of these names."""
    found = [getattr(bound, name, None) for bound in field.metadata for name in names]
    return [bound for bound in found if bound is not None]


def _ends(field: FieldInfo) -> tuple[str, str]:
    """The least and the largest number of a field; nothing where there is no end."""
    largest = _bounds(field, "le") or [below - 1 for below in _bounds(field, "lt")]  # of integers alone
    return _plain(_bounds(field, "ge")), _plain(largest)


def _plain(numbers: list[Any]) -> str:
    return "".join(str(int(number)) if number == int(number) else str(number) for number in numbers)


def listed(field: FieldInfo) -> str:
    """What a setting may be, in a list of settings; nothing where its description has to say that."""
    kind, (least, largest) = kind_of(field), _ends(field)
    if kind is bool:
        return "yes or no"
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return f"{least} … {largest}".rstrip() if least or largest else ""


def says(field: FieldInfo, error: Mapping[str, Any], largest: int | None = None, text: bool = False) -> str:
    """What pydantic's `error` is, as `must …, got …`. largest: what is allowed here and now, if that is less than the
    field says. text: it was given as words, as variables and flags are."""
    kind, given = kind_of(field), error["input"]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if get_origin(kind) is Literal:
        return f"must be one of {', '.join(get_args(kind))}" + ("" if isinstance(given, str) else _got(given, text))
    if kind is bool:
        return f"must be {'yes or no' if text else 'true or false'}{_got(given, text)}"
    if kind is int or kind is float:
        outside = error["type"].startswith(("greater", "less"))
        return _number(field, kind is int, outside, largest) + _got(given, text)
    if error["type"] == "string_pattern_mismatch":
        return "is ill-formed"
    if kind is str:
        most = _bounds(field, "max_length")
        length = f" of {_plain(_bounds(field, 'min_length')) or 0} to {_plain(most)} characters" if most else ""
        got = f", got {len(given)}" if isinstance(given, str) else _got(given, text)
        return f"must be a string{length}{got}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"must be an object of {', '.join(kind.model_fields)}{_got(given, text)}"
    return f"is ill-formed: {error['msg']}"


def _number(field: FieldInfo, whole: bool, outside: bool, largest: int | None) -> str:
    least, most = _ends(field)
    most = most if largest is None else str(largest)
    if above := _plain(_bounds(field, "gt")):
        span = f"more than {above}, at most {most}"
    else:
        span = f"in {least}..{most}" if most else f"at least {least}"
    if outside:
        return f"must lie {span}" if span.startswith("in") else f"must be {span}"
    return f"must be {'an integer' if whole else 'a number'} {span}"


def _got(given: object, text: bool) -> str:
    """What was given, as far as it may be repeated: a number, or of which kind it is."""
    if isinstance(given, bool):
        return f", got {WORDS[given]}"
    if isinstance(given, int | float):
        digits = str(given)
        return f", got {digits}" if len(digits) <= LONGEST else f", got a number of {len(digits)} digits"
    if text and isinstance(given, str):
        return f", got {given}" if NUMBER.fullmatch(given) else ""
    return f", got {KINDS[type(given)]}" if type(given) in KINDS else ""


def whole_number(name: str, given: str, least: int, most: int) -> int:
    """A number that stands in a URL. Raises Invalid."""
    if given.isascii() and given.isdigit() and len(given) <= len(str(most)) and least <= int(given) <= most:
        return int(given)
    raise Invalid((name, f"{name} must be an integer in {least}..{most}{_got(given, text=True)}"))

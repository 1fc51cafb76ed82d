"""What values a field allows, in words: for refusals, for `ddpm serve --help` and for docs/settings.md.

Error messages never echo input, except numbers and the names of unknown fields.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.errors import Invalid

NAME = re.compile(r"[A-Za-z_]{1,40}")  # not a key, a path or a tag
NUMBER = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?")
WHOLE = re.compile(r"0|[1-9][0-9]{0,18}")  # the only form of an integer in a URL
MAX_DIGITS = 25  # of a number that a message repeats
KINDS = {str: "a string", list: "a list", dict: "an object", NoneType: "null"}


def kind_of(field: FieldInfo) -> Any:
    """The type of a field when it is not null: a class or a Literal."""
    if get_origin(field.annotation) in (Union, UnionType):
        return next(one for one in get_args(field.annotation) if one is not NoneType)
    return field.annotation


def _bound(field: FieldInfo, name: str) -> Any:
    """One of the bounds that a field was declared with (ge, gt, le, lt, min_length, max_length), or None."""
    return next((getattr(each, name) for each in field.metadata if hasattr(each, name)), None)


def _ends(field: FieldInfo, largest: int | None = None) -> tuple[str, str]:
    """The smallest and the largest number that a field allows; "" for no limit."""
    below = _bound(field, "lt")  # only integers have it
    most = largest if largest is not None else _bound(field, "le") if below is None else below - 1
    least, most = (int(end) if end is not None and end == int(end) else end for end in (_bound(field, "ge"), most))
    return "" if least is None else str(least), "" if most is None else str(most)


def listed(field: FieldInfo) -> str:
    """The allowed values of a setting for a table of settings; "" where its description says them."""
    kind, (least, most) = kind_of(field), _ends(field)
    if kind is bool:
        return "yes or no"
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return f"{least} … {most}".rstrip() if least or most else ""


def says(field: FieldInfo, error: Mapping[str, Any], largest: int | None = None, text: bool = False) -> str:
    """A pydantic error in our words: `must …, got …`. largest: a limit below that of the field, if there is one.
    text: the value was given as text, in a variable or a flag."""
    kind, given = kind_of(field), error["input"]
    got = _got(given, text)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "string_unicode":  # half of a surrogate pair, or bytes of a variable that are not UTF-8
        return "must be Unicode text"
    if error["type"] == "string_pattern_mismatch":
        return "is ill-formed"
    if get_origin(kind) is Literal:
        return f"must be one of {', '.join(get_args(kind))}{'' if isinstance(given, str) else got}"
    if kind is bool:
        return f"must be {'yes or no' if text else 'true or false'}{got}"
    if kind in (int, float):
        return _number(field, "an integer" if kind is int else "a number", error["type"], largest) + got
    if kind is str:
        most = _bound(field, "max_length")
        length = f" of {_bound(field, 'min_length') or 0} to {most} characters" if most is not None else ""
        return f"must be a string{length}{f', got {len(given)}' if isinstance(given, str) else got}"
    if get_origin(kind) is list:
        least, most = _bound(field, "min_length"), _bound(field, "max_length")
        most = most if largest is None else min(most, largest)
        items = "integers" if int in get_args(get_args(kind)[0]) or get_args(kind)[0] is int else "labels"
        length = f"{least}" if least == most else f"{least} to {most}"
        return f"must be a list of {length} {items}{f', got {len(given)}' if isinstance(given, list) else got}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"must be an object of {', '.join(kind.model_fields)}{got}"
    return f"is ill-formed: {error['msg']}"


def _number(field: FieldInfo, kind: str, error: str, largest: int | None) -> str:
    """`must lie in 0..9` for a number out of bounds, `must be an integer in 0..9` for anything else."""
    (least, most), above = _ends(field, largest), _bound(field, "gt")
    if above is not None:
        span = f"more than {above}, at most {most}"
    else:
        span = f"in {least}..{most}" if most else f"at least {least}"
    if not error.startswith(("greater", "less")):
        return f"must be {kind} {span}"
    return f"must lie {span}" if span.startswith("in") else f"must be {span}"


def _got(given: object, text: bool) -> str:
    """`, got …` for a number, and for anything else its type."""
    if isinstance(given, bool):
        return ", got true" if given else ", got false"
    if isinstance(given, int | float):
        digits = str(given)
        return f", got {digits}" if len(digits) <= MAX_DIGITS else f", got a number of {len(digits)} digits"
    if text and isinstance(given, str):
        return f", got {given}" if NUMBER.fullmatch(given) else ""
    return f", got {KINDS[type(given)]}" if type(given) in KINDS else ""


def unknown(kind: str, name: str, known: Collection[str], where: Sequence[str] = ()) -> tuple[str, str]:
    """(pointer without its first slash, message) of a field or a parameter that there is not. Its name is repeated if
    it has the form of one. where: the names of what holds it"""
    repeated = [name] if NAME.fullmatch(name) else []
    said = " ".join([f"unknown {kind}", *(f'"{each}"' for each in repeated)])
    allowed = f"there are {', '.join(known)}" if known else "there are none"
    return "/".join([*where, *repeated]), ": ".join([*where, f"{said}; {allowed}"])


def whole_number(name: str, given: str, least: int, most: int) -> int:
    """An integer of a URL or a header. Raises Invalid."""
    if WHOLE.fullmatch(given) and least <= int(given) <= most:
        return int(given)
    raise Invalid((name, f"{name} must be an integer in {least}..{most}{_got(given, text=True)}"))

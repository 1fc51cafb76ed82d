"""Errors of the model, as types, and the one way to ask a library that may fail. Messages name the allowed values.

ModelError
├── PlanError          such a plan cannot exist
├── ModelRefused       a model directory is not usable
└── NoSuchDevice       the requested device is not on this machine
"""

from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


class ModelError(Exception):
    """Every error that the `model` package raises on purpose."""


class PlanError(ModelError):
    """Such a plan cannot exist. `field` is the name of the request's field at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type["PlanError"], tuple[str, str]]:
        return PlanError, (self.field, str(self))


class ModelRefused(ModelError):
    """A model directory is incomplete, malformed, hostile, or of a kind that is not supported."""


class NoSuchDevice(ModelError):
    """The requested device is not on this machine."""


def reason(error: Exception) -> str:
    """Why something could not be read, for people: what the error says, in a line of at most 200 characters."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError):  # which says only the key
        said = ""
    line = next(iter(said.splitlines()), "").partition("; use sys.")[0]  # which is for programmers
    return printable(line)[:200] or type(error).__name__


def printable(text: str) -> str:
    """A text for a terminal or a log: names of files may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def attempt(call: Callable[[], R]) -> R | Exception:
    """The result of a call into an optional library, or the error that it raised.

    Triton and OpenVINO may be missing, broken, or unfit for the machine, and fail with errors of any type then. The
    caller has a substitute, so the error is an answer.
    """
    try:
        return call()
    except Exception as error:
        return error

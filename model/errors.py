"""What can go wrong in the model, as types. The message says what was given and what is allowed.

ModelError
├── PlanError          such a plan cannot exist
├── ModelRefused       a model directory is not what it must be
└── NoSuchDevice       the device asked for is not on this machine
"""


class ModelError(Exception):
    """Everything the `model` package raises on purpose."""


class PlanError(ModelError):
    """Such a plan cannot exist. `field` is the name of the request's field at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type["PlanError"], tuple[str, str]]:
        return PlanError, (self.field, str(self))


class ModelRefused(ModelError):
    """A model directory is missing something, malformed, hostile, or of a kind that is not supported."""


class NoSuchDevice(ModelError):
    """The device asked for is not on this machine."""

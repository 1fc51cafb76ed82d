"""The layouts of foreign checkpoints that can be converted. Another one is a module of its own and a line here."""

from collections.abc import Mapping

from torch import Tensor

from model.convert import lucidrains, openai, ports
from model.convert.frame import Converted, Format, Options
from model.errors import ModelRefused

FORMATS: dict[str, Format] = {
    "ports": ports,
    "openai": openai,
    "lucidrains": lucidrains,
}


def convert(state: Mapping[str, Tensor], options: Options, name: str | None = None) -> Converted:
    """The state dict as a model directory, by the format of this name, or by the one that recognises it."""
    fitting = [name] if name else [name for name, known in FORMATS.items() if known.recognises(state)]
    if len(fitting) != 1:
        some = ", ".join(map(ascii, sorted(state)[:3]))
        raise ModelRefused(f"no known layout of a DDPM has tensors named {some}; there are {', '.join(FORMATS)}")
    return FORMATS[fitting[0]].convert(state, options)

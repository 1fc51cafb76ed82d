"""The layouts of foreign checkpoints that can be converted. Another one is a module of its own and a line here."""

from collections.abc import Mapping

from torch import Tensor

from model.convert import flat_ports, ports
from model.convert.frame import Converted, Format, Options
from model.errors import ModelRefused

FORMATS: dict[str, Format] = {
    "ports": ports,
    "flat-ports": flat_ports,
}


def convert(state: Mapping[str, Tensor], options: Options, name: str | None = None) -> Converted:
    """The state dict as a model directory, by the format of this name, or by the one that recognises it."""
    fitting = [name] if name else [name for name, known in FORMATS.items() if known.recognises(state)]
    if len(fitting) != 1:
        if "down_blocks.0.resnets.0.conv1.weight" in state:
            raise ModelRefused(
                "a net of diffusers without its config.json: SRC must be the directory that it was saved in"
            )
        some = ", ".join(map(ascii, sorted(state)[:3]))
        raise ModelRefused(f"no known layout of a DDPM has tensors named {some}; there are {', '.join(FORMATS)}")
    return FORMATS[fitting[0]].convert(state, options)

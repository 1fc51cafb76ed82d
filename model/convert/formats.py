"""The formats of foreign checkpoints that can be converted. To add one, write its module and add a line here."""

from collections.abc import Mapping

from torch import Tensor

from model.convert import flat_ports, lucidrains, openai, ports
from model.convert.protocol import Converted, Format, Options, refuse_unread
from model.errors import ModelRefused

FORMATS: dict[str, Format] = {
    "ports": ports,
    "flat-ports": flat_ports,
    "openai": openai,
    "lucidrains": lucidrains,
}


def convert(state: Mapping[str, Tensor], options: Options, name: str | None = None) -> Converted:
    """Converts a state dict by the format of this name, or by the one that recognises it. Raises ModelRefused."""
    fitting = [name] if name else [name for name, known in FORMATS.items() if known.recognises(state)]
    if len(fitting) != 1:
        if "down_blocks.0.resnets.0.conv1.weight" in state:
            raise ModelRefused(
                "a net of diffusers without its config.json: SRC must be the directory that it was saved in"
            )
        some = ", ".join(map(ascii, sorted(state)[:3]))
        raise ModelRefused(f"no known layout of a DDPM has tensors named {some}; there are {', '.join(FORMATS)}")
    known = FORMATS[fitting[0]]
    refuse_unread(options, known.READS, f"the layout {fitting[0]}")
    try:
        return known.convert(state, options)
    except KeyError as error:
        raise ModelRefused(f"{ascii(error.args[0])} is missing, which such a net has") from error
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        raise ModelRefused(f"its tensors do not have the shapes of such a net: {type(error).__name__}") from error

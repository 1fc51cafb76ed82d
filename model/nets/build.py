"""The nets there are, and which of them a model directory describes."""

from typing import TypeAlias

from model.nets.config import Architecture
from model.nets.lucidrains import LucidUNet
from model.nets.lucidrains_config import LucidArchitecture
from model.nets.unet import UNet

Net: TypeAlias = UNet | LucidUNet


def build(architecture: Architecture | LucidArchitecture) -> Net:
    """The net of this shape, its weights yet to be loaded."""
    return LucidUNet(architecture) if isinstance(architecture, LucidArchitecture) else UNet(architecture)

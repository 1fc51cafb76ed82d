"""The nets there are, and which of them a model directory describes."""

from typing import TypeAlias

from model.architecture import Architecture
from model.lucid_architecture import LucidArchitecture
from model.lucid_unet import LucidUNet
from model.unet import UNet

Net: TypeAlias = UNet | LucidUNet


def build(architecture: Architecture | LucidArchitecture) -> Net:
    """The net of this shape, its weights yet to be loaded."""
    return LucidUNet(architecture) if isinstance(architecture, LucidArchitecture) else UNet(architecture)

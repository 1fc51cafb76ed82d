"""Builds a net from its architecture."""

from typing import TypeAlias

from model.nets.lucidrains import LucidrainsUNet
from model.nets.lucidrains_config import AnyArchitecture, LucidrainsArchitecture
from model.nets.unet import UNet

Net: TypeAlias = UNet | LucidrainsUNet


def build(architecture: AnyArchitecture) -> Net:
    """The net of this shape, whose weights are still to be loaded."""
    return LucidrainsUNet(architecture) if isinstance(architecture, LucidrainsArchitecture) else UNet(architecture)

"""Whether what was converted is a model: its configurations are sound, and call for exactly these tensors."""

import torch

from model.architecture import architecture
from model.card import noise_schedule
from model.convert.frame import Converted
from model.errors import ModelRefused
from model.lucid_architecture import LUCID, lucid_architecture
from model.nets import build


def fitted(converted: Converted) -> Converted:
    """The same. Raises ModelRefused, naming the first tensor that is missing, too many or of another shape."""
    noise_schedule(converted.scheduler)
    config = converted.config
    with torch.device("meta"):
        net = build(lucid_architecture(config) if config["_class_name"] == LUCID else architecture(config))
    expected = {name: list(p.shape) for name, p in net.state_dict().items()}
    for name in sorted(expected.keys() | converted.tensors.keys()):
        if name not in converted.tensors:
            raise ModelRefused(f"the file lacks what would become {name}: a variant that cannot be converted")
        if name not in expected:
            raise ModelRefused(f"{ascii(name)} has no place in the net: a variant that cannot be converted")
        if (given := list(converted.tensors[name].shape)) != expected[name]:
            raise ModelRefused(
                f"{name} must have shape {expected[name]}, got {given}: a variant that cannot be converted"
            )
    return converted

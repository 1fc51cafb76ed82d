"""The U-Net of rosinality's `denoising-diffusion-pytorch`: Ho's, or Nichol & Dhariwal's with `use_affine_time`.

It has the blocks of pytorch-ddpm in the same order under other names. Its attention divides by the root of all
channels, whatever its heads are, which is undone in the weights of the queries.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from model.convert.layouts import flat_ports
from model.convert.nets import Net
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, required, scheduler_config
from model.errors import ModelRefused
from model.options import CHANNELS

READS = OF_THE_SCHEDULER | {"image_size", "heads"}
NAMES = frozenset({"time.1.weight", "down.0.weight", "down.1.resblocks.conv1.weight", "mid.0.attention.qkv.weight"})
GROUPS = 32
RESNET = {
    "norm1": "block1.0",
    "conv1": "block1.2",
    "time.1": "temb_proj.1",
    "norm2": "block2.0",
    "conv2": "block2.3",
    "skip": "shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "out": "proj"}
ENDS = {"down.0": "head", "out.0": "tail.0", "out.2": "tail.2"}
ENDS |= {f"time.{i}": f"time_embedding.timembedding.{i}" for i in (1, 3)}
PATHS = {"down": "downblocks", "mid": "middleblocks", "up": "upblocks"}


def _renamed(layer: str) -> str:
    """A layer's name in pytorch-ddpm's layout. Raises ModelRefused if there is none."""
    found = re.fullmatch(r"(down|mid|up)\.(\d+)\.(?:resblocks\.(\S+)|attention\.(\S+)|[01])", layer)
    if layer in ENDS:
        return ENDS[layer]
    if found:
        path, number, resnet, attention = found.groups()
        place = f"{PATHS[path]}.{int(number) - (path == 'down')}"
        if not (resnet or attention):
            return f"{place}.main"
        if resnet in RESNET or attention in ATTENTION:
            return f"{place}.{RESNET[resnet] if resnet else f'attn.{ATTENTION[attention]}'}"
    raise ModelRefused(f"{ascii(layer)} is not a layer of rosinality's U-Net: a variant of it that cannot be converted")


def _separated(qkv: Tensor, heads: int) -> dict[str, Tensor]:
    """Weight or bias of queries, keys and values, which are ordered by head in the file."""
    q, k, v = (part.flatten(0, 1) for part in qkv.unflatten(0, (heads, 3, -1)).unbind(1))
    return {"q": q * heads**-0.5, "k": k, "v": v}


def _tensors(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The weights by their names in pytorch-ddpm's layout."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key == "time.0.inv_freq":
            continue
        layer, _, kind = key.rpartition(".")
        name = _renamed(layer)
        if name.endswith(".qkv"):
            stem = name.removesuffix("qkv")
            tensors |= {f"{stem}proj_{part}.{kind}": each for part, each in _separated(tensor, heads).items()}
        else:
            tensors[f"{name}.{kind}"] = tensor
    return tensors


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net as a `UNet2DModel`, with Ho's schedule unless the options say otherwise."""
    state = net.tensors
    if state["down.0.weight"].shape[1] not in CHANNELS:
        raise ModelRefused("a net that folds pixels into channels (fold > 1) cannot be converted")
    affine = "down.1.resblocks.norm2.weight" not in state  # `use_affine_time`: the timestep scales and shifts
    heads = options.heads or 1
    if any(key.endswith("qkv.bias") and len(tensor) % (3 * heads) for key, tensor in state.items()):
        raise ModelRefused("--heads must divide the channels that are attended to")
    tensors = _tensors(state, heads)
    if affine:
        for key in [key for key in tensors if key.endswith(".block2.3.bias")]:
            norm = key.removesuffix("3.bias") + "0"
            tensors |= {f"{norm}.weight": torch.ones_like(tensors[key]), f"{norm}.bias": torch.zeros_like(tensors[key])}
    size = required(options.image_size, "--image-size", "the file does not tell the size of a picture")
    config, tensors = flat_ports.as_unet(tensors, options)
    config |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": GROUPS} if affine else {}
    if heads > 1:
        config |= {"_class_name": "OpenAIUNet", "attention_heads": heads}
    origin = f"rosinality's U-Net ({heads} heads{'' if options.heads else ' assumed'}), {size} x {size}"
    return Converted(config, scheduler_config(options, "fixed_small"), tensors, origin)

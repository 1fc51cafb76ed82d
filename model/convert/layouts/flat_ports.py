"""Ho's U-Net in the layout of w86763777's `pytorch-ddpm`: one flat list of blocks on the way down, one on the way up.

Besides the names, sines and cosines of the timestep alternate, which is undone in the columns of the first dense layer,
and the norms' epsilon is 1e-5. The table of timesteps is in the file, so T is known.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from model.convert.nets import Net
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, scheduler_config
from model.errors import ModelRefused

READS = OF_THE_SCHEDULER | {"image_size"}
IMAGE_SIZE = 32  # the default of `img_size`
TABLE = "time_embedding.timembedding.0.weight"  # [T, C] of the sines and cosines themselves
FIRST_DENSE = "time_embedding.timembedding.1.weight"
NAMES = frozenset({TABLE, FIRST_DENSE, "head.weight", "tail.2.weight", "downblocks.0.block1.2.weight"})
ENDS = {
    "head": "conv_in",
    "time_embedding.timembedding.1": "time_embedding.linear_1",
    "time_embedding.timembedding.3": "time_embedding.linear_2",
    "tail.0": "conv_norm_out",
    "tail.2": "conv_out",
}
RESNET = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "time_emb_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTION = {
    "attn.group_norm": "group_norm",
    "attn.proj_q": "to_q",
    "attn.proj_k": "to_k",
    "attn.proj_v": "to_v",
    "attn.proj": "to_out.0",
}


def _places(state: Mapping[str, Tensor], path: str) -> Iterator[tuple[str, int, int | None]]:
    """(name, level, number among the level's residual blocks) of each block on this path.

    A block that resamples ends its level, and has no number.
    """
    numbers = {int(found[1]) for found in (re.match(rf"{path}\.(\d+)\.", key) for key in state) if found}
    level = i = 0
    for number in sorted(numbers):
        name = f"{path}.{number}"
        if f"{name}.main.weight" in state:
            yield name, level, None
            level, i = level + 1, 0
        else:
            yield name, level, i
            i += 1


def _layers(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in UNet2DModel of each layer that such a net can have."""
    named = dict(ENDS)
    for path, there, sampler in (("downblocks", "down_blocks", "down"), ("upblocks", "up_blocks", "up")):
        for name, level, i in _places(state, path):
            if i is None:
                named[f"{name}.main"] = f"{there}.{level}.{sampler}samplers.0.conv"
                continue
            named |= {f"{name}.{layer}": f"{there}.{level}.resnets.{i}.{ours}" for layer, ours in RESNET.items()}
            named |= {f"{name}.{layer}": f"{there}.{level}.attentions.{i}.{ours}" for layer, ours in ATTENTION.items()}
    for i in range(2):
        named |= {f"middleblocks.{i}.{layer}": f"mid_block.resnets.{i}.{ours}" for layer, ours in RESNET.items()}
    return named | {f"middleblocks.0.{layer}": f"mid_block.attentions.0.{ours}" for layer, ours in ATTENTION.items()}


def _config(state: Mapping[str, Tensor], options: Options) -> dict[str, Any]:
    widths: dict[int, int] = {}
    attended: set[int] = set()
    layers = 0
    for name, level, i in _places(state, "downblocks"):
        if i is None:
            continue
        conv = state.get(f"{name}.block1.2.weight")
        if conv is None:
            raise ModelRefused(f"{name}.block1.2.weight is missing")
        widths[level], layers = conv.shape[0], max(layers, i + 1)
        attended |= {level} if f"{name}.attn.proj.weight" in state else set()
    down = ["AttnDownBlock2D" if level in attended else "DownBlock2D" for level in sorted(widths)]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": options.image_size or IMAGE_SIZE,
        "in_channels": state["head.weight"].shape[1],
        "out_channels": state["tail.2.weight"].shape[0],
        "block_out_channels": [widths[level] for level in sorted(widths)],
        "layers_per_block": layers,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        "flip_sin_to_cos": False,
        "freq_shift": 0,
        "downsample_padding": 1,
    }


def as_unet(state: Mapping[str, Tensor], options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, weights by their names in UNet2DModel) of a net with these names. Raises ModelRefused."""
    named, tensors = _layers(state), {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if layer not in named:
            raise ModelRefused(
                f"{ascii(key)} is not a tensor of pytorch-ddpm's U-Net: a variant that cannot be converted"
            )
        dense = ".attentions." in named[layer] and tensor.ndim == 4  # a 1 x 1 convolution there
        tensors[f"{named[layer]}.{kind}"] = tensor.flatten(1) if dense else tensor
    return _config(state, options), tensors


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net as a `UNet2DModel`, with pytorch-ddpm's schedule unless the options say otherwise."""
    weights = {key: tensor for key, tensor in net.tensors.items() if key != TABLE}
    dense = weights[FIRST_DENSE]
    weights[FIRST_DENSE] = torch.cat([dense[:, 0::2], dense[:, 1::2]], dim=1)  # alternating columns: first all sines
    config, tensors = as_unet(weights, options)
    scheduler = scheduler_config(options, "fixed_large")
    if options.timesteps is None and options.scheduler is None:
        scheduler["num_train_timesteps"] = net.tensors[TABLE].shape[0]
    if options.clip is None and options.scheduler is None:
        scheduler["clip_sample"] = False  # its sampler clamps x0 only after using it
    size = config["sample_size"]
    assumed = "" if options.image_size else " assumed"
    return Converted(config, scheduler, tensors, f"Ho's U-Net in the layout of pytorch-ddpm, {size} x {size}{assumed}")

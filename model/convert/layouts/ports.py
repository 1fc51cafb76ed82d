"""Ho's U-Net in the layout of pesser (`pytorch_diffusion`), ermongroup (`ddim`) and their copies.

The same net as google/ddpm-*, under other names, with attention as 1 x 1 convolutions. Neither the picture's size nor
the noise schedule is in such a file: all of Ho's nets attend at 16 x 16 and were trained on his linear schedule.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.convert.nets import Net
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, required, scheduler_config
from model.errors import ModelRefused

READS = OF_THE_SCHEDULER | {"image_size"}
NAMES = frozenset({"temb.dense.0.weight", "mid.block_1.conv1.weight", "conv_in.weight"})
ATTENDED = 16  # pixels of a side, where all of Ho's nets attend
RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# The path of a layer in such a file and in UNet2DModel. {level} counts from the picture down, {above} from the bottom.
PLACES = {
    r"conv_in": "conv_in",
    r"conv_out": "conv_out",
    r"norm_out": "conv_norm_out",
    r"temb\.dense\.0": "time_embedding.linear_1",
    r"temb\.dense\.1": "time_embedding.linear_2",
    r"down\.(?P<level>\d+)\.block\.(?P<i>\d+)\.(?P<resnet>\w+)": "down_blocks.{level}.resnets.{i}.{resnet}",
    r"down\.(?P<level>\d+)\.attn\.(?P<i>\d+)\.(?P<attention>\w+)": "down_blocks.{level}.attentions.{i}.{attention}",
    r"down\.(?P<level>\d+)\.downsample\.conv": "down_blocks.{level}.downsamplers.0.conv",
    r"mid\.block_1\.(?P<resnet>\w+)": "mid_block.resnets.0.{resnet}",
    r"mid\.attn_1\.(?P<attention>\w+)": "mid_block.attentions.0.{attention}",
    r"mid\.block_2\.(?P<resnet>\w+)": "mid_block.resnets.1.{resnet}",
    r"up\.(?P<level>\d+)\.block\.(?P<i>\d+)\.(?P<resnet>\w+)": "up_blocks.{above}.resnets.{i}.{resnet}",
    r"up\.(?P<level>\d+)\.attn\.(?P<i>\d+)\.(?P<attention>\w+)": "up_blocks.{above}.attentions.{i}.{attention}",
    r"up\.(?P<level>\d+)\.upsample\.conv": "up_blocks.{above}.upsamplers.0.conv",
}


def _renamed(key: str, levels: int) -> str:
    """A tensor's name in UNet2DModel. Raises ModelRefused if there is none."""
    layer, _, kind = key.rpartition(".")
    for pattern, place in PLACES.items():
        found = re.fullmatch(pattern, layer)
        words = found.groupdict() if found else {}
        if found and words.get("resnet", "norm1") in RESNET and words.get("attention", "q") in ATTENTION:
            above = levels - 1 - int(words.get("level", 0))
            resnet, attention = RESNET.get(words.get("resnet", "")), ATTENTION.get(words.get("attention", ""))
            place = place.format(**words | {"above": above, "resnet": resnet, "attention": attention})
            return f"{place}.{kind}"
    raise ModelRefused(f"{ascii(key)} is not a tensor of Ho's U-Net: a variant of it that cannot be converted")


def _levels(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The levels that have a layer of this pattern."""
    return sorted({int(found[1]) for found in (re.match(pattern, key) for key in state) if found})


def _config(state: Mapping[str, Tensor], options: Options) -> dict[str, Any]:
    levels = _levels(state, r"down\.(\d+)\.block\.0\.conv1\.weight$")
    if levels != list(range(len(levels))):
        raise ModelRefused("down.0, down.1, … must be there without a gap")
    attended = _levels(state, r"down\.(\d+)\.attn\.0\.q\.weight$")
    for level in levels[:-1]:
        if f"down.{level}.downsample.conv.weight" not in state:
            raise ModelRefused("a net that resamples without convolutions (resamp_with_conv = False) is not supported")
    size = options.image_size
    if size is None and len(attended) == 1:
        size = ATTENDED << attended[0]
    blocks = {key.split(".")[3] for key in state if re.match(r"down\.0\.block\.\d+\.", key)}
    down = ["AttnDownBlock2D" if level in attended else "DownBlock2D" for level in levels]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": required(size, "--image-size", "it cannot be told from a net that does not attend at one level"),
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "block_out_channels": [state[f"down.{level}.block.0.conv1.weight"].shape[0] for level in levels],
        "layers_per_block": len(blocks),
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "act_fn": "silu",
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
    }


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net as a `UNet2DModel`, with Ho's schedule unless the options say otherwise."""
    state = net.tensors
    for key in ("conv_out.weight", "down.0.block.0.conv1.weight"):
        if key not in state:
            raise ModelRefused(f"{key} is missing")
    config = _config(state, options)
    tensors = {_renamed(key, len(config["block_out_channels"])): tensor for key, tensor in state.items()}
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.ndim == 4:  # a 1 x 1 convolution there, a dense layer here
            tensors[key] = tensor.flatten(1)
    size = config["sample_size"]
    # run_cifar.py has fixedlarge, the scripts for 256 x 256 have fixedsmall
    scheduler = scheduler_config(options, "fixed_large" if size == 32 else "fixed_small")
    return Converted(config, scheduler, tensors, f"Ho's U-Net in the layout of pesser and ermongroup, {size} x {size}")

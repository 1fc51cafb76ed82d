"""Ho's U-Net in the layout of tqch's `ddpm-torch`: that of pesser, under other names, with attention in one product."""

import re
from collections.abc import Mapping

from torch import Tensor

from model.convert.layouts import ports
from model.convert.nets import Net
from model.convert.protocol import Converted, Options
from model.errors import ModelRefused

READS = ports.READS
NAMES = frozenset({"embed.0.weight", "in_conv.weight", "middle.0.conv1.weight", "out_conv.2.weight"})
BLOCK = r"(?P<way>down|up)samples\.level_(?P<level>\d+)\.(?P<i>\d+)"
# The path of a layer in such a file, and in pesser's layout. A block with attention is a pair: 0 and 1.
PLACES = {
    r"in_conv": "conv_in",
    r"embed\.0": "temb.dense.0",
    r"embed\.2": "temb.dense.1",
    r"out_conv\.0": "norm_out",
    r"out_conv\.2": "conv_out",
    r"middle\.0\.(?P<layer>[a-z]\w*)": "mid.block_1.{layer}",
    r"middle\.1\.(?P<layer>[a-z]\w*)": "mid.attn_1.{layer}",
    r"middle\.2\.(?P<layer>[a-z]\w*)": "mid.block_2.{layer}",
    rf"{BLOCK}(\.0)?\.(?P<layer>[a-z]\w*)": "{way}.{level}.block.{i}.{layer}",
    rf"{BLOCK}\.1\.(?P<layer>norm|project_\w+)": "{way}.{level}.attn.{i}.{layer}",
    rf"{BLOCK}\.1": "{way}.{level}.{way}sample.conv",
}
LAYERS = {"fc": "temb_proj", "skip": "nin_shortcut", "project_out": "proj_out"}


def _renamed(layer: str) -> str:
    """A layer's name in pesser's layout. Raises ModelRefused if there is none."""
    for pattern, place in PLACES.items():
        if found := re.fullmatch(pattern, layer):
            words = found.groupdict()
            return place.format(**words | {"layer": LAYERS.get(words.get("layer", ""), words.get("layer", ""))})
    raise ModelRefused(f"{ascii(layer)} is not a layer of ddpm-torch's U-Net: a variant of it that cannot be converted")


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net as a `UNet2DModel`, with Ho's schedule unless the options say otherwise."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in net.tensors.items():
        layer, _, kind = key.rpartition(".")
        name = _renamed(layer)
        if name.endswith(".project_in"):
            stem = name.removesuffix("project_in")
            tensors |= {f"{stem}{part}.{kind}": each for part, each in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            tensors[f"{name}.{kind}"] = tensor
    made = ports.convert(Net(net.layout, net.prefix, tensors), options, tables)
    size = made.config["sample_size"]
    return Converted(
        made.config, made.scheduler, made.tensors, f"Ho's U-Net in the layout of ddpm-torch, {size} x {size}"
    )
